"""What a head's config.json may say: a closed, typed, bounded set of fields. Anything else is refused."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import Any, Self

from .errors import HeadError

FORMAT_VERSION = 1
ACTIVATIONS = ("relu", "silu", "gelu", "tanh")
MAX_WIDTH = 2**20
MAX_PARAMETERS = 2**28
MAX_STEPS = 1024
MAX_CALIBRATION = 32
MAX_STRING = 512
MAX_INFO_BYTES = 16 * 1024


@dataclass
class ControlDefaults:
    """The control a head is used with when generate() is given no other, and the table that strengths are read from."""

    step_size: float = 0.5
    """α, in hidden-state units per unit of ∇V (V in standard deviations of the reward); ≥ 0, 0 is no control."""
    num_steps: int = 30
    """n, the steps of ascent at each token, 0 to 1024; 0 is no control. 0.5 and 30: the paper's Vicuna on HH-RLHF."""
    strength: float | None = None
    """Mean KL per token in nats, > 0; picks α from the calibration in place of step_size. None: step_size counts."""
    max_kl: float | None = None
    """No token's KL above it, nats, > 0. None: 4 × the strength where there is one, else no bound."""
    max_relative_norm: float | None = None
    """‖u‖ at most this share of ‖h‖, > 0. None: no bound."""
    regularization: float = 0.0
    """λ ≥ 0 of the penalty λ‖u‖² on the control."""
    target_value: float | None = None
    """Value to steer to, from either side, in raw units of the reward. None: as high as the steps reach."""
    calibration: list[list[float]] = field(default_factory=list)
    """Pairs [mean KL per token in nats, step_size that gives it], both rising, at most 32. The KL is measured on the
    base model's own states with each token held at 4 × the mean; empty: not calibrated."""
    calibration_num_steps: int | None = None
    """n that the calibration was made at, 1 to 1024; num_steps where None."""


@dataclass
class RewardScale:
    """The reward that V predicts: V is in units of (reward − mean) / std."""

    name: str = "reward"
    """What the reward function is called."""
    mean: float = 0.0
    """Mean of the raw reward over the training rollouts."""
    std: float = 1.0
    """Standard deviation of the raw reward over the training rollouts; > 0."""


