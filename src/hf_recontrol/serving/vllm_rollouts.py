"""Rollouts by vLLM: one engine writes the answers, another reads them again and has their hidden states.

Its pooling runner returns the states behind the final norm, the LM head's input, 1e-5 from those of generating. (The
connector of vLLM that extracts hidden states has those in front of the norm.)
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..config_checks import shown
from ..control_checks import unlike_softmax
from .vllm_settings import VARIABLE

SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "max_new_tokens")


class VllmAnswers:
    """Answers and their hidden states, for collect_rollouts(…, engine=VllmAnswers(model)).

    Starts two engines, which each hold the model's weights and live until the process ends.

    Args:
        model: the model of the rollouts, by which the engines' own is read: its name and revision, and its dtype. On
            an accelerator that is the engines' it should be on the CPU.
        share: of an accelerator's memory for each engine.
        engine: more for vllm.LLM.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: the model has settings of generate() that vLLM would not follow, or heads are in the environment.
    """

    def __init__(self, model: PreTrainedModel, *, share: float = 0.42, engine: Mapping[str, Any] | None = None):
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
        common = {
            "model": model.config._name_or_path,
            "revision": getattr(model.config, "_commit_hash", None),
            "dtype": str(model.dtype).removeprefix("torch."),
            "gpu_memory_utilization": share,
            **(engine or {}),
        }
        self._dtype = model.dtype
        self.facts = {"engine": f"vllm {vllm.__version__}"}
        self._writer = vllm.LLM(**common)
        pooling = vllm.config.PoolerConfig(task="token_embed", use_activation=False)
        self._reader = vllm.LLM(**common, runner="pooling", pooler_config=pooling)

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
        if more := sorted(set(generation) - {*SAMPLING, "eos_token_id"}):
            raise ValueError(f"generation_kwargs has {more}, which vLLM is not given. Leave them out.")
        from vllm import SamplingParams

        seeds = torch.randint(2**31, (len(prompts),)).tolist()  # by the block's seed
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
        outputs = self._writer.generate(inputs, [SamplingParams(seed=s, **sampling) for s in seeds], use_tqdm=False)
        answers = [output.outputs[0] for output in outputs]
        token_ids = [list(answer.token_ids) for answer in answers]
        stopped = [len(answer.token_ids) if isinstance(answer.stop_reason, str) else None for answer in answers]
        return token_ids, self._states(prompts, token_ids), stopped

    def _states(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> list[Tensor]:
        """Of each answer's tokens the states that predict them: from the prompt's last position on."""
        texts = [{"prompt_token_ids": prompt + answer[:-1]} for prompt, answer in zip(prompts, answers, strict=True)]
        outputs = self._reader.encode(texts, pooling_task="token_embed", use_tqdm=False)
        return [
            output.outputs.data[len(prompt) - 1 :].to(self._dtype)
            for output, prompt in zip(outputs, prompts, strict=True)
        ]
