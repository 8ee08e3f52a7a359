"""generate(..., recontrol_value_head=…): stock generate() of any transformers model, steered by a value head."""

import functools
import types
from typing import Any

from transformers import GenerationMixin, PreTrainedModel

from .hooks import install, lm_head, uninstall
from .keywords import set_defaults
from .steering import check_forward, note_tokens, steered_generate, steered_generate_batch, steered_manager


class RecontrolGenerationMixin:
    """Adds the `recontrol_` keywords to generate(): `class MyModel(RecontrolGenerationMixin, LlamaForCausalLM)`.

    For a model that exists, use `enable_recontrol(model)`.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # signatures say which keywords a model takes, so what it has of its own is wrapped class by class
        stock = getattr(cls, "prepare_inputs_for_generation", None)
        if stock is not None:
            cls.prepare_inputs_for_generation = _noting(stock)  # type: ignore[attr-defined]
        stock = getattr(super(), "generate", None)
        if stock is not None and cls.generate is RecontrolGenerationMixin.generate:
            cls.generate = _steering(stock)  # type: ignore[method-assign]

    @functools.wraps(GenerationMixin.generate)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        return steered_generate(super().generate, self, args, kwargs)  # type: ignore[misc]

    @functools.wraps(GenerationMixin._update_model_kwargs_for_generation)
    def _update_model_kwargs_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        check_forward(self)
        return super()._update_model_kwargs_for_generation(*args, **kwargs)  # type: ignore[misc]

    @functools.wraps(GenerationMixin.heal_tokens)
    def heal_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _healed_plainly(GenerationMixin.heal_tokens, self, args, kwargs)

    @functools.wraps(GenerationMixin.generate_batch)
    def generate_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        return steered_generate_batch(super().generate_batch, self, args, kwargs)  # type: ignore[misc]

    @functools.wraps(GenerationMixin.init_continuous_batching)
    def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
        return steered_manager(super().init_continuous_batching, self, args, kwargs)  # type: ignore[misc]

    def set_recontrol_defaults(self: Any, value_head: Any = None, **defaults: Any) -> None:
        """Steer this model's generate() unless a call or its config says otherwise. Replaces earlier defaults.

        The heads are read now and registered, see `register_value_heads`; their names and the numbers go into
        `model.generation_config`, which save_pretrained writes too. Whoever loads that model must register the heads
        again: a config alone never loads one.

        Args:
            value_head: as recontrol_value_head. A head or heads from the Hub are registered by their ids; a head
                itself under a name made of its reward and weights. None, with nothing else: no defaults.
            defaults: step_size, num_steps, strength, max_kl, max_relative_norm, regularization, target_value, scale,
                strict, trace, start, start_token_id: as the keywords of generate().

        Raises:
            TypeError, ValueError, HeadError, HeadUnavailable, HeadMismatch: as generate() would. Nothing is changed.
        """
        set_defaults(self, value_head, defaults)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class was made at run time, so it is pickled as the stock class and made again
        stock = type(self).__dict__.get("_recontrol_stock_class")
        reduced = super().__reduce_ex__(protocol)
        return reduced if stock is None else (_new_enabled, (stock,), *reduced[2:])


def _steering(stock: Any) -> Any:
    """generate() with the signature and docstring that the model's class gives it: Whisper, for one, has its own."""

    @functools.wraps(stock)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        return steered_generate(super(RecontrolGenerationMixin, self).generate, self, args, kwargs)

    return generate


def _noting(stock: Any) -> Any:
    """prepare_inputs_for_generation, which every decoding loop calls before each forward with all tokens so far."""

    @functools.wraps(stock)
    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        note_tokens(args[0] if args else kwargs.get("input_ids"))  # Rag names them otherwise
        return stock(self, *args, **kwargs)

    return prepare_inputs_for_generation