@dataclass
class ValueHeadConfig:
    """What V computes, and for which model; the whole of config.json."""

    hidden_size: int
    """Width of the hidden states that V reads: the base model's LM-head input."""
    intermediate_size: int | None = None
    """Width of the hidden layers; hidden_size where None."""
    num_hidden_layers: int = 1
    """0 (linear: its control is one constant vector), 1 or 2."""
    hidden_act: str = "relu"
    """relu, silu, gelu (the exact one) or tanh."""
    base_model_name_or_path: str | None = None
    """The model whose hidden states V was trained on."""
    base_model_revision: str | None = None
    """The commit of that model."""
    base_model_type: str | None = None
    """That model's config.model_type."""
    reward: RewardScale = field(default_factory=RewardScale)
    control: ControlDefaults = field(default_factory=ControlDefaults)
    info: dict[str, Any] = field(default_factory=dict)
    """Free description, at most 16 KiB of JSON: figures of the training run, notes. Never interpreted."""
    kind: str = "value"
    format_version: int = FORMAT_VERSION
    weights_sha256: str | None = None
    """SHA-256 of model.safetensors, written when the head is saved and checked when it is loaded."""
    hf_recontrol_version: str | None = None
    """The version of this package that wrote the head."""

    def __post_init__(self) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = self.hidden_size
        self.validate()

    @property
    def width(self) -> int:
        """intermediate_size, known to be set."""
        assert self.intermediate_size is not None  # for the type checker: __post_init__ has set it
        return self.intermediate_size

    def validate(self) -> None:
        """Check every field against its type and bounds.

        Raises:
            HeadError: names the field, its value, and what is allowed.
        """
        version = self.format_version
        if type(version) is not int or version != FORMAT_VERSION:
            _refuse("format_version", version, f"{FORMAT_VERSION}; another needs another release of hf_recontrol")
        _check("kind", self.kind, self.kind == "value", '"value"')
        _check_integer("hidden_size", self.hidden_size, 1, MAX_WIDTH)
        _check_integer("intermediate_size", self.intermediate_size, 1, MAX_WIDTH)
        _check_integer("num_hidden_layers", self.num_hidden_layers, 0, 2)
        _check("hidden_act", self.hidden_act, self.hidden_act in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}")
        parameters = sum(math.prod(shape) for shape in self.tensor_shapes().values())
        _check(
            "hidden_size × intermediate_size", parameters, parameters <= MAX_PARAMETERS, f"≤ {MAX_PARAMETERS} weights"
        )
        optional = ("base_model_name_or_path", "base_model_revision", "base_model_type", "hf_recontrol_version")
        for name in (*optional, "weights_sha256"):
            _check_string(name, getattr(self, name), optional=True)
        _check("reward", self.reward, isinstance(self.reward, RewardScale), "an object {name, mean, std}")
        _check_string("reward.name", self.reward.name)
        _check_number("reward.mean", self.reward.mean, -1e30)
        _check_number("reward.std", self.reward.std, 1e-30)
        _check(
            "control", self.control, isinstance(self.control, ControlDefaults), "an object {step_size, num_steps, …}"
        )
        _check_control(self.control)
        _check_info(self.info)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor in model.safetensors. No other is allowed, none may be missing."""
        widths = [self.hidden_size, *[self.width] * self.num_hidden_layers, 1]
        shapes: dict[str, tuple[int, ...]] = {"input_mean": (self.hidden_size,), "input_std": (self.hidden_size,)}
        for i, (inputs, outputs) in enumerate(pairwise(widths)):
            shapes |= {f"layers.{i}.weight": (outputs, inputs), f"layers.{i}.bias": (outputs,)}
        return shapes

    def to_dict(self) -> dict[str, Any]:
        """The config as plain JSON values."""
        return asdict(self)

    def to_json_string(self) -> str:
        """config.json's text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=True, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config that `values` spell out.

        Raises:
            HeadError: an unknown or missing field, a wrong type, or a value out of bounds.
        """
        values = dict(_only_known(cls, values, "config.json", values.get("hf_recontrol_version")))
        for name, part in (("reward", RewardScale), ("control", ControlDefaults)):
            if name in values:
                if not isinstance(values[name], Mapping):
                    _refuse(name, values[name], "an object")
                values[name] = part(**_only_known(part, values[name], f"config.json's {name!r}", None))
        if "hidden_size" not in values:
            raise HeadError("config.json has no hidden_size. Save the head again with ValueHead.save_pretrained.")
        return cls(**values)


def shown(value: object) -> str:
    """A value from an untrusted file, fit for a terminal and a log: ASCII, at most 80 characters."""
    try:
        text = ascii(value)
    except ValueError:  # an integer of more digits than Python prints
        text = f"a {type(value).__name__} too long to print"
    return text if len(text) <= 80 else text[:77] + "..."


def _only_known(kind: type, values: Mapping[str, Any], where: str, version: object) -> Mapping[str, Any]:
    known = [f.name for f in fields(kind)]
    unknown = sorted(str(name) for name in values if name not in known)
    if unknown:
        wrote = f" It was written by hf_recontrol {shown(version)}; a newer release may read it." if version else ""
        raise HeadError(f"{where} has unknown fields {shown(unknown)}; allowed are {', '.join(known)}.{wrote}")
    return values


def _refuse(name: str, value: object, allowed: str) -> None:
    raise HeadError(f"A head's config has {name} = {shown(value)}; allowed: {allowed}.")


def _check(name: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        _refuse(name, value, allowed)


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    _check(name, value, type(value) is int and low <= value <= high, f"an integer from {low} to {high}")


def _check_number(name: str, value: object, low: float) -> None:
    holds = type(value) in (int, float) and low <= value <= 1e30  # type: ignore[operator]  # False for NaN
    _check(name, value, holds, f"a number from {low:g} to 1e30")


def _check_string(name: str, value: object, *, optional: bool = False) -> None:
    holds = isinstance(value, str) and len(value) <= MAX_STRING and value.isprintable()
    _check(name, value, holds or (optional and value is None), f"up to {MAX_STRING} printable characters")


def _check_control(control: ControlDefaults) -> None:
    _check_number("control.step_size", control.step_size, 0.0)
    _check_integer("control.num_steps", control.num_steps, 0, MAX_STEPS)
    _check_number("control.regularization", control.regularization, 0.0)
    lowest = {"strength": 1e-30, "max_kl": 1e-30, "max_relative_norm": 1e-30, "target_value": -1e30}
    for name, low in lowest.items():
        if getattr(control, name) is not None:
            _check_number(f"control.{name}", getattr(control, name), low)
    table = control.calibration
    pairs = isinstance(table, list) and len(table) <= MAX_CALIBRATION
    pairs = pairs and all(isinstance(pair, list) and len(pair) == 2 for pair in table)
    _check("control.calibration", table, pairs, f"at most {MAX_CALIBRATION} pairs [KL per token, step_size]")
    for column in zip(*table, strict=True):
        for number in column:
            _check_number("control.calibration", number, 1e-30)
        rises = all(one < other for one, other in pairwise(column))
        _check("control.calibration", table, rises, "pairs whose numbers rise")
    steps = control.calibration_num_steps
    if steps is not None:
        _check_integer("control.calibration_num_steps", steps, 1, MAX_STEPS)
    _check("control.calibration", table, not table or bool(steps or control.num_steps), "none at num_steps = 0")
    calibrated = control.strength is None or bool(table)
    _check("control.strength", control.strength, calibrated, "None, for there is no calibration to read it from")


def _check_info(info: object) -> None:
    _check("info", type(info).__name__, isinstance(info, dict), "an object")
    try:
        size = len(json.dumps(info, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise HeadError(
            f"A head's info must be plain JSON of finite numbers, but it holds: {shown(str(error))}."
        ) from error
    _check("info", f"{size} bytes", size <= MAX_INFO_BYTES, f"at most {MAX_INFO_BYTES} bytes of JSON")
