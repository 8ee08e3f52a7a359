"""Reward functions in TRL's convention: Hub ids, sequence classifiers, and callables with keywords only."""

import asyncio
import inspect
import json
import math
import os
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerState,
)

from .config_checks import shown
from .errors import CollectError

R = TypeVar("R")
Text = str | list[dict[str, Any]]
RewardFunc = (
    str | os.PathLike[str] | PreTrainedModel | tuple[PreTrainedModel, PreTrainedTokenizerBase] | Callable[..., Any]
)
RESERVED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


@dataclass(frozen=True)
class RewardResult:
    """What the reward functions said of a batch of completions."""

    total: list[float | None]
    """Weighted sum over the functions that gave a reward; None where none did."""
    per_function: dict[str, list[float | None]]
    """Each function's own, unweighted."""
    logged: dict[str, list[Any]]
    """Columns from log_extra, and values from log_metric repeated for each completion."""


class Rewards:
    """One or several reward functions, called as TRL's GRPOTrainer calls them.

    A callable gets keywords only: prompts, completions, completion_ids (lists of token ids, without padding), every
    other column as a list, trainer_state, log_extra(column, values) and log_metric(name, value). It may be async (those
    run together, in one event loop) and returns a float or None for each completion. None leaves the completion out
    of this function's say. A model is a sequence classifier with one label, and reads prompt + completion.

    Departs from TRL where the letter would harm: plain texts get the classifier's special tokens, as its training gave
    it (message lists do not: their template has them); and the caller's models and tokenizers are left as they were.

    Args:
        reward_funcs: a Hub id or folder of a sequence classifier, such a model (its tokenizer is loaded from its
            `config._name_or_path`), a (model, tokenizer) pair, a callable, or a list of these. Ids are downloaded here.
        reward_weights: one for each function; 1 where None.
        device: where models named by id are put; None is the CPU. A model object stays where it is.
        batch_size: texts per forward of a model.

    Attributes:
        names: of the functions, each once: a callable's `__name__`, the last part of a model's id.
        weights: of the functions.

    Raises:
        ValueError: no function, a wrong number of weights, or a model that does not end in one trained score.
        TypeError: something else than the above.
    """

    def __init__(
        self,
        reward_funcs: RewardFunc | list[RewardFunc],
        reward_weights: Sequence[float] | None = None,
        *,
        device: torch.device | str | None = None,
        batch_size: int = 64,
    ):
        functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        self.weights = (
            [1.0] * len(functions) if reward_weights is None else [float(weight) for weight in reward_weights]
        )
        if not functions or len(self.weights) != len(functions) or not all(map(math.isfinite, self.weights)):
            raise ValueError(
                f"There are {len(functions)} reward functions and the weights {reward_weights}; expected are one "
                "function or more, and as many finite weights. Leave reward_weights out to weigh all by 1."
            )
        self._functions = [_as_function(function, device, batch_size) for function in functions]
        self.names = _unique([_name(function) for function in self._functions])
        self._runner = asyncio.Runner()  # one loop for all calls: clients that a function keeps open are bound to it
        weakref.finalize(self, _outside_loops, self._runner.close)

    def check(self, *, conversational: bool) -> None:
        """Raise ValueError if a model cannot read such prompts. For the door, before anything is generated."""
        for name, function in zip(self.names, self._functions, strict=True):
            if conversational and isinstance(function, _Classifier) and function.tokenizer.chat_template is None:
                raise ValueError(
                    f"The prompts are message lists, but the tokenizer of the reward model {name!r} has no chat "
                    "template. Set one, or give plain texts as prompts."
                )

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[list[int]],
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> RewardResult:
        """Score completions.

        Args:
            prompts: texts or message lists, one for each completion.
            completions: texts, or [{"role": "assistant", "content": text}].
            completion_ids: token ids of each, without padding.
            columns: further columns for the callables, each as long.

        Raises:
            CollectError: a function returned something else than one finite number or None for each completion.
        """
        logged: dict[str, list[Any]] = {}
        reserved = {"prompts": list(prompts), "completions": list(completions), "completion_ids": list(completion_ids)}
        arguments = {name: list(column) for name, column in (columns or {}).items()} | reserved
        calls: dict[str, Callable[[], Any]] = {}
        for name, function in zip(self.names, self._functions, strict=True):
            log_extra = partial(_log_extra, logged, len(prompts), name)
            log_metric = partial(_log_metric, logged, len(prompts), name)
            own = {"trainer_state": TrainerState(), "log_extra": log_extra, "log_metric": log_metric}
            calls[name] = partial(function, **arguments, **own)
        results = {name: call() for name, call in calls.items() if not _is_async(call.func)}  # type: ignore[attr-defined]
        results |= self._gather({name: call for name, call in calls.items() if name not in results})
        checked = {name: _checked(name, results[name], len(prompts)) for name in self.names}
        return RewardResult(self._weigh(checked, len(prompts)), checked, logged)

    def _weigh(self, rewards: Mapping[str, list[float | None]], count: int) -> list[float | None]:
        total: list[float | None] = [None] * count
        for weight, column in zip(self.weights, rewards.values(), strict=True):
            for i, reward in enumerate(column):
                if reward is not None:
                    total[i] = (total[i] or 0.0) + weight * reward
        return total

    def _gather(self, waiting: Mapping[str, Callable[[], Awaitable[Any]]]) -> dict[str, Any]:
        async def gather() -> list[Any]:
            return await asyncio.gather(*(call() for call in waiting.values()))

        if not waiting:
            return {}
        return dict(zip(waiting, _outside_loops(lambda: self._runner.run(gather())), strict=True))


