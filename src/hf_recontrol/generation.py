"""generate(..., recontrol_value_head=…): stock generate() of any transformers model, steered by a value head."""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel

from .control import Controller
from .errors import SteeringNotApplied
from .hooks import Call, Recorder, install, live_call, lm_head, lm_head_owner, run_live, uninstall
from .keywords import RecontrolKeywords, refuse_unread_config


class RecontrolGenerationMixin:
    """Adds the `recontrol_` keywords to generate(): `class MyModel(RecontrolGenerationMixin, LlamaForCausalLM)`.

    For a model that exists, use `enable_recontrol(model)`.
    """

    @functools.wraps(GenerationMixin.generate)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _generate(super().generate, self, args, kwargs)  # type: ignore[misc]

    @functools.wraps(GenerationMixin._update_model_kwargs_for_generation)
    def _update_model_kwargs_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        _check_forward()
        return super()._update_model_kwargs_for_generation(*args, **kwargs)  # type: ignore[misc]

    @functools.wraps(GenerationMixin.generate_batch)
    def generate_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _generate_batch(super().generate_batch, self, args, kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class was made at run time, so it is pickled as the stock class and made again
        stock = type(self).__dict__.get("_recontrol_stock_class")
        reduced = super().__reduce_ex__(protocol)
        return reduced if stock is None else (_new_enabled, (stock,), *reduced[2:])


def _generate(
    stock: Callable[..., Any],
    model: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    recorder: Recorder | None = None,
) -> Any:
    keywords = RecontrolKeywords.pop(kwargs)
    config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    call = None
    # assisted decoding drafts with a copy of the target's config: drafts are plain, the target's forward decides
    if keywords != RecontrolKeywords() or recorder is not None or not getattr(config, "is_assistant", False):
        refuse_unread_config(config, model, keywords)
        controller = keywords.controller(model)
        if controller is not None or recorder is not None:
            if kwargs.get("cache_implementation") == "paged":
                raise ValueError('cache_implementation="paged" cannot be steered: it runs in a thread of its own.')
            install(model)
            call = Call(None if controller is None else controller.edit, recorder, lm_head_owner(model))
    result = run_live(call, stock, *args, **kwargs)
    if call is not None and call.unsound is not None and int(call.unsound):
        warnings.warn(
            f"{int(call.unsound)} hidden states were not finite, or would not have been after the edit, and were left "
            "unedited; those tokens are unguided. Is the model's dtype too narrow, or the step size huge?",
            UserWarning,
            stacklevel=3,
        )
    return result


def _generate_batch(stock: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Continuous batching, which takes any keyword and ignores it: refused where ours would be lost."""
    keywords = RecontrolKeywords.pop(kwargs)
    refuse_unread_config(kwargs.get("generation_config", args[1] if len(args) > 1 else None), model, keywords)
    if keywords.value_head is not False and keywords != RecontrolKeywords():
        raise ValueError("generate_batch() cannot be steered: it runs in a thread of its own. Use generate().")
    return stock(*args, **kwargs)


def _check_forward() -> None:
    call = live_call()
    if call is not None:
        call.check()


@functools.cache
def _enabled_class(stock: Any) -> Any:
    """A subclass of the model's class with our mixin in front, and the stock name.

    Pipelines, saved configs and servers go by the class's name; generate() takes its decoding methods from the class.
    """
    names = {name: getattr(stock, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(stock.__name__, (RecontrolGenerationMixin, stock), {**names, "_recontrol_stock_class": stock})


def _new_enabled(stock: type) -> Any:
    enabled: Any = _enabled_class(stock)
    return enabled.__new__(enabled)


def enable_recontrol(model: Any = None) -> Any:
    """Let generate() take `recontrol_value_head=` and its fellows.

    Changes the model: its class becomes a subclass of the same name, so `type(model) is LlamaForCausalLM` is no longer
    true. isinstance, save_pretrained, pipelines, deepcopy, pickle and torch.compile keep working, and without a head
    generate() gives what it gave before, bit for bit. `disable_recontrol(model)` undoes it.

    Args:
        model: a transformers model with an LM head; a PeftModel or a compiled model stands for the one inside. None
            patches GenerationMixin instead, for servers that make their own models: then every model in this process
            takes the keywords, until `disable_recontrol()`.

    Returns:
        The model that was given.

    Raises:
        ValueError: the model has no usable LM head, or a generate() of its own.

    Example:
        >>> import torch
        >>> from hf_recontrol import ValueHead, ValueHeadConfig
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...     num_attention_heads=1, num_key_value_heads=1, vocab_size=16, eos_token_id=None))
        >>> model = enable_recontrol(model)
        >>> head = ValueHead(ValueHeadConfig(hidden_size=8))
        >>> model.generate(torch.tensor([[1, 2]]), max_new_tokens=3, recontrol_value_head=head).shape
        torch.Size([1, 5])
    """
    if model is None:
        _patch_generation_mixin()
        return None
    inner = _unwrap(model)
    if "generate" in vars(inner):
        raise ValueError(
            f"This {type(inner).__name__} has a generate() of its own (a custom_generate repository loaded with "
            "trust_remote_code), which would pass ours by. Load the model without trust_remote_code."
        )
    lm_head(inner)
    if not isinstance(inner, RecontrolGenerationMixin):
        inner.__class__ = _enabled_class(type(inner))  # type: ignore[arg-type]
    install(inner)
    return model


def disable_recontrol(model: Any = None) -> Any:
    """Undo `enable_recontrol`: the stock class and no hooks. None undoes `enable_recontrol()`. Returns the model."""
    if model is None:
        for name, stock in _PATCHED.items():
            setattr(GenerationMixin, name, stock)
        _PATCHED.clear()
        return None
    inner = _unwrap(model)
    stock = vars(type(inner)).get("_recontrol_stock_class")
    if stock is not None:
        inner.__class__ = stock
    uninstall(inner)
    return model


def _unwrap(model: Any) -> Any:
    """The transformers model inside a compiled model or a PeftModel."""
    while not isinstance(model, PreTrainedModel):
        inside = (
            getattr(model, "_orig_mod", None) or getattr(model, "base_model", None) or getattr(model, "model", None)
        )
        if inside is None:
            raise TypeError(f"enable_recontrol() takes a transformers model, not a {type(model).__name__}.")
        model = inside
    return model


_PATCHED: dict[str, Any] = {}


def _patch_generation_mixin() -> None:
    if _PATCHED:
        return
    names = ("generate", "generate_batch", "_update_model_kwargs_for_generation")
    generate, generate_batch, update = (_PATCHED.setdefault(name, getattr(GenerationMixin, name)) for name in names)

    @functools.wraps(generate)
    def patched_generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, RecontrolGenerationMixin):  # has taken its keywords already
            return generate(self, *args, **kwargs)
        return _generate(functools.partial(generate, self), self, args, kwargs)

    @functools.wraps(generate_batch)
    def patched_generate_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _generate_batch(functools.partial(generate_batch, self), self, args, kwargs)

    @functools.wraps(update)
    def patched_update(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, RecontrolGenerationMixin):  # else it has checked already
            _check_forward()
        return update(self, *args, **kwargs)

    GenerationMixin.generate = patched_generate  # type: ignore[method-assign]
    GenerationMixin.generate_batch = patched_generate_batch  # type: ignore[method-assign]
    GenerationMixin._update_model_kwargs_for_generation = patched_update  # type: ignore[method-assign]


@contextmanager
def _enabled(model: PreTrainedModel) -> Iterator[None]:
    """The model enabled for the time, and left as it was found."""
    was_enabled = isinstance(model, RecontrolGenerationMixin)
    enable_recontrol(model)
    try:
        yield
    finally:
        if not was_enabled:
            disable_recontrol(model)


def generate_with_hidden_states(model: PreTrainedModel, *, max_new_tokens: int, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """generate(), and the hidden state that predicted each new token: s_t = h_t, the LM head's input before any edit.

    Recorded while generating, at no cost in time. Greedy decoding and sampling only.

    Args:
        model: any transformers model with an LM head, enabled or not.
        max_new_tokens: at most so many tokens are generated.
        kwargs: generate()'s, the `recontrol_` ones too (s_t is recorded before the edit).

    Returns:
        The token ids as generate() returns them, int64 (rows, tokens), whose last n columns are the n new ones; and
        (rows, n, hidden_size) in the model's dtype. After a row's EOS both hold padding.

    Raises:
        ValueError: a decoding mode in which a forward is not one token.
        SteeringNotApplied: the model passed the hooks by.
    """
    plain_modes: dict[str, Any] = {"num_beams": 1, "assistant_model": None, "prompt_lookup_num_tokens": None}
    plain_modes |= {"prefill_chunk_size": None, "guidance_scale": None}
    for name, plain in plain_modes.items():
        if kwargs.setdefault(name, plain) != plain:
            raise ValueError(
                f"Hidden states are recorded in greedy decoding and sampling, not with {name}={kwargs[name]!r}."
            )
    recorder = Recorder(max_new_tokens)
    with _enabled(model):
        stock = functools.partial(super(RecontrolGenerationMixin, model).generate, max_new_tokens=max_new_tokens)  # type: ignore[misc]
        sequences = _generate(stock, model, (), {**kwargs, "return_dict_in_generate": False}, recorder)
    hidden_states = recorder.hidden_states()
    if kwargs.get("input_ids") is not None and not model.config.is_encoder_decoder:
        new_tokens = sequences.shape[1] - kwargs["input_ids"].shape[1]
        if hidden_states.shape[:2] != (sequences.shape[0], new_tokens):
            raise SteeringNotApplied(
                f"{tuple(hidden_states.shape[:2])} hidden states were recorded for {tuple(sequences.shape[:1])} rows "
                f"of {new_tokens} new tokens: this decoding mode does not make one token of each forward. Leave it out."
            )
    return sequences, hidden_states


def forward_steered(model: PreTrainedModel, controller: Controller | None, **kwargs: Any) -> Any:
    """One forward pass with the control at every position that reaches the LM head.

    Args:
        model: any transformers model with an LM head, enabled or not.
        controller: the control; None is a plain forward.
        kwargs: the forward's.

    Returns:
        What the model's forward returns.
    """
    if controller is None:
        return run_live(None, model, **kwargs)
    with _enabled(model):
        return run_live(Call(controller.edit, owner=lm_head_owner(model)), model, **kwargs)
