"""Where h_t is: the input of the LM head. The only seam with the models.

A model gets three permanent hooks, inert unless a `Call` is live in this thread: around the forward of the model that
owns the LM head, and in front of the LM head. Rejected: hooks added and removed with each call (two threads on one
model mix, and a graph compiled before ignores them), a ContextVar (Dynamo cannot trace it), a LogitsProcessor (h is
gone when it runs).
"""

import os
import threading
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .calls import live_call


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
        if call.reads_logits:
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


def hidden_width(model: PreTrainedModel) -> int:
    """Of the hidden states that its LM head reads: what a head's hidden_size must be."""
    return int(getattr(lm_head(model), "in_features", None) or model.config.get_text_config().hidden_size)


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
