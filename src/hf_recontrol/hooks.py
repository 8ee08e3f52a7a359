"""Where h_t is: the input of the LM head. Edits it and records it; the only seam with the models.

A model gets three permanent hooks, inert unless a `Call` is live in this thread: around the forward of the model that
owns the LM head, and in front of the LM head. Rejected: hooks added and removed with each call (two threads on one
model mix, and a graph compiled before ignores them), a ContextVar (Dynamo cannot trace it), a LogitsProcessor (h is
gone when it runs).
"""

import functools
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .cuda_graph import CudaGraphs
from .errors import SteeringNotApplied
from .kl_bound import bounded
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
        recorder: "Recorder | None" = None,
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
        self.doubled = edit is not None and (max_kl is not None or (recorder is not None and recorder.wants_logits))
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
        """The logits that the forward returns, (batch, ..., vocabulary), from those of at_head's two halves."""
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


class Recorder:
    """What is kept of a generate(). Traced code may write into tensors that exist; only step() may do more."""

    prompt_tokens: int | None = None
    """Columns of the ids before the first new token; None while no forward was prepared."""
    wants_logits = False
    """Whether after_forward is to be called: costs a second row through the LM head."""

    def at_head(self, hidden_states: Tensor, edited: Tensor, sound: Tensor | None) -> None:
        """The LM head's input before and after the edit, (..., hidden_size), and which rows are sound, (..., 1)."""

    def after_forward(self, base: Tensor, logits: Tensor, scale: Tensor | None) -> None:
        """The logits without control and those returned, (..., vocabulary), and the share left by max_kl, (..., 1)."""

    def step(self) -> None:
        """After each forward of a generate(), outside what is compiled."""

    def new_tokens(self, forwards: int, columns: int) -> int:
        """How many tokens were generated, one with each of the first forwards.

        Where reading the stop flag would stall the device (Apple's, since transformers 5.24), generate() reads it a
        step late and takes the last step back: one forward more than tokens.

        Args:
            forwards: as many as were seen.
            columns: of the ids that generate() returned.

        Raises:
            SteeringNotApplied: the forwards were not one for each token.
        """
        new = forwards if self.prompt_tokens is None else columns - self.prompt_tokens
        if forwards not in (new, new + 1):
            raise SteeringNotApplied(
                f"{forwards} forwards were seen for {new} new tokens: this decoding mode does not make one token of "
                "each forward. Leave it out, or recontrol_trace."
            )
        return new


class HiddenStates(Recorder):
    """Keeps the last position of the LM head's input at each forward, in tensors made once: no list, no growth.

    Args:
        steps: how many forwards there can be.
    """

    def __init__(self, steps: int):
        self.steps = steps
        self.next: Tensor | None = None  # index of the next forward, int64 (1,): a tensor, so Dynamo does not count
        self.buffer: Tensor | None = None  # (steps, rows, hidden_size) in the model's dtype

    def at_head(self, hidden_states: Tensor, edited: Tensor, sound: Tensor | None) -> None:
        last = hidden_states[..., -1, :]
        if self.buffer is None or self.next is None:
            self.buffer = last.new_zeros((self.steps, *last.shape))
            self.next = torch.zeros(1, dtype=torch.int64, device=last.device)
        self.buffer.index_copy_(0, self.next, last.detach().unsqueeze(0))
        self.next += 1

    def recorded(self, columns: int) -> Tensor:
        """Of each new token, (rows, new tokens, hidden_size).

        Args:
            columns: of the ids that generate() returned.
        """
        if self.buffer is None or self.next is None:
            raise SteeringNotApplied("No forward pass was recorded. Call enable_recontrol() on the model that runs.")
        return self.buffer[: self.new_tokens(int(self.next), columns)].transpose(0, 1).contiguous()


def _before_forward(module: nn.Module, args: Any, kwargs: Any) -> None:
    call = live_call()
    if call is not None and call.owner is module:
        call.inside, call.fired = True, False


