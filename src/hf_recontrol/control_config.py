"""How hard to steer: what a call may say, filled up with what the heads' own configs say."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from math import inf
from numbers import Integral, Real
from typing import Any, Self

from .config_checks import shown
from .head_config import MAX_STEPS, ControlDefaults, SteeringDefaults

BELT = 4.0  # × the strength: max_kl where a strength is given and no max_kl
RIVALS = {"step_size": ("strength",), "scale": ("strength",), "strength": ("step_size", "scale")}
OF_AN_ASCENT = ("step_size", "num_steps", "regularization", "target_value")
"""What only a value head knows."""


@dataclass(frozen=True)
class ControlConfig:
    """How hard to steer. None means what the head's config says."""

    step_size: float | None = None
    """α of a value head, finite, ≥ 0, in hidden-state units per unit of ∇V. 0 is no control. Not together with
    strength."""
    num_steps: int | None = None
    """n of a value head, 0 to 1024 steps at each token. 0 is no control."""
    strength: float | None = None
    """Mean KL per token to spend, in nats, > 0: picks α, or the scale, from the head's calibration."""
    max_kl: float | None = None
    """Seat belt: no token's KL above it, in nats, > 0; before temperature and other logits processors. inf: none. Where
    neither call nor head sets it, 4 × the strength, or none without a strength."""
    max_relative_norm: float | None = None
    """‖u‖ at most this share of ‖h‖, > 0; inf: no bound."""
    regularization: float | None = None
    """λ ≥ 0: each step of an ascent takes 2αλu off u."""
    target_value: float | None = None
    """Value to steer to, from below and from above, in raw units of the reward. Of one head only."""
    scale: float | None = None
    """What a control head's u is multiplied by, finite, ≥ 0. 0 is no control. Not together with strength."""

    def __post_init__(self) -> None:
        for name, wanted, holds in (
            ("step_size", "a finite number ≥ 0 (0 is no control)", lambda x: 0 <= x < inf),
            ("scale", "a finite number ≥ 0 (0 is no control)", lambda x: 0 <= x < inf),
            ("strength", "a finite number > 0, the mean KL per token in nats", lambda x: 0 < x < inf),
            ("max_kl", "a number > 0, in nats (inf: no bound)", lambda x: x > 0),
            ("max_relative_norm", "a number > 0, a share of the hidden state's norm (inf: no bound)", lambda x: x > 0),
            ("regularization", "a finite number ≥ 0", lambda x: 0 <= x < inf),
            ("target_value", "a finite number, in raw units of the reward", lambda x: -inf < x < inf),
        ):
            value = getattr(self, name)
            if value is not None and not holds(as_float(value)):  # nothing holds for NaN
                raise ValueError(f"{name} is {shown(value)}; it must be {wanted}.")
        n = self.num_steps
        if n is not None and (isinstance(n, bool) or not isinstance(n, Integral) or not 0 <= n <= MAX_STEPS):
            raise ValueError(f"num_steps is {shown(n)}; it must be an integer from 0 to {MAX_STEPS} (0 is no control).")
        for name in RIVALS["strength"]:
            if getattr(self, name) is not None and self.strength is not None:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r} and strength {self.strength!r}, but the strength picks the "
                    f"{name}. Give one of the two."
                )

    @classmethod
    def of(cls, value: "ControlConfig | Mapping[str, Any]") -> "ControlConfig":
        """A ControlConfig, or a dict of its fields."""
        if isinstance(value, ControlConfig):
            return value
        if not isinstance(value, Mapping):
            raise TypeError(f"The control's config is a {type(value).__name__}; pass a ControlConfig or a dict.")
        known = [field.name for field in fields(cls)]
        if unknown := sorted(str(name) for name in value if name not in known):
            raise ValueError(f"The control's config has unknown fields {unknown}; allowed are {', '.join(known)}.")
        return cls(**value)

    def over(self, lower: "ControlConfig") -> Self:
        """This one, filled up from a lower layer. A step_size or scale here hides a strength there, and the other way
        round."""
        filled = {
            field.name: getattr(lower, field.name)
            for field in fields(self)
            if getattr(self, field.name) is None
            and all(getattr(self, rival) is None for rival in RIVALS.get(field.name, ()))
        }
        return replace(self, **filled)

    def over_heads(self, heads: Sequence[SteeringDefaults]) -> Self:
        """This one, filled up with the defaults of the heads that it is for.

        Raises:
            ValueError: the heads differ in an option that is not given, an option is given that none of them has, or
                one has a value that is not allowed.
        """
        self._check_meant_for(heads)
        own: dict[str, Any] = {}
        for name in [field.name for field in fields(self) if field.name not in RIVALS]:
            if getattr(self, name) is None:
                own[name] = _shared(name, heads, f"recontrol_{name}")
        if self.step_size is None and self.scale is None and self.strength is None:
            theirs = [f"recontrol_{name}" for name in RIVALS["strength"] if any(hasattr(head, name) for head in heads)]
            own["strength"] = _shared(
                "strength", heads, ", ".join(["recontrol_strength", *theirs[:-1]]) + f" or {theirs[-1]}"
            )
        if self.strength is None and own.get("strength") is None:
            for name in RIVALS["strength"]:
                if getattr(self, name) is None:
                    own[name] = _shared(name, heads, f"recontrol_strength or recontrol_{name}")
        whole = replace(self, **own)
        if whole.max_kl is None and whole.strength is not None:
            whole = replace(whole, max_kl=BELT * whole.strength)
        return whole

    def _check_meant_for(self, heads: Sequence[SteeringDefaults]) -> None:
        for name in [field.name for field in fields(self)]:
            if getattr(self, name) is not None and not is_known(name, heads):
                kinds = ("multiplies a control head's u", "a value head; its α is step_size")
                if name in OF_AN_ASCENT:
                    kinds = ("is of a value head's ascent", "a control head, which makes none")
                both = ", or give a strength, which is for both" if name in RIVALS else ""
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, which {kinds[0]}, but the head given is {kinds[1]}. Leave it "
                    f"out{both}."
                )


