"""One generate() at the LM head: what is to be done there, and the thread's note of which call that is."""

import functools
import threading
import weakref
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from .cuda_graph import CudaGraphs
from .errors import SteeringNotApplied
from .kl_bound import bounded
from .recording import Recorder
from .start import Start

P = ParamSpec("P")
R = TypeVar("R")


class _Thread(threading.local):
    def __init__(self) -> None:  # in each thread; of torch 2.11 Dynamo would take a class attribute for its value
        self.live: weakref.ref[_Live] | None = None  # of the innermost generate() of this thread


_THREAD = _Thread()


class _Live:
    """Owned by nothing but the value stack of `run_live`: it dies with the call, whatever a traceback keeps alive."""

    def __init__(self, call: "Call"):
        self.call = call


def live_call() -> "Call | None":
    """The call whose control is live in this thread, None where there is none."""
    live = _THREAD.live
    return None if live is None else getattr(live(), "call", None)


def run_live(call: "Call | None", function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run `function` with `call` live in this thread; None turns an outer call off for the time.

    Raises:
        SteeringNotApplied: `function` returned and the call was not applied, or was lost on the way.
    """
    outer = _THREAD.live
    try:
        if call is None:
            _THREAD.live = None
            return function(*args, **kwargs)
        # The loop is the lifetime: its iterator, on the value stack, is the only owner of the _Live. A variable of
        # this frame would keep steering on where a notebook keeps the traceback of an interrupt.
        for _THREAD.live in map(weakref.ref, (_Live(call),)):
            result = function(*args, **kwargs)
            call.finish(live_call())
        return result
    finally:
        _THREAD.live = outer


class Call:
    """One steered or recorded generate(): what to do at the LM head, and flags that tell whether it was done.

    Flags, not counters: a Python counter in a hook makes Dynamo compile again at each step, until it gives up.

    Args:
        edit: from the LM head's input, float (..., hidden_size), to (edited, sound): the same shape, and bool (..., 1),
            False where a row was left as it came because it was not finite. None edits nothing.
        recorder: is shown the LM head's input before and after the edit, at each forward.
        owner: the module whose forwards are meant, see `lm_head_owner`. Another model's, run in between by a logits
            processor, say, stay plain.
        max_kl: no token's KL above it, in nats; or from logits to the bound of each row, (..., 1); None is no bound.
        start: which rows are edited yet; None is all.
        model: whose generate() it is; `owner`, or a model around it.
    """

    def __init__(
        self,
        edit: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
        recorder: Recorder | None = None,
        owner: nn.Module | None = None,
        max_kl: float | Callable[[Tensor], Tensor] | None = None,
        start: Start | None = None,
        model: nn.Module | None = None,
    ):
        self.owner = owner
        self.model = model
        self.passes_on = False  # a generate() of the same model inside this one is a part of it, not one of its own
        self.start = start
        self.edit = edit
        self.recorder = recorder
        self.max_kl = max_kl
        # The base rows go through the LM head before the edited ones, so that soft-caps, scales and biases, which the
        # model may apply after it, are in both: a KL measured before them is wrong for about 50 architectures.
        watched = recorder is not None and recorder.wants_logits
        self.doubled = edit is not None and (max_kl is not None or watched)
        self.reads_logits = self.doubled or watched
        self._graphs = CudaGraphs()
        self.unsound: Tensor | None = None  # rows left unedited because they were not finite; int64 ()
        self.inside = False  # between the forward's pre-hook and its hook
        self.fired = False  # the LM head was reached in this forward
        self.steered = False  # the last forward came back with its LM head's input edited
        self.ever = False  # at least one did
        self.missed: str | None = None  # class of a model whose forward went by its LM head; stays

    def at_head(self, hidden_states: Tensor) -> Tensor:
        """Record and edit the LM head's input; the input as it came in front of it where both are needed."""
        self.fired = True
        if self.edit is None:
            edited, sound = hidden_states, None
        else:
            edited, sound = self.edit(hidden_states)
            self._count(~sound)
            if self.start is not None:
                edited = self.start.applied(edited, hidden_states)
        if self.recorder is not None:
            self.recorder.at_head(hidden_states, edited, sound)
        return torch.cat([hidden_states, edited]) if self.doubled else edited

    def after_forward(self, logits: Tensor) -> Tensor:
        """The logits that the forward returns, (batch, ..., vocabulary), from those of what at_head returned."""
        if not self.doubled:  # nothing is edited, only watched
            if self.recorder is not None:
                self.recorder.after_forward(logits, logits, None)
            return logits
        base, edited = logits.chunk(2)
        scale = None
        if self.max_kl is not None:
            if callable(self.max_kl):
                edited, scale = bounded(base, edited, self.max_kl(base))
            elif self._graphs.can_take(base):
                edited, scale = self._graphs(functools.partial(bounded, max_kl=self.max_kl), (base, edited))
            else:
                edited, scale = bounded(base, edited, self.max_kl)
            self._count(scale == 0)  # the edit overflowed in the logits
        if self.recorder is not None:
            self.recorder.after_forward(base, edited, scale)
        return edited

    def _count(self, unsound: Tensor) -> None:
        if self.unsound is None:
            self.unsound = torch.zeros((), dtype=torch.int64, device=unsound.device)
        self.unsound.add_(unsound.sum().to(self.unsound.device))  # the logits may be on another than the LM head

    def check(self) -> None:
        """After a forward: raise unless it was applied to. For eager code: hooks themselves never raise.

        An exception inside a traced hook would surface as Dynamo's, and in a server's loop it would end all requests.
        """
        self._require(self.steered)
        self._require_start(self.start is None or self.start.noted)
        self.steered = False
        if self.start is not None:
            self.start.noted = False
        if self.recorder is not None:
            self.recorder.step()

    def finish(self, live: "Call | None") -> None:
        """Raise unless this call was applied and is still the live one."""
        if live is not self:
            raise SteeringNotApplied(
                "The live control was lost during generate(). No text was returned; please report how."
            )
        self._require(self.ever)
        self._require_start(self.start is None or self.start.begun is not None)

    def _require(self, steered: bool) -> None:
        if self.missed is not None:
            raise SteeringNotApplied(
                f"The forward pass of {self.missed} did not call its output embeddings as a module, so its hidden "
                "states could not be reached. No text was returned. This model cannot be used with hf_recontrol as it "
                "is; please report its name."
            )
        if not steered:
            raise SteeringNotApplied(
                "A forward pass went by our hooks. No text was returned. Was the model wrapped, compiled or replaced "
                "after enable_recontrol()? Call enable_recontrol() on the model that runs."
            )

    def _require_start(self, noted: bool) -> None:
        if not noted:
            raise SteeringNotApplied(
                "This model or decoding mode goes by prepare_inputs_for_generation(), so which tokens are new is not "
                "known. No text was returned. Leave recontrol_start and recontrol_start_token_id out."
            )
