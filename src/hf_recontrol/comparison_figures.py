"""Figures that compare methods. They read no files and compute no metrics: a row has what is drawn.

A row is one method at one setting: {"method": its name, "placebo": True draws it in grey, "setting": nats per answer
that were asked for, None for a method without a strength, …}. Its other columns are each figure's own. What is missing,
None or NaN is left out; a figure of which nothing is left, or of no rows, is a ValueError. A gain is of a judge, or of
the reward, over the base model: {"mean", "low", "high", "n"}, in standard deviations of the base answers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .figure_rows import Row, drawable, interval, label, name_and_setting, number, sample_size
from .figure_style import FAINT, LINES, PLACEBO, SMALL, WIDTH, looks, new_figure, plain_numbers, shared_legend

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HOLLOW = {"markerfacecolor": "white", "linestyle": "none", "zorder": 3}  # above the lines, which would cross it


def comparison_figure(rows: Sequence[Row], by: str = "judge") -> "Figure":
    """Each method's gain as a bar, the highest on top, with its interval, its number beside it, and placebos in grey.

    Args:
        rows: one for each method, at the setting of your choice.
        by: the column of the gain: "judge", "reward", "second_judge" or the like; or "win_rate", whose bars start at
            0.5, a draw.
    """
    rows = sorted(drawable(rows, by), key=lambda row: number(row, by))
    methods = [row["method"] for row in rows]
    if twice := sorted({method for method in methods if methods.count(method) > 1}):
        raise ValueError(f"{twice} have several rows, but a bar is one method at one setting. Pass one row of each.")
    figure = new_figure(WIDTH, 1.2 + 0.27 * len(rows))
    axis = figure.subplots()
    for place, row in enumerate(rows):
        _bar(axis, place, row, by)
    axis.axvline(_base(by), color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [*map(name_and_setting, rows)], fontsize=SMALL, parse_math=False)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.margins(x=0.12)  # holds the number beside the longest bar
    asked = any(math.isfinite(number(row, "setting")) for row in rows)
    brackets = "\nin brackets: the KL per answer that was asked for" if asked else ""
    axis.set_xlabel(label(by).replace("\n", " ") + sample_size(rows, by) + brackets)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def _base(by: str) -> float:
    return 0.5 if by == "win_rate" else 0.0


def _bar(axis: Any, place: int, row: Row, by: str) -> None:
    mean, base, ends = number(row, by), _base(by), interval(row, by)
    axis.barh(place, mean - base, left=base, height=0.7, color=PLACEBO if row.get("placebo") else LINES[4])
    if ends is not None:
        axis.hlines(place, *ends, color="black", linewidth=1.5)
    text = f"{mean:.2f}" if by == "win_rate" else f"{mean:+.2f}".replace("-", "−")
    right = (max(mean, base, *(ends or ())), place)
    axis.annotate(text, right, (5, 0), textcoords="offset points", verticalalignment="center", fontsize=SMALL)


def kl_figure(rows: Sequence[Row]) -> "Figure":
    """Judge's and reward's gain against KL: a line for each method through its rows in order of KL.

    Where only an upper bound of the KL is known, as of best-of-n, the point is hollow with an arrow to the left. A row
    of KL 0, the base model's, has no place on the logarithmic axis and is left out; the line at 0 is the base model.

    Args:
        rows: with "kl_per_answer" in nats, "kl_is_bound": True where it is an upper bound, and "judge" or "reward".
    """
    names = _present(rows, "kl_per_answer", ("judge", "reward"))
    figure = _panels(rows, "kl_per_answer", names, height=1.5 + 3.3 * len(names))
    for axis in figure.axes:
        axis.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    figure.axes[-1].set_xlabel("KL per answer (nats)")
    return figure


def sweep_figure(rows: Sequence[Row]) -> "Figure":
    """What step size and number of steps do to diversity, coherence and reward: a line for each number of steps.

    Args:
        rows: with "step_size" (α, in units of the hidden state per unit of ∇V) and "num_steps" (n), and any of
            "diversity_20", "coherence" (a cosine) and "reward". Several methods get lines of their own.
    """
    rows = sorted(drawable(rows, "step_size", "num_steps"), key=lambda row: number(row, "num_steps"))
    several = len({row["method"] for row in rows}) > 1
    lines = [{**row, "method": f"{row['method']}, " * several + f"n = {row['num_steps']}"} for row in rows]
    names = _present(lines, "step_size", ("diversity_20", "coherence", "reward"))
    figure = _panels(lines, "step_size", names, height=1.2 + 2.3 * len(names))
    figure.axes[-1].set_xlabel("step size α (units of the hidden state per unit of ∇V)")
    return figure


def time_figure(rows: Sequence[Row]) -> "Figure":
    """Seconds per token against batch size, both logarithmic: a line for each method.

    Args:
        rows: with "batch_size", in answers, and "seconds_per_token".
    """
    figure = _panels(rows, "batch_size", ("seconds_per_token",), height=5.5)
    (axis,) = figure.axes
    axis.set_yscale("log")
    plain_numbers(axis.yaxis)
    axis.set_xscale("log", base=2)
    sizes = sorted({number(row, "batch_size") for row in drawable(rows, "batch_size", "seconds_per_token")})
    axis.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axis.set_xlabel("batch size (answers)")
    return figure


def win_rate_figure(rows: Sequence[Row]) -> "Figure":
    """Win rate against seconds per token: a point with its interval for each row, named at the right; 0.5 is a draw.

    Args:
        rows: with "seconds_per_token" and "win_rate": {"mean", "low", "high", "n"}, 0 to 1.
    """
    known = drawable(rows, "seconds_per_token", "win_rate")
    marks = {name: {**look, "linestyle": "none", "markersize": 5} for name, look in looks(rows).items()}
    rows = sorted(known, key=lambda row: number(row, "win_rate"))
    figure = new_figure(WIDTH, max(4.5, 1.2 + 0.22 * len(rows)))
    axis: Any = figure.subplots()
    for row in rows:
        _draw(axis, [row], "seconds_per_token", "win_rate", marks[row["method"]])
    axis.axhline(0.5, color="black", linestyle="--", linewidth=0.8, zorder=0)
    axis.set(xscale="log", xlabel=label("seconds_per_token"), ylabel=label("win_rate") + sample_size(rows, "win_rate"))
    plain_numbers(axis.xaxis)
    low, high = axis.get_ylim()
    heights = _spread([(number(row, "win_rate") - low) / (high - low) for row in rows])
    line = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.7, "relpos": (0, 0.5), "shrinkA": 18}
    for row, height in zip(rows, heights, strict=True):
        axis.plot(1.05, height, transform=axis.transAxes, clip_on=False, **marks[row["method"]])
        point, text = (number(row, "seconds_per_token"), number(row, "win_rate")), name_and_setting(row)
        look = {"fontsize": SMALL, "verticalalignment": "center", "arrowprops": line, "zorder": 1}
        axis.annotate(text, point, (1.08, height), textcoords="axes fraction", parse_math=False, **look)
    return figure


def _spread(heights: list[float]) -> list[float]:
    """Heights in rising order, in shares of the axis, moved apart so that the names at them do not touch."""
    gap = 1 / max(len(heights), 18)
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    top = 1.0
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], top)
        top = heights[i] - gap
    return heights


def _present(rows: Sequence[Row], x: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the columns that have something to draw; all where none has, for the error that follows."""
    known = drawable(rows, x)
    return tuple(name for name in names if not all(math.isnan(number(row, name)) for row in known)) or names


