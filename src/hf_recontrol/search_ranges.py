"""Which options of a control are searched, and between which values."""

import math
from collections.abc import Mapping
from typing import Any

from .head import Head
from .head_config import MAX_STEPS

Options = dict[str, float | int]
Range = tuple[float, float]
STEPS = (1, 64)  # the paper's 30 to 200; a token of 200 took ARGRE (NeurIPS 2025) 7 × the time of one without control
FACTOR = 10.0
DIGITS = 3


def search_ranges(head: Head, ranges: Mapping[str, Range] | None = None) -> dict[str, Range]:
    """The ranges given, checked, or those that fit the head; see search_control.

    Raises:
        ValueError: names the option, and what it may be.
    """
    control = head.config.control
    found = dict(_default(head) if ranges is None else ranges)
    known = [name for name in ("strength", "step_size", "num_steps", "scale") if hasattr(control, name)]
    if not found or not set(found) <= set(known) or {"strength", control.multiplier} <= set(found):
        raise ValueError(
            f"The options to search are {sorted(found)}; of a {head.config.kind} head they may be {', '.join(known)}, "
            f"but not strength and {control.multiplier} together, for the strength picks the {control.multiplier}."
        )
    for name, pair in found.items():
        low, high = _checked(name, pair)
        found[name] = (low, high)
    top = control.calibration[-1][0] if control.calibration else None
    if "strength" in found and (top is None or found["strength"][1] > top):
        raise ValueError(
            f"The strength is searched up to {found['strength'][1]:g}, but the head is "
            + ("not calibrated" if top is None else f"calibrated up to {top:g} nats a token")
            + ". Stay below that, or calibrate it first: hf-recontrol tune HEAD --model MODEL --calibrate."
        )
    return found


def suggest(trial: Any, ranges: Mapping[str, Range]) -> Options:
    """The options that an optuna trial is to have, of three digits: those are tried, and those can be read."""
    options: Options = {}
    for name, (low, high) in ranges.items():
        if name == "num_steps":
            options[name] = trial.suggest_int(name, int(low), int(high), log=True)
        else:
            rounded = float(f"{trial.suggest_float(name, low, high, log=True):.{DIGITS}g}")
            options[name] = min(max(rounded, low), high)
    return options


def own_options(head: Head, ranges: Mapping[str, Range]) -> Options | None:
    """What the head steers with by itself, if that is within the ranges: a good place to begin."""
    control = head.config.control
    own = {name: getattr(control, name) for name in ranges}
    if control.multiplier in own and control.strength is not None:
        return None  # the multiplier belongs to a strength, with a bound of the KL that a multiplier does not have
    inside = all(own[name] is not None and low <= own[name] <= high for name, (low, high) in ranges.items())
    return own if inside else None


def _default(head: Head) -> dict[str, Range]:
    control = head.config.control
    if control.calibration:
        return {"strength": (control.calibration[0][0], control.calibration[-1][0])}
    own = getattr(control, control.multiplier) or getattr(type(control)(), control.multiplier)
    found: dict[str, Range] = {control.multiplier: (own / FACTOR, own * FACTOR)}
    return found | ({"num_steps": STEPS} if hasattr(control, "num_steps") else {})


def _checked(name: str, pair: Range) -> Range:
    low, high = pair
    if not 0 < low <= high < math.inf:
        raise ValueError(f"The range of {name} is {low:g} to {high:g}; expected is 0 < lowest ≤ highest, both finite.")
    whole = low == int(low) and high == int(high)
    if name == "num_steps" and not (whole and high <= MAX_STEPS):
        raise ValueError(f"The range of num_steps is {low:g} to {high:g}; expected are integers from 1 to {MAX_STEPS}.")
    return low, high