def _outside_loops(function: Callable[[], R]) -> R:
    """function(), in a thread of its own where an event loop runs in this one already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return function()
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


class _Classifier:
    """A sequence classifier as a callable: one score for each prompt + completion."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int):
        if getattr(model.config, "num_labels", None) != 1:
            raise ValueError(
                f"The reward model {_model_name(model)!r} has {getattr(model.config, 'num_labels', 'no')} labels; a "
                "reward is one score. Load it with AutoModelForSequenceClassification.from_pretrained(…, "
                "num_labels=1), or wrap it in a function that returns one float for each completion."
            )
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.pad_token_id = 0 if pad is None else pad

    def __call__(self, *, prompts: Sequence[Text], completions: Sequence[Text], **unread: object) -> list[float]:
        rows = [self._token_ids(*pair) for pair in zip(prompts, completions, strict=True)]
        modes = [(module, module.training) for module in self.model.modules()]
        config_pad = self.model.config.pad_token_id
        try:
            self.model.train(False)
            self.model.config.pad_token_id = self.pad_token_id  # the model finds a row's last token by it
            scores = []
            for start in range(0, len(rows), self.batch_size):
                scores += self._scores(rows[start : start + self.batch_size])
            return scores
        finally:
            self.model.config.pad_token_id = config_pad
            for module, training in modes:
                module.training = training

    @torch.no_grad()
    def _scores(self, rows: list[list[int]]) -> list[float]:
        tokens = [torch.tensor(row, dtype=torch.long) for row in rows]
        mask = pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True)
        input_ids = pad_sequence(tokens, batch_first=True, padding_value=self.pad_token_id)
        device = self.model.device
        logits = self.model(input_ids=input_ids.to(device), attention_mask=mask.to(device)).logits
        scores: list[float] = logits[:, 0].float().tolist()
        return scores

    def _token_ids(self, prompt: Text, completion: Text) -> list[int]:
        if isinstance(prompt, str):
            token_ids: list[int] = self.tokenizer(prompt + str(completion))["input_ids"]
        else:
            text = self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
            token_ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]  # the template wrote them
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and len(token_ids) > longest:
            raise CollectError(
                f"A prompt with its completion has {len(token_ids)} tokens, but the reward model "
                f"{_model_name(self.model)!r} reads {longest}. Shorten the prompts or lower max_new_tokens."
            )
        return token_ids