def _panels(rows: Sequence[Row], x: str, names: Sequence[str], *, height: float) -> "Figure":
    """A panel for each name, one below the other, with a line for each method and one legend."""
    drawn = {name: drawable(rows, x, name) for name in names}
    marks = looks(rows)
    figure = new_figure(WIDTH, height)
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, known) in zip(panels, drawn.items(), strict=True):
        for method, look in marks.items():
            _draw(axis, [row for row in known if row["method"] == method], x, name, look, method)
        axis.set(xscale="log", ylabel=label(name))
        plain_numbers(axis.xaxis)
    shared_legend(figure)
    return figure


def _draw(axis: Any, rows: list[Row], x: str, y: str, look: Mapping[str, Any], name: str | None = None) -> None:
    """A method's line, its intervals, and hollow points where x is only an upper bound of the KL."""
    rows = sorted(rows, key=lambda row: number(row, x))
    for row in rows:
        if (ends := interval(row, y)) is not None:
            axis.vlines(number(row, x), *ends, color=look["color"], linewidth=1, alpha=0.6)
    bounds = [row for row in rows if _is_bound(row, x)]
    _plot(axis, [row for row in rows if not _is_bound(row, x)], x, y, look, name)
    _plot(axis, bounds, x, y, {**look, **HOLLOW}, name and f"{name} (KL: at most)")
    for row in bounds:
        point, arrow = (number(row, x), number(row, y)), {"arrowstyle": "<-", "color": look["color"], "shrinkB": 3}
        axis.annotate("", point, (-16, 0), textcoords="offset points", arrowprops=arrow, annotation_clip=False)


def _is_bound(row: Row, x: str) -> bool:
    return x == "kl_per_answer" and bool(row.get("kl_is_bound"))


def _plot(axis: Any, rows: list[Row], x: str, y: str, look: Mapping[str, Any], name: str | None) -> None:
    if rows:
        places = [[number(row, column) for row in rows] for column in (x, y)]
        axis.plot(*places, **{"markersize": 5, **look}, label=name)
