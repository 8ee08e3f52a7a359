"""One engine of vLLM in a process of its own, given its work as a file: `python vllm_engine.py JOB RESULT`.

In a process of its own, for vLLM keeps threads, process groups and memory until its process ends.
"""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 128,
    "block_size": 32,  # the CPU's attention takes multiples of it
    "seed": 0,
}


class EngineError(Exception):
    """The engine's process ended by an error; its text is what it wrote."""


def environment(**more):
    """Of a process that runs an engine; None takes a variable away."""
    found = os.environ | ENVIRONMENT | more
    return {name: value for name, value in found.items() if value is not None}


def run_engine(folder, batches, *, heads=None, default=None, engine=None, variables=None, steered=True, broken=None):
    """What an engine answers to batches of requests, each a dict of prompt_token_ids and what SamplingParams takes, and
    "adapter", the folder of a LoRA adapter.

    Returns:
        {"batches": a list of lists of answers, each a list of {"token_ids", "logprobs", "prompt_logprobs"}, one for
        each of n; "preemptions": their count; "cached": tokens of prompts that were found in the prefix cache, of each
        batch; "log": what the process wrote}.
    """
    job, result = Path(folder, "job.json"), Path(folder, "result.json")
    result.unlink(missing_ok=True)
    job.write_text(
        json.dumps(
            {
                "batches": batches,
                "heads": heads or {},
                "default": default,
                "engine": ENGINE | (engine or {}),
                "steered": steered,
                "broken": broken,
            }
        )
    )
    command = [sys.executable, __file__, str(job), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(**(variables or {})), timeout=1200)
    if done.returncode or not result.exists():
        raise EngineError(done.stdout + done.stderr)
    return json.loads(result.read_text()) | {"log": done.stdout + done.stderr}


def main(job, result):
    """In the child."""
    job = json.loads(Path(job).read_text())
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from hf_recontrol.serving.vllm_requests import steering_arguments

    arguments = {}
    if job["heads"] and job["steered"]:
        arguments = steering_arguments(job["heads"], default=job["default"])
    if job["broken"]:
        BREAK[job["broken"]]()
    llm = LLM(disable_log_stats=False, **(arguments | job["engine"]))
    answers, cached = [], [0]

    def count(name):
        return sum(metric.value for metric in llm.get_metrics() if metric.name == name)

    for batch in job["batches"]:
        prompts = [{"prompt_token_ids": request.pop("prompt_token_ids")} for request in batch]
        folders = [request.pop("adapter", None) for request in batch]
        adapters = [folder and LoRARequest("adapter", 1, folder) for folder in folders] if any(folders) else None
        params = [SamplingParams(**({"temperature": 0, "ignore_eos": True} | request)) for request in batch]
        outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=adapters)
        answers.append([answers_of(output) for output in outputs])
        cached.append(count("vllm:prefix_cache_hits"))
    found = {"batches": answers, "preemptions": count("vllm:num_preemptions")}
    found["cached"] = [after - before for before, after in pairwise(cached)]
    Path(result).write_text(json.dumps(found))


def answers_of(output):
    def plain(positions):
        return positions and [at and {token: one.logprob for token, one in at.items()} for at in positions]

    return [
        {
            "token_ids": list(one.token_ids),
            "logprobs": plain(one.logprobs),
            "prompt_logprobs": plain(output.prompt_logprobs),
        }
        for one in output.outputs
    ]


def ignore_moves():
    import dataclasses

    from hf_recontrol.serving import vllm as ours

    follow = ours.process_dict_updates
    ours.process_dict_updates = lambda rows, update, make: follow(rows, dataclasses.replace(update, moved=()), make)


def go_by_the_layer():
    from hf_recontrol.serving import vllm as ours

    ours.SteeredLogitsProcessor.forward = ours.LogitsLayer.forward


BREAK = {"moves": ignore_moves, "layer": go_by_the_layer}
"""Ways to break what is tested, to see that it is noticed."""


if __name__ == "__main__":
    main(*sys.argv[1:])
