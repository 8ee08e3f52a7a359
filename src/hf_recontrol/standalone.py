"""The parts that a repository's custom_generate/generate.py is put together of, by custom_generate.py.

They run where this package is not installed. Here they are code as any other; what a head fills in stands in capitals.
"""

import functools
import hashlib
import math
import os
import threading
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from .activations import relu_slope
from .kl_bound import bounded

REPO_ID, REVISION, SHA256 = "user/head", "main", ""
BASE_MODEL: str | None = None
HIDDEN_SIZE, SCALE, STEP_SIZE, NUM_STEPS, MAX_KL = 1, 1.0, 1.0, 1, float("inf")
activation, slope = torch.relu, relu_slope


def generate(model: Any, **kwargs: Any) -> Any:
    """model.generate(**kwargs), with h + u in the place of each hidden state h that the LM head reads.

    Every way of decoding that forwards the model in the calling thread, without torch.compile. Calls of other threads
    stay as they are.

    Raises:
        ValueError: an option or a model that is not supported; files that are not those of this head.
        RuntimeError: a forward pass could not be steered. No text is returned.
    """
    names = ("token", "cache_dir", "local_files_only", "force_download")
    download: dict[str, Any] = {name: kwargs.pop(name) for name in names if name in kwargs}
    kwargs.pop("revision", None)  # of this file, which knows that of the weights
    check(model, kwargs)
    weights(model.device, **download)  # what cannot be had is said before the work
    steering = Steering(model, download)
    hooks = steering.hooks()
    try:
        # a graph compiled with the hooks would outlive them
        output = type(model).generate(model, **kwargs, disable_compile=True)
    finally:
        steering.over = True
        for hook in hooks:
            hook.remove()
    steering.finish()
    return output


def check(model: Any, kwargs: dict[str, Any]) -> None:
    """Refuse what would not be steered as it should, and warn of another base model."""
    kwargs.pop("disable_compile", None)
    configs = (kwargs.get("generation_config"), model.generation_config)
    for name in ("assistant_early_exit", "assistant_ensemble_weight"):  # drafts by this model, or mixed with the text
        said = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
        if any(value is not None for value in said):
            raise ValueError(f"custom_generate={REPO_ID!r} does not support {name}. Leave it out.")
    if ours := sorted(name for name in kwargs if name.startswith("recontrol_")):
        raise ValueError(
            f"custom_generate={REPO_ID!r} steers as this head does by default, without {', '.join(ours)}. Leave them "
            "out, or use the package: pip install hf-recontrol."
        )
    lm_head = model.get_output_embeddings()
    if not isinstance(lm_head, nn.Module) or isinstance(lm_head, nn.Embedding | nn.ModuleList):
        raise ValueError(f"{type(model).__name__} has no LM head that maps hidden states to logits, as steering needs.")
    width = getattr(lm_head, "in_features", None) or model.config.get_text_config().hidden_size
    if width != HIDDEN_SIZE:
        raise ValueError(
            f"The head {REPO_ID!r} reads hidden states {HIDDEN_SIZE} wide, but those of this model are {width} wide. "
            f"Use it with {BASE_MODEL or 'the model that it was trained on'}."
        )
    name = model.config._name_or_path
    if BASE_MODEL is not None and name not in ("", None, BASE_MODEL) and not os.path.isdir(name):
        warnings.warn(f"The head {REPO_ID!r} was trained on {BASE_MODEL!r}; this model is {name!r}.", stacklevel=2)


@functools.cache
def weights(device: torch.device, **download: Any) -> dict[str, Tensor]:
    """The head's tensors, float32, of the commit and with the hash that this file was written for."""
    data = Path(hf_hub_download(REPO_ID, "model.safetensors", revision=REVISION, **download)).read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise ValueError(f"model.safetensors of {REPO_ID!r} is damaged. Pass force_download=True once.")
    return {name: tensor.to(device, torch.float32) for name, tensor in load(data).items()}


def layers_of(tensors: dict[str, Tensor]) -> list[tuple[Tensor, Tensor | None]]:
    """(weight, bias) of each layer."""
    names = sorted(name.removesuffix(".weight") for name in tensors if name.endswith(".weight"))
    return [(tensors[f"{name}.weight"], tensors.get(f"{name}.bias")) for name in names]


