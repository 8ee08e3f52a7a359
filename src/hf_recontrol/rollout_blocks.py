"""One block of rollouts: answers generated as one batch, cut where they end, and scored."""

import hashlib
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from .answers import StopStrings, end_of_answer, eos_token_ids, left_padded, padding_token_id, prompt_token_ids
from .config_checks import shown
from .control import Controller
from .errors import CollectError
from .forwards import generate_with_hidden_states
from .reward_calls import Failures
from .rewards import Rewards, Text

logger = logging.getLogger(__name__)
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
}  # the values that mean "unset"


class Answer(NamedTuple):
    """One answer to a prompt."""

    prompt_id: int
    token_ids: list[int]
    """EOS or stop string included."""
    finish_reason: str
    hidden_states: Tensor
    """(len(token_ids), hidden_size): those that predicted each token."""


class AnswerEngine(Protocol):
    """What answers in place of the model's own generate()."""

    facts: dict[str, Any]
    """For the fingerprint: another engine's rollouts are others."""

    def check(self, generation: Mapping[str, Any]) -> None:
        """Raise ValueError unless it can follow these of generate()'s keywords. Called before anything is written."""

    def __call__(
        self, prompts: Sequence[list[int]], eos: Sequence[int], stop_strings: Sequence[str], generation: dict[str, Any]
    ) -> tuple[list[list[int]], list[Tensor], list[int | None]]:
        """As Collector._generate; draws by torch's random state."""


