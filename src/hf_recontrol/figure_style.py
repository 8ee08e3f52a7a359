"""How every figure looks: its size, its colours and marks, its numbers and its legend."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")  # Okabe and Ito, for all eyes
MARKERS = "osDvP"  # five, so that with the seven colours 35 methods look different
PLACEBO, FAINT = "#8C8C8C", "#BBBBBB"
WIDTH = 8.0  # inches: saved at dpi=100 a figure is 800 pixels wide, as a README shows it
SMALL = 9  # points, of what stands close together; the rest is matplotlib's 10


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ImportError('Figures need matplotlib. Install the extra: pip install "hf-recontrol[plots]"') from error
    # not pyplot, which keeps every figure and chooses a window system for the whole process
    return matplotlib.figure.Figure(figsize=(width, height), layout="constrained")


def looks(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each method's colour, marker and line style, in order of first appearance; placebos are grey and dashed."""
    marks: dict[str, dict[str, Any]] = {}
    colours, markers, grey_markers = cycle(LINES), cycle(MARKERS), cycle(MARKERS)
    placebos = {row["method"] for row in rows if row.get("placebo")}
    for method in dict.fromkeys(row["method"] for row in rows):
        if method in placebos:
            marks[method] = {"color": PLACEBO, "marker": next(grey_markers), "linestyle": "--"}
        else:
            marks[method] = {"color": next(colours), "marker": next(markers), "linestyle": "-"}
    return marks


def plain_numbers(axis: Any) -> None:
    """Plain numbers at a logarithmic axis, also where it spans less than a decade."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=20))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def shared_legend(figure: "Figure") -> None:
    """One legend below all panels, which names once what is drawn in any of them."""
    found: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    columns = max(1, int(WIDTH * 100 / (45 + 6.5 * max(map(len, found)))))  # in pixels: a letter is 6.5, a mark 45
    legend = figure.legend(
        found.values(), found.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=SMALL
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a $ in a method's name is text