class Steering:
    """h ← h + u in front of the LM head, in one thread and in the model's own forwards, for one generate()."""

    def __init__(self, model: Any, download: dict[str, Any]):
        self.lm_head = model.get_output_embeddings()
        inside = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
        self.owner = [module for module in inside if module.get_output_embeddings() is self.lm_head][-1]
        self.download, self.thread, self.over = download, threading.get_ident(), False
        self.inside = self.fired = self.ever = False
        self.unsound: dict[torch.device, Tensor] = {}  # hidden states left as they are, on each device

    def hooks(self) -> list[Any]:
        return [
            self.owner.register_forward_pre_hook(self.before_forward, prepend=True),
            self.lm_head.register_forward_pre_hook(self.at_head, with_kwargs=True, prepend=True),
            self.owner.register_forward_hook(self.after_forward),
        ]

    def before_forward(self, module: nn.Module, args: Any) -> None:
        if threading.get_ident() == self.thread:
            self.inside, self.fired = True, False

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def at_head(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self.over or not self.inside or threading.get_ident() != self.thread:
            return None
        self.fired = True
        if args:
            return (self.edited(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: self.edited(kwargs[name])}

    @torch.no_grad()
    def edited(self, h: Tensor) -> Tensor:
        """h + u; behind h itself where the bound of the KL needs the logits of both."""
        with torch.autocast(h.device.type, enabled=False):
            x = h.to(torch.float32)
            moved = (x + control(x, weights(h.device, **self.download))).to(h.dtype)
        sound = torch.isfinite(moved).all(-1, keepdim=True)  # another row must not spoil its batch
        self.count(~sound)
        moved = torch.where(sound, moved, h)
        return torch.cat([h, moved]) if math.isfinite(MAX_KL) else moved

    def after_forward(self, module: nn.Module, args: Any, outputs: Any) -> None:
        if threading.get_ident() != self.thread:
            return
        if not self.fired:
            raise RuntimeError(f"A forward pass of {type(module).__name__} could not be steered; is it compiled?")
        self.inside, self.ever = False, True
        if math.isfinite(MAX_KL):
            base, edited = outputs.logits.chunk(2)
            outputs.logits, share = bounded(base, edited, MAX_KL)
            self.count(share == 0)

    def count(self, unsound: Tensor) -> None:
        self.unsound[unsound.device] = self.unsound.get(unsound.device, 0) + unsound.sum()

    def finish(self) -> None:
        if not self.ever:
            raise RuntimeError("No forward pass of this model was steered in this thread. No text is returned.")
        if plain := sum(int(count) for count in self.unsound.values()):
            warnings.warn(f"{plain} hidden states were not finite when steered, and were left plain.", stacklevel=3)


def control(h: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """u of a control head; overwritten by the kind's own."""
    raise NotImplementedError


def control_of_control_head(h: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """u = SCALE · output_scale ∘ (bias + f(x)), x = (h − input_mean) / input_std."""
    x = (h - tensors["input_mean"]) / tensors["input_std"]
    layers = layers_of(tensors)
    for weight, bias in layers:
        x = functional.linear(x, weight, bias)
        if bias is not None:  # a hidden layer; the last one, and one of low rank, have none
            x = activation(x)
    u = x + tensors["bias"] if layers else tensors["bias"].expand_as(x)
    return SCALE * (tensors["output_scale"] * u)


def control_of_value_head(h: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """u ← u + STEP_SIZE · ∇V(h + u), NUM_STEPS times from u = 0.

    V sees h as z = W₁x + b₁ alone, x = (h − input_mean) / input_std. So the steps run in z, and u = W₁ᵀc / input_std.
    """
    (first, bias), *others = layers_of(tensors)
    rows = first / tensors["input_std"]
    if "gram" not in tensors:
        tensors["gram"] = rows @ rows.T
    z = functional.linear((h - tensors["input_mean"]) / tensors["input_std"], first, bias)
    p, c = torch.zeros_like(z), torch.zeros_like(z)
    for _ in range(NUM_STEPS):
        s = step(z + p, others)
        p, c = p + s @ tensors["gram"], c + s
    return c @ first / tensors["input_std"]


def step(z: Tensor, layers: list[tuple[Tensor, Tensor | None]]) -> Tensor:
    """STEP_SIZE · ∂V/∂z, by the chain rule backwards through the layers behind the first."""
    inputs = [z]
    for weight, bias in layers[:-1]:
        inputs.append(functional.linear(activation(inputs[-1]), weight, bias))
    s = torch.full_like(z[..., :1], STEP_SIZE)
    for x, (weight, _) in zip(reversed(inputs), reversed(layers), strict=False):
        s = s @ weight * slope(x)
    return s
