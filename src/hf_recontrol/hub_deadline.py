"""How long the Hub is waited for: its own library retries a server that hangs for minutes."""

import contextvars
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from huggingface_hub.utils import tqdm  # type: ignore[attr-defined, unused-ignore]

DEADLINE_SECONDS = 30.0
SLOWEST_BYTES_PER_SECOND = 100_000
Result = TypeVar("Result")


class Deadline:
    """30 s from now; while a file's bytes come, 30 s from the last one, if they come at 100 kB/s or more.

    Args:
        sent: bytes that are sent meanwhile, of which nothing is told; their time at 100 kB/s is added.
    """

    def __init__(self, sent: int = 0) -> None:
        self._start = self._last = time.monotonic() + sent / SLOWEST_BYTES_PER_SECOND
        self._received = 0.0

    def received(self, size: float) -> None:
        """So many bytes more."""
        self._received += size
        self._last = max(self._last, time.monotonic())

    def remaining(self) -> float:
        """Seconds; below 0 when it is over."""
        at_slowest = self._start + self._received / SLOWEST_BYTES_PER_SECOND
        return min(at_slowest, self._last) + DEADLINE_SECONDS - time.monotonic()

    def bar(self) -> type[tqdm]:
        """The progress bar of a download, which tells of its bytes whether it is shown or not."""
        received = self.received

        class Bar(tqdm):  # type: ignore[misc, unused-ignore]
            def update(self, n: float | None = 1) -> Any:
                received(n or 0)
                return super().update(n)

        return Bar


def within(deadline: Deadline, function: Callable[[], Result]) -> Result:
    """function(), or TimeoutError when the deadline is over.

    It runs in a daemon thread, which is left behind then: a download may still complete the cache, and a push may still
    arrive.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # handed to the waiting thread, whatever it is
            future.set_exception(error)

    threading.Thread(target=contextvars.copy_context().run, args=(run,), name="hf-recontrol-hub", daemon=True).start()
    while True:
        rest = deadline.remaining()
        try:
            return future.result(timeout=max(0.0, rest))
        except TimeoutError as error:
            if future.done():  # the function's own
                raise
            if rest <= 0:
                raise TimeoutError("no answer from the Hub in time") from error
