"""generate(..., recontrol_value_head=…): stock generate() of any transformers model, steered by a value head."""

import difflib
import functools
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from .control import ControlConfig, Controller
from .errors import HeadMismatch
from .hooks import Call, Recorder, install, is_installed, live_call, lm_head, model_name, run_live, uninstall
from .value_head import ValueHead

Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass(frozen=True)
class RecontrolKeywords:
    """What generate() takes besides its own keywords, each with `recontrol_` in front."""

    value_head: "ValueHead | str | os.PathLike[str] | bool | None" = None
    """The head: an id on the Hub, "id@revision", a folder (which wins over an id of the same name), or a ValueHead.
    None or False is none: stock generate()."""
    step_size: float | None = None
    """α, ≥ 0; the head's where None. 0 is no control, bit for bit."""
    num_steps: int | None = None
    """n, 0 to 1024; the head's where None. 0 is no control, bit for bit."""
    revision: str | None = None
    """Branch, tag or commit of a head on the Hub."""
    token: str | None = None
    """Access token for a head on the Hub; the stored one where None."""
    strict: bool = False
    """Whether a head trained on another base model is an error; otherwise it is a warning."""

    @classmethod
    def pop(cls, kwargs: dict[str, Any]) -> "RecontrolKeywords":
        """Take ours out of generate()'s keywords."""
        ours = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("recontrol_")}
        known = ["recontrol_" + name for name in cls.__dataclass_fields__]
        for name in ours:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                raise ValueError(f"generate() has no keyword {name!r}; the nearest is {nearest!r}. Ours: {', '.join(known)}.")
        return cls(**{name.removeprefix("recontrol_"): value for name, value in ours.items()})

    def controller(self, model: PreTrainedModel) -> Controller | None:
        """The control that was asked for, checked against the model; None where none was.

        Raises:
            TypeError, ValueError: a keyword has a wrong value, or does nothing as it stands.
            HeadError, HeadUnavailable, HeadMismatch: the head cannot be read, fetched, or used with this model.
        """
        if type(self.strict) is not bool:
            raise ValueError(f"recontrol_strict is {self.strict!r}; it must be True or False.")
        control = ControlConfig(step_size=self.step_size, num_steps=self.num_steps)
        if self.value_head is None or self.value_head is False:
            if self.value_head is None and self != RecontrolKeywords():
                raise ValueError(
                    "generate() was given recontrol_ keywords but no recontrol_value_head, so nothing would be steered. "
                    "Name a head, or leave the others out."
                )
            return None
        head = self._head()
        check_base_model(head, model, strict=self.strict)
        return Controller(head, control)

    def _head(self) -> ValueHead:
        head = self.value_head
        if isinstance(head, ValueHead):
            if self.revision is not None or self.token is not None:
                raise ValueError("recontrol_revision and recontrol_token are for a head on the Hub, but a ValueHead was given.")
            return head
        if isinstance(head, str | os.PathLike):
            return load_value_head(os.fspath(head), self.revision, self.token)
        raise TypeError(
            f"recontrol_value_head is a {type(head).__name__}; it must be an id on the Hub, a folder, a ValueHead, or False."
        )


class _HeadCache:
    """Heads already read, so that each generate() does not read again: one load each, also under threads.

    A folder is read again when its files change. A head on the Hub stays at the commit it was first resolved to.
    """

    def __init__(self, size: int = 16):
        self._size = size
        self._heads: OrderedDict[tuple[object, ...], ValueHead] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[object, ...], load: Callable[[], ValueHead]) -> ValueHead:
        with self._lock:
            if key not in self._heads:
                self._heads[key] = load()
            self._heads.move_to_end(key)
            while len(self._heads) > self._size:
                self._heads.popitem(last=False)
            return self._heads[key]


_HEADS = _HeadCache()


def load_value_head(name_or_path: str, revision: str | None = None, token: str | None = None) -> ValueHead:
    """The head of that folder or Hub id, read once per process."""
    files: tuple[object, ...] = ()
    if os.path.isdir(name_or_path):
        folder = Path(name_or_path).resolve()
        files = tuple((f.name, f.stat().st_mtime_ns, f.stat().st_size, f.stat().st_ino) for f in sorted(folder.iterdir()))
        name_or_path = str(folder)
    load = functools.partial(ValueHead.from_pretrained, name_or_path, revision=revision, token=token)
    return _HEADS.get((name_or_path, revision, token, files), load)


def check_base_model(head: ValueHead, model: PreTrainedModel, *, strict: bool = False) -> None:
    """Refuse a head of another width; warn of a head of another base model, or refuse it where `strict`.

    Raises:
        HeadMismatch: names both sides.
    """
    name = model_name(model)
    width = getattr(lm_head(model), "in_features", None) or model.config.get_text_config().hidden_size
    head.check_width(width, repr(name or type(model).__name__))
    trained_on = (head.config.base_model_name_or_path, head.config.base_model_type)
    used_on = (name, model.config.model_type)
    same = all(ours == theirs for ours, theirs in zip(trained_on, used_on, strict=True) if ours and theirs)
    if strict and (None in (trained_on[0], name) or not same):
        raise HeadMismatch(
            f"The value head was trained on {trained_on[0]!r} ({trained_on[1]}), this model is {name!r} ({used_on[1]}), and "
            "recontrol_strict asks for the same. Use the head's own base model, or leave recontrol_strict out."
        )
    if not same:
        warnings.warn(
            f"The value head was trained on {trained_on[0]!r} ({trained_on[1]}) but steers {name!r} ({used_on[1]}); its "
            "values may mean nothing there. Silence this with warnings.filterwarnings if the two share their weights.",
            UserWarning,
            stacklevel=5,
        )


