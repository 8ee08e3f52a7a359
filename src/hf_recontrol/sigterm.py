"""SIGTERM while a head is trained, as schedulers send it before they take a machine: a checkpoint, then exit 143.

In a shell Ctrl-C does the same, and ends with 130.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy


class Termination(TrainerCallback):
    """Ends the training after the step in which a signal came, with a checkpoint unless save_strategy is "no".

    transformers' own enable_jit_checkpoint waits 3 seconds, may save in the middle of a step, keeps its handler after
    an exception, and lets the process end with 0.
    """

    def __init__(self) -> None:
        self.signals = [signal.SIGTERM]
        """What ends the training; in a notebook Ctrl-C is an interrupt as ever."""
        self.received = 0
        """The signal that this process was sent, if it was."""
        self.due = False
        """Whether any was, and all of them end with this step. See RecontrolTrainer.get_batch_samples."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A signal is noted in here, and handled as before afterwards. Only the main thread has signals."""
        self.received, self.due = 0, False
        handlers = {one: handler for one in self.signals if (handler := signal.getsignal(one)) != signal.SIG_IGN}
        if threading.current_thread() is not threading.main_thread() or None in handlers.values():  # not Python's
            yield
            return
        for signum in handlers:
            signal.signal(signum, self._note)
        try:
            yield
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)

    @property
    def exit_status(self) -> int:
        """As a process has that the signal ended."""
        return 128 + (self.received or signal.SIGTERM)

    def _note(self, signum: int, frame: object) -> None:
        if self.received == signum == signal.SIGINT:  # asked twice
            raise KeyboardInterrupt
        self.received = signum

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop, and save."""
        if self.received and args.world_size == 1:  # several processes have to end with the same step
            self.due = True
        if self.due:
            control.should_training_stop = True
            control.should_save = args.save_strategy != SaveStrategy.NO

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Nothing that belongs to the end of an epoch is done in its middle; Trainer calls this there too."""
        if self.due and state.epoch is not None and state.epoch % 1:
            control.should_log = control.should_evaluate = control.should_save = False
        elif self.due:  # once more, with what is measured here: the resumed run begins with the next epoch
            control.should_save = args.save_strategy != SaveStrategy.NO