@dataclass(frozen=True)
class Collector:
    """Answers any block of the prompts; the same block in the same way each time, given the same random state."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rewards: Rewards
    prompts: Sequence[Text]
    columns: Mapping[str, Sequence[Any]]
    num_return_sequences: int
    drop_truncated: bool
    stop_strings: list[str]
    generation: dict[str, Any]
    controller: Controller | None = None
    engine: AnswerEngine | None = None

    @cached_property
    def failures(self) -> Failures:
        """Counts the batches that a reward function failed on. They are committed without a reward, and stay so."""
        return Failures(planned=len(self.prompts) * self.num_return_sequences)

    def fitting(self, max_prompt_tokens: int | None = None) -> tuple[list[int], str]:
        """Ids of the prompts that are answered, and a SHA-256 of the token ids of all.

        The others are too long: for max_prompt_tokens, or to leave their answer room in the model's context. One line
        of the log says how many.

        Raises:
            CollectError: a prompt has no tokens, or all are too long.
        """
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        most = math.inf if max_prompt_tokens is None else max_prompt_tokens
        fit, skipped, digest = [], [], hashlib.sha256()
        for i in range(len(self.prompts)):
            token_ids, (answer_tokens, known) = self._prompt_token_ids(i), self._answer_to(i)
            if not token_ids:
                raise CollectError(
                    f"Prompt {i}, {shown(self.prompts[i])}, has no tokens, so no state predicts its answer's first. "
                    "Leave it out, or use a tokenizer that begins texts with a special token."
                )
            if len(token_ids) <= min(most, context - answer_tokens):
                fit.append(i)
            else:
                skipped.append((len(token_ids), answer_tokens))
            digest.update(f"{token_ids}{known}\n".encode())
        if skipped:
            longest, its_answer = max(skipped, key=sum)
            message = (
                f"{len(skipped)} of {len(self.prompts)} prompts are too long, the longest has {longest} tokens: "
                f"max_prompt_tokens is {max_prompt_tokens}, and the model's context of {context} must hold the answer "
                f"too, here {its_answer} tokens"
            )
            if not fit:
                raise CollectError(f"{message}. Shorten the prompts, raise max_prompt_tokens or lower max_new_tokens.")
            logger.warning("%s. They are skipped.", message)
        return fit, digest.hexdigest()

    def collect(self, prompt_ids: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor, list[dict[str, Any]]]:
        """Answer and score a block: what RolloutStore.commit takes."""
        answers = self._answers(prompt_ids)
        rows = [self._row(answer) for answer in answers]
        rewards = self._score(rows, [answer.token_ids for answer in answers])
        dropped = {"empty", "length"} if self.drop_truncated else {"empty"}
        lengths = [0 if row["finish_reason"] in dropped else row["length"] for row in rows]
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        kept = list(zip(answers, lengths, strict=True))
        hidden_states = torch.cat([answer.hidden_states[:length] for answer, length in kept])
        token_ids = [token for answer, length in kept for token in answer.token_ids[:length]]
        return hidden_states.cpu(), offsets, rewards, torch.tensor(token_ids, dtype=torch.int64), rows

    def _prompt_token_ids(self, prompt_id: int) -> list[int]:
        return prompt_token_ids(self.tokenizer, self.prompts[prompt_id])

    def _answer_to(self, prompt_id: int) -> tuple[int, str]:
        """How many tokens the answer to a prompt has, at most, and what is known of it before the block is made."""
        return self.generation["max_new_tokens"], ""

    def _answers(self, prompt_ids: Sequence[int]) -> list[Answer]:
        prompt_ids = [i for i in prompt_ids for _ in range(self.num_return_sequences)]
        generated, hidden_states, stopped = self._generate([self._prompt_token_ids(i) for i in prompt_ids])
        eos = self._eos_token_ids()
        answers = []
        for i, ids, states, stop in zip(prompt_ids, generated, hidden_states, stopped, strict=True):
            end, finish_reason = end_of_answer(ids, eos, stop)
            answers.append(Answer(i, ids[:end], finish_reason, states[:end]))
        return answers

    def _score(self, rows: list[dict[str, Any]], completion_ids: list[list[int]]) -> Tensor:
        """Put the rewards into the rows; (answers,) in float64, NaN where there is none."""
        columns = {name: [column[row["prompt_id"]] for row in rows] for name, column in self.columns.items()}
        prompts, completions = [row["prompt"] for row in rows], [row["completion"] for row in rows]
        result = self.rewards(prompts, completions, completion_ids, columns, failures=self.failures)
        taken = sorted(result.logged.keys() & rows[0].keys())
        if taken:
            raise CollectError(
                f"A reward function logged {taken}, but the table has columns of its own so called. Rename them."
            )
        for i, row in enumerate(rows):
            row["reward"] = result.total[i]
            row["rewards"] = {name: column[i] for name, column in result.per_function.items()}
            row["errors"] = result.errors
            row |= {name: column[i] for name, column in result.logged.items()}
        return torch.tensor([math.nan if reward is None else reward for reward in result.total], dtype=torch.float64)

    def _row(self, answer: Answer) -> dict[str, Any]:
        prompt = self.prompts[answer.prompt_id]
        token_ids = [] if answer.finish_reason == "empty" else answer.token_ids
        return {
            "prompt_id": answer.prompt_id,
            "prompt": prompt,
            "prompt_token_ids": self._prompt_token_ids(answer.prompt_id),
            "completion": self._completion(answer),
            "token_ids": token_ids,
            "reward": None,
            "rewards": {},
            "errors": {},
            "finish_reason": answer.finish_reason,
            "length": len(token_ids),
            "finite": True,  # its hidden states
        }

    def _completion(self, answer: Answer) -> Text:
        text = str(self.tokenizer.decode(answer.token_ids, skip_special_tokens=True))
        if answer.finish_reason == "stop":
            text = text[: min((text.find(stop) for stop in self.stop_strings if stop in text), default=len(text))]
        plain = isinstance(self.prompts[answer.prompt_id], str)
        return text if plain else [{"role": "assistant", "content": text}]

    def _generate(self, prompts: list[list[int]]) -> tuple[list[list[int]], Iterable[Tensor], list[int | None]]:
        """The new tokens of each row, the states that predicted them, and how many there were at a stop string."""
        device, eos = self.model.device, self._eos_token_ids()
        if self.engine is not None:
            return self.engine(prompts, eos, self.stop_strings, self.generation)
        pad = padding_token_id(self.tokenizer, eos)
        input_ids, attention_mask = left_padded(prompts, pad)
        stopping = StopStrings(self.stop_strings, self.tokenizer, len(prompts), input_ids.shape[1])
        sequences, hidden_states = generate_with_hidden_states(
            self.model,
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            pad_token_id=pad,
            stopping_criteria=StoppingCriteriaList([stopping] if self.stop_strings else []),
            logits_processor=LogitsProcessorList([_Samplable()]),
            controller=self.controller,
            recontrol_value_head=False,  # whatever the model's defaults say
            **({"eos_token_id": eos or None} | self.generation),
        )
        generated: list[list[int]] = sequences[:, input_ids.shape[1] :].tolist()
        return generated, hidden_states, stopping.lengths

    def _eos_token_ids(self) -> list[int]:
        return eos_token_ids(self.model, self.tokenizer, self.generation)


class _Samplable(LogitsProcessor):
    """Lets a row be sampled whose logits are not finite, for torch would refuse all of its batch."""

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        sound = scores.amax(-1, keepdim=True).isfinite()  # −∞ is a token that was ruled out
        return torch.where(sound, scores, 0.0)
