"""What a head's config.json may say: a closed, typed, bounded set of fields. Anything else is refused."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import Any, ClassVar, Self

from .config_checks import check, check_info, check_integer, check_number, check_string, only_known, refuse
from .errors import HeadError

FORMAT_VERSION = 1
ACTIVATIONS = ("relu", "silu", "gelu", "tanh")
MAX_WIDTH = 2**20
MAX_PARAMETERS = 2**28
MAX_STEPS = 1024
MAX_CALIBRATION = 32
WIDEST_BY_DEFAULT = 1024
EITHER = " here (ValueHead reads value heads, ControlHead control heads, Head.from_pretrained either)"


@dataclass(kw_only=True)
class SteeringDefaults:
    """How hard a head steers when generate() is not told, and the table that strengths are read from."""

    multiplier: ClassVar[str]
    """The field that a strength picks."""

    strength: float | None = None
    """Mean KL per token in nats, > 0; picks the multiplier (a value head's step_size, a control head's scale) from the
    calibration. None: the multiplier as it stands counts."""
    max_kl: float | None = None
    """No token's KL above it, nats, > 0. None: 4 × the strength where there is one, else no bound."""
    max_relative_norm: float | None = None
    """‖u‖ at most this share of ‖h‖, > 0. None: no bound."""
    calibration: list[list[float]] = field(default_factory=list)
    """Pairs [mean KL per token in nats, the multiplier that gives it], both rising, at most 32. The KL is measured on
    states of the model's own answers with each token held at 4 × the mean; empty: not calibrated."""

    def forget_calibration(self) -> None:
        """Take out what belongs to weights that are about to change."""
        self.calibration, self.strength = [], None

    def validate(self) -> None:
        """Check every field against its type and bounds.

        Raises:
            HeadError: names the field, its value, and what is allowed.
        """
        for name in ("strength", "max_kl", "max_relative_norm"):
            if getattr(self, name) is not None:
                check_number(f"control.{name}", getattr(self, name), 1e-30)
        table = self.calibration
        pairs = isinstance(table, list) and len(table) <= MAX_CALIBRATION
        pairs = pairs and all(isinstance(pair, list) and len(pair) == 2 for pair in table)
        check("control.calibration", table, pairs, f"at most {MAX_CALIBRATION} pairs [KL per token, multiplier]")
        for column in zip(*table, strict=True):
            for number in column:
                check_number("control.calibration", number, 1e-30)
            rises = all(one < other for one, other in pairwise(column))
            check("control.calibration", table, rises, "pairs whose numbers rise")
        calibrated = self.strength is None or bool(table)
        check("control.strength", self.strength, calibrated, "None, for there is no calibration to read it from")


@dataclass(kw_only=True)
class ControlDefaults(SteeringDefaults):
    """The ascent that a value head is used with when generate() is given no other."""

    multiplier: ClassVar[str] = "step_size"

    step_size: float = 0.5
    """α, in hidden-state units per unit of ∇V (V in standard deviations of the reward); ≥ 0, 0 is no control."""
    num_steps: int = 30
    """n, the steps of ascent at each token, 0 to 1024; 0 is no control. 0.5 and 30: the paper's Vicuna on HH-RLHF."""
    regularization: float = 0.0
    """λ ≥ 0 of the penalty λ‖u‖² on the control."""
    target_value: float | None = None
    """Value to steer to, from either side, in raw units of the reward. None: as high as the steps reach."""
    calibration_num_steps: int | None = None
    """n that the calibration was made at, 1 to 1024; num_steps where None."""

    def forget_calibration(self) -> None:
        """As SteeringDefaults."""
        super().forget_calibration()
        self.calibration_num_steps = None

    def validate(self) -> None:
        """As SteeringDefaults."""
        super().validate()
        check_number("control.step_size", self.step_size, 0.0)
        check_integer("control.num_steps", self.num_steps, 0, MAX_STEPS)
        check_number("control.regularization", self.regularization, 0.0)
        if self.target_value is not None:
            check_number("control.target_value", self.target_value, -1e30)
        steps = self.calibration_num_steps
        if steps is not None:
            check_integer("control.calibration_num_steps", steps, 1, MAX_STEPS)
        table = self.calibration
        check("control.calibration", table, not table or bool(steps or self.num_steps), "none at num_steps = 0")