def is_known(name: str, heads: Sequence[SteeringDefaults]) -> bool:
    """Whether an option means something to one of the heads."""
    return any(hasattr(head, name) or name not in (*OF_AN_ASCENT, "scale") for head in heads)


def as_float(value: object) -> float:
    """A number as a float; NaN for what is none, or is too large for one."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def _shared(name: str, heads: Sequence[SteeringDefaults], keyword: str) -> Any:
    """What the heads that know `name` say of it; None where none does."""
    values: list[Any] = []
    for head in heads:
        if hasattr(head, name) and getattr(head, name) not in values:
            values.append(getattr(head, name))
    if len(values) > 1:
        raise ValueError(
            f"The heads differ in their {name}: {', '.join(sorted(map(str, values)))}. Pass {keyword} to settle it."
        )
    return values[0] if values else None


def step_size_for(strength: float, control: ControlDefaults, num_steps: int) -> float:
    """The α that spends `strength` nats a token, by a value head's calibration.

    With another number of steps than it was calibrated at, n · α is kept: the ascent follows the same path, in finer or
    coarser steps. Very coarse ones leave it: at n = 1 the KL may be a quarter off. Less is spent where λ, a norm cap or
    a target value, which the calibration did not have, hold the control back.

    Raises:
        ValueError: the head is not calibrated, or not so far.
    """
    calibrated_at = control.calibration_num_steps or control.num_steps
    return calibrated_at / num_steps * multiplier_for(strength, control.calibration) if num_steps else 0.0


def multiplier_for(strength: float, table: Sequence[Sequence[float]]) -> float:
    """The step size or scale that spends `strength` nats a token, by a calibration table.

    Linear in log KL and log multiplier between the table's entries. Below the first, the multiplier grows with the root
    of the KL, as it does for every small shift.

    Raises:
        ValueError: the table is empty, or ends before.
    """
    if not table:
        raise ValueError(
            f"strength is {strength}, but the head is not calibrated, so nothing says how to spend it. Calibrate it: "
            "`hf-recontrol tune HEAD --model MODEL --rollouts FOLDER --calibrate`, or pass base_model= to "
            "RecontrolTrainer; or give a step_size, of a control head a scale."
        )
    if strength > table[-1][0]:
        raise ValueError(
            f"strength is {strength}, but the head is calibrated up to {table[-1][0]} nats a token. Pass that or less, "
            "or a step_size (of a control head a scale); texts beyond it tend to fall apart."
        )
    if strength <= table[0][0]:
        return float(table[0][1] * math.sqrt(strength / table[0][0]))
    low, high = next(pair for pair in pairwise(table) if strength <= pair[1][0])
    share = math.log(strength / low[0]) / math.log(high[0] / low[0])
    return float(low[1] * (high[1] / low[1]) ** share)
