"""Rollouts by vLLM: one engine writes the answers, another reads them again and has their hidden states.

Its pooling runner returns the states behind the final norm, the LM head's input, 1e-5 from those of generating. (The
connector of vLLM that extracts hidden states has those in front of the norm.)
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..config_checks import shown
from ..control_checks import unlike_softmax
from .vllm_settings import VARIABLE

SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "max_new_tokens")
OURS = ("model", "revision", "dtype", "runner", "pooler_config", "logits_processors", "additional_config")
SHARE = 0.42
"""Of an accelerator's memory for each engine, where the user says nothing else."""


class VllmAnswers:
    """Answers and their hidden states, for collect_rollouts(…, engine=VllmAnswers(model)).

    Starts two engines for the first block, which each hold the model's weights and live until the process ends.

    Args:
        model: the model of the rollouts, by which the engines' own is read: its name and revision, and its dtype. On
            an accelerator that is the engines' it should be on the CPU.
        engine_args: more for both, of vllm.LLM: {"tensor_parallel_size": 2}. gpu_memory_utilization, of each, is 0.42
            where not given. The others are in the rollouts' fingerprint.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: the model has settings of generate() that vLLM would not follow, heads are in the environment, or
            an engine argument is set here or does not exist.
    """

    def __init__(self, model: PreTrainedModel, *, engine_args: Mapping[str, Any] | None = None):
        try:
            import vllm
        except ImportError as error:
            raise ImportError("--engine vllm needs vLLM. Install it: pip install 'hf-recontrol[vllm]'") from error
        if VARIABLE in os.environ:
            raise ValueError(f"{VARIABLE} is set, but rollouts with vLLM are of the plain model. Unset it.")
        own = {name: value for name, value in model.generation_config.to_diff_dict().items() if name not in SAMPLING}
        if changed := unlike_softmax(own):
            raise ValueError(
                f"The model's generation config has {shown(changed)}, which vLLM would not follow. Collect without "
                "vLLM, or with these settings neutral."
            )
        more = dict(engine_args or {})
        known = {field.name for field in fields(vllm.EngineArgs)}
        if wrong := sorted(name for name in more if name in OURS or name not in known):
            raise ValueError(
                f"The engine arguments have {shown(wrong)}, which vllm.LLM does not know, or which the rollouts decide "
                f"({', '.join(OURS)}). Leave them out."
            )
        self._arguments = {
            "model": model.config._name_or_path,
            "revision": getattr(model.config, "_commit_hash", None),
            "dtype": str(model.dtype).removeprefix("torch."),
            "gpu_memory_utilization": SHARE,
            **more,
        }
        self._dtype = model.dtype
        self.facts: dict[str, Any] = {"engine": f"vllm {vllm.__version__}"}
        if decisive := {name: value for name, value in more.items() if name != "gpu_memory_utilization"}:
            self.facts["engine_args"] = decisive

    @cached_property
    def _engines(self) -> tuple[Any, Any]:
        """What writes, and what reads again. Started late: what is wrong with the rollouts is said before."""
        import vllm

        pooling = vllm.config.PoolerConfig(task="token_embed", use_activation=False)
        reader = {"runner": "pooling", "pooler_config": pooling}
        return vllm.LLM(**self._arguments), vllm.LLM(**self._arguments, **reader)

    def check(self, generation: Mapping[str, Any]) -> None:
        """Raise ValueError where generate()'s keywords are others than vLLM is given."""
        if more := sorted(set(generation) - {*SAMPLING, "eos_token_id"}):
            raise ValueError(f"generation_kwargs has {more}, which vLLM is not given. Leave them out.")

    def __call__(
        self, prompts: Sequence[list[int]], eos: Sequence[int], stop_strings: Sequence[str], generation: dict[str, Any]
    ) -> tuple[list[list[int]], list[Tensor], list[int | None]]:
        """Answer each prompt.

        Args:
            prompts: token ids.
            eos: token ids that end an answer.
            stop_strings: texts that end an answer.
            generation: of generate()'s keywords those that collect_rollouts gives.

        Returns:
            The new tokens; the states that predicted them, (tokens, hidden_size) each; and how many tokens there were
            at a stop string, None where none was met.
        """
        from vllm import SamplingParams

        seeds = torch.randint(2**31, (len(prompts),)).tolist()  # by the block's seed, before an engine sets its own
        writer, reader = self._engines
        sampling = {
            "temperature": generation["temperature"] if generation["do_sample"] else 0.0,
            "max_tokens": generation["max_new_tokens"],
            "stop_token_ids": list(eos),
            "stop": list(stop_strings),
            "ignore_eos": True,  # `eos` has it, where the rollouts are to end by it
            "skip_special_tokens": False,  # one may be a stop string
        }
        if generation["do_sample"]:
            sampling |= {"top_p": generation["top_p"], "top_k": generation["top_k"]}
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = writer.generate(inputs, [SamplingParams(seed=s, **sampling) for s in seeds], use_tqdm=False)
        answers = [output.outputs[0] for output in outputs]
        token_ids = [list(answer.token_ids) for answer in answers]
        stopped = [len(answer.token_ids) if isinstance(answer.stop_reason, str) else None for answer in answers]
        return token_ids, self._states(reader, prompts, token_ids), stopped

    def _states(self, reader: Any, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> list[Tensor]:
        """Of each answer's tokens the states that predict them: from the prompt's last position on."""
        texts = [{"prompt_token_ids": prompt + answer[:-1]} for prompt, answer in zip(prompts, answers, strict=True)]
        outputs = reader.encode(texts, pooling_task="token_embed", use_tqdm=False)
        return [
            output.outputs.data[len(prompt) - 1 :].to(self._dtype)
            for output, prompt in zip(outputs, prompts, strict=True)
        ]
