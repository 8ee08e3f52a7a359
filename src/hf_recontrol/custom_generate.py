"""custom_generate/generate.py of a head's repository: steered text for who has transformers and not this package.

`model.generate(custom_generate="user/head", trust_remote_code=True)` runs it. It does what the head does by default: of
both kinds and all shapes of head, at their own scale or step size, or at the strength of their calibration, and within
max_kl. What a head may ask for beyond that is refused before anything is sent.
"""

import inspect
import json
import math
from typing import Any

from . import kl_bound, standalone
from .activations import ACTIVATION_AND_SLOPE
from .control_config import ControlConfig, multiplier_for, step_size_for
from .errors import HeadError
from .head_config import HeadConfig, SteeringDefaults

GENERATE_NAME = "custom_generate/generate.py"
MAX_ROWS = 2**14
"""Of W₁: the product of its rows takes 1 GiB then."""

_TOP = '''"""Steered text: model.generate(..., custom_generate={repo_id}, trust_remote_code=True).

It changes no weight, and needs transformers alone. hf_recontrol {version} wrote it, and has all other options:
model.generate(..., recontrol_value_head={repo_id}). The method is RE-Control, arXiv:2406.05954.
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

REPO_ID = {repo_id}
REVISION = {revision}  # the commit of the weights
SHA256 = {sha256}
BASE_MODEL = {base_model}
HIDDEN_SIZE = {hidden_size}
{control}
MAX_KL = {max_kl}  # nats, of each token from the model's own choice
'''
_EVERY = (standalone.generate, standalone.check, standalone.weights, standalone.layers_of, standalone.Steering)
_OF_A_KIND: dict[str, tuple[Any, ...]] = {
    "control": (standalone.control_of_control_head,),
    "value": (standalone.control_of_value_head, standalone.step),
}
_BELT = "# The bound of the KL.\n\nSTEPS, TOLERANCE, ELEMENTS_AT_ONCE = {STEPS}, {TOLERANCE}, {ELEMENTS_AT_ONCE}\n"
_OF_THE_BELT = ("bounded", "_bounded", "_share", "_largest", "_miss", "_kl_at")


def check_can_stand_alone(config: HeadConfig) -> None:
    """Refuse a head of which a generate.py would do something else than the head by default.

    Raises:
        HeadError: names the option.
    """
    _constants(config)


def standalone_generate(
    config: HeadConfig, *, repo_id: str, revision: str, sha256: str, base_model: str | None, version: str | None
) -> str:
    """The text of generate.py.

    Args:
        config: the head's.
        revision: the commit in which its weights are.
        sha256: of model.safetensors there.
        base_model: its id on the Hub, if it has one.
        version: of this package.
    """
    constants, max_kl = _constants(config)
    assigned = "\n".join(f"{name} = {value!r}" for name, value in constants.items())
    top = _TOP.format(
        repo_id=json.dumps(repo_id),
        revision=json.dumps(revision),
        sha256=json.dumps(sha256),
        base_model=json.dumps(base_model) if base_model else None,
        hidden_size=config.hidden_size,
        control=assigned,
        max_kl='float("inf")' if math.isinf(max_kl) else repr(max_kl),
        version=version or "",
    )
    _, slope = ACTIVATION_AND_SLOPE[config.hidden_act]
    name = f"torch.{config.hidden_act}" if config.hidden_act in ("relu", "tanh") else f"functional.{config.hidden_act}"
    parts = [top, *map(inspect.getsource, (*_EVERY, *_OF_A_KIND[config.kind]))]
    if config.kind == "value":
        parts += [inspect.getsource(slope), f"activation, slope = {name}, {slope.__name__}\n"]
    else:
        parts.append(f"activation = {name}\n")
    parts += [_BELT.format(**vars(kl_bound)), *(inspect.getsource(vars(kl_bound)[one]) for one in _OF_THE_BELT)]
    return "\n\n".join(parts).replace(f"def control_of_{config.kind}_head(", "def control(")


def _constants(config: HeadConfig) -> tuple[dict[str, float], float]:
    """What the head's defaults make of the constants of its kind, and max_kl, inf where there is none."""
    defaults: Any = config.control
    for name, plain in (("max_relative_norm", None), ("regularization", 0), ("target_value", None)):
        if (value := getattr(defaults, name, plain)) not in (plain, math.inf):
            raise HeadError(
                f"The head's config has control.{name} = {value!r}, which custom_generate does not support. Set "
                f"head.config.control.{name} = {plain!r}, or push without custom_generate."
            )
    said = ControlConfig().over_heads([defaults])
    max_kl = math.inf if said.max_kl is None else float(said.max_kl)
    constants = _of_an_ascent(config, said) if config.kind == "value" else {"SCALE": _scale(defaults, said)}
    if 0 in constants.values():
        raise HeadError(
            f"The head's defaults do not steer ({constants}), so its custom_generate would give plain text. Calibrate "
            "it, set head.config.control, or push without custom_generate."
        )
    return constants, max_kl


def _scale(defaults: SteeringDefaults, said: ControlConfig) -> float:
    return float(said.scale or 0.0) if said.strength is None else multiplier_for(said.strength, defaults.calibration)


def _of_an_ascent(config: HeadConfig, said: ControlConfig) -> dict[str, float]:
    steps, defaults = int(said.num_steps or 0), config.control
    if config.num_hidden_layers and config.width > MAX_ROWS:
        raise HeadError(
            f"The head's hidden layers are {config.width} wide; custom_generate supports {MAX_ROWS} at most. Push "
            "without it."
        )
    alpha = float(said.step_size or 0.0)
    if said.strength is not None:
        alpha = step_size_for(said.strength, defaults, steps)  # type: ignore[arg-type]  # a value head's
    return {"STEP_SIZE": alpha, "NUM_STEPS": steps}