@dataclass(kw_only=True)
class ScaleDefaults(SteeringDefaults):
    """The multiple of its u that a control head is used with when generate() is given no other."""

    multiplier: ClassVar[str] = "scale"

    scale: float = 1.0
    """What u is multiplied by, ≥ 0; 0 is no control, 1 the control as it was fitted."""

    def validate(self) -> None:
        """As SteeringDefaults."""
        super().validate()
        check_number("control.scale", self.scale, 0.0)


@dataclass
class RewardScale:
    """The reward that a head was fitted to, in units of (reward − mean) / std."""

    name: str = "reward"
    """What the reward function is called."""
    mean: float = 0.0
    """Mean of the raw reward over the training rollouts."""
    std: float = 1.0
    """Standard deviation of the raw reward over the training rollouts; > 0."""


@dataclass
class HeadConfig:
    """What both kinds of head have in their config.json. Its `kind` tells which of the two it is."""

    control_class: ClassVar[type[SteeringDefaults]] = SteeringDefaults

    hidden_size: int
    """Width of the hidden states that the head reads: the base model's LM-head input."""
    intermediate_size: int | None = None
    """Width of the hidden layers. Where None: hidden_size, of a control head 1024 at most."""
    num_hidden_layers: int = 1
    """0 (linear), 1 or 2."""
    hidden_act: str = "relu"
    """relu, silu, gelu (the exact one) or tanh."""
    base_model_name_or_path: str | None = None
    """The model whose hidden states the head was trained on."""
    base_model_revision: str | None = None
    """The commit of that model."""
    base_model_type: str | None = None
    """That model's config.model_type."""
    reward: RewardScale = field(default_factory=RewardScale)
    control: SteeringDefaults = field(default_factory=SteeringDefaults)
    """How hard it steers unless told otherwise."""
    info: dict[str, Any] = field(default_factory=dict)
    """Free description, at most 16 KiB of JSON: figures of the training run, notes. Never interpreted."""
    kind: str = "head"
    format_version: int = FORMAT_VERSION
    weights_sha256: str | None = None
    """SHA-256 of model.safetensors, written when the head is saved and checked when it is loaded."""
    hf_recontrol_version: str | None = None
    """The version of this package that wrote the head."""

    def __post_init__(self) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = self._default_width()
        self.validate()

    def _default_width(self) -> int:
        return self.hidden_size

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
            refuse("format_version", version, f"{FORMAT_VERSION}; another needs another release of hf_recontrol")
        check("kind", self.kind, self.kind == type(self).kind, f'"{type(self).kind}"')
        check_integer("hidden_size", self.hidden_size, 1, MAX_WIDTH)
        check_integer("intermediate_size", self.intermediate_size, 1, MAX_WIDTH)
        check_integer("num_hidden_layers", self.num_hidden_layers, 0, 2)
        check("hidden_act", self.hidden_act, self.hidden_act in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}")
        self._validate_shape()
        parameters = sum(math.prod(shape) for shape in self.tensor_shapes().values())
        check(
            "hidden_size × intermediate_size", parameters, parameters <= MAX_PARAMETERS, f"≤ {MAX_PARAMETERS} weights"
        )
        optional = ("base_model_name_or_path", "base_model_revision", "base_model_type", "hf_recontrol_version")
        for name in (*optional, "weights_sha256"):
            check_string(name, getattr(self, name), optional=True)
        check("reward", self.reward, isinstance(self.reward, RewardScale), "an object {name, mean, std}")
        check_string("reward.name", self.reward.name)
        check_number("reward.mean", self.reward.mean, -1e30)
        check_number("reward.std", self.reward.std, 1e-30)
        names = ", ".join(f.name for f in fields(self.control_class))
        allowed = f"a {self.control_class.__name__}, in JSON an object {{{names}}}"
        check("control", self.control, type(self.control) is self.control_class, allowed)
        self.control.validate()
        check_info(self.info)

    def _validate_shape(self) -> None:
        """Of the fields that a kind has of its own."""

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor in model.safetensors. No other is allowed, none may be missing."""
        shapes: dict[str, tuple[int, ...]] = {"input_mean": (self.hidden_size,), "input_std": (self.hidden_size,)}
        for i, (inputs, outputs) in enumerate(pairwise(self.widths)):
            shapes |= {f"layers.{i}.weight": (outputs, inputs), f"layers.{i}.bias": (outputs,)}
        return shapes

    @property
    def widths(self) -> list[int]:
        """Of what each layer reads, and of what the last one gives."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The config as plain JSON values."""
        return asdict(self)

    def to_json_string(self) -> str:
        """config.json's text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=True, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config that `values` spell out, of the class that their `kind` names.

        Raises:
            HeadError: an unknown or missing field, a wrong type, or a value out of bounds.
        """
        if cls is HeadConfig:
            kind = values.get("kind", ValueHeadConfig.kind)
            kinds: dict[str, Any] = {one.kind: one for one in (ValueHeadConfig, ControlHeadConfig)}
            check("kind", kind, isinstance(kind, str) and kind in kinds, " or ".join(f'"{one}"' for one in kinds))
            return kinds[kind].from_dict(values)  # type: ignore[no-any-return]
        check("kind", values.get("kind", cls.kind), values.get("kind", cls.kind) == cls.kind, f"{cls.kind!r}{EITHER}")
        values = dict(only_known(cls, values, "config.json", values.get("hf_recontrol_version")))
        for name, part in (("reward", RewardScale), ("control", cls.control_class)):
            if name in values:
                if not isinstance(values[name], Mapping):
                    refuse(name, values[name], "an object")
                values[name] = part(**only_known(part, values[name], f"config.json's {name!r}", None))
        if "hidden_size" not in values:
            raise HeadError("config.json has no hidden_size. Save the head again with save_pretrained.")
        return cls(**values)


