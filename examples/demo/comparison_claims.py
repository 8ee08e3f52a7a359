"""Who is above whom in a comparison, in sentences with intervals: the differences, and where best-of-n is met."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hf_recontrol.intervals import crossed_bootstrap

Row = Mapping[str, Any]
Gains = Mapping[tuple[str, float | None], Mapping[str, Tensor]]
OURS = ("RE-Control", "control head", "constant control")
OTHERS = {
    "RE-Control": (
        "random direction",
        "linear head, shuffled rewards",
        "Static RE",
        "linear head",
        "CD (ARGS)",
        "CD prefix, FUDGE",
    ),
    "control head": ("RE-Control", "linear head", "constant control"),
}
"""What each should be above at the same KL, and the simpler ones by which it is measured."""


def claims(rows: Sequence[Row], gains: Gains) -> str:
    """Markdown: differences by the judge with 95 % intervals over runs and prompts, and the KL that meets best-of-n."""
    settings = sorted({row["setting"] for row in rows if row["setting"] is not None})
    lines = []
    for name, others in OTHERS.items():
        lines += [f"Difference of the judge's gain, {name} less the other at the same KL:", ""]
        lines += ["| nats asked | " + " | ".join(others) + " |", "|---" * (len(others) + 1) + "|"]
        for setting in settings:
            cells = [_difference(gains, (name, setting), (other, setting)) for other in others]
            lines.append(f"| {setting:g} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["Difference to what also costs one generation, and needs no head:", ""]
    lines += ["| nats asked | method | base | prompting |", "|---|---|---|---|"]
    for setting in settings:
        for name in OURS:
            cells = [_difference(gains, (name, setting), (other, None)) for other in ("base", "prompting")]
            lines.append(f"| {setting:g} | {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Nats an answer at which the judge's gain is that of best-of-n, by a straight line between settings:",
        "",
    ]
    sizes = [row for row in rows if row["method"].startswith("best-of-")]
    lines += [
        "| method | forwards | " + " | ".join(_named(row) for row in sizes) + " |",
        "|---" * (len(sizes) + 2) + "|",
    ]
    for name in OURS:
        points = [row for row in rows if row["method"] == name]
        met = [_met(points, row["judge"]["mean"]) for row in sizes]
        lines.append(f"| {name} | {points[0]['forwards_per_token']:g} | " + " | ".join(met) + " |")
    return "\n".join(lines) + "\n"


def _difference(gains: Gains, ours: tuple[str, float | None], other: tuple[str, float | None]) -> str:
    """'+0.31 [+0.20, +0.42]'; in bold where the interval is above 0."""
    if ours not in gains or other not in gains:
        return "not compared"
    gain = crossed_bootstrap(gains[ours]["judge"] - gains[other]["judge"])
    text = f"{gain.mean:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}]"
    return f"**{text}**" if gain.low > 0 else text


def _named(row: Row) -> str:
    return f"{row['method']} ({row['judge']['mean']:+.2f}, ≤ {row['kl_per_answer']:.2f} nats)"


def _met(points: Sequence[Row], gain: float) -> str:
    """The KL at which a method's gain is so high."""
    places = [(0.0, 0.0), *((row["kl_per_answer"], row["judge"]["mean"]) for row in points)]
    for (x, low), (more, high) in itertools.pairwise(sorted(places)):
        if low <= gain <= high and high > low:
            return f"{x + (more - x) * (gain - low) / (high - low):.1f}"
    return f"not by {max(x for x, _ in places):.1f}"
