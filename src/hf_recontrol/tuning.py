"""Chooses a method's strength on validation prompts: for all methods with the same effort, by the KL of its answers."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .baselines import Method, Steered
from .comparison import Comparison
from .control_config import ControlConfig
from .disk import faults, make_folder, write_file
from .errors import CollectError
from .fingerprints import sha256_of
from .head import Head
from .rewards import Text
from .sampling import Sampler

FLAT = 0.1
"""d log KL / d log multiplier below which a KL is at its floor; it is 2 for small multipliers."""
Family = Callable[[float], Method]
"""From a multiplier > 0 to the method that steers so hard: a step size, a scale, a weight."""


def steered_by(head: Head, name: str, config: ControlConfig | None = None) -> Family:
    """The methods of a head whose step size, or scale, is the multiplier.

    Args:
        head: a value or a control head.
        name: of the row.
        config: other options of the control.
    """
    multiplier = head.config.control.multiplier
    return lambda value: Steered(name, head, ControlConfig.of({multiplier: value}).over(config or ControlConfig()))


def match_kl(
    family: Family,
    kl_of: Callable[[Method], float],
    targets: Sequence[float],
    *,
    start: float = 1.0,
    tolerance: float = 0.05,
    trials: int = 8,
    tried: list[tuple[float, float]] | None = None,
) -> list[tuple[float, float]]:
    """The multipliers at which a method's answers are so far from the base model's.

    By lines in log multiplier and log KL, from the weakest target to the strongest. Every method may take the same
    number of trials; the nearest one is taken, however near it came, and what it spends is returned beside it. A target
    below what a method spends in any case, as under an instruction, is given up when that is seen.

    Args:
        family: from a multiplier to the method.
        kl_of: measures KL(p ‖ p_base) in nats per answer; see kl_per_answer.
        targets: nats per answer, > 0.
        start: the first multiplier that is tried.
        tolerance: as a share of a target; a trial so near ends the search.
        trials: of each target, ≥ 1.
        tried: (multiplier, KL per answer) of earlier trials, which are not made again. Those made are appended.

    Returns:
        (multiplier, KL per answer) for each target, in the order given.

    Raises:
        ValueError: targets or settings out of bounds, or a method that spends nothing or what is not finite.
    """
    if not targets or not all(0 < target < math.inf for target in targets) or trials < 1 or not 0 < start < math.inf:
        raise ValueError(
            f"targets are {list(targets)}, trials {trials} and start {start}; expected are nats per answer > 0, one "
            "trial or more, and a finite number > 0."
        )
    found: dict[float, tuple[float, float]] = {}
    tried = [] if tried is None else tried
    multiplier = start
    for target in sorted(set(targets)):
        nearest = [point for point in tried if abs(point[1] / target - 1) < tolerance]
        for _ in range(0 if nearest else trials):
            multiplier = _next(tried, target, multiplier)
            kl = kl_of(family(multiplier))
            if not 0 < kl < math.inf:
                raise ValueError(
                    f"{family(multiplier).name} spends {kl} nats per answer at {multiplier:.3g}; expected is a finite "
                    "number > 0. Is its head trained, its reward not the same for all candidates?"
                )
            tried.append((multiplier, kl))
            if abs(kl / target - 1) < tolerance or _at_floor(tried, target):
                break
        found[target] = min(tried, key=lambda point: abs(math.log(point[1] / target)))
        multiplier = found[target][0]
    return [found[target] for target in targets]


def kl_per_answer(sampler: Sampler, prompts: Sequence[Text], measure: Callable[..., None]) -> Callable[[Method], float]:
    """Measures a method by its answers to these prompts, one to each, always from the same seeds.

    Args:
        measure: puts "kl" into the rows of answers; see Comparison.
    """

    def measured(method: Method) -> float:
        answers = method.answer(sampler, prompts)
        measure(method, answers)
        spent = [row["kl"] for rows in answers for row in rows]
        return math.nan if None in spent else math.fsum(spent) / len(spent)

    return measured


def _at_floor(tried: list[tuple[float, float]], target: float) -> bool:
    """Whether a smaller multiplier left a KL above the target nearly as it was: it goes no lower."""
    if len(tried) < 2:
        return False
    (before, kl_before), (last, kl) = tried[-2:]
    return target < kl and last < before / 1.5 and math.log(kl_before / kl) < FLAT * math.log(before / last)


def _next(tried: list[tuple[float, float]], target: float, multiplier: float) -> float:
    """The next trial, by a line in log multiplier and log KL: between the nearest on either side, or beyond the last.

    KL grows with the square of a small multiplier. It may have a floor, as under an instruction that costs some by
    itself: so the last on a side is that of the farthest multiplier, and not of the nearest KL.
    """
    if not tried:
        return multiplier
    below = sorted(point for point in tried if point[1] < target)
    above = sorted(point for point in tried if point[1] >= target)
    if below and above and below[-1][0] < above[0][0]:
        (x, y), (other, other_y) = below[-1], above[0]
        share = math.log(target / y) / math.log(other_y / y)
        return math.exp(math.log(x) + math.log(other / x) * min(max(share, 0.1), 0.9))
    (x, y), *others = (below[:-3:-1] or above)[:2]
    other, other_y = others[0] if others else (x, y)
    slope = 2.0 if x == other else min(max(math.log(other_y / y) / math.log(other / x), 0.5), 4.0)
    return x * math.exp(math.log(target / y) / slope)


class Strengths:
    """Multipliers that were found by match_kl, kept in a file: a comparison that is gone on with finds each once.

    Args:
        validation: the sampler and the prompts that strengths are chosen on; none of them is tested on.
        file: JSON; made with its folder if it does not exist.
        targets: nats per answer. What was found for others before is kept, and is where the search for new ones begins.
        options: more for match_kl.
    """

    def __init__(self, validation: Comparison, file: str | Path, targets: Sequence[float], **options: Any):
        self.validation, self.file, self.targets, self.options = validation, Path(file), list(targets), options
        self._kl_of = kl_per_answer(validation.sampler, validation.prompts, validation.measure)

    def of(self, family: Family, start: float = 1.0) -> list[tuple[float, float]]:
        """(multiplier, KL per answer on the validation prompts) for each target.

        Raises:
            CollectError: the file is damaged, or the disk refused.
        """
        made_by = {**self.validation.facts, **family(start).facts(), **self.options}
        key = sha256_of([json.dumps(made_by, sort_keys=True)])
        known = self._read()
        kept = known.setdefault(key, {"method": family(start).name, "tried": [], "found": []})
        found = {target: (multiplier, kl) for target, multiplier, kl in kept["found"]}
        if missing := [target for target in self.targets if target not in found]:
            new = match_kl(family, self._kl_of, missing, start=start, tried=kept["tried"], **self.options)
            found |= dict(zip(missing, new, strict=True))
            kept["found"] = [(target, *point) for target, point in sorted(found.items())]
            with faults(f"Writing {self.file}"):
                make_folder(self.file.parent)
                write_file(self.file, json.dumps(known, indent=1, ensure_ascii=False).encode())
        return [found[target] for target in self.targets]

    def _read(self) -> dict[str, Any]:
        if not self.file.exists():
            return {}
        with faults(f"Reading {self.file}"):
            data = self.file.read_bytes()
        try:
            return {
                key: {
                    "method": kept["method"],
                    "tried": [(multiplier, kl) for multiplier, kl in kept["tried"]],
                    "found": [(target, multiplier, kl) for target, multiplier, kl in kept["found"]],
                }
                for key, kept in json.loads(data).items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CollectError(
                f"{self.file} is damaged ({error!r}). Delete it, and strengths are found again."
            ) from error