@dataclass
class ValueHeadConfig(HeadConfig):
    """What V computes, and for which model; the whole of config.json."""

    control_class: ClassVar[type[SteeringDefaults]] = ControlDefaults

    control: ControlDefaults = field(default_factory=ControlDefaults)
    """The ascent, unless generate() is told otherwise."""
    kind: str = "value"

    @property
    def widths(self) -> list[int]:
        """Of what each layer reads, and 1."""
        return [self.hidden_size, *[self.width] * self.num_hidden_layers, 1]


@dataclass
class ControlHeadConfig(HeadConfig):
    """What u = f(h) computes, and for which model; the whole of config.json."""

    control_class: ClassVar[type[SteeringDefaults]] = ScaleDefaults

    control: ScaleDefaults = field(default_factory=ScaleDefaults)
    """The multiple of u, unless generate() is told otherwise."""
    kind: str = "control"
    rank: int | None = None
    """Of f without a hidden layer: None is a full matrix, r one of rank r, and 0 leaves u one constant vector."""

    def _default_width(self) -> int:
        if type(self.hidden_size) is not int:  # validate() says what is wrong
            return self.hidden_size
        return min(self.hidden_size, WIDEST_BY_DEFAULT)  # 0.3 % of a 1.2B model's weights, read once a token

    def _validate_shape(self) -> None:
        if self.rank is not None:
            check_integer("rank", self.rank, 0, self.hidden_size)
            check("rank", self.rank, self.num_hidden_layers == 0, "None where there are hidden layers")

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """As HeadConfig's; and u's constant part and units, instead of a bias in the layer before them."""
        shapes = super().tensor_shapes() | {"bias": (self.hidden_size,), "output_scale": (self.hidden_size,)}
        for i in range(self.num_hidden_layers, len(self.widths) - 1):
            del shapes[f"layers.{i}.bias"]
        return shapes

    @property
    def widths(self) -> list[int]:
        """Of what each layer reads, and of u; of a constant u, which has no layer, the first."""
        inner = [self.width] * self.num_hidden_layers if self.rank is None else [self.rank]
        return [self.hidden_size] if self.rank == 0 else [self.hidden_size, *inner, self.hidden_size]
