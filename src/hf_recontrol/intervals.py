"""Confidence intervals of gains and of shares."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch


@dataclass(frozen=True)
class Gain:
    """A mean gain over prompts, with its confidence interval."""

    mean: float
    """treated − baseline, the mean over prompts."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    n: int
    """Prompts."""


def paired_bootstrap(
    baseline: Any,
    treated: Any,
    *,
    resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
    in_baseline_sd: bool = False,
) -> Gain:
    """Mean of treated − baseline on the same prompts, with the percentile interval of a bootstrap over prompts.

    Efron 1979. Each prompt is drawn with all its answers, which are not independent. With few prompts the interval is
    too narrow: of 95 % intervals of normal gains, 89 % held the truth at 10 prompts, 93 % at 20, 94 % at 100.

    Args:
        baseline: float (prompts,) or (prompts, answers): tensor, array or nested lists.
        treated: likewise, prompts in the same order; it may have another number of answers.
        resamples: draws of as many prompts as there are.
        seed: of the draws; the global generators are left alone.
        confidence: of the interval, between 0 and 1.
        in_baseline_sd: divide by the standard deviation (n − 1) of all baseline values. It is not resampled: a fixed
            unit, the same for all methods that are compared with one baseline.

    Raises:
        ValueError: shapes that do not pair, fewer than two prompts, values that are not finite, or an sd of 0.
    """
    base, new = (torch.as_tensor(values, dtype=torch.float64).cpu() for values in (baseline, treated))
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(f"confidence is {confidence}, resamples {resamples}; pass 0 < confidence < 1, resamples ≥ 1.")
    shapes = f"baseline has shape {tuple(base.shape)}, treated {tuple(new.shape)}"
    if not {base.ndim, new.ndim} <= {1, 2} or len(base) != len(new) or len(base) < 2:
        raise ValueError(f"{shapes}; both must be (prompts,) or (prompts, answers), of the same two or more prompts.")
    gains = new.reshape(len(new), -1).mean(1) - base.reshape(len(base), -1).mean(1)
    if in_baseline_sd:
        gains = gains / base.std()
    if not gains.isfinite().all():
        raise ValueError("A gain is not finite: a value is NaN or infinite, or the baseline's sd is 0. Leave it out.")
    generator = torch.Generator().manual_seed(seed)
    at_once = max(2**22 // len(gains), 1)  # 32 MiB of indices
    counts = [min(at_once, resamples - start) for start in range(0, resamples, at_once)]
    draws = (torch.randint(len(gains), (count, len(gains)), generator=generator) for count in counts)
    means = torch.cat([gains[draw].mean(1) for draw in draws])
    low, high = (float(means.quantile((1 + side * confidence) / 2)) for side in (-1, 1))
    return Gain(float(gains.mean()), low, high, n=len(gains))


def crossed_bootstrap(gains: Any, *, resamples: int = 10_000, seed: int = 0, confidence: float = 0.95) -> Gain:
    """Mean gain over runs and prompts, with the percentile interval of a bootstrap over both.

    Runs (of training, with their seeds) are drawn, and prompts, the same ones for every run that was drawn; as both are
    samples. With three runs the interval knows little of the spread between runs: a fourth may well lie outside.

    Args:
        gains: float (runs, prompts): treated − baseline, in the unit that is to be reported.
        resamples, seed, confidence: as for paired_bootstrap.

    Raises:
        ValueError: not of that shape, fewer than two prompts, or values that are not finite.
    """
    gains = torch.as_tensor(gains, dtype=torch.float64).cpu()
    if gains.ndim != 2 or not len(gains) or gains.shape[1] < 2 or not gains.isfinite().all():
        raise ValueError(
            f"gains has shape {tuple(gains.shape)}; it must be (runs, prompts) with finite values for one or more runs "
            "on the same two or more prompts."
        )
    generator = torch.Generator().manual_seed(seed)
    runs, prompts = gains.shape
    means = []
    for _ in range(resamples):
        drawn = gains[torch.randint(runs, (runs,), generator=generator)].mean(0)
        means.append(drawn[torch.randint(prompts, (prompts,), generator=generator)].mean())
    low, high = (float(torch.stack(means).quantile((1 + side * confidence) / 2)) for side in (-1, 1))
    return Gain(float(gains.mean()), low, high, n=prompts)


def ratio_interval(
    numerators: Any,
    denominators: Any,
    groups: Sequence[Hashable],
    *,
    resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float] | None:
    """Percentile interval of Σ numerators / Σ denominators, of a bootstrap over groups, such as prompts.

    Args:
        numerators: float (answers,).
        denominators: float (answers,), ≥ 0.
        groups: what each answer belongs to; they are drawn whole, since answers to one prompt are not independent.
        resamples, seed, confidence: as for paired_bootstrap.

    Returns:
        (low, high); None where there are fewer than two groups, or some draws have nothing to divide by.
    """
    places = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    index = torch.tensor([places[group] for group in groups])
    sums = torch.zeros(2, len(places), dtype=torch.float64)
    parts = torch.stack([torch.as_tensor(part, dtype=torch.float64).cpu() for part in (numerators, denominators)])
    sums.index_add_(1, index, parts)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.stack(
        [sums[:, torch.randint(len(places), (len(places),), generator=generator)].sum(1) for _ in range(resamples)]
    )
    ratios = draws[:, 0] / draws[:, 1]
    if len(places) < 2 or not ratios.isfinite().all():
        return None
    low, high = (float(ratios.quantile((1 + side * confidence) / 2)) for side in (-1, 1))
    return low, high


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The shares p with |successes/n − p| ≤ z √(p(1 − p)/n): the score interval of a share, never empty at 0 or 1.

    Wilson 1927, "Probable inference, the law of succession, and statistical inference", JASA 22, 209–212; without a
    continuity correction.

    Args:
        successes: 0 to n.
        n: independent trials, ≥ 1.
        confidence: between 0 and 1; z is the normal quantile of (1 + confidence)/2.

    Returns:
        Its lower and its upper end.

    Raises:
        ValueError: numbers out of these bounds.

    Examples:
        >>> [round(end, 3) for end in wilson(8, 10)]
        [0.49, 0.943]
    """
    if not 0 <= successes <= n or n < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"successes is {successes}, n {n}, confidence {confidence}; pass 0 ≤ successes ≤ n, n ≥ 1 and 0 < "
            "confidence < 1."
        )
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    share = successes / n
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return max(centre - half, 0.0), min(centre + half, 1.0)  # rounding could leave the bounds at 0 and n successes