def _as_function(function: object, device: torch.device | str | None, batch_size: int) -> Callable[..., Any]:
    if isinstance(function, (str, os.PathLike)):
        name = os.fspath(function)
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=1, output_loading_info=True
        )
        if loading["missing_keys"]:
            raise ValueError(
                f"{name!r} is not a reward model: it has no weights for {shown(sorted(loading['missing_keys']))}, and "
                "random ones would give random rewards. Give a trained sequence classifier with one label."
            )
        return _Classifier(model.to(device or "cpu"), AutoTokenizer.from_pretrained(name), batch_size)
    if isinstance(function, tuple) and len(function) == 2 and isinstance(function[0], PreTrainedModel):
        return _Classifier(function[0], function[1], batch_size)
    if isinstance(function, PreTrainedModel):
        if not function.config._name_or_path:
            raise ValueError(
                "The reward model's config says not where it came from, so its tokenizer cannot be loaded. Give the "
                "pair (model, tokenizer)."
            )
        return _Classifier(function, AutoTokenizer.from_pretrained(function.config._name_or_path), batch_size)
    if callable(function):
        return function
    raise TypeError(
        f"A reward function is {shown(function)}; expected is a Hub id, a folder, a sequence classifier, a pair "
        "(model, tokenizer), a callable, or a list of these."
    )


def _name(function: Callable[..., Any]) -> str:
    if isinstance(function, _Classifier):
        return _model_name(function.model)
    name: str = getattr(function, "__name__", type(function).__name__)
    return name


def _model_name(model: PreTrainedModel) -> str:
    return model.config._name_or_path.rstrip("/").split("/")[-1] or type(model).__name__


def _unique(names: list[str]) -> list[str]:
    """The names, the second of a kind with _2 behind it, and so on: two lambdas have one name."""
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return unique


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def _checked(name: str, rewards: object, count: int) -> list[float | None]:
    if not isinstance(rewards, (list, tuple)):
        hint = "call .tolist() on it" if hasattr(rewards, "tolist") else "return a list"
        raise CollectError(
            f"The reward function {name!r} returned a {type(rewards).__name__}; expected is a list of {count} floats "
            f"or None, one for each completion: {hint}."
        )
    if len(rewards) != count:
        raise CollectError(
            f"The reward function {name!r} returned {len(rewards)} rewards for {count} completions; expected is one "
            "float or None for each."
        )
    for i, reward in enumerate(rewards):
        number = isinstance(reward, Real) and not isinstance(reward, bool) and _is_finite(reward)
        if reward is not None and not number:
            raise CollectError(
                f"The reward function {name!r} returned {shown(reward)} ({type(reward).__name__}) for completion {i}; "
                "expected is a finite number, or None to leave the completion out."
            )
    return [None if reward is None else float(reward) for reward in rewards]


def _is_finite(number: Real) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer beyond float
        return False


def _log_extra(logged: dict[str, list[Any]], count: int, name: str, column: str, values: Sequence[Any]) -> None:
    values = list(values)
    if len(values) != count:
        raise CollectError(
            f"The reward function {name!r} logged {len(values)} values as {column!r} for {count} completions; "
            "expected is one for each."
        )
    logged[column] = [_plain(name, column, value) for value in values]


def _log_metric(logged: dict[str, list[Any]], count: int, name: str, metric: str, value: float) -> None:
    logged[metric] = [_plain(name, metric, value)] * count


def _plain(name: str, column: str, value: Any) -> Any:
    """The value as JSON has it: numpy's and torch's scalars as Python's, NaN and infinities as None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CollectError(
            f"The reward function {name!r} logged {shown(value)} as {column!r}, which does not go into a table of "
            f"JSON: {shown(str(error))}. Log numbers, texts, or lists and dicts of them."
        ) from error
    return value
