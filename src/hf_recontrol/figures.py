"""Figures of one answer, of one hidden state, and of how far steering goes. They read no files and compute nothing."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .figure_style import LINES, WIDTH, looks, new_figure, plain_numbers
from .landscape import Landscape
from .trace import Trace
from .trace_text import token_texts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = {
    "judge": "judge gain (sd of base answers)",
    "reward": "reward gain (sd of base answers)",
    "perplexity_ratio": "perplexity (ratio to base)",
    "distinct_3": "distinct-3 (share of 3-grams)",
}
COLLAPSE = {"perplexity_ratio": 1.5, "distinct_3": 0.9}


def trace_figure(trace: Trace, row: int = 0, tokenizer: Any = None) -> "Figure":
    """One answer, token by token: V(h) and V(h + u), ‖u‖, KL; triangles at the cap, dotted lines where left unedited.

    Of a control head, which knows no values, ‖u‖ and KL.

    `figure.savefig("trace.png")` writes it; a notebook shows it after `%matplotlib inline`.

    Args:
        trace: of (rows, tokens).
        row: which answer, from 0. One that is not there or has no token is a ValueError.
        tokenizer: the model's, to write the tokens under the axis, 60 at most; None numbers them from 0.
    """
    drawable = trace.lengths.nonzero()[:, 0].tolist()
    if row not in drawable:
        raise ValueError(f"row is {row}, but the rows that have tokens to draw are {drawable}. Pass one of these.")
    length = int(trace.lengths[row])
    figure = new_figure(min(max(8.0, 1.5 + 0.2 * length), 13.5), 7)
    curves = {
        "value\n(units of the reward)": trace.steered_values,
        "‖u‖ (units of\nthe hidden state)": trace.control_norms,
        "KL of the token\n(nats)": trace.kl,
    }
    before = trace.values[row, :length]
    if bool(before.isnan().all()):
        del curves["value\n(units of the reward)"]
    axes = figure.subplots(len(curves), 1, sharex=True, height_ratios=(2, 1, 1)[-len(curves) :])
    if len(curves) == 3:
        axes[0].plot(range(length), before.numpy(), ".-", color=LINES[0], label="before the control")
    capped, unedited = (part[row, :length].nonzero()[:, 0].tolist() for part in (trace.capped, ~trace.sound))
    for axis, (name, curve) in zip(axes, curves.items(), strict=True):
        axis.plot(range(length), curve[row, :length].numpy(), ".-", color=LINES[1], label="after the control")
        axis.plot(capped, curve[row, capped].numpy(), "^", color="black", markersize=5, label="at the cap")
        for i in unedited:
            axis.axvline(i, color="grey", linestyle=":", label="left unedited" if i == unedited[0] else None)
        axis.set_ylabel(name)
    axes[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    axes[-1].set_xlabel("token of the answer")
    if tokenizer is not None:
        step = math.ceil(length / 60)
        labels = [text.strip()[:16] or "␣" for text in token_texts(trace, row, tokenizer)[::step]]
        axes[-1].set_xticks(range(0, length, step), labels, rotation=90, fontsize=8, parse_math=False)  # $ is text
    return figure


def overoptimization_figure(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Gains, perplexity and distinct-3 against KL: how far each method raises the reward before the texts collapse.

    A method is a line through its rows in order of KL, with the gains' intervals as a band. One whose name begins with
    "best-of" is drawn as points, since only an upper bound of its KL is known. Dashed: the texts collapse.

    Args:
        rows: one or more, each {"method": its name, "kl_per_answer": nats, above 0 as the axis is logarithmic, "judge"
            and "reward": {"mean", "low", "high"} of the gain in standard deviations of the base answers,
            "perplexity_ratio": perplexity / the base model's, "distinct_3": 0 to 1}. Else a ValueError.
    """
    _check(rows)
    marks = looks(rows)
    figure = new_figure(10, 8)
    axes = list(figure.subplots(2, 2).flat)
    for axis, (name, label) in zip(axes, PANELS.items(), strict=True):
        for method, look in marks.items():
            _draw(axis, name, method, [row for row in rows if row["method"] == method], look)
        if name in COLLAPSE:
            limits = "collapse: perplexity {perplexity_ratio} × base, distinct-3 {distinct_3}".format(**COLLAPSE)
            axis.axhline(COLLAPSE[name], color="grey", linestyle="--", label=limits)
        axis.set(xscale="log", xlabel="KL per answer (nats)", ylabel=label)
        plain_numbers(axis.xaxis)
        if name == "perplexity_ratio" and max(row[name] for row in rows) >= 2:  # it grows without bound
            axis.set_yscale("log")
            plain_numbers(axis.yaxis)
    # perplexity's panel has all that the others have, and the limits
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _check(rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        raise ValueError("Got no rows, but a figure needs one. Pass one for each method and strength.")
    for i, row in enumerate(rows):
        if lacking := sorted({"method", "kl_per_answer", *PANELS} - row.keys()):
            raise ValueError(f"Row {i} lacks {lacking}, which every row needs. Add what it lacks.")
        if not 0 < (kl := row["kl_per_answer"]) < math.inf:
            raise ValueError(f"Row {i} has kl_per_answer {kl}; a logarithmic axis needs it above 0. Leave the row out.")


def _draw(axis: Any, name: str, method: str, rows: list[Mapping[str, Any]], look: dict[str, Any]) -> None:
    best_of = method.startswith("best-of")
    rows = sorted(rows, key=lambda row: float(row["kl_per_answer"]))
    kl, heights = [row["kl_per_answer"] for row in rows], [row[name] for row in rows]
    if name in ("judge", "reward"):
        low, high, heights = ([gain[part] for gain in heights] for part in ("low", "high", "mean"))
        axis.vlines(kl, low, high, color=look["color"])
        if not best_of:
            axis.fill_between(kl, low, high, color=look["color"], alpha=0.2, linewidth=0)
    label = f"{method} (KL is an upper bound)" if best_of else method
    axis.plot(kl, heights, **look | {"linestyle": "none" if best_of else "-"}, label=label)


def landscape_figure(landscape: Landscape) -> "Figure":
    """V about one hidden state, as level lines, with the path that the control takes; it ends where x is 1 and y is 0.

    The path is drawn by its shadow on the plane, as its steps leave the plane a little.

    Args:
        landscape: of `value_landscape`.
    """
    figure = new_figure(WIDTH, 6.5)
    axis = figure.subplots()
    axes, (x, y) = landscape.axis.numpy(), landscape.path.T.numpy()
    levels = axis.contourf(axes, axes, landscape.values.numpy(), levels=20, cmap="cividis")
    figure.colorbar(levels, ax=axis, label="value V (units of the reward)")
    axis.plot(x, y, ".-", color="black", label=f"path of the control, n = {len(x) - 1}")
    axis.plot(x[:1], y[:1], "o", color="white", markeredgecolor="black", markersize=9, label="h, before")
    axis.plot(x[-1:], y[-1:], "*", color=LINES[1], markeredgecolor="black", markersize=16, label="h + u, after")
    axis.set(
        xlabel=f"along the control u (units of ‖u‖ = {landscape.control_norm:.3g})",
        ylabel="along a random direction at right angles (units of ‖u‖)",
        aspect="equal",
    )
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure
