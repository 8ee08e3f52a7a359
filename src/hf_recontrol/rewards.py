"""Reward functions in TRL's convention: Hub ids, sequence classifiers, and callables with keywords only."""

import asyncio
import inspect
import math
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config_checks import shown
from .errors import CollectError
from .fingerprints import code_sha256
from .reward_calls import Failures, Outcome, RewardCall, described
from .reward_models import RewardModel, reward_model, short_name
from .reward_models import Text as Text  # it belongs to what is imported from here

R = TypeVar("R")
RewardFunc = (
    str | os.PathLike[str] | PreTrainedModel | tuple[PreTrainedModel, PreTrainedTokenizerBase] | Callable[..., Any]
)
RESERVED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


@dataclass(frozen=True)
class RewardResult:
    """What the reward functions said of a batch of completions."""

    total: list[float | None]
    """Weighted sum over the functions that gave a reward; None where none did, and where a function failed: without its
    part the sum would be another reward."""
    per_function: dict[str, list[float | None]]
    """Each function's own, unweighted."""
    logged: dict[str, list[Any]]
    """Columns from log_extra, and values from log_metric repeated for each completion."""
    errors: dict[str, str] = field(default_factory=dict)
    """Class and message of the last error, for each function that failed on this batch."""


class Rewards:
    """One or several reward functions, called as TRL's GRPOTrainer calls them.

    A callable gets keywords only: prompts, completions, completion_ids (lists of token ids, without padding), every
    other column as a list, trainer_state, log_extra(column, values) and log_metric(name, value). It may be async (those
    run together, in one event loop) and returns a float or None for each completion. None leaves the completion out
    of this function's say. A model is a sequence classifier with one label, and reads prompt + completion.

    Departs from TRL where the letter would harm: plain texts get the classifier's special tokens, as its training gave
    it (message lists do not: their template has them); and the caller's models and tokenizers are left as they were.

    A callable that raises or overruns its time is tried again, after 0.5 s, 1 s, 2 s, … An async one is cancelled when
    it overruns; another one runs, where there is a timeout, in a thread that is then abandoned: no Python thread can be
    killed, so what it does goes on beside the next try, until it ends or the process does. A wrong return, an error of
    a model, Ctrl-C and SystemExit are not tried again.

    Args:
        reward_funcs: a Hub id or folder of a sequence classifier, such a model (its tokenizer is loaded from its
            `config._name_or_path`), a (model, tokenizer) pair, a callable, or a list of these. Ids are downloaded here.
        reward_weights: one for each function; 1 where None.
        device: where models named by id are put; None is the CPU. A model object stays where it is.
        batch_size: texts per forward of a model.
        timeout: seconds that a callable may take for a batch, > 0; None is as long as it likes.
        retries: how often a callable is tried again on the same batch, ≥ 0.

    Attributes:
        names: of the functions, each once: a callable's `__name__`, the last part of a model's id.
        weights: of the functions.

    Raises:
        ValueError: no function, a wrong number of weights, a timeout or retries out of bounds, or a model that does not
            end in one trained score.
        TypeError: something else than the above.
    """

    def __init__(
        self,
        reward_funcs: RewardFunc | list[RewardFunc],
        reward_weights: Sequence[float] | None = None,
        *,
        device: torch.device | str | None = None,
        batch_size: int = 64,
        timeout: float | None = None,
        retries: int = 2,
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
        if (timeout is not None and not 0 < timeout < math.inf) or type(retries) is not int or retries < 0:
            raise ValueError(
                f"timeout is {timeout!r} and retries {retries!r}; expected are seconds > 0 or None, and an integer ≥ 0."
            )
        self.timeout, self.retries = timeout, retries
        self._functions = [_as_function(function, device, batch_size) for function in functions]
        self.names = _unique([_name(function) for function in self._functions])
        self._runner = asyncio.Runner()  # one loop for all calls: clients that a function keeps open are bound to it
        weakref.finalize(self, outside_loops, self._runner.close)

    def check(self, *, conversational: bool) -> None:
        """Raise ValueError if a model cannot read such prompts. For the door, before anything is generated."""
        for name, function in zip(self.names, self._functions, strict=True):
            if conversational and isinstance(function, RewardModel) and function.tokenizer.chat_template is None:
                raise ValueError(
                    f"The prompts are message lists, but the tokenizer of the reward model {name!r} has no chat "
                    "template. Set one, or give plain texts as prompts."
                )

    def facts(self) -> dict[str, Any]:
        """What the rewards are, in plain JSON, for a store's fingerprint: the same in another process.

        Returns:
            "rewards": {name: weight}; "reward_functions": for each name {"code_sha256"} of a callable (see code_sha256
            for what it cannot see), {"model", "revision", "weights_sample_sha256"} of a model.
        """
        functions = {
            name: function.facts() if isinstance(function, RewardModel) else {"code_sha256": code_sha256(function)}
            for name, function in zip(self.names, self._functions, strict=True)
        }
        return {"rewards": dict(zip(self.names, self.weights, strict=True)), "reward_functions": functions}

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[list[int]],
        columns: Mapping[str, Sequence[Any]] | None = None,
        *,
        failures: Failures | None = None,
    ) -> RewardResult:
        """Score completions.

        Args:
            prompts: texts or message lists, one for each completion.
            completions: texts, or [{"role": "assistant", "content": text}].
            completion_ids: token ids of each, without padding.
            columns: further columns for the callables, each as long.
            failures: counts the batches that a function failed on, whose rewards are then None. Where None, the first
                one is an error.

        Raises:
            CollectError: a function returned something else than one finite number or None for each completion, or
                failed (its own error is the cause).
        """
        count = len(prompts)
        reserved: dict[str, list[Any]] = {
            "prompts": list(prompts),
            "completions": list(completions),
            "completion_ids": list(completion_ids),
        }
        arguments = {name: list(column) for name, column in (columns or {}).items()} | reserved
        outcomes = self._outcomes(arguments, count)
        failures = failures or Failures(planned=count)
        result = RewardResult([], {}, {})
        for name in self.names:
            outcome = outcomes[name]
            failures.count(name, count, outcome.error)
            result.logged.update(outcome.logged)
            if outcome.error is not None:
                result.errors[name] = described(outcome.error)
            result.per_function[name] = [None] * count if outcome.error else _checked(name, outcome.rewards, count)
        result.total.extend([None] * count if result.errors else self._weigh(result.per_function, count))
        return result

    def _outcomes(self, arguments: Mapping[str, Sequence[Any]], count: int) -> dict[str, Outcome]:
        outcomes, waiting = {}, []
        for name, function in zip(self.names, self._functions, strict=True):
            call = RewardCall(name, function, arguments, count, self.timeout, self.retries)
            if isinstance(function, RewardModel):
                outcomes[name] = Outcome(function(**arguments))
            elif _is_async(function):
                waiting.append(call)
            else:
                outcomes[name] = call.run()
        return outcomes | self._gather(waiting)

    def _weigh(self, rewards: Mapping[str, list[float | None]], count: int) -> list[float | None]:
        total: list[float | None] = [None] * count
        for weight, column in zip(self.weights, rewards.values(), strict=True):
            for i, reward in enumerate(column):
                if reward is not None:
                    total[i] = (total[i] or 0.0) + weight * reward
        return total

    def _gather(self, calls: list[RewardCall]) -> dict[str, Outcome]:
        async def gather() -> list[Outcome]:
            return await asyncio.gather(*(call.run_async() for call in calls))

        outcomes = outside_loops(lambda: self._runner.run(gather())) if calls else []
        return {call.name: outcome for call, outcome in zip(calls, outcomes, strict=True)}


def outside_loops(function: Callable[[], R]) -> R:
    """function(), in a thread of its own where an event loop runs in this one already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return function()
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def _as_function(function: Any, device: torch.device | str | None, batch_size: int) -> Callable[..., Any]:
    model = reward_model(function, device, batch_size)
    if model is None and not callable(function):
        raise TypeError(
            f"A reward function is {shown(function)}; expected is a Hub id, a folder, a sequence classifier, a pair "
            "(model, tokenizer), a callable, or a list of these."
        )
    return model or function


def _name(function: Callable[..., Any]) -> str:
    if isinstance(function, RewardModel):
        return short_name(function.model)
    name: str = getattr(function, "__name__", type(function).__name__)
    return name


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
