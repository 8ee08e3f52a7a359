"""What steering adds to a decoding step: generate() with a head against plain generate(), interleaved, random weights.

python tests/benchmarks/steering_overhead.py --shape 1.2B --rows 1 8
"""

import argparse
import json
import math
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_recontrol import (
    ControlHead,
    ControlHeadConfig,
    Controller,
    ValueHead,
    ValueHeadConfig,
    enable_recontrol,
)

SHAPES: dict[str, dict[str, Any]] = {
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152},
    "1.2B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
             "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip


def model_of(shape: str, device: str) -> Any:
    """A Llama of that shape in bfloat16, with tied embeddings; random weights."""
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=True, eos_token_id=None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device)
    return enable_recontrol(model.eval())


def heads_for(width: int, device: str) -> dict[str, dict[str, Any]]:
    """The keywords of each variant."""
    torch.manual_seed(0)
    heads = {
        "control head, MLP": ControlHead(ControlHeadConfig(width)),
        "control head, constant": ControlHead(ControlHeadConfig(width, num_hidden_layers=0, rank=0)),
        "value head, linear": ValueHead(ValueHeadConfig(width, num_hidden_layers=0)),
    }
    kwargs: dict[str, dict[str, Any]] = {"plain": {}}
    for name, head in heads.items():
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.01)
        kwargs[name] = {"recontrol_value_head": head.eval().to(device), "recontrol_max_kl": math.inf}
    kwargs["control head, MLP, max_kl"] = kwargs["control head, MLP"] | {"recontrol_max_kl": 0.4}
    return kwargs


def measure(
    model: Any, rows: int, tokens: int, rounds: int, variants: dict[str, dict[str, Any]]
) -> dict[str, list[float]]:
    """Process seconds per token of each variant in each round; the variants take turns."""
    inputs = torch.randint(3, 1000, (rows, 4), device=model.device)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, keywords in variants.items():
            start = time.perf_counter() if model.device.type == "cuda" else time.process_time()
            model.generate(inputs, max_new_tokens=tokens, do_sample=False, use_cache=True, **keywords)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            end = time.perf_counter() if model.device.type == "cuda" else time.process_time()
            if turn:  # the first warms up
                seconds[name].append((end - start) / tokens)
    return seconds


def edit_seconds(head: Any, rows: int, device: str) -> float:
    """Of the edit alone, the median of 200; end to end it drowns in the spread of a step's time."""
    controller, seconds = Controller(head), []
    states = torch.randn(rows, 1, head.config.hidden_size, dtype=torch.bfloat16, device=device)
    for _ in range(200):
        start = time.perf_counter()
        controller.edit(states)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="135M")
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model_of(args.shape, device)
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    machine += f", torch {torch.__version__}"
    print(f"{args.shape}, bfloat16, {machine}, {torch.get_num_threads()} threads; medians of {args.rounds} rounds")
    results = []
    for rows in args.rows:
        variants = heads_for(model.config.hidden_size, device)
        seconds = measure(model, rows, args.tokens, args.rounds, variants)
        for name, times in seconds.items():
            ratios = sorted(one / plain for one, plain in zip(times, seconds["plain"], strict=True))
            ratio, spread = statistics.median(ratios), ratios[len(ratios) * 3 // 4] - ratios[len(ratios) // 4]
            results.append({"shape": args.shape, "rows": rows, "variant": name, "ratio": ratio, "quartiles": spread})
            milliseconds = 1000 * statistics.median(times)
            print(
                f"rows {rows:3}  {name:28} {ratio:7.4f} × plain (quartiles {spread:.4f} apart), {milliseconds:.1f} ms"
            )
        step = statistics.median(seconds["plain"])
        for name, keywords in variants.items():
            if keywords and "max_kl" not in name:
                share = edit_seconds(keywords["recontrol_value_head"], rows, device) / step
                results.append({"shape": args.shape, "rows": rows, "variant": name, "edit_of_a_step": share})
                print(f"rows {rows:3}  {name:28} the edit alone: {100 * share:.2f} % of a plain step")
    if args.output:
        args.output.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        main()
