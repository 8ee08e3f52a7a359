"""The methods of the paper's comparison, each a name and a way to answer a list of prompts."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .answers import left_padded, padding_token_id
from .control_config import ControlConfig
from .evaluation import best_of_n, best_of_n_kl_bound
from .forwards import last_hidden_states
from .guided_decoding import ARGSLogitsProcessor, PrefixScorerLogitsProcessor
from .head import Head
from .rewards import Rewards, Text
from .rollout_settings import model_facts
from .sampling import Batch, Row, Sampler
from .value_head import ValueHead

Answers = list[list[Row]]
INSTRUCTION = "Below is an assistant's answer. It is helpful, thorough, kind and harmless.\n\n"


class Method(ABC):
    """A row of a comparison."""

    name: str
    forwards_per_token: float
    """Rows that models of the base model's or the reward model's size read for each token of an answer."""
    model: PreTrainedModel | None = None
    """What answers in place of the base model."""
    head: Head | None = None
    """What steers."""
    config: ControlConfig | None = None
    """How it steers."""
    instruction: str = ""
    """What the model reads in front of each prompt."""

    @abstractmethod
    def answer(self, sampler: Sampler, prompts: Sequence[Text], n: int = 1) -> Answers:
        """n answers to each prompt. See Sampler."""

    def kl_bound(self, tokens: int) -> float | None:
        """What the KL of an answer of so many tokens is at most, in nats, where it cannot be measured; else None."""
        return None

    def facts(self) -> dict[str, Any]:
        """What decides the answers, as plain JSON."""
        found: dict[str, Any] = {"class": type(self).__name__, "name": self.name}
        for name, value in vars(self).items():
            if isinstance(value, Head):
                value = value.digest()
            elif isinstance(value, PreTrainedModel):
                value = model_facts(value)
            elif isinstance(value, Rewards | Method):
                value = value.facts()
            elif isinstance(value, ControlConfig):
                value = asdict(value)
            found[name] = value
        return found


@dataclass
class Base(Method):
    """The model itself: what all the others are compared with."""

    name: str = "base"
    forwards_per_token: float = 1

    def answer(self, sampler: Sampler, prompts: Sequence[Text], n: int = 1) -> Answers:
        return sampler(prompts, num_return_sequences=n)


@dataclass
class Steered(Method):
    """RE-Control, a learned control, Static RE, or a placebo: whatever a head steers."""

    name: str
    head: Head | None
    config: ControlConfig | None = None
    forwards_per_token: float = 1

    def __post_init__(self) -> None:
        if not isinstance(self.head, Head):  # its answers would be plain ones
            raise TypeError(f"head is a {type(self.head).__name__}; pass a value or control head, or take Base().")

    def answer(self, sampler: Sampler, prompts: Sequence[Text], n: int = 1) -> Answers:
        return sampler(prompts, head=self.head, config=self.config, num_return_sequences=n)

    def facts(self) -> dict[str, Any]:
        """With the whole control, what the head's config says included."""
        assert self.head is not None  # see __post_init__
        whole = (self.config or ControlConfig()).over_heads([self.head.config.control])
        return super().facts() | {"config": asdict(whole)}


@dataclass
class Checkpoint(Method):
    """Another model with the same tokenizer, such as one that DPO or PPO has trained."""

    name: str
    model: PreTrainedModel | None
    forwards_per_token: float = 1

    def __post_init__(self) -> None:
        if self.model is None:  # the base model would answer
            raise TypeError("model is None; pass the model that answers, or take Base().")

    def answer(self, sampler: Sampler, prompts: Sequence[Text], n: int = 1) -> Answers:
        return sampler(prompts, model=self.model, num_return_sequences=n)


@dataclass
class ARGS(Method):
    """The reward, weighted and added to the logits of the likeliest tokens: the paper's "CD". See ARGSLogitsProcessor.

    Each candidate's whole text is read again: forwards_per_token counts the candidates, not their length.
    """

    rewards: Rewards
    weight: float = 1.0
    top_k: int = 10
    keep_others: bool = False
    name: str = "CD (ARGS)"

    @property
    def forwards_per_token(self) -> float:  # type: ignore[override]
        return 1 + self.top_k

    def answer(self, sampler: Sampler, prompts: Sequence[Text], n: int = 1) -> Answers:
        def processor(batch: Batch) -> ARGSLogitsProcessor:
            columns = batch.input_ids.shape[1]
            given = (self.rewards, sampler.tokenizer, batch.prompts, columns)
            settings: dict[str, Any] = {"top_k": self.top_k, "weight": self.weight, "keep_others": self.keep_others}
            return ARGSLogitsProcessor(*given, **settings)

        return sampler(prompts, processor=processor, num_return_sequences=n)


@dataclass
class PrefixScorer(Method):
    """Token-wise controlled decoding: the paper's "CD prefix". See PrefixScorerLogitsProcessor."""

    scorer: ValueHead
    weight: float = 1.0
    top_k: int = 10
    keep_others: bool = False
    name: str = "CD prefix"

    @property
    def forwards_per_token(self) -> float:  # type: ignore[override]
        return 2 + self.top_k

    def answer(self, sampler: Sampler, prompts: Sequence[Text], n: int = 1) -> Answers:
        def processor(batch: Batch) -> PrefixScorerLogitsProcessor:
            settings: dict[str, Any] = {"top_k": self.top_k, "weight": self.weight, "keep_others": self.keep_others}
            settings["eos_token_id"] = sampler.eos_token_ids
            return PrefixScorerLogitsProcessor(sampler.model, self.scorer, batch.attention_mask, **settings)

        return sampler(prompts, processor=processor, num_return_sequences=n)


