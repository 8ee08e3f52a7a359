"""What every way of sampling needs: a prompt's tokens, a padded batch, where an answer ends, a seed for the time."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from .reward_models import Text


def prompt_token_ids(tokenizer: Any, prompt: Text) -> list[int]:
    """The tokens that an answer follows; of a message list by the chat template, which begins the assistant's turn."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    begun = prompt[-1]["role"] == "assistant"  # then the answer goes on where the prompt ends
    text = tokenizer.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=not begun, continue_final_message=begun
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # the template wrote them


def eos_token_ids(model: PreTrainedModel, tokenizer: Any, generation: Mapping[str, Any]) -> list[int]:
    """What ends an answer: generate()'s keyword, else the model's generation config, else the tokenizer."""
    for found in (generation.get("eos_token_id"), model.generation_config.eos_token_id, tokenizer.eos_token_id):
        if found is not None:
            return [found] if isinstance(found, int) else list(found)
    return []


def padding_token_id(tokenizer: Any, eos: Sequence[int]) -> int:
    """Any will do, as the attention mask hides it."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return eos[0] if eos else 0


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, int64 (rows, tokens of the longest)."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    return (
        pad_sequence(ids, batch_first=True, padding_value=pad, padding_side="left"),
        pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side="left"),
    )


def end_of_answer(token_ids: list[int], eos: Sequence[int], stopped: int | None = None) -> tuple[int, str]:
    """How many of the generated tokens are the answer's, EOS and stop string included, and what ended it.

    Found by the first EOS, not by the padding: the two may be one token.
    """
    end = next((length for length, token in enumerate(token_ids, 1) if token in eos), None)
    if stopped is not None and (end is None or stopped < end):
        return stopped, "stop"
    if end is None:
        return len(token_ids), "length"
    return end, "empty" if end == 1 else "eos"


@contextmanager
def seeded(device_type: str, seed: int) -> Iterator[None]:
    """Seed torch for the time; afterwards its random state is what it was."""
    if device_type == "cpu":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators too
            yield
    else:
        devices = range(torch.get_device_module(device_type).device_count())
        with torch.random.fork_rng(devices=devices, device_type=device_type):
            torch.manual_seed(seed)
            yield


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """No dropout for the time; afterwards each module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train(False)
        yield
    finally:
        for module, training in modes:
            module.training = training


class StopStrings(StoppingCriteria):
    """Ends a row whose text holds a stop string, and keeps how many tokens it then had in `lengths`, else None."""

    def __init__(self, stop_strings: Sequence[str], tokenizer: PreTrainedTokenizerBase, rows: int, prompt_tokens: int):
        self.stop_strings, self.tokenizer, self.prompt_tokens = stop_strings, tokenizer, prompt_tokens
        self.lengths: list[int | None] = [None] * rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        for row, ids in enumerate(input_ids[:, self.prompt_tokens :].tolist()):
            if self.lengths[row] is None:
                text = self.tokenizer.decode(ids)  # with special tokens: one may be a stop string
                if any(stop in text for stop in self.stop_strings):
                    self.lengths[row] = len(ids)
        return torch.tensor([length is not None for length in self.lengths], device=input_ids.device)
