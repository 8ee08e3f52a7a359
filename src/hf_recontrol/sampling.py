"""Answers of one model to a list of prompts: the part that all methods of a comparison share."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from .answers import (
    StopStrings,
    end_of_answer,
    eos_token_ids,
    evaluating,
    left_padded,
    padding_token_id,
    prompt_token_ids,
    seeded,
)
from .control_config import ControlConfig
from .forwards import enabled, last_hidden_states, logits_of
from .head import Head
from .kl_bound import kl_divergence
from .rewards import Text

Row = dict[str, Any]


class Batch(NamedTuple):
    """What a LogitsProcessor may need to know of the prompts that are answered together."""

    prompts: list[Text]
    input_ids: Tensor
    """int64 (prompts, tokens), padded on the left."""
    attention_mask: Tensor
    """int64 (prompts, tokens)."""


Processor = Callable[[Batch], LogitsProcessor]


class _Meter(LogitsProcessor):
    """Runs a processor, and keeps KL(what it left ‖ what it was given) at each step, in nats."""

    def __init__(self, processor: LogitsProcessor):
        self.processor = processor
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        processed = self.processor(input_ids, scores.clone())
        self.steps.append(self._kl(input_ids, processed, scores).cpu())
        return processed

    def of(self, row: int, tokens: int) -> list[float]:
        """Of the tokens of one answer."""
        return [float(step[row]) for step in self.steps[:tokens]]

    def _kl(self, input_ids: Tensor, processed: Any, scores: Any) -> Tensor:
        return kl_divergence(processed, scores)


class _InstructedMeter(_Meter):
    """Where the model reads an instruction: the KL from the same model without it, which costs it a forward more."""

    def __init__(self, processor: LogitsProcessor, model: PreTrainedModel, batch: Batch, plain: tuple[Tensor, Tensor]):
        super().__init__(processor)
        self.model, self.prompt_length = model, batch.input_ids.shape[1]
        self.unread, self.mask = (tensor.to(model.device) for tensor in plain)
        self.cache: Any = None

    def _kl(self, input_ids: Tensor, processed: Any, scores: Any) -> Tensor:
        repeats = len(input_ids) // len(self.mask)
        unread, mask = (tensor.repeat_interleave(repeats, 0) for tensor in (self.unread, self.mask))
        if self.cache is not None:
            unread = input_ids[:, -1:]
        mask = torch.cat([mask, mask.new_ones(len(mask), input_ids.shape[1] - self.prompt_length)], 1)
        states, self.cache = last_hidden_states(self.model, unread, mask, cache=self.cache, use_cache=True)
        return kl_divergence(processed, logits_of(self.model, states))


@dataclass(frozen=True)
class Sampler:
    """How every method of a comparison generates: one model, one set of options, one seed.

    Batches are the same for every method, and each has a seed of its own, made from `seed` and its place.
    """

    model: PreTrainedModel
    """The base model; it is enabled for the time of a call where it is not."""
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int = 128
    """Where an answer is cut."""
    batch_size: int = 16
    """Prompts generated together."""
    seed: int = 0
    generation: dict[str, Any] = field(
        default_factory=lambda: {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    )
    """More for generate(). The default is the model's own softmax, of which the KL is measured."""
    meters: bool = True
    """Whether what a processor spends is measured, which costs time."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end an answer, as EOS does; they are among its tokens, and not in its text."""
    instruction: str = ""
    """What the model reads in front of each prompt; of a message list at the beginning of its system message. Rows and
    rewards do not see it."""

    def __call__(
        self,
        prompts: Sequence[Text],
        *,
        head: Head | None = None,
        config: ControlConfig | None = None,
        processor: Processor | None = None,
        model: PreTrainedModel | None = None,
        num_return_sequences: int = 1,
    ) -> list[list[Row]]:
        """Answer prompts.

        Args:
            prompts: texts or message lists.
            head: what steers; the model's defaults never do.
            config: how the head steers; as it says itself where None.
            processor: makes the LogitsProcessor of each batch.
            model: one that answers in place of the base model, with the same tokenizer.
            num_return_sequences: answers to each prompt.

        Returns:
            For each prompt, in order, its answers: {"prompt", "completion", "token_ids" (EOS included, no padding),
            "finish_reason": "eos", "stop", "length" where it was cut, or "empty" where it is EOS alone}; with a
            processor, unless `meters` is False, also "kl": of each token, KL(p ‖ p_base) in nats, p_base what the model
            gives without the processor and without the instruction.
        """
        rows: list[list[Row]] = []
        for start in range(0, len(prompts), self.batch_size):
            part = list(prompts[start : start + self.batch_size])
            meters: list[_Meter] = []
            answers = self.continue_ids(
                [self.prompt_token_ids(prompt) for prompt in part],
                seed=f"{self.seed}:{start}",
                model=model,
                processors=functools.partial(self._metered, part, processor, meters),
                num_return_sequences=num_return_sequences,
                recontrol_value_head=head or False,
                recontrol_config=config,
            )
            for prompt, candidates in zip(part, answers, strict=True):
                rows.append([self.row(prompt, token_ids) for token_ids in candidates])
            for meter in meters:
                for i, row in enumerate(row for of_prompt in rows[start:] for row in of_prompt):
                    row["kl"] = meter.of(i, len(row["token_ids"]))
        return rows

    def continue_ids(
        self,
        token_ids: Sequence[Sequence[int]],
        *,
        seed: str,
        model: PreTrainedModel | None = None,
        processors: Callable[[Tensor, Tensor], list[LogitsProcessor]] = lambda ids, mask: [],
        num_return_sequences: int = 1,
        **options: Any,
    ) -> list[list[list[int]]]:
        """Go on from token ids, as one batch: of each of them num_return_sequences lists, EOS included.

        Args:
            token_ids: what the model reads.
            seed: any text.
            model: the base model where None.
            processors: from input_ids and attention_mask, int64 (rows, tokens).
            options: more for generate(), beyond `generation`.
        """
        model = model or self.model
        eos = self.eos_token_ids
        pad = padding_token_id(self.tokenizer, eos)
        input_ids, attention_mask = (tensor.to(model.device) for tensor in left_padded(token_ids, pad))
        defaults = {"eos_token_id": eos or None, "max_new_tokens": self.max_new_tokens, "recontrol_value_head": False}
        rows, read = len(input_ids) * num_return_sequences, input_ids.shape[1]
        stopping = StopStrings(self.stop_strings, self.tokenizer, rows, read)
        number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big")
        with enabled(model), evaluating(model), seeded(model.device.type, number):
            sequences = model.generate(  # type: ignore[operator]
                input_ids=input_ids,
                attention_mask=attention_mask,
                pad_token_id=pad,
                num_return_sequences=num_return_sequences,
                logits_processor=LogitsProcessorList(processors(input_ids, attention_mask)),
                stopping_criteria=StoppingCriteriaList([stopping] if self.stop_strings else []),
                **(defaults | self.generation | options),
            )
        generated = sequences[:, read:].tolist()
        stopped = [ids[:length] for ids, length in zip(generated, stopping.lengths, strict=True)]
        new = [ids[: end_of_answer(ids, eos)[0]] for ids in stopped]
        return [new[i : i + num_return_sequences] for i in range(0, len(new), num_return_sequences)]

    def _metered(
        self, prompts: list[Text], processor: Processor | None, meters: list[_Meter], ids: Tensor, mask: Tensor
    ) -> list[LogitsProcessor]:
        if processor is not None:
            batch = Batch(prompts, ids, mask)
            if not self.meters:
                return [processor(batch)]
            meters.append(_Meter(processor(batch)) if not self.instruction else self._instructed(processor, batch))
        return list(meters)

    def _instructed(self, processor: Processor, batch: Batch) -> _Meter:
        ids = [prompt_token_ids(self.tokenizer, prompt) for prompt in batch.prompts]
        plain = left_padded(ids, padding_token_id(self.tokenizer, self.eos_token_ids))
        return _InstructedMeter(processor(batch), self.model, batch, plain)

    def has_stopped(self, token_ids: list[int]) -> bool:
        """Whether an answer's text holds a stop string."""
        text = str(self.tokenizer.decode(token_ids)) if self.stop_strings else ""
        return any(stop in text for stop in self.stop_strings)

    @property
    def eos_token_ids(self) -> list[int]:
        """What ends an answer."""
        return eos_token_ids(self.model, self.tokenizer, self.generation)

    def prompt_token_ids(self, prompt: Text) -> list[int]:
        """What the model reads for a prompt."""
        if not self.instruction:
            return prompt_token_ids(self.tokenizer, prompt)
        if isinstance(prompt, str):
            return prompt_token_ids(self.tokenizer, self.instruction + prompt)
        first, *others = prompt
        if first["role"] == "system":
            system = {**first, "content": f"{self.instruction}\n{first['content']}"}
            return prompt_token_ids(self.tokenizer, [system, *others])
        return prompt_token_ids(self.tokenizer, [{"role": "system", "content": self.instruction}, *prompt])

    def row(self, prompt: Text, token_ids: list[int]) -> Row:
        """{"prompt", "completion", "token_ids", "finish_reason": "eos", "stop", "length", or "empty" of EOS alone}."""
        text = str(self.tokenizer.decode(token_ids, skip_special_tokens=True))
        _, finish_reason = end_of_answer(token_ids, self.eos_token_ids)
        if ends := [text.find(stop) for stop in self.stop_strings if stop in text]:
            text, finish_reason = text[: min(ends)], "stop"
        completion = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        return {"prompt": prompt, "completion": completion, "token_ids": token_ids, "finish_reason": finish_reason}
