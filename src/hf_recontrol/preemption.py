"""SIGTERM, which schedulers send some time before they kill: work in hand is finished first."""

import queue
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

GRACE = 20.0  # seconds; of the 30 that Kubernetes and SLURM leave a process before they kill it


class Preemption:
    """While it is open, SIGTERM raises SystemExit(143), outside of `finishing` at once. Use it in a `with`.

    Only in the main thread, where Python allows it, and only where SIGTERM is not ignored. The caller's handler is
    put back at the end.
    """

    def __init__(self) -> None:
        self._busy = self._asked = False
        self._before: Any = None
        self._messages: queue.SimpleQueue[str] = queue.SimpleQueue()  # may be filled by a signal handler, unlike others

    def __enter__(self) -> Self:
        if sys.platform != "win32" and threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGTERM)
            if before is not None and before != signal.SIG_IGN:
                threading.Thread(target=self._watch, args=(threading.get_ident(),), daemon=True).start()
                self._before = before
                signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._messages.put("done")

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """What is in it is finished before SystemExit is raised, unless that takes longer than GRACE."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False
        if self._asked:
            raise SystemExit(143)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if not self._busy or self._asked:
            raise SystemExit(143)
        self._asked = True
        self._messages.put("asked")

    def _watch(self, main_thread: int) -> None:
        if self._messages.get() == "asked":
            try:
                self._messages.get(timeout=GRACE)
            except queue.Empty:
                signal.pthread_kill(main_thread, signal.SIGTERM)  # breaks off a system call too
