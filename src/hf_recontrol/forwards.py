"""Forwards for measuring and training: what a model's hidden states were, and what logits come of edited ones."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .calls import Call, run_live
from .control import Controller
from .errors import SteeringNotApplied
from .generation import RecontrolGenerationMixin, disable_recontrol, enable_recontrol, unwrapped
from .hooks import lm_head_owner
from .kl_bound import bounded
from .recording import HiddenStates, Recorder
from .steering import ONE_FORWARD_A_TOKEN, call_for, steered_generate


@contextmanager
def enabled(model: PreTrainedModel) -> Iterator[None]:
    """The model enabled for the time, and left as it was found."""
    was_enabled = isinstance(unwrapped(model), RecontrolGenerationMixin)
    enable_recontrol(model)
    try:
        yield
    finally:
        if not was_enabled:
            disable_recontrol(model)


def generate_with_hidden_states(
    model: PreTrainedModel, *, max_new_tokens: int, controller: Controller | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """generate(), and the hidden state that predicted each new token: s_t = h_t, the LM head's input before any edit.

    Recorded while generating, at no cost in time. Greedy decoding and sampling only.

    Args:
        model: any transformers model with an LM head, enabled or not.
        max_new_tokens: at most so many tokens are generated.
        controller: a control, taken as it is, whatever the keywords and the model's defaults say.
        kwargs: generate()'s, the `recontrol_` ones too (s_t is recorded before the edit).

    Returns:
        The token ids as generate() returns them, int64 (rows, tokens), whose last n columns are the n new ones; and
        (rows, n, hidden_size) in the model's dtype. After a row's EOS both hold padding.

    Raises:
        ValueError: a decoding mode in which a forward is not one token.
        SteeringNotApplied: the model passed the hooks by.
    """
    recorder = HiddenStates(max_new_tokens)
    sequences = generate_recorded(model, recorder, controller, max_new_tokens=max_new_tokens, **kwargs)
    hidden_states = recorder.recorded(sequences.shape[1])
    if len(hidden_states) != len(sequences):
        raise SteeringNotApplied(
            f"Hidden states of {len(hidden_states)} rows were recorded for {len(sequences)} rows of tokens: this "
            "decoding mode regroups the batch. Leave it out."
        )
    return sequences, hidden_states


def generate_recorded(
    model: PreTrainedModel, recorder: Recorder, controller: Controller | None = None, **kwargs: Any
) -> Tensor:
    """generate(), watched by a recorder. Greedy decoding and sampling only.

    Args:
        model, controller, kwargs: as of generate_with_hidden_states.
        recorder: is shown each forward.

    Returns:
        The token ids as generate() returns them, int64 (rows, tokens).

    Raises:
        ValueError: a decoding mode in which a forward is not one token.
        SteeringNotApplied: the model passed the hooks by.
    """
    for name, (plain, *others) in ONE_FORWARD_A_TOKEN.items():
        if kwargs.setdefault(name, others[0] if others else plain) not in (plain, *others):
            raise ValueError(
                f"Hidden states are recorded in greedy decoding and sampling, not with {name}={kwargs[name]!r}."
            )
    kwargs["return_dict_in_generate"] = False
    with enabled(model):
        stock = super(RecontrolGenerationMixin, model).generate  # type: ignore[misc]
        sequences: Tensor = steered_generate(stock, model, (), kwargs, recorder, controller)
        return sequences


def forward_steered(model: PreTrainedModel, controller: Controller | None, **kwargs: Any) -> Any:
    """One forward pass with the control at every position that reaches the LM head.

    Args:
        model: any transformers model with an LM head, enabled or not.
        controller: the control; None is a plain forward.
        kwargs: the forward's.

    Returns:
        What the model's forward returns.

    Raises:
        ValueError: `labels` or return_dict=False with a max_kl: the loss would be of plain and edited rows.
    """
    if controller is None:
        return run_live(None, model, **kwargs)
    if controller.max_kl is not None and (kwargs.get("labels") is not None or kwargs.get("return_dict") is False):
        raise ValueError(
            f"max_kl is {controller.max_kl}, which needs the logits of plain and edited rows: labels and "
            "return_dict=False cannot be had with it. Compute the loss from the logits that are returned."
        )
    with enabled(model):
        return run_live(call_for(model, controller), model, **kwargs)


def hidden_states_of(model: PreTrainedModel, **kwargs: Any) -> Tensor:
    """The LM head's input at every position of one forward, before any edit.

    The LM head itself runs at one position only: the logits of a whole text can be larger than all else.

    Args:
        model: a decoder-only transformers model, enabled or not.
        kwargs: the forward's: input_ids, attention_mask, position_ids.

    Returns:
        (rows, positions, hidden_size) in the model's dtype.

    Raises:
        SteeringNotApplied: the model gives its LM head fewer positions than it reads, or passed the hooks by.
    """
    seen: list[Tensor] = []

    def keep(own: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(own)
        last = own[..., -1:, :]
        return last, torch.ones_like(last[..., :1], dtype=torch.bool)

    if "use_cache" in inspect.signature(model.forward).parameters:
        kwargs["use_cache"] = False
    with torch.no_grad(), enabled(model):
        run_live(Call(keep, owner=lm_head_owner(model)), model, **kwargs)
    (hidden_states,) = seen
    if hidden_states.shape[:-1] != kwargs["input_ids"].shape:
        raise SteeringNotApplied(
            f"{type(model).__name__} read input_ids {tuple(kwargs['input_ids'].shape)} and gave its LM head hidden "
            f"states {tuple(hidden_states.shape)}; expected is a state of each token. This architecture cannot be "
            "replayed; generate its answers instead."
        )
    return hidden_states


def last_hidden_states(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, *, cache: Any = None, use_cache: bool = False
) -> tuple[Tensor, Any]:
    """The LM head's input at the last position of one forward, before any edit.

    Plain also inside a steered generate() of the same model, which goes on undisturbed.

    Args:
        model: a decoder-only transformers model, enabled or not.
        input_ids: int64 (rows, tokens): those that the cache does not hold.
        attention_mask: int64 (rows, tokens and those of the cache); padding on the left.
        cache: of an earlier forward; changed in place.
        use_cache: whether to make one.

    Returns:
        (rows, hidden_size) in the model's dtype; and the cache, None where there is none.
    """
    accepted = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    if "position_ids" in accepted:  # a forward does not count them from the mask, as generate() does
        inputs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
    inputs |= {name: value for name, value in {"use_cache": use_cache, "logits_to_keep": 1}.items() if name in accepted}
    cache_name = "cache" if "cache" in accepted else "past_key_values"  # before transformers 5.24
    if cache is not None:
        inputs[cache_name] = cache
    recorder = HiddenStates(1)
    with torch.no_grad(), enabled(model):
        outputs = run_live(Call(recorder=recorder, owner=lm_head_owner(model)), model, **inputs)
    assert recorder.buffer is not None  # run_live raises where the LM head was passed by
    return recorder.buffer[0], getattr(outputs, cache_name, None)


def logits_of(model: PreTrainedModel, hidden_states: Tensor) -> Tensor:
    """The logits that the model makes of these hidden states: its LM head, and what it does after it.

    A forward of one token in which the LM head is given these states instead.

    Args:
        model: any transformers model with an LM head, enabled or not.
        hidden_states: float (tokens, hidden_size), as generate_with_hidden_states or rollouts have them.

    Returns:
        (tokens, vocabulary), in the model's dtype.
    """

    def instead(own: Tensor) -> tuple[Tensor, Tensor]:
        states = hidden_states.to(own).reshape(1, *[1] * (own.ndim - 3), *hidden_states.shape)
        return states, torch.ones_like(states[..., :1], dtype=torch.bool)

    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    inputs: dict[str, Any] = {"input_ids": ids} | (
        {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    )
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    with enabled(model):
        outputs = run_live(Call(instead, owner=lm_head_owner(model)), model, **inputs)
    logits: Tensor = outputs.logits
    return logits.reshape(len(hidden_states), -1)


def steered_logits(model: PreTrainedModel, hidden_states: Tensor, controller: Controller) -> Tensor:
    """As logits_of, of the edited hidden states, and held at the controller's max_kl."""
    base, edited = logits_of(model, torch.cat([hidden_states, controller(hidden_states)])).chunk(2)
    return edited if controller.max_kl is None else bounded(base, edited, controller.max_kl)[0]


def logits_at_once(model: PreTrainedModel) -> int:
    """How many tokens' logits to hold at a time, where there are several copies of 64 MiB (on a GPU 512 MiB) each."""
    elements = 2**24 if model.device.type == "cpu" else 2**27
    return max(1, int(elements // model.config.get_text_config().vocab_size))
