"""A function of a few rows as one launch: on a GPU hundreds of small kernels cost their launches, and little else."""

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_ROWS = 64
"""More rows than this keep a GPU busy for longer than it takes to launch the kernels."""

Tensors = tuple[Tensor, ...]
_RECORDING = threading.Lock()  # CUDA allows no wait for a device while a graph is recorded on it, and recording waits


@dataclass(frozen=True)
class _Graph:
    state: Hashable
    rows: Tensors
    replay: Callable[[], None]
    results: Tensors


class CudaGraphs:
    """Records a function of rows once for each number of them, rounded up to a power of two, and replays it.

    A graph knows the places of what it reads, so it is recorded again when `state` says that they changed. Each thread
    and stream has its own: two that replay one graph at once would share its memory.
    """

    def __init__(self) -> None:
        self._graphs: dict[Hashable, _Graph] = {}

    @staticmethod
    def can_take(rows: Tensor) -> bool:
        """Whether this is a call to replay: a few rows on a GPU, outside of what others trace or record."""
        few = rows.device.type == "cuda" and 0 < rows[..., 0].numel() <= MAX_ROWS
        return few and not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing()

    def __call__(self, function: Callable[..., Tensors], rows: Tensors, state: Hashable = None) -> Tensors:
        """function(*rows).

        Args:
            function: of each row alone, with no randomness, and no wait for the device. Returns a tuple.
            rows: one or more (..., width), that differ in width alone, and that `can_take` takes.
            state: of whatever else the function reads.
        """
        flat = [each.reshape(-1, each.shape[-1]) for each in rows]
        count = len(flat[0])
        bucket = 1 << (count - 1).bit_length()
        shapes = tuple((each.shape[-1], each.dtype) for each in rows)
        place = threading.get_ident(), stream_of(rows[0]), shapes, bucket
        graph = self._graphs.get(place)
        if graph is None or graph.state != state:
            with torch.inference_mode(False), torch.no_grad():  # else it could be replayed in inference mode alone
                own = tuple(each.new_zeros(bucket, each.shape[-1]) for each in flat)
                graph = self._graphs[place] = _Graph(state, own, *record(function, own))
        for place_of, each in zip(graph.rows, flat, strict=True):
            place_of[:count].copy_(each)
        graph.replay()
        # copies: the next replay writes over the results
        return tuple(each[:count].clone().view(*rows[0].shape[:-1], -1) for each in graph.results)


def stream_of(tensor: Tensor) -> Hashable:
    """The stream on which the tensor's device works now."""
    return torch.cuda.current_stream(tensor.device)


def record(function: Callable[..., Tensors], rows: Tensors) -> tuple[Callable[[], None], Tensors]:
    """A graph of function(*rows): what runs it again on what `rows` hold then, and the tensors that it writes."""
    device = rows[0].device
    with _RECORDING, torch.cuda.device(device):
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            function(*rows)  # libraries set themselves up at their first call, which cannot be recorded
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do on the device meanwhile is their affair
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            results = function(*rows)
    return graph.replay, results
