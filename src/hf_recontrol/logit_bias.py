"""A constant control as a bias on the logits: for engines that know biases and no hidden states."""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .control import Controller
from .control_config import ControlConfig
from .control_head import ControlHead
from .forwards import logits_of
from .head import Head

PROBE = 100.0
"""Logits as large as this show what a model does to its LM head's output, a soft-cap, say."""


@torch.no_grad()
def logit_bias(head: Head | Mapping[Head, float], model: Any, config: ControlConfig | None = None) -> Tensor:
    """b = W u: what a control that is one vector for every token adds to the logits, float32 (vocabulary,).

    Constant are linear value heads and control heads of rank 0, with no target value and no max_relative_norm. Adding b
    to the logits, before temperature, gives the distribution of the steered model without max_kl: a bias knows no bound
    of the KL, cannot begin later, and is of this model alone.

    Args:
        head: as for a Controller.
        model: the language model, enabled or not.
        config: how hard; the heads' own where None. `ControlConfig(max_kl=float("inf"))` says that no bound is wanted.

    Raises:
        ValueError: a control that depends on the hidden state, or a model that does more to its LM head's output than
            to multiply it by a constant, such as a soft-cap.
        HeadMismatch: the head is of another width.

    Examples:
        In OpenAI's API and vLLM b is a `logit_bias` (`save_logit_bias` writes it), in transformers a `sequence_bias`:

            model.generate(**inputs, sequence_bias={(i,): value for i, value in enumerate(bias.tolist())})

        With beams also renormalize_logits=True, since these add it to log-probabilities.
    """
    controller = Controller(head, config)
    _check_constant(controller)
    if controller.max_kl is not None:
        warnings.warn(
            f"max_kl is {controller.max_kl:g} nats, which a bias cannot hold: some tokens may be moved further. To "
            'silence this, pass ControlConfig(max_kl=float("inf")).',
            stacklevel=3,  # past no_grad
        )
    width = controller.heads[0].config.hidden_size
    u = controller.control(torch.zeros(1, width, device=model.device))
    bias = _difference(model, u)
    factor = PROBE / bias.abs().max().clamp_min(1e-30)
    probe = _difference(model, factor * u) - factor * bias
    if not probe.abs().max() <= 0.05 * PROBE:
        raise ValueError(
            f"The logits of this {type(model).__name__} do not grow with the control (a soft-cap, say), so no constant "
            "bias does what the head does. Steer it by generate(..., recontrol_value_head=…)."
        )
    return bias


def _difference(model: Any, u: Tensor) -> Tensor:
    plain, edited = logits_of(model, torch.cat([torch.zeros_like(u), u])).float().unbind()
    return edited - plain


def _check_constant(controller: Controller) -> None:
    for head in controller.heads:
        rank = getattr(head.config, "rank", None)
        if head.config.num_hidden_layers or (isinstance(head, ControlHead) and rank != 0):
            raise ValueError(
                f"The {head.config.kind} head's control depends on the hidden state, so it is no constant bias. "
                "Constant are linear value heads (num_hidden_layers=0) and control heads of rank 0: fit_linear_head, "
                "fit_constant_control."
            )
    for name in ("target_value", "max_relative_norm"):
        if (value := getattr(controller.config, name)) not in (None, float("inf")):
            raise ValueError(f"{name} is {value}, which depends on the hidden state. Leave it out for a constant bias.")


def save_logit_bias(bias: Tensor, path: str | os.PathLike[str]) -> None:
    """Write a bias: .json, {token id: bias}, as logit_bias in OpenAI's API and vLLM; or .safetensors, a tensor `bias`.

    Raises:
        ValueError: another ending.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        save_file({"bias": bias.detach().cpu().contiguous()}, path, metadata={"format": "pt"})
    elif path.suffix == ".json":
        entries = {str(i): float(f"{value:.6g}") for i, value in enumerate(bias.tolist())}
        path.write_text(json.dumps(entries) + "\n", encoding="utf-8")
    else:
        raise ValueError(f"The bias is to be written to {str(path)!r}; the name must end in .json or .safetensors.")
