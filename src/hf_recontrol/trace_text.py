"""What the control did to each token of an answer, in words and colours: in a notebook, in a terminal, in a file."""

import html
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .trace import Trace

Colour = tuple[int, ...]  # red, green, blue, each 0 to 255
Paint = Callable[[float], Colour]
BLUE, ORANGE, PURPLE, GREY = (107, 174, 214), (253, 174, 97), (188, 149, 220), (200, 200, 200)  # black is read on them
SHOWN_BY = {
    "values": "value before the control, in units of the reward",
    "steered_values": "value after the control, in units of the reward",
    "kl": "KL from the unsteered model, in nats",
    "control_norms": "‖u‖, in units of the hidden state",
}
SIGNS = {"▲": "at the cap", "✗": "left unedited"}
CSS = {"": "", "▲": "text-decoration:underline", "✗": "text-decoration:line-through"}


@dataclass(frozen=True)
class _Token:
    text: str
    colour: Colour
    sign: str = ""
    tooltip: str = ""

    # black is set with the background: the foreground of a dark notebook or terminal is white
    def ansi(self) -> str:
        return "\x1b[38;2;0;0;0;48;2;{};{};{}m".format(*self.colour) + f"{self.text}{self.sign}\x1b[0m"

    def html(self, tooltip: str = "title") -> str:
        """The token, with its numbers in the attribute `tooltip`."""
        style = "color:#000;background-color:#{:02x}{:02x}{:02x};".format(*self.colour) + CSS[self.sign]
        return f'<span style="{style}" {tooltip}="{html.escape(self.tooltip)}">{html.escape(self.text)}</span>'


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
        for row, (summary, tokens) in enumerate(self.rows):
            lines.append(f"row {row}: {summary}")
            lines.append("".join(token.ansi() if in_colour else token.text + token.sign for token in tokens))
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        parts = [f"<div>{self.legend_html()}</div>"]
        for row, (summary, tokens) in enumerate(self.rows):
            parts.append(f'<div style="margin-top:0.6em">row {row}: {summary}</div>')
            parts.append(f"<div>{''.join(map(_Token.html, tokens))}</div>")
        # the classes keep MathJax, which a notebook runs over every output, from typesetting a token like $x$
        style = "white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.7"
        return f'<div class="tex2jax_ignore mathjax_ignore" style="{style}">{"".join(parts)}</div>'

    def legend_html(self) -> str:
        """What the colours and the lines stand for."""
        scale = "".join(number.html() for number in self.legend)
        signs = ", ".join(f'<span style="{CSS[sign]}">{meaning}</span>' for sign, meaning in SIGNS.items())
        return f"{self.title}: {scale}; {signs}"


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
    rows = [_row(trace, row, tokenizer, by, colour) for row in range(len(trace))]
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


def _row(trace: Trace, row: int, tokenizer: Any, by: str, colour: Paint) -> tuple[str, list[_Token]]:
    texts = token_texts(trace, row, tokenizer)
    if not texts:
        return "no tokens", []
    columns = {name: getattr(trace, name)[row, : len(texts)] for name in (*SHOWN_BY, "capped", "sound")}
    before, after, kl = (float(columns[name].nanmean()) for name in ("values", "steered_values", "kl"))
    values = "" if math.isnan(before) else f"mean value {before:.3g} → {after:.3g}, "  # a control head knows none
    summary = (
        f"tokens {len(texts)}, {values}mean KL {kl:.3g} nats per token, "
        f"at the cap {int(columns['capped'].sum())}, left unedited {int((~columns['sound']).sum())}"
    )
    tokens = []
    for i, (text, likeliest) in enumerate(zip(texts, base_texts(trace, row, tokenizer), strict=True)):
        value, steered, kl, norm, capped, sound = (column[i].item() for column in columns.values())
        signs = ["▲"] * capped + ["✗"] * (not sound)
        numbers = f"value {value:.3g} → {steered:.3g}\n" * bool(values) + f"‖u‖ {norm:.3g}\nKL {kl:.3g} nats"
        base = f"likeliest without control: {likeliest.strip() or '␣'}"
        tooltip = "\n".join([numbers, base, *(SIGNS[sign] for sign in signs)])
        tokens.append(_Token(text, colour(columns[by][i].item()), "".join(signs[-1:]), tooltip))
    return summary, tokens


def token_texts(trace: Trace, row: int, tokenizer: Any) -> list[str]:
    """The texts of a row's tokens, up to its length, fit to be printed; their ids where the tokenizer is None."""
    ids = trace.token_ids[row, : int(trace.lengths[row])].tolist()
    return [_gained(ids[:i], token, tokenizer) for i, token in enumerate(ids)]


def base_texts(trace: Trace, row: int, tokenizer: Any) -> list[str]:
    """As token_texts, of the tokens that would have been likeliest without the control, each after the same text."""
    length = int(trace.lengths[row])
    ids, base = trace.token_ids[row, :length].tolist(), trace.base_token_ids[row, :length].tolist()
    return [_gained(ids[:i], token, tokenizer) for i, token in enumerate(base)]


def _gained(ids: list[int], token: int, tokenizer: Any) -> str:
    """What the text of `ids` gains by a token.

    Decoded alone it can lose its leading space, and a part of a character is no text. Eight tokens back are enough, as
    a character has at most four bytes.
    """
    if tokenizer is None:
        return f" {token}"
    before, after = tokenizer.decode(ids[-8:]), tokenizer.decode([*ids[-8:], token])
    kept = next((k for k, c in enumerate(before) if after[k : k + 1] != c), len(before))
    # control characters could command the terminal, and others reverse the line
    printable = (c if c.isprintable() else " " * c.isspace() for c in after[kept:].replace("\n", "⏎"))
    return "".join(printable) or "·"
