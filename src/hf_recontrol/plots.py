"""What the control did, to look at: a trace's tokens in colour, and figures. Reads no files, computes no metrics."""

import html
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

from .trace import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Colour = tuple[int, ...]  # red, green, blue, each 0 to 255
Paint = Callable[[float], Colour]
BLUE, ORANGE, PURPLE, GREY = (107, 174, 214), (253, 174, 97), (188, 149, 220), (200, 200, 200)  # black is read on them
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")  # Okabe and Ito, for all eyes
SHOWN_BY = {
    "values": "value before the control, in units of the reward",
    "steered_values": "value after the control, in units of the reward",
    "kl": "KL from the unsteered model, in nats",
    "control_norms": "‖u‖, in units of the hidden state",
}
SIGNS = {"▲": "at the cap", "✗": "left unedited"}
CSS = {"": "", "▲": "text-decoration:underline", "✗": "text-decoration:line-through"}
PANELS = {
    "judge": "judge gain (sd of base answers)",
    "reward": "reward gain (sd of base answers)",
    "perplexity_ratio": "perplexity (ratio to base)",
    "distinct_3": "distinct-3 (share of 3-grams)",
}
COLLAPSE = {"perplexity_ratio": 1.5, "distinct_3": 0.9}


@dataclass(frozen=True)
class _Token:
    text: str
    colour: Colour
    sign: str = ""
    tooltip: str = ""

    # black is set with the background: the foreground of a dark notebook or terminal is white
    def ansi(self) -> str:
        return "\x1b[38;2;0;0;0;48;2;{};{};{}m".format(*self.colour) + f"{self.text}{self.sign}\x1b[0m"

    def html(self) -> str:
        style = "color:#000;background-color:#{:02x}{:02x}{:02x};".format(*self.colour) + CSS[self.sign]
        return f'<span style="{style}" title="{html.escape(self.tooltip)}">{html.escape(self.text)}</span>'


@dataclass(frozen=True, repr=False)
class ShownTrace:
    """What `show` returns: HTML in a notebook; printed, coloured in a terminal, plain elsewhere or under NO_COLOR."""

    title: str
    """What the colours stand for, with its unit."""
    legend: list[_Token]
    """Numbers along the colour scale."""
    rows: list[tuple[str, list[_Token]]]
    """Per row, its means and its tokens."""

    def __str__(self) -> str:
        in_colour = sys.stdout is not None and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        scale = f"{self.title}: {''.join(number.ansi() for number in self.legend)}; " if in_colour else ""
        lines = [scale + ", ".join(f"{sign} {meaning}" for sign, meaning in SIGNS.items())]
        for summary, tokens in self.rows:
            lines += [summary, "".join(token.ansi() if in_colour else token.text + token.sign for token in tokens)]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        scale = "".join(number.html() for number in self.legend)
        signs = ", ".join(f'<span style="{CSS[sign]}">{meaning}</span>' for sign, meaning in SIGNS.items())
        parts = [f"<div>{self.title}: {scale}; {signs}</div>"]
        for summary, tokens in self.rows:
            parts.append(f'<div style="margin-top:0.6em">{summary}</div><div>{"".join(map(_Token.html, tokens))}</div>')
        # the classes keep MathJax, which a notebook runs over every output, from typesetting a token like $x$
        style = "white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.7"
        return f'<div class="tex2jax_ignore mathjax_ignore" style="{style}">{"".join(parts)}</div>'


def show(trace: Trace, tokenizer: Any = None, *, by: str | None = None) -> ShownTrace:
    """The rows' tokens in colour: the last line of a notebook's cell, or `print` it.

    Values run from blue over white, their mean, to orange; KL and ‖u‖ from white, 0, to purple; grey is not finite.
    Underlined (printed: ▲) is at the cap, struck through (✗) left unedited. Point at a token to see all its numbers.

    Args:
        trace: of (rows, tokens); each row is shown up to its length.
        tokenizer: the model's; None shows the ids.
        by: "values" or "steered_values", in units of the reward; "kl", nats; "control_norms", of the hidden state. Of
            a control head, which knows no values, "kl" where None; else "values".
    """
    if by is None:
        by = "kl" if trace.values.numel() and bool(trace.values.isnan().all()) else "values"
    if by not in SHOWN_BY:
        raise ValueError(f"by is {by!r}, but tokens are coloured by one of {', '.join(SHOWN_BY)}. Pass one of these.")
    numbers, colour = _scale(trace, by)
    rows = [_row(trace, row, _texts(trace, row, tokenizer), by, colour) for row in range(len(trace))]
    return ShownTrace(SHOWN_BY[by], [_Token(f" {number:.3g} ", colour(number)) for number in numbers], rows)


def _scale(trace: Trace, by: str) -> tuple[list[float], Paint]:
    numbers = [number for number in getattr(trace, by).flatten().tolist() if math.isfinite(number)] or [0.0]
    around_mean = by in ("values", "steered_values")
    centre = math.fsum(numbers) / len(numbers) if around_mean else 0.0
    reach = max(abs(number - centre) for number in numbers)  # 0 for equal values: float64 sums float32 ones exactly

    def colour(number: float) -> Colour:
        if not math.isfinite(number):
            return GREY
        share = (number - centre) / reach if reach else 0.0
        full = PURPLE if not around_mean else ORANGE if share > 0 else BLUE
        return tuple(round(255 - (255 - part) * abs(share)) for part in full)

    return [centre + step * reach for step in ((-1, 0, 1) if around_mean else (0, 1))], colour


