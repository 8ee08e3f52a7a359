"""Several heads as one: a weighted sum is a wider head of the same kind."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .config_checks import MAX_STRING
from .control import Controller
from .control_config import ControlConfig
from .errors import HeadMismatch
from .head import Head
from .head_config import ControlDefaults, RewardScale, ScaleDefaults, SteeringDefaults

H = TypeVar("H", bound=Head)
SAME = ("kind", "hidden_size", "num_hidden_layers")
OPTIONAL = ("base_model_name_or_path", "base_model_type")


@torch.no_grad()
def merge_heads(
    heads: Mapping[H, float], config: ControlConfig | None = None, *, names: Sequence[str] | None = None
) -> H:
    """One head that steers as `recontrol_value_head={head: weight, …}` does: V = Σ wᵢVᵢ, or f = Σ wᵢfᵢ.

    The hidden layers stand side by side, block by block, and the inputs are standardised as those of the first head; so
    the sum is exact, up to rounding in float32. Where the heads' own step sizes or scales differ, as calibrated ones
    do, wᵢ is also multiplied by the head's own over their mean, so that each pushes as hard, times its weight, as it
    would alone. The merged head is not calibrated: a strength needs `hf-recontrol tune --calibrate` first.

    Args:
        heads: value heads or control heads, of as many hidden layers with the same activation and for one base model;
            control heads without a hidden layer may be of any rank. A negative weight steers away.
        config: how hard, as for a Controller; the heads' own where None.
        names: what each is called, for the card; its reward where None.

    Returns:
        A new head, in float32, with as many rows in a hidden layer as all heads together.

    Raises:
        HeadMismatch: they differ in kind, shape, activation or base model.
        ValueError: as a Controller raises; a target_value, which is of one reward alone.
        HeadError: the merged head would be too large.
    """
    controller = Controller(dict[Head, float](heads.items()), config)
    found = list(heads)
    _check_same(found)
    if controller.config.target_value is not None:
        raise ValueError("target_value is of one reward alone, so it cannot be merged. Set it to None in the head.")
    own = [controller.multipliers[head] for head in found]
    mean = own[0] if len(set(own)) == 1 else math.fsum(own) / len(own)
    weights = [heads[head] * (one / mean if mean else 1.0) for head, one in zip(found, own, strict=True)]
    names = names or [head.config.reward.name for head in found]
    first = found[0].config
    merged = type(found[0])(
        type(first)(
            hidden_size=first.hidden_size,
            num_hidden_layers=first.num_hidden_layers,
            hidden_act=first.hidden_act,
            control=_defaults(controller, mean),
            reward=_reward(found, weights),
            info=_info(found, weights, names),
            **_width(found),
            **{name: _common(found, name) for name in (*OPTIONAL, "base_model_revision")},
        )
    )
    tensors = _summed(found, weights, merged)
    merged.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=True)
    return merged.eval()


def _check_same(heads: Sequence[Head]) -> None:
    for name in (*SAME, *OPTIONAL, *(["hidden_act"] if heads[0].config.num_hidden_layers else [])):
        values = {getattr(head.config, name) for head in heads}
        if len(values - {None} if name in OPTIONAL else values) > 1:
            raise HeadMismatch(
                f"The heads differ in {name}: {sorted(map(str, values))}. Heads that are merged have it in common; "
                "unmerged, generate() takes them as recontrol_value_head={head: weight}."
            )


def _common(heads: Sequence[Head], name: str) -> Any:
    """What all heads say that say something; of a revision what all say."""
    values = {getattr(head.config, name) for head in heads}
    values = values - {None} if name in OPTIONAL else values
    return values.pop() if len(values) == 1 else None


def _defaults(controller: Controller, multiplier: float) -> SteeringDefaults:
    said = controller.config
    bounds = {name: getattr(said, name) for name in ("max_kl", "max_relative_norm")}
    bounds = {name: None if value == math.inf else value for name, value in bounds.items()}
    if said.num_steps is None:  # control heads
        return ScaleDefaults(scale=multiplier, **bounds)
    regularization = float(said.regularization or 0.0)
    return ControlDefaults(
        step_size=multiplier, num_steps=controller.num_steps, regularization=regularization, **bounds
    )


def _reward(heads: Sequence[Head], weights: Sequence[float]) -> RewardScale:
    """That of the sum, whose parts are in standard deviations; the heads' own, if they share it and this is a mean."""
    scales = [head.config.reward for head in heads]
    if all(scale == scales[0] for scale in scales) and math.isclose(math.fsum(weights), 1.0):
        return RewardScale(scales[0].name, scales[0].mean, scales[0].std)
    terms = [f"{weight:.4g} × {scale.name}" for weight, scale in zip(weights, scales, strict=True)]
    return RewardScale((" + ".join(terms) + ", each standardised")[:MAX_STRING])


