"""What the control adds to a plain decoding step, against its number of steps n: one figure from the JSON of edit.py.

python tests/benchmarks/edit.py --rows 1 --steps 1 3 10 30 100 200 --step-of 1.2B --output edit.json
python tests/benchmarks/figure.py edit.json --output edit.png
"""

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from hf_recontrol.plots import LINES

CURVES = {  # of edit.py: the label at the curve's end, its colour and marker
    "authors' loop": ("authors' loop", LINES[1], "s"),
    "closed form": ("closed form", LINES[5], "D"),
    "ours": ("hf-recontrol", LINES[0], "o"),
    "three products": ("three products:\nthe limit", LINES[6], ""),
}


def points_of(results: list[dict[str, Any]], variant: str, rows: int) -> list[tuple[int, float]]:
    """(n, percent of a plain step), in order of n."""
    chosen = [row for row in results if row["variant"] == variant and row["rows"] == rows]
    return sorted((row["steps"], 100 * row["of_a_plain_step"]) for row in chosen)


def drawn(edit: dict[str, Any], rows: int) -> Figure:
    """The figure; 7 inches wide, so that at 100 dots per inch it is 700 pixels."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axis = figure.subplots()
    for variant, (label, colour, marker) in CURVES.items():
        points = points_of(edit["results"], variant, rows)
        if not points:
            continue
        steps, percent = zip(*points, strict=True)
        axis.plot(steps, percent, "-" if marker else "--", marker=marker or None, color=colour, linewidth=2)
        axis.annotate(
            label, (steps[-1], percent[-1]), (8, 0), textcoords="offset points", color=colour, va="center", fontsize=11
        )
    shape = edit["step_of"]
    axis.set(xscale="log", yscale="log", xlabel="steps of the ascent, n")
    axis.set_ylabel("time added to a plain\ndecoding step (%)")
    label_axes(axis)
    text = (
        f"One decoding step of a {shape} model in bfloat16, {rows} row{'s' * (rows > 1)}; value head {edit['width']} "
    )
    text += f"wide, α = {edit['step_size']:g}. {edit['machine']}. {edit['command']}."
    figure.supxlabel("\n".join(textwrap.wrap(text, 105)), fontsize=7.5, color="#444444", x=0.02, ha="left")
    return figure


def label_axes(axis: Any) -> None:
    """Plain numbers, a light grid, and room at the right for the curves' names."""
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=20))
        one.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
        one.set_minor_formatter(NullFormatter())
    axis.tick_params(labelsize=10, which="major")
    axis.grid(which="major", color="#dddddd", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.04)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("edit", type=Path, help="JSON of edit.py --step-of")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("edit.png"))
    args = parser.parse_args()
    edit = json.loads(args.edit.read_text(encoding="utf-8"))
    if edit["step_of"] is None:
        parser.error(f"{args.edit} has no plain step to compare with. Run edit.py with --step-of.")
    drawn(edit, args.rows).savefig(args.output, dpi=200)


if __name__ == "__main__":
    main()