def _refuse_unread_config(kwargs: dict[str, Any], model: PreTrainedModel, keywords: RecontrolKeywords) -> None:
    """A generation config that names a head or a strength is data, maybe a stranger's: never obeyed, never ignored."""
    if keywords.value_head is False:
        return
    for where, config in (("generation_config", kwargs.get("generation_config")), ("model's", model.generation_config)):
        found = [name for name in vars(config or GenerationConfig()) if name.startswith("recontrol_")]
        if found:
            raise ValueError(
                f"The {where} generation config has {found[0]!r}. A config cannot choose what is loaded: pass it to "
                "generate() as a keyword, or pass recontrol_value_head=False for plain text."
            )


class RecontrolGenerationMixin:
    """Adds the `recontrol_` keywords to generate(). Put it in front: `class M(RecontrolGenerationMixin, LlamaForCausalLM)`.

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
        if any(name.startswith("recontrol_") for name in kwargs):
            raise ValueError("generate_batch() cannot be steered: it runs in a thread of its own. Use generate().")
        return super().generate_batch(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class was made at run time, so it is pickled as the stock class and made again
        stock = type(self).__dict__.get("_recontrol_stock_class")
        reduced = super().__reduce_ex__(protocol)
        return reduced if stock is None else (_new_enabled, (stock,), *reduced[2:])


def _generate(
    stock: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], recorder: Recorder | None = None
) -> Any:
    keywords = RecontrolKeywords.pop(kwargs)
    call = None
    # assisted decoding runs the draft with a copy of the target's config: drafts are plain, the target's forward decides
    if not getattr(kwargs.get("generation_config"), "is_assistant", False):
        _refuse_unread_config(kwargs, model, keywords)
        controller = keywords.controller(model)
        if controller is not None or recorder is not None:
            call = Call(None if controller is None else controller.edit, recorder)
            if not is_installed(model):
                install(model)
    result = run_live(call, stock, *args, **kwargs)
    if call is not None and call.unsound is not None and int(call.unsound):
        warnings.warn(
            f"{int(call.unsound)} hidden states were not finite, or would not have been after the edit, and were left "
            "unedited; those tokens are unguided. Is the model's dtype too narrow, or the step size huge?",
            UserWarning,
            stacklevel=3,
        )
    return result


def _check_forward() -> None:
    call = live_call()
    if call is not None:
        call.check()


@functools.cache
def _enabled_class(stock: type) -> type:
    """A subclass of the model's class with our mixin in front, and the stock name.

    Pipelines, saved configs and servers go by the class's name; generate() takes its decoding methods from the class.
    """
    names = {name: getattr(stock, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(stock.__name__, (RecontrolGenerationMixin, stock), {**names, "_recontrol_stock_class": stock})


def _new_enabled(stock: type) -> Any:
    enabled = _enabled_class(stock)
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
        inner.__class__ = _enabled_class(type(inner))
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
        inside = getattr(model, "_orig_mod", None) or getattr(model, "base_model", None) or getattr(model, "model", None)
        if inside is None:
            raise TypeError(f"enable_recontrol() takes a transformers model, not a {type(model).__name__}.")
        model = inside
    return model


_PATCHED: dict[str, Any] = {}


def _patch_generation_mixin() -> None:
    if _PATCHED:
        return
    generate = _PATCHED["generate"] = GenerationMixin.generate
    update = _PATCHED["_update_model_kwargs_for_generation"] = GenerationMixin._update_model_kwargs_for_generation

    @functools.wraps(generate)
    def patched_generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, RecontrolGenerationMixin):  # has taken its keywords already
            return generate(self, *args, **kwargs)
        return _generate(functools.partial(generate, self), self, args, kwargs)

    @functools.wraps(update)
    def patched_update(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, RecontrolGenerationMixin):  # else it has checked already
            _check_forward()
        return update(self, *args, **kwargs)

    GenerationMixin.generate = patched_generate  # type: ignore[method-assign]
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
    for name, plain in {"num_beams": 1, "assistant_model": None, "prompt_lookup_num_tokens": None}.items():
        if kwargs.setdefault(name, plain) != plain:
            raise ValueError(f"Hidden states are recorded in greedy decoding and sampling, not with {name}={kwargs[name]!r}.")
    recorder = Recorder(max_new_tokens)
    with _enabled(model):
        stock = functools.partial(super(RecontrolGenerationMixin, model).generate, max_new_tokens=max_new_tokens)  # type: ignore[misc]
        sequences = _generate(stock, model, (), {**kwargs, "return_dict_in_generate": False}, recorder)
    return sequences, recorder.hidden_states()


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
        return run_live(Call(controller.edit), model, **kwargs)