def _healed_plainly(stock: Any, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """token_healing's generate() of a prompt's last token; it gets none of ours, and defaults may be turned off."""
    plain = types.SimpleNamespace(generate=functools.partial(model.generate, recontrol_value_head=False))
    return stock(plain, *args, **kwargs)


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

    Examples:
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
    inner = unwrapped(model)
    if "generate" in vars(inner):
        raise ValueError(
            f"This {type(inner).__name__} has a generate() of its own (a custom_generate repository loaded with "
            "trust_remote_code), which would pass ours by. Load the model without trust_remote_code."
        )
    if not issubclass(type(inner), GenerationMixin):
        raise ValueError(
            f"{type(inner).__name__} has no generate() of transformers' GenerationMixin, which chooses one token after "
            "another, so there is nothing to steer. This architecture is not supported."
        )
    lm_head(inner)
    if not isinstance(inner, RecontrolGenerationMixin):
        inner.__class__ = _enabled_class(type(inner))  # type: ignore[arg-type]
    install(inner)
    return model


def disable_recontrol(model: Any = None) -> Any:
    """Undo `enable_recontrol`: the stock class and no hooks. None undoes `enable_recontrol()`. Returns the model.

    Defaults stay in model.generation_config, where stock generate() ignores them; set_recontrol_defaults() clears them.
    """
    if model is None:
        for name, stock in _PATCHED.items():
            setattr(GenerationMixin, name, stock)
        _PATCHED.clear()
        return None
    inner = unwrapped(model)
    stock = vars(type(inner)).get("_recontrol_stock_class")
    if stock is not None:
        inner.__class__ = stock
    uninstall(inner)
    return model


def unwrapped(model: Any) -> Any:
    """The transformers model inside a compiled model or a PeftModel."""
    while not isinstance(model, PreTrainedModel):
        inside = getattr(model, "_orig_mod", None)  # of torch.compile
        if inside is None and hasattr(model, "get_base_model"):  # of PEFT; base_model is one level too deep
            inside = model.get_base_model()
        if inside is None:
            raise TypeError(f"enable_recontrol() takes a transformers model, not a {type(model).__name__}.")
        model = inside
    return model


_PATCHED: dict[str, Any] = {}


def _patch_generation_mixin() -> None:
    if _PATCHED:
        return
    names = (
        "generate",
        "generate_batch",
        "init_continuous_batching",
        "_update_model_kwargs_for_generation",
        "prepare_inputs_for_generation",
        "heal_tokens",
    )
    generate, generate_batch, manager, update, prepare, heal = (
        _PATCHED.setdefault(name, getattr(GenerationMixin, name)) for name in names
    )

    @functools.wraps(generate)
    def patched_generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, RecontrolGenerationMixin):  # has taken its keywords already
            return generate(self, *args, **kwargs)
        return steered_generate(functools.partial(generate, self), self, args, kwargs)

    @functools.wraps(generate_batch)
    def patched_generate_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, RecontrolGenerationMixin):
            return generate_batch(self, *args, **kwargs)
        return steered_generate_batch(functools.partial(generate_batch, self), self, args, kwargs)

    @functools.wraps(manager)
    def patched_manager(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, RecontrolGenerationMixin):
            return manager(self, *args, **kwargs)
        return steered_manager(functools.partial(manager, self), self, args, kwargs)

    @functools.wraps(update)
    def patched_update(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, RecontrolGenerationMixin):  # else it has checked already
            check_forward(self)
        return update(self, *args, **kwargs)

    @functools.wraps(heal)
    def patched_heal(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (
            heal(self, *args, **kwargs)
            if isinstance(self, types.SimpleNamespace)
            else _healed_plainly(heal, self, args, kwargs)
        )

    GenerationMixin.heal_tokens = patched_heal  # type: ignore[method-assign]
    GenerationMixin.generate = patched_generate  # type: ignore[method-assign]
    GenerationMixin.generate_batch = patched_generate_batch  # type: ignore[method-assign]
    GenerationMixin.init_continuous_batching = patched_manager  # type: ignore[method-assign]
    GenerationMixin._update_model_kwargs_for_generation = patched_update  # type: ignore[method-assign]
    GenerationMixin.prepare_inputs_for_generation = _noting(prepare)  # type: ignore[method-assign]
