"""How hard to steer: what a call may say, filled up with what the heads' own configs say."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from math import inf
from numbers import Integral, Real
from typing import Any, Self

from .head_config import MAX_STEPS, ControlDefaults, shown

BELT = 4.0  # × the strength: max_kl where a strength is given and no max_kl
EXCLUSIVE = {"step_size": "strength", "strength": "step_size"}


@dataclass(frozen=True)
class ControlConfig:
    """How hard to steer. None means what the head's config says."""

    step_size: float | None = None
    """α, finite, ≥ 0, in hidden-state units per unit of ∇V. 0 is no control. Not together with strength."""
    num_steps: int | None = None
    """n, 0 to 1024 steps at each token. 0 is no control."""
    strength: float | None = None
    """Mean KL per token to spend, in nats, > 0: picks α from the head's calibration. Not together with step_size."""
    max_kl: float | None = None
    """Seat belt: no token's KL above it, in nats, > 0; before temperature and other logits processors. inf: none. Where
    neither call nor head sets it, 4 × the strength, or none without a strength."""
    max_relative_norm: float | None = None
    """‖u‖ at most this share of ‖h‖, > 0; inf: no bound."""
    regularization: float | None = None
    """λ ≥ 0: each step takes 2αλu off u."""
    target_value: float | None = None
    """Value to steer to, from below and from above, in raw units of the reward. Of one head only."""

    def __post_init__(self) -> None:
        for name, wanted, holds in (
            ("step_size", "a finite number ≥ 0 (0 is no control)", lambda x: 0 <= x < inf),
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
        if self.step_size is not None and self.strength is not None:
            raise ValueError(
                f"step_size is {self.step_size!r} and strength {self.strength!r}, but the strength picks the "
                "step_size. Give one of the two."
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
        """This one, filled up from a lower layer; a step_size here hides a strength there, and the other way round."""
        filled = {
            field.name: getattr(lower, field.name)
            for field in fields(self)
            if getattr(self, field.name) is None
            and (field.name not in EXCLUSIVE or getattr(self, EXCLUSIVE[field.name]) is None)
        }
        return replace(self, **filled)

    def over_heads(self, heads: Sequence[ControlDefaults]) -> Self:
        """This one, filled up with the defaults of the heads that it is for.

        Raises:
            ValueError: the heads differ in an option that is not given, or have a value that is not allowed.
        """
        own: dict[str, Any] = {}
        for name in [field.name for field in fields(self) if field.name not in EXCLUSIVE]:
            if getattr(self, name) is None:
                own[name] = _shared(name, heads, f"recontrol_{name}")
        if self.step_size is None and self.strength is None:
            own["strength"] = _shared("strength", heads, "recontrol_strength or recontrol_step_size")
            if own["strength"] is None:
                own["step_size"] = _shared("step_size", heads, "recontrol_strength or recontrol_step_size")
        whole = replace(self, **own)
        if whole.max_kl is None and whole.strength is not None:
            whole = replace(whole, max_kl=BELT * whole.strength)
        return whole


def as_float(value: object) -> float:
    """A number as a float; NaN for what is none, or is too large for one."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def _shared(name: str, heads: Sequence[ControlDefaults], keyword: str) -> Any:
    values = {getattr(head, name) for head in heads}
    if len(values) > 1:
        raise ValueError(
            f"The heads differ in their {name}: {', '.join(sorted(map(str, values)))}. Pass {keyword} to settle it."
        )
    return values.pop()


def step_size_for(strength: float, control: ControlDefaults, num_steps: int) -> float:
    """The α that spends `strength` nats a token, by the head's calibration.

    Linear in log KL and log α between the table's entries. Below the first, α grows with the root of the KL, as it does
    for every small shift. With another number of steps than it was calibrated at, n · α is kept: the ascent follows the
    same path, in finer or coarser steps. Very coarse ones leave it: at n = 1 the KL may be a quarter off. Less is spent
    where λ, a norm cap or a target value, which the calibration did not have, hold the control back.

    Raises:
        ValueError: the head is not calibrated, or not so far.
    """
    table = control.calibration
    if not table:
        raise ValueError(
            f"strength is {strength}, but the head is not calibrated, so no step_size is known for it. Calibrate it: "
            "`hf-recontrol tune HEAD --model MODEL --rollouts FOLDER --calibrate`, or pass base_model= to "
            "RecontrolTrainer; or give a step_size."
        )
    if strength > table[-1][0]:
        raise ValueError(
            f"strength is {strength}, but the head is calibrated up to {table[-1][0]} nats a token. Pass that or less, "
            "or a step_size; texts beyond it tend to fall apart."
        )
    calibrated_at = control.calibration_num_steps or control.num_steps
    rate: float = calibrated_at / num_steps if num_steps else 0.0
    if strength <= table[0][0]:
        return float(rate * table[0][1] * math.sqrt(strength / table[0][0]))
    low, high = next(pair for pair in pairwise(table) if strength <= pair[1][0])
    share = math.log(strength / low[0]) / math.log(high[0] / low[0])
    return float(rate * low[1] * (high[1] / low[1]) ** share)
