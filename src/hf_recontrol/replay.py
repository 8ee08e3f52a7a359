"""Rollouts of answers that exist: one forward over prompt and answer has the states that predict its tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .answers import evaluating
from .config_checks import shown
from .errors import CollectError, SteeringNotApplied
from .forwards import generate_with_hidden_states, hidden_states_of
from .rewards import RewardFunc, Rewards, Text
from .rollout_blocks import GREEDY, Answer, Collector

COLUMNS = ("completion", "completion_ids", "token_ids", "prompt_token_ids", "finish_reason")
OWN_SOFTMAX = "own softmax"
CHECKED_TOKENS = 4
SAME_STATES = 0.1  # float32 gives 1e-6, bfloat16 0.01, a model that looks ahead 0.5 to 1.5
FINISHED = ("eos", "length", "stop", "empty")


@dataclass(frozen=True, kw_only=True)
class Replay(Collector):
    """A Collector whose answers are given: nothing is generated, and the random state does not matter."""

    given: Mapping[str, Sequence[Any]]
    """Of COLUMNS those that there are, each with a value for each prompt."""

    def fitting(self, max_prompt_tokens: int | None = None) -> tuple[list[int], str]:
        """As a Collector's, of prompts with their answers.

        Raises:
            SteeringNotApplied: one forward of this model does not give the states of generating.
        """
        fit, digest = super().fitting(max_prompt_tokens)
        lengths = ((i, len(self._answer_ids(i)[0])) for i in fit)
        prompt_id, length = next((found for found in lengths if found[1] >= CHECKED_TOKENS), (fit[0], 1))
        with evaluating(self.model):
            self._check_states(self._prompt_token_ids(prompt_id), min(length, CHECKED_TOKENS))
        return fit, digest

    def _check_states(self, prompt: list[int], tokens: int) -> None:
        """Generate a few tokens and replay them: a model that looks ahead, say, differs."""
        input_ids = torch.tensor([prompt], device=self.model.device)
        sequences, generated = generate_with_hidden_states(
            self.model,
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=tokens,
            pad_token_id=0,
            eos_token_id=None,
            recontrol_value_head=False,
            **GREEDY,
        )
        (replayed,) = self._states([(prompt, sequences[0, len(prompt) :].tolist())])
        difference = (replayed - generated[0]).float().norm(dim=-1) / generated[0].float().norm(dim=-1)
        if not bool((difference < SAME_STATES).all()):
            raise SteeringNotApplied(
                f"One forward of {type(self.model).__name__} over a text gives other hidden states than generating it, "
                f"{difference.max():.2g} of their length apart; at most {SAME_STATES} is rounding. This architecture "
                "cannot be replayed; generate its answers instead."
            )

    def _answer_to(self, prompt_id: int) -> tuple[int, str]:
        token_ids, finish_reason = self._answer_ids(prompt_id)
        return len(token_ids), f" {token_ids} {finish_reason}"

    def _answers(self, prompt_ids: Sequence[int]) -> list[Answer]:
        found = [(i, *self._answer_ids(i)) for i in prompt_ids]
        states = self._states([(self._prompt_token_ids(i), token_ids) for i, token_ids, _ in found])
        return [Answer(*answer, hidden_states) for answer, hidden_states in zip(found, states, strict=True)]

    def _states(self, texts: Sequence[tuple[list[int], list[int]]]) -> list[Tensor]:
        """Of each prompt and answer the states that predict the answer's tokens: from the prompt's last position on."""
        # The last token predicts nothing that is asked for. Padding is on the right, whatever the tokenizer's side:
        # there no position can see it, whether or not the model knows of masks and position ids.
        rows = [torch.tensor((prompt + answer)[: len(prompt) + max(len(answer), 1) - 1]) for prompt, answer in texts]
        input_ids = pad_sequence(rows, batch_first=True)
        attention_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if "position_ids" in signature(self.model.forward).parameters:  # generate() counts from 0; Roberta would not
            inputs["position_ids"] = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
        states = hidden_states_of(self.model, **{name: tensor.to(self.model.device) for name, tensor in inputs.items()})
        begins = [len(prompt) - 1 for prompt, _ in texts]
        return [
            row[begin : begin + len(answer)].clone()  # a view would keep the states of all the prompts
            for row, begin, (_, answer) in zip(states, begins, texts, strict=True)
        ]

    def _prompt_token_ids(self, prompt_id: int) -> list[int]:
        token_ids = self._given_ids("prompt_token_ids", prompt_id)
        return super()._prompt_token_ids(prompt_id) if token_ids is None else token_ids

    def _answer_ids(self, prompt_id: int) -> tuple[list[int], str]:
        """Tokens of an answer, EOS included where it is finished, and what ended it."""
        finish_reason, eos = self._given("finish_reason", prompt_id), self._eos_token_ids()
        if finish_reason is not None and finish_reason not in FINISHED:
            raise CollectError(
                f"finish_reason of answer {prompt_id} is {shown(finish_reason)}; expected is None or one of {FINISHED}."
            )
        given = [self._given_ids(name, prompt_id) for name in ("completion_ids", "token_ids")]
        token_ids = next((ids for ids in given if ids is not None), None)
        if token_ids is not None:
            ended = "eos" if token_ids and token_ids[-1] in eos else "length"
        else:
            token_ids, ended = self._tokenised(prompt_id), "eos"
            if finish_reason in (None, "eos", "empty") and not (token_ids and token_ids[-1] in eos):
                token_ids.append(self._end(prompt_id, eos))
        alone = not token_ids or (len(token_ids) == 1 and token_ids[0] in eos)
        told = None if finish_reason == "empty" else finish_reason  # the tokens say that better
        return token_ids, "empty" if alone else told or ended

    def _end(self, prompt_id: int, eos: list[int]) -> int:
        own = self.tokenizer.eos_token_id  # of several, a chat model's tokenizer names the one that ends a turn
        if not eos:
            raise CollectError(
                f"Answer {prompt_id} is finished, but neither the model nor the tokenizer has an EOS token. "
                'Set tokenizer.eos_token, pass generation_kwargs={"eos_token_id": …}, or add a column finish_reason '
                'with "length".'
            )
        return own if own in eos else eos[0]

    def _tokenised(self, prompt_id: int) -> list[int]:
        """The completion's text on its own, as behind the prompt's tokens, so these are a prefix of the whole."""
        completion, conversational = self._given("completion", prompt_id), not isinstance(self.prompts[prompt_id], str)
        text = completion
        if conversational and isinstance(completion, list) and len(completion) == 1:
            text = completion[0].get("content") if completion[0].get("role") == "assistant" else None
        if not isinstance(text, str) or conversational == isinstance(completion, str):
            expected = '[{"role": "assistant", "content": "…"}]' if conversational else "a text"
            raise CollectError(
                f"Completion {prompt_id} is {shown(completion)}; expected is {expected}, of the prompt's kind. "
                "Or give the answers' token ids as a column completion_ids."
            )
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _completion(self, answer: Answer) -> Text:
        completion: Text | None = self._given("completion", answer.prompt_id)
        return super()._completion(answer) if completion is None else completion

    def _given(self, name: str, prompt_id: int) -> Any:
        return self.given[name][prompt_id] if name in self.given else None

    def _given_ids(self, name: str, prompt_id: int) -> list[int] | None:
        token_ids = self._given(name, prompt_id)
        size = self.model.config.get_text_config().vocab_size
        if token_ids is not None and not (
            isinstance(token_ids, list) and all(type(token) is int and 0 <= token < size for token in token_ids)
        ):
            raise CollectError(
                f"{name} of answer {prompt_id} is {shown(token_ids)}; expected is a list of integers from 0 to "
                f"{size - 1}, which are the model's tokens. Leave the column out to tokenise the texts here."
            )
        return token_ids


def given_answers(prompts: Any, sampling: str | None) -> dict[str, Any]:
    """The columns of a dataset that Replay reads."""
    if sampling not in (None, OWN_SOFTMAX):
        raise ValueError(
            f"sampling is {sampling!r}; expected is {OWN_SOFTMAX!r}, where the answers were sampled from this very "
            "model's softmax at temperature 1 with nothing that changes the logits, or None."
        )
    names = list(getattr(prompts, "column_names", ()))
    if not {"completion", "completion_ids", "token_ids"} & set(names):
        raise ValueError(
            "features_from='dataset' takes the answers from a datasets.Dataset with the columns prompt and completion, "
            f"but prompts is a {type(prompts).__name__} with the columns {names}. Make one with load_prompts(…) or "
            "datasets.Dataset.from_list([{'prompt': …, 'completion': …, 'reward': …}])."
        )
    return {name: prompts[name][:] for name in COLUMNS if name in names}


def rewards_or_given(prompts: Any, reward_funcs: RewardFunc | list[RewardFunc] | Rewards | None) -> Any:
    """The reward functions; where there are none, one that reads the dataset's column "reward"."""
    has_column = "reward" in getattr(prompts, "column_names", ())
    if (reward_funcs is not None) == has_column:
        found = "a column 'reward' and reward_funcs" if has_column else "neither a column 'reward' nor reward_funcs"
        raise ValueError(
            f"There are {found}; expected is one of the two. Pass reward_funcs=None to use the column, or "
            "dataset.remove_columns('reward') and functions to score the answers anew."
        )
    return _stored if has_column else reward_funcs


def _stored(*, reward: list[float | None], **unread: Any) -> list[float | None]:
    return reward


_stored.__name__ = "reward"  # in the table and the fingerprint