def _info(heads: Sequence[Head], weights: Sequence[float], names: Sequence[str]) -> dict[str, Any]:
    """What the card says: of what it was merged, and the licence that all of them have."""
    info: dict[str, Any] = {"merged": [[name, weight] for name, weight in zip(names, weights, strict=True)]}
    for name in ("license", "language"):
        said = [head.config.info.get(name) for head in heads]
        if said[0] is not None and all(one == said[0] for one in said):
            info[name] = said[0]
    return info


def _width(heads: Sequence[Head]) -> dict[str, Any]:
    """The fields of the config that say how many rows the merged head has."""
    if heads[0].config.num_hidden_layers:
        return {"intermediate_size": sum(head.config.width for head in heads)}
    ranks = [getattr(head.config, "rank", None) for head in heads]
    if heads[0].config.kind == "value":
        return {}
    known = [rank for rank in ranks if rank is not None]
    total = sum(known)
    return {"rank": total if len(known) == len(ranks) and total <= heads[0].config.hidden_size else None}


def _summed(heads: Sequence[Head], weights: Sequence[float], merged: Head) -> dict[str, Tensor]:
    """The tensors of the merged head, in float64."""
    wide = [{name: tensor.double().cpu() for name, tensor in head.state_dict().items()} for head in heads]
    inputs_and_outputs = ("input_mean", "input_std", "output_scale")
    tensors = {name: wide[0][name] for name in inputs_and_outputs if name in wide[0]}
    parts = [_Part(one, tensors, weight) for one, weight in zip(wide, weights, strict=True)]
    depth = len(merged.config.widths) - 1
    if depth == 1:  # linear
        products = [part.product() for part in parts if part.layers]
        tensors["layers.0.weight"] = torch.stack(products).sum(0)
    elif depth:
        stacks = list(zip(*[part.layers for part in parts if part.layers], strict=True))
        for i, blocks in enumerate(stacks):
            joined = torch.block_diag(*blocks)
            if i == 0:
                joined = torch.cat(blocks)
            elif i == depth - 1:
                joined = torch.cat(blocks, -1)
            tensors[f"layers.{i}.weight"] = joined
    for i in range(merged.config.num_hidden_layers):
        tensors[f"layers.{i}.bias"] = torch.cat([part.biases[i] for part in parts])
    name = "bias" if "bias" in wide[0] else f"layers.{depth - 1}.bias"
    tensors[name] = torch.stack([part.constant for part in parts]).sum(0)
    return tensors


class _Part:
    """One head of a sum: constant + last · σ(… first · x + b), for the merged head's x, times its weight."""

    def __init__(self, tensors: Mapping[str, Tensor], merged: Mapping[str, Tensor], weight: float):
        count = sum(name.endswith(".weight") for name in tensors)
        self.layers = [tensors[f"layers.{i}.weight"] for i in range(count)]
        self.biases = [tensors[name] for i in range(count) if (name := f"layers.{i}.bias") in tensors]
        self.constant = tensors["bias"] if "bias" in tensors else self.biases.pop()
        if self.layers:
            shift = self.layers[0] @ ((merged["input_mean"] - tensors["input_mean"]) / tensors["input_std"])
            self.layers[0] = self.layers[0] * (merged["input_std"] / tensors["input_std"])
            if self.biases:
                self.biases[0] = self.biases[0] + shift
            else:
                self.constant = self.constant + (shift if count == 1 else self.layers[1] @ shift)
            unit = _unit(tensors, merged, weight, self.constant)
            self.layers[-1] = unit.unsqueeze(-1) * self.layers[-1]
        self.constant = _unit(tensors, merged, weight, self.constant) * self.constant

    def product(self) -> Tensor:
        """Of a head without hidden layers, as one matrix."""
        return self.layers[0] if len(self.layers) == 1 else self.layers[1] @ self.layers[0]


def _unit(tensors: Mapping[str, Tensor], merged: Mapping[str, Tensor], weight: float, like: Tensor) -> Tensor:
    """What multiplies each output: the weight, in the merged head's units of u."""
    if "output_scale" not in tensors:
        return torch.full_like(like, weight)
    return weight * tensors["output_scale"] / merged["output_scale"]
