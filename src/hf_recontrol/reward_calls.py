"""One batch through one reward function: within its time, again after an error; and a count of those that fail."""

import asyncio
import json
import logging
import math
import os
import queue
import sysconfig
import threading
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from transformers import TrainerState

from .config_checks import shown
from .errors import CollectError

R = TypeVar("R")
logger = logging.getLogger(__name__)
PAUSE = 0.5  # seconds before the second try; twice as long before each further one
MOST_FAILED = 0.05  # of the answers
LONGEST = 300  # characters of an error that are kept
FEW = 3  # batches: a function that has failed on all of so many will fail on


@dataclass
class Outcome:
    """What came of a batch."""

    rewards: Any = None
    """As the function returned it, unchecked."""
    logged: dict[str, list[Any]] = field(default_factory=dict)
    """By the try that came through."""
    error: Exception | None = None
    """Of the last try, where none came through."""


@dataclass(frozen=True)
class RewardCall:
    """A batch that is to be scored by one function, up to 1 + retries times. Each try gets its own lists."""

    name: str
    function: Callable[..., Any]
    arguments: Mapping[str, Sequence[Any]]
    count: int
    timeout: float | None = None
    retries: int = 0

    def run(self) -> Outcome:
        """In this thread, or with a timeout in one of its own, which is abandoned when it overruns."""
        for pause in self._pauses():
            time.sleep(pause)
            outcome = Outcome()
            with _caught(outcome):
                outcome.rewards = _within(self.timeout, partial(self._call, outcome.logged))
            if outcome.error is None:
                break
        return outcome

    async def run_async(self) -> Outcome:
        """In the running loop; cancelled when it overruns."""
        for pause in self._pauses():
            await asyncio.sleep(pause)
            outcome = Outcome()
            with _caught(outcome):
                outcome.rewards = await _within_async(self.timeout, partial(self._call, outcome.logged))
            if outcome.error is None:
                break
        return outcome

    def _pauses(self) -> list[float]:
        return [0.0, *(PAUSE * 2**i for i in range(self.retries))]

    def _call(self, logged: dict[str, list[Any]]) -> Any:
        return self.function(
            **{name: list(column) for name, column in self.arguments.items()},
            trainer_state=TrainerState(),
            log_extra=partial(_log_extra, logged, self.count, self.name),
            log_metric=partial(_log_metric, logged, self.count, self.name),
        )


@contextmanager
def _caught(outcome: Outcome) -> Iterator[None]:
    """Keep an error of the user's function in the outcome.

    The one place where Exception is caught: the function is anyone's, calls anything and raises whatever that raises.
    What it raises is tried again, counted and said, never passed over. Ctrl-C and SystemExit are no Exceptions.
    """
    try:
        yield
    except CollectError:  # ours, of a wrong log: it would come again
        raise
    except Exception as error:
        outcome.error = error


def _within(timeout: float | None, function: Callable[[], R]) -> R:
    if timeout is None:
        return function()
    results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            results.put((function(), None))
        except BaseException as error:  # raised below, in the caller's thread, whatever it is
            results.put((None, error))

    threading.Thread(target=work, name="reward", daemon=True).start()  # daemon: the process can end before it does
    try:
        value, error = results.get(timeout=timeout)
    except queue.Empty:
        raise _overrun(timeout) from None
    if error is not None:
        raise error
    return value  # type: ignore[no-any-return]


async def _within_async(timeout: float | None, function: Callable[[], Awaitable[R]]) -> R:
    try:
        async with asyncio.timeout(timeout) as limit:
            return await function()
    except TimeoutError:
        if limit.expired():
            raise _overrun(timeout) from None
        raise  # the function's own


def _overrun(timeout: float | None) -> TimeoutError:
    return TimeoutError(f"no rewards within {timeout:g} s")


def described(error: Exception) -> str:
    """Class and message in one line, for a table."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _where(error: Exception) -> str:
    """The innermost line of the user's code: neither Python's own, nor an installed package's, nor ours."""
    others = (sysconfig.get_path("stdlib"), os.path.dirname(__file__), "<")
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "site-packages" not in frame.filename and not frame.filename.startswith(others)
    ]
    return f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""


class Failures:
    """Counts, for each function, the answers of batches that it failed on, and ends the collecting at too many.

    Too many are more than 5 % of the answers that are to be scored, or all of the first three batches.

    Args:
        planned: answers that are to be scored.
    """

    def __init__(self, planned: int):
        self.planned = planned
        self.answers: Counter[str] = Counter()
        self._batches: Counter[str] = Counter()
        self._scored: set[str] = set()

    def count(self, name: str, answers: int, error: Exception | None) -> None:
        """Of a batch. Raises CollectError, from `error`, where it is one too many."""
        self._batches[name] += 1
        if error is None:
            self._scored.add(name)
            return
        self.answers[name] += answers
        many = self.answers[name] > MOST_FAILED * self.planned
        if many or (self._batches[name] >= FEW and name not in self._scored):
            raise CollectError(
                f"The reward function {name!r} failed on {self.answers[name]} answers"
                f"{f', of {self.planned} that are to be scored' if many else ' and has scored none yet'}; "
                f"{MOST_FAILED:.0%} may fail. The last error: {described(error)}{_where(error)}. What was "
                "committed is kept, and this batch is not: mend what the function needs and call again with the same "
                "arguments. If its code must change after something was committed, give another output_dir; it may "
                "return None for answers that it cannot score."
            ) from error
        logger.warning(
            "The reward function %r failed on a batch of %d answers, which stay without a reward: %s",
            name,
            answers,
            described(error),
        )


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