def _before_head(module: nn.Module, args: Any, kwargs: Any = None) -> Any:
    # No kwargs: torch's dynamic quantisation copies hooks, and forgets what they take. install() mends that.
    call = live_call()
    if call is None or not call.inside:  # plain use, or a draft that borrows the head
        return None
    if args:
        return (call.at_head(args[0]), *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: call.at_head(kwargs[name])}


def _after_forward(module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
    call = live_call()
    if call is None or call.owner is not module:
        return
    call.inside = False
    if call.fired:
        if call.doubled:
            outputs.logits = call.after_forward(outputs.logits)
        call.steered = call.ever = True
    else:
        call.missed = type(module).__name__


_HOOKS = (_before_forward, _before_head, _after_forward)
_INSTALLING = threading.Lock()


def lm_head(model: PreTrainedModel) -> nn.Module:
    """The module that maps hidden states to logits.

    Raises:
        ValueError: the model has none, or one whose input is not hidden states.
    """
    head = model.get_output_embeddings()
    head = _lm_head_inside(model) if head is None else head
    if not isinstance(head, nn.Module) or isinstance(head, nn.Embedding | nn.ModuleList):
        found = "None" if head is None else f"a {type(head).__name__}"
        raise ValueError(
            f"{type(model).__name__}.get_output_embeddings() is {found}, but steering needs a module that maps hidden "
            "states to logits, such as lm_head. This architecture is not supported."
        )
    return head


def _lm_head_inside(model: PreTrainedModel) -> Any:
    """That of the one language model inside: Blip and NemotronH-Omni generate with it and do not hand its head on."""
    inside = [module for module in model.modules() if isinstance(module, PreTrainedModel) and module is not model]
    heads = {head for module in inside if (head := module.get_output_embeddings()) is not None}
    return heads.pop() if len(heads) == 1 else None


def lm_head_owner(model: PreTrainedModel) -> PreTrainedModel:
    """The innermost model that owns the LM head: Blip2, for one, generates through its language_model."""
    return _owners(model)[-1]


def _owners(model: PreTrainedModel) -> list[PreTrainedModel]:
    head = lm_head(model)
    return [m for m in model.modules() if isinstance(m, PreTrainedModel) and m.get_output_embeddings() is head]


def is_installed(model: PreTrainedModel) -> bool:
    """Whether the present LM head carries our hook. resize_token_embeddings and PEFT replace the head."""
    head = lm_head(model)
    keys = [key for key, hook in head._forward_pre_hooks.items() if hook is _before_head]
    return any(key in head._forward_pre_hooks_with_kwargs for key in keys)


def install(model: PreTrainedModel) -> None:
    """Put the inert hooks on the model, where they are not yet. Hooks on a replaced LM head are removed first."""
    if is_installed(model):  # most often; without the lock, which a fork may leave taken
        return
    with _INSTALLING:  # two threads may meet a new model at once, and two hooks would edit twice
        if is_installed(model):
            return
        uninstall(model)
        owner = lm_head_owner(model)
        owner.register_forward_pre_hook(_before_forward, with_kwargs=True, prepend=True)
        owner.register_forward_hook(_after_forward, with_kwargs=True)
        # prepend: under tensor parallelism the later hooks see sharded tensors. Last, for it stands for all three.
        lm_head(model).register_forward_pre_hook(_before_head, with_kwargs=True, prepend=True)
        for module in (model, *_owners(model)):
            module.__dict__.pop("_compiled_call", None)  # a graph compiled before does not know the hooks


def uninstall(model: PreTrainedModel) -> None:
    """Remove our hooks from every module of the model."""
    for module in model.modules():
        for hooks, with_kwargs in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for key in [key for key, hook in hooks.items() if hook in _HOOKS]:
                del hooks[key]
                with_kwargs.pop(key, None)
        module.__dict__.pop("_compiled_call", None)


def model_name(model: PreTrainedModel) -> str | None:
    """The model's Hub id; "./" and the last part of its path where it was read from a folder; None without a name."""
    name = model.config._name_or_path or None
    return f"./{os.path.basename(os.path.abspath(name))}" if name and os.path.isdir(name) else name