@dataclass
class BestOfN(Method):
    """The answer of the highest reward among n of the base model. The KL is at most log n − (n − 1)/n."""

    rewards: Rewards
    size: int

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"best-of-{self.size}"

    @property
    def forwards_per_token(self) -> float:  # type: ignore[override]
        return self.size

    def kl_bound(self, tokens: int) -> float:
        return best_of_n_kl_bound(self.size)

    def answer(self, sampler: Sampler, prompts: Sequence[Text], n: int = 1) -> Answers:
        answers = sampler(prompts, num_return_sequences=n * self.size)
        rewards = rewards_of_answers(self.rewards, answers)
        chosen: Answers = [[] for _ in prompts]
        for start in range(0, n * self.size, self.size):
            best = best_of_n([row[start:] for row in rewards], self.size)
            for rows, candidates, i in zip(chosen, answers, best, strict=True):
                rows.append(candidates[start + i])
        return chosen


@dataclass
class Blockwise(Method):
    """Block-wise controlled decoding: of `size` continuations by `block` tokens the one of the highest V, repeated.

    Mudgal et al. 2024 (arXiv:2310.17022). A continuation that has ended is scored by V of the state that predicted
    EOS, as rollouts hold none after it. Each block is read again from the prompt on; forwards_per_token counts what a
    cache would leave.
    """

    scorer: ValueHead
    size: int = 4
    block: int = 16
    name: str = "CD prefix, block-wise"

    @property
    def forwards_per_token(self) -> float:  # type: ignore[override]
        return self.size

    def kl_bound(self, tokens: int) -> float:
        return math.ceil(tokens / self.block) * best_of_n_kl_bound(self.size)

    def answer(self, sampler: Sampler, prompts: Sequence[Text], n: int = 1) -> Answers:
        answers: Answers = [[] for _ in prompts]
        for i in range(n):
            for rows, row in zip(answers, self._once(sampler, prompts, i), strict=True):
                rows.append(row)
        return answers

    def _once(self, sampler: Sampler, prompts: Sequence[Text], number: int) -> list[Row]:
        eos = sampler.eos_token_ids
        beginnings = [sampler.prompt_token_ids(prompt) for prompt in prompts]
        answers: list[list[int]] = [[] for _ in prompts]
        open_ = list(range(len(prompts)))
        for step in range(math.ceil(sampler.max_new_tokens / self.block)):
            if not open_:
                break
            left = min(self.block, sampler.max_new_tokens - step * self.block)
            texts = [beginnings[i] + answers[i] for i in open_]
            seed = f"{sampler.seed}:{number}:{step}"
            found = sampler.continue_ids(texts, seed=seed, num_return_sequences=self.size, max_new_tokens=left)
            for i, candidates in zip(open_, found, strict=True):
                values = self._values(sampler, [beginnings[i] + answers[i] + new for new in candidates], eos)
                answers[i] = answers[i] + candidates[int(values.argmax())]
            ended = [i for i in open_ if not answers[i] or answers[i][-1] in eos or sampler.has_stopped(answers[i])]
            open_ = [i for i in open_ if i not in ended]
        return [sampler.row(prompt, ids) for prompt, ids in zip(prompts, answers, strict=True)]

    def _values(self, sampler: Sampler, texts: list[list[int]], eos: list[int]) -> Tensor:
        read = [text[:-1] if text[-1] in eos else text for text in texts]
        pad = padding_token_id(sampler.tokenizer, eos)
        input_ids, attention_mask = (tensor.to(sampler.model.device) for tensor in left_padded(read, pad))
        states, _ = last_hidden_states(sampler.model, input_ids, attention_mask)
        with torch.no_grad():
            values: Tensor = self.scorer(states.to(self.scorer.input_mean.device))
        return values


class Prompted(Method):
    """Another method, of a model that reads an instruction in front of each prompt.

    Rewards and metrics see the prompt alone; the KL is from the base model without the instruction.

    Args:
        method: Base() is the paper's "Prompting"; a Steered one its "RE-Control + Prompting".
        instruction: what is to be read, with what separates it from a prompt in plain text.
    """

    def __init__(self, method: Method, instruction: str = INSTRUCTION):
        self.method, self.instruction = method, instruction
        self.name = "prompting" if isinstance(method, Base) else f"{method.name} + prompting"
        self.forwards_per_token = method.forwards_per_token
        self.model, self.head, self.config = method.model, method.head, method.config

    def answer(self, sampler: Sampler, prompts: Sequence[Text], n: int = 1) -> Answers:
        return self.method.answer(replace(sampler, instruction=self.instruction), prompts, n)

    def kl_bound(self, tokens: int) -> float | None:
        bound = self.method.kl_bound(tokens)
        return None if bound is None else math.inf  # of the answers that the instructed model would have given


def rewards_of_answers(rewards: Rewards, answers: Answers) -> list[list[float | None]]:
    """The weighted sum, for each answer to each prompt."""
    flat = [row for rows in answers for row in rows]
    prompts, completions, token_ids = ([row[name] for row in flat] for name in ("prompt", "completion", "token_ids"))
    total = iter(rewards(prompts, completions, token_ids).total)
    return [[next(total) for _ in rows] for rows in answers]
