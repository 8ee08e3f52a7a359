"""The processes that one call is shared by, as `accelerate launch` and torchrun start them."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import CollectError

PATIENCE = timedelta(hours=2)  # longer than the longest block, and than checking a folder when it is opened


class Processes:
    """The group that this process is in; one that was started alone is its own. Use it in a `with`.

    They wait for each other on a gloo group of their own: it needs no GPU, has its own time-out, and says at once when
    a process has left it, by its death or by an exception out of the `with`.

    Args:
        device_type: of the model; "cpu" keeps accelerate from looking for a GPU.

    Attributes:
        rank, size: 0 and 1 where this process is alone.

    Raises:
        ImportError: a launcher has started several, and accelerate is not installed.
        CollectError: from any wait, when another process has ended or has not come within two hours.
    """

    rank, size = 0, 1

    def __init__(self, device_type: str):
        self.device_type = device_type
        self._group: Any = None

    def __enter__(self) -> Self:
        initialized = dist.is_available() and dist.is_initialized()
        if not initialized and _launched():
            _initialize(self.device_type)
            initialized = True
        if initialized and dist.get_world_size() > 1:
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            with self._others_needed():
                self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def wait(self) -> None:
        """Until all are here."""
        if self._group is not None:
            self._await(dist.all_reduce, torch.ones(1))

    def from_first(self, values: Tensor) -> Tensor:
        """The first process's values, in all; the shape and dtype must be the same in each."""
        if self._group is not None:
            self._await(dist.broadcast, values, src=0)
        return values

    def _await(self, collective: Any, values: Tensor, **arguments: Any) -> None:
        with self._others_needed():
            work = collective(values, group=self._group, async_op=True, **arguments)
            while not work.is_completed():  # its own wait() would keep signals from being handled
                time.sleep(0.01)
            work.wait()

    @contextmanager
    def _others_needed(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise CollectError(
                f"Another of the {self.size} processes of this run has ended, or failed, or did not come within "
                f"{PATIENCE}; its own output says why. What was committed is kept: call again with the same "
                "arguments, in as many processes as you like."
            ) from error


def check_own(model: torch.nn.Module) -> None:
    """Raise ValueError if the model is split over processes, so that each needs the others for a forward pass."""
    from torch.distributed.tensor import DTensor  # not in every build of torch

    if any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            f"The weights of this {type(model).__name__} are split over the processes (tensor parallel, FSDP or "
            "DeepSpeed ZeRO-3), but each process answers other prompts. Load a whole model in each, or start one "
            'process and split the model with device_map="auto".'
        )


def _launched() -> bool:
    """Whether this process was started as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ and "MASTER_ADDR" in os.environ


def _initialize(device_type: str) -> None:
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ImportError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, so the work is to be shared by processes, which needs "
            'accelerate: pip install "hf-recontrol[train]". To work in this process alone, unset WORLD_SIZE.'
        ) from error
    PartialState(cpu=device_type == "cpu")
    if not dist.is_initialized():
        raise CollectError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but accelerate's PartialState had been made for one process. "
            "Start the script by `accelerate launch` or torchrun, and make no PartialState or Accelerator before that."
        )