def _row(trace: Trace, row: int, texts: list[str], by: str, colour: Paint) -> tuple[str, list[_Token]]:
    if not texts:
        return f"row {row}: no tokens", []
    columns = {name: getattr(trace, name)[row, : len(texts)] for name in (*SHOWN_BY, "capped", "sound")}
    before, after, kl = (float(columns[name].nanmean()) for name in ("values", "steered_values", "kl"))
    values = "" if math.isnan(before) else f"mean value {before:.3g} → {after:.3g}, "  # a control head knows none
    summary = (
        f"row {row}: tokens {len(texts)}, {values}mean KL {kl:.3g} nats per token, "
        f"at the cap {int(columns['capped'].sum())}, left unedited {int((~columns['sound']).sum())}"
    )
    tokens = []
    for i, text in enumerate(texts):
        value, steered, kl, norm, capped, sound = (column[i].item() for column in columns.values())
        signs = ["▲"] * capped + ["✗"] * (not sound)
        numbers = f"value {value:.3g} → {steered:.3g}\n" * bool(values) + f"‖u‖ {norm:.3g}\nKL {kl:.3g} nats"
        tooltip = "\n".join([numbers, *(SIGNS[sign] for sign in signs)])
        tokens.append(_Token(text, colour(columns[by][i].item()), "".join(signs[-1:]), tooltip))
    return summary, tokens


def _texts(trace: Trace, row: int, tokenizer: Any) -> list[str]:
    ids = trace.token_ids[row, : int(trace.lengths[row])].tolist()
    if tokenizer is None:
        return [f" {token}" for token in ids]
    texts = []
    for i in range(len(ids)):
        # A token is what the text gains by it: decoded alone it can lose its leading space, and a part of a character
        # is no text. Eight tokens back are enough, as a character has at most four bytes.
        window = ids[max(0, i - 8) : i + 1]
        before, after = tokenizer.decode(window[:-1]), tokenizer.decode(window)
        kept = next((k for k, c in enumerate(before) if after[k : k + 1] != c), len(before))
        # control characters could command the terminal, and others reverse the line
        printable = (c if c.isprintable() else " " * c.isspace() for c in after[kept:].replace("\n", "⏎"))
        texts.append("".join(printable) or "·")
    return texts


def _figure(width: float, height: float) -> "Figure":
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ImportError('Figures need matplotlib. Install the extra: pip install "hf-recontrol[plots]"') from error
    # not pyplot, which keeps every figure and chooses a window system for the whole process
    return matplotlib.figure.Figure(figsize=(width, height), layout="constrained")


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
    figure = _figure(min(max(8.0, 1.5 + 0.2 * length), 13.5), 7)
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
        labels = [text.strip()[:16] or "␣" for text in _texts(trace, row, tokenizer)[::step]]
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
    methods = dict.fromkeys(row["method"] for row in rows)
    figure = _figure(10, 8)
    axes = list(figure.subplots(2, 2).flat)
    for axis, (name, label) in zip(axes, PANELS.items(), strict=True):
        for method, colour, marker in zip(methods, cycle(LINES), cycle("osDvP"), strict=False):
            _draw(axis, name, method, [row for row in rows if row["method"] == method], colour, marker)
        if name in COLLAPSE:
            limits = "collapse: perplexity {perplexity_ratio} × base, distinct-3 {distinct_3}".format(**COLLAPSE)
            axis.axhline(COLLAPSE[name], color="grey", linestyle="--", label=limits)
        axis.set(xscale="log", xlabel="KL per answer (nats)", ylabel=label)
        _number(axis.xaxis)
        if name == "perplexity_ratio" and max(row[name] for row in rows) >= 2:  # it grows without bound
            axis.set_yscale("log")
            _number(axis.yaxis)
    # perplexity's panel has all that the others have, and the limits
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _number(axis: Any) -> None:
    """Plain numbers at a logarithmic axis, also where it spans less than a decade."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=20))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _check(rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        raise ValueError("Got no rows, but a figure needs one. Pass one for each method and strength.")
    for i, row in enumerate(rows):
        if lacking := sorted({"method", "kl_per_answer", *PANELS} - row.keys()):
            raise ValueError(f"Row {i} lacks {lacking}, which every row needs. Add what it lacks.")
        if not 0 < (kl := row["kl_per_answer"]) < math.inf:
            raise ValueError(f"Row {i} has kl_per_answer {kl}; a logarithmic axis needs it above 0. Leave the row out.")


def _draw(axis: Any, name: str, method: str, rows: list[Mapping[str, Any]], colour: str, marker: str) -> None:
    best_of = method.startswith("best-of")
    rows = sorted(rows, key=lambda row: float(row["kl_per_answer"]))
    kl, heights = [row["kl_per_answer"] for row in rows], [row[name] for row in rows]
    if name in ("judge", "reward"):
        low, high, heights = ([gain[part] for gain in heights] for part in ("low", "high", "mean"))
        axis.vlines(kl, low, high, color=colour)
        if not best_of:
            axis.fill_between(kl, low, high, color=colour, alpha=0.2, linewidth=0)
    label = f"{method} (KL is an upper bound)" if best_of else method
    axis.plot(kl, heights, marker=marker, linestyle="none" if best_of else "-", color=colour, label=label)
