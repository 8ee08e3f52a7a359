"""All there is to look at: traces in colour, figures, the colours of their lines. Figures need the extra `plots`."""

from .comparison_figures import comparison_figure, kl_figure, sweep_figure, time_figure, win_rate_figure
from .figure_style import LINES
from .figures import landscape_figure, overoptimization_figure, trace_figure
from .trace_text import ShownTrace, show

__all__ = [
    "LINES",
    "ShownTrace",
    "comparison_figure",
    "kl_figure",
    "landscape_figure",
    "overoptimization_figure",
    "show",
    "sweep_figure",
    "time_figure",
    "trace_figure",
    "win_rate_figure",
]
