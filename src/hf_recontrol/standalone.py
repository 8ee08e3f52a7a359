"""The parts that a repository's custom_generate/generate.py is put together of, by custom_generate.py.

They run where this package is not installed. Here they are code as any other; what a head fills in stands in capitals.
"""

import functools
import hashlib
import math
import os
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

    Every way of decoding, by forwards that are not compiled. The model stays as it is: other calls of it, in other
    threads or inside this one, are plain.

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
    try:
        kwargs["disable_compile"] = True  # a graph would outlive the call
        output = type(model).generate(steering.views[id(model)], **kwargs)
    finally:
        steering.views.clear()  # they are in a circle, which would keep the weights of a deleted model
    if not steering.unsound:  # nothing was edited
        raise RuntimeError("No forward pass of this model was steered. No text is returned.")
    if plain := sum(map(int, steering.unsound)):
        warnings.warn(f"{plain} hidden states were not finite when steered, and were left plain.", stacklevel=2)
    return output


def check(model: Any, kwargs: dict[str, Any]) -> None:
    """Refuse what would not be steered as it should, and warn of another base model."""
    said = [kwargs, *(vars(one) for one in (kwargs.get("generation_config"), model.generation_config) if one)]
    drafts = ("assistant_early_exit", "assistant_ensemble_weight")  # by this model, or mixed with the text
    refused = [name for name in drafts if any(one.get(name) is not None for one in said)]
    refused += [name for name in kwargs if name.startswith("recontrol_")]
    if kwargs.get("cache_implementation") == "paged":  # it runs in a thread of its own
        refused.append('cache_implementation="paged"')
    if refused:
        raise ValueError(
            f"custom_generate={REPO_ID!r} does not support {', '.join(refused)}. Leave it out; for what begins with "
            "recontrol_, use the package: pip install hf-recontrol."
        )
    lm_head = model.get_output_embeddings()
    if lm_head not in model.modules() or isinstance(lm_head, nn.Embedding | nn.ModuleList):
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
    """h ← h + u in front of the LM head of a view of the model, for one generate().

    The view is another object with the same state, one __dict__ for both. Hooks on the model itself would be seen by
    other threads, and torch reads hooks while they change.
    """

    def __init__(self, model: Any, download: dict[str, Any]):
        self.download = download
        self.fired: bool | None = None  # whether this forward has reached the LM head; None outside of forwards
        self.unsound: list[Tensor] = []  # how many hidden states each forward left as they are
        self.views: dict[int, Any] = {}
        lm_head = model.get_output_embeddings()
        around = [module for module in model.modules() if lm_head in module.modules()]
        owners = [one for one in around if isinstance(one, PreTrainedModel) and one.get_output_embeddings() is lm_head]
        runs = {lm_head: self.at_head, owners[-1]: self.forward}
        for module in reversed(around):  # from the inside
            self.views[id(module)] = self.view(module, runs.get(module))

    def view(self, module: nn.Module, run: Any) -> Any:
        """`module` with the views of what it holds; a call of it goes through `run`, if that is not None."""
        stock: Any = type(module)

        def bound(function: Any, view: Any) -> Any:  # with the signature that generate() reads
            return functools.update_wrapper(functools.partial(function, view), stock.forward.__get__(view))

        names: dict[str, Any] = {"__module__": stock.__module__, "__qualname__": stock.__qualname__}
        for name, value in {**module._modules, **vars(module)}.items():
            method = getattr(value, "_torchdynamo_orig_callable", value)
            given = [*map(id, method.args), *method.keywords] if isinstance(method, functools.partial) else []
            if id(value) in self.views:
                names[name] = property(functools.partial(lambda key, _: self.views[key], id(value)))
            elif getattr(method, "__self__", None) is module:  # kept there by torch.compile, bound to the module
                names[name] = property(method.__func__.__get__)
            elif given == [id(module)]:  # by accelerate
                names[name] = property(functools.partial(bound, method.func))
        if run is not None:
            names["__call__"] = lambda view, *args, **kwargs: run(stock.__call__.__get__(view), *args, **kwargs)
        view: Any = object.__new__(type(stock.__name__, (stock,), names))
        object.__setattr__(view, "__dict__", vars(module))
        return view

    def forward(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        self.fired = False
        outputs = call(*args, **kwargs)
        if not self.fired:
            raise RuntimeError(
                f"A forward pass of {type(call.__self__).__name__} went by its LM head, so it could not be steered. No "
                "text is returned. Was model.forward replaced? Then put the model's own back."
            )
        self.fired = None
        if math.isfinite(MAX_KL):
            base, edited = outputs.logits.chunk(2)
            outputs.logits, share = bounded(base, edited, MAX_KL)
            self.unsound.append((share == 0).sum())
        return outputs

    def at_head(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fired is None:  # a draft borrows it
            return call(*args, **kwargs)
        self.fired = True
        if args:
            return call(self.edited(args[0]), *args[1:], **kwargs)
        name = next(iter(kwargs))
        return call(**kwargs | {name: self.edited(kwargs[name])})

    @torch.no_grad()
    def edited(self, h: Tensor) -> Tensor:
        """h + u; behind h itself where the bound of the KL needs the logits of both."""
        with torch.autocast(h.device.type, enabled=False):
            x = h.to(torch.float32)
            moved = (x + control(x, weights(h.device, **self.download))).to(h.dtype)
        sound = torch.isfinite(moved).all(-1, keepdim=True)  # another row must not spoil its batch
        self.unsound.append((~sound).sum())
        moved = torch.where(sound, moved, h)
        return torch.cat([h, moved]) if math.isfinite(MAX_KL) else moved


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
