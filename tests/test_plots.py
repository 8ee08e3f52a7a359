"""What a trace looks like in a notebook, in a terminal and in a file; figures are read back from their lines."""

import io
import math
import re
import sys
from html.parser import HTMLParser

import pytest
import torch
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_recontrol.plots import overoptimization_figure, show, trace_figure
from hf_recontrol.trace import Trace

NAN = math.nan
WHITE, GREY, BLUE, ORANGE, PURPLE = "#ffffff", "#c8c8c8", "#6baed6", "#fdae61", "#bc95dc"
SGR = re.compile(r"\x1b\[[0-9;]*m")


def make_trace(*rows, ids=None, capped=(), unedited=(), **columns):
    """A trace of the given values, a row each; elsewhere the value + 1, ‖u‖ 2, KL 0.25. `capped` holds (row, token)."""
    width = max([len(row) for row in rows], default=0)
    values = torch.tensor([[*row, *[NAN] * (width - len(row))] for row in rows]).reshape(len(rows), width)
    trace = {
        "token_ids": torch.arange(3, 3 + width).repeat(len(rows), 1),
        "base_token_ids": torch.arange(3, 3 + width).flip(0).repeat(len(rows), 1),
        "values": values,
        "steered_values": values + 1,
        "control_norms": values * 0 + 2,
        "kl": values * 0 + 0.25,
        "scale": values * 0 + 1,
        "sound": torch.ones_like(values, dtype=torch.bool),
    }
    for where in capped:
        trace["scale"][where] = 0.5
    for where in unedited:
        trace["sound"][where] = False
    if ids is not None:
        trace["token_ids"] = trace["base_token_ids"] = torch.tensor(ids)
    return Trace(**(trace | {name: torch.tensor(column) for name, column in columns.items()}))


class Pieces:
    """A tokenizer whose text is its pieces, one after the other."""

    def __init__(self, *pieces):
        self.pieces = pieces

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)


def pieces_trace(*pieces):
    """A trace with a token for each piece, and the tokenizer."""
    return make_trace([float(i) for i in range(len(pieces))], ids=[list(range(len(pieces)))]), Pieces(*pieces)


class Page(HTMLParser):
    """The tags of a page, and its tokens: (text, style, tooltip) of each span with a tooltip."""

    def __init__(self, shown):
        super().__init__()
        self.tags, self.tokens = [], []
        self.feed(shown._repr_html_())
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes = dict(attrs)

    def handle_data(self, data):
        if self.attributes.get("title"):
            self.tokens.append((data, self.attributes["style"], self.attributes["title"]))

    def handle_endtag(self, tag):
        self.attributes = {}


def texts(shown):
    return [text for text, _, _ in Page(shown).tokens]


def backgrounds(shown):
    return [re.search("background-color:(#......)", style)[1] for _, style, _ in Page(shown).tokens]


def printed(shown, monkeypatch, *, terminal):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdout", stream)
    print(shown)
    monkeypatch.undo()
    return stream.getvalue()


@pytest.fixture(autouse=True)
def colours_are_wanted(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)


# show, in a notebook


def test_pointing_at_a_token_gives_all_its_numbers():
    shown = show(make_trace([0.5, -1.25, 3.0], capped=[(0, 1)], unedited=[(0, 2)]), tiny_tokenizer())
    (_, _, free), (_, _, capped), (_, _, unedited) = Page(shown).tokens
    rest, base = ["‖u‖ 2", "KL 0.25 nats"], "likeliest without control: "
    assert free.splitlines() == ["value 0.5 → 1.5", *rest, base + "w5"]
    assert capped.splitlines() == ["value -1.25 → -0.25", *rest, base + "w4", "at the cap"]
    assert unedited.splitlines() == ["value 3 → 4", *rest, base + "w3", "left unedited"]


def test_a_notebook_shows_which_tokens_are_at_the_cap_and_which_unedited():
    styles = [
        style for _, style, _ in Page(show(make_trace([1.0, 2.0, 3.0], capped=[(0, 1)], unedited=[(0, 2)]))).tokens
    ]
    assert ["underline" in style for style in styles] == [False, True, False]
    assert ["line-through" in style for style in styles] == [False, False, True]


def test_html_in_a_token_stays_text():
    hostile = [
        '</span><script>alert("1")</script>',
        "<img src=x onerror=alert(1)>",
        '" onmouseover="alert(1)',
        "&lt;b>",
    ]
    page = Page(show(*pieces_trace(*hostile)))
    assert [text for text, _, _ in page.tokens] == hostile
    assert set(page.tags) == {"div", "span"}


def test_mathjax_is_kept_from_a_token():
    outermost = re.match('<div class="([^"]*)"', show(*pieces_trace("$x$"))._repr_html_())
    assert outermost[1].split() == ["tex2jax_ignore", "mathjax_ignore"]


def test_ipython_displays_the_html():
    formatters = pytest.importorskip("IPython.core.formatters")
    shown = show(make_trace([1.0, 2.0]), tiny_tokenizer())
    assert formatters.HTMLFormatter()(shown) == shown._repr_html_()
    assert formatters.PlainTextFormatter()(shown) == str(shown)


def test_the_text_is_readable_in_light_and_dark_themes():
    trace = make_trace([-1.0, 0.0, 1.0, -math.inf], kl=[[0.0, 0.1, 0.2, NAN]])
    for by in ("values", "kl"):
        for _, style, _ in Page(show(trace, by=by)).tokens:
            assert "color:#000;" in style
        for colour in backgrounds(show(trace, by=by)):
            channels = [part / 255 for part in bytes.fromhex(colour[1:])]
            linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
            luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
            assert (luminance + 0.05) / 0.05 > 7  # WCAG's AAA, black on it


# Colours


def test_values_run_from_blue_over_white_at_the_mean_to_orange():
    assert backgrounds(show(make_trace([-1.0, 1.0, 3.0]))) == [BLUE, WHITE, ORANGE]


def test_one_scale_holds_for_all_rows():
    assert backgrounds(show(make_trace([0.0, 2.0], [4.0]))) == [BLUE, WHITE, ORANGE]


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("values", [BLUE, WHITE, ORANGE]),
        ("steered_values", [ORANGE, WHITE, BLUE]),
        ("kl", [WHITE, "#decaee", PURPLE]),
        ("control_norms", [PURPLE, "#decaee", WHITE]),
    ],
)
def test_by_chooses_what_is_coloured(by, expected):
    columns = {"steered_values": [[9.0, 8.0, 7.0]], "kl": [[0.0, 0.5, 1.0]], "control_norms": [[4.0, 2.0, 0.0]]}
    assert backgrounds(show(make_trace([1.0, 2.0, 3.0], **columns), by=by)) == expected


def test_an_unknown_by_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"'value', but .* values, steered_values, kl, control_norms"):
        show(make_trace([1.0]), by="value")


@pytest.mark.parametrize("terminal", [False, True])
def test_the_legend_names_the_unit_and_the_ends_of_the_scale(terminal, monkeypatch):
    shown = show(make_trace([-1.0, 0.5, 2.0]))
    text = (
        SGR.sub("", printed(shown, monkeypatch, terminal=True))
        if terminal
        else re.sub("<[^>]*>", "", shown._repr_html_())
    )
    assert text.startswith("value before the control, in units of the reward:  -1  0.5  2 ; ")
    assert "at the cap" in text
    assert "left unedited" in text


def test_the_legend_of_kl_begins_at_zero():
    text = re.sub("<[^>]*>", "", show(make_trace([1.0, 2.0], kl=[[0.25, 0.75]]), by="kl")._repr_html_())
    assert text.startswith("KL from the unsteered model, in nats:  0  0.75 ; ")


@pytest.mark.parametrize("value", [0.0, 2.0, 0.1, 1e30])
def test_equal_values_are_all_white(value):
    assert backgrounds(show(make_trace([value] * 7))) == [WHITE] * 7


def test_no_kl_at_all_is_white():
    assert backgrounds(show(make_trace([1.0, 2.0], kl=[[0.0, 0.0]]), by="kl")) == [WHITE, WHITE]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, NAN])
def test_a_number_that_is_not_finite_is_grey_and_leaves_the_scale_alone(bad):
    trace = make_trace([1.0, 2.0, 3.0, 4.0], steered_values=[[-1.0, bad, 0.0, 1.0]])
    assert backgrounds(show(trace, by="steered_values")) == [BLUE, GREY, WHITE, ORANGE]


# show, printed


def test_a_terminal_gets_the_notebooks_colours(monkeypatch):
    shown = show(make_trace([-1.0, 1.0, 3.0], capped=[(0, 1)], unedited=[(0, 2)]), tiny_tokenizer())
    line = printed(shown, monkeypatch, terminal=True).splitlines()[2]
    colours = re.findall(r"\x1b\[38;2;0;0;0;48;2;(\d+);(\d+);(\d+)m[^\x1b]*\x1b\[0m", line)
    assert ["#{:02x}{:02x}{:02x}".format(*map(int, colour)) for colour in colours] == backgrounds(shown)
    assert SGR.sub("", line) == "w3 w4▲ w5✗"


def test_a_file_gets_plain_text_that_says_as_much(monkeypatch):
    trace = make_trace([0.5, 1.5, 4.0], [2.0], capped=[(0, 1), (1, 0)], unedited=[(0, 2)])
    assert printed(show(trace, tiny_tokenizer()), monkeypatch, terminal=False).splitlines() == [
        "▲ at the cap, ✗ left unedited",
        "row 0: tokens 3, mean value 2 → 3, mean KL 0.25 nats per token, at the cap 1, left unedited 1",
        "w3 w4▲ w5✗",
        "row 1: tokens 1, mean value 2 → 3, mean KL 0.25 nats per token, at the cap 1, left unedited 0",
        "w3▲",
    ]


@pytest.mark.parametrize(("no_color", "coloured"), [("1", False), ("", True)])  # no-color.org: "not an empty string"
def test_no_color_is_heeded_when_printing(no_color, coloured, monkeypatch):
    shown = show(make_trace([1.0, 2.0]))
    monkeypatch.setenv("NO_COLOR", no_color)
    assert ("\x1b" in printed(shown, monkeypatch, terminal=True)) is coloured


def test_a_process_without_stdout_can_still_make_the_text(monkeypatch):
    shown = show(make_trace([1.0]), tiny_tokenizer())
    monkeypatch.setattr(sys, "stdout", None)
    text = str(shown)
    monkeypatch.undo()
    assert text.endswith("w3")


def test_the_interactive_prompt_shows_what_print_does():
    shown = show(make_trace([1.0, 2.0]))
    assert repr(shown) == str(shown)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_token_cannot_command_the_terminal(terminal, monkeypatch):
    hostile = ["\x1b[2J", "\x1b]0;title\x07", "a\x08b", "\x9b31m", "c\rd", "\u202egnp", "\u2028e", "\ud800f", "\x7f"]
    text = printed(show(*pieces_trace(*hostile)), monkeypatch, terminal=terminal)
    line = SGR.sub("", text).splitlines()[2]
    assert line == "[2J]0;titleab31mc dgnp ef·"


# Token texts


def test_a_newline_is_shown_and_breaks_no_line():
    shown = show(*pieces_trace("a\n", "\n\n", "b"))
    assert texts(shown) == ["a⏎", "⏎⏎", "b"]
    assert str(shown).splitlines()[2] == "a⏎⏎⏎b"


def byte_tokenizer():
    """Byte-level BPE without merges: a token is a byte."""
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_byte_level_tokens_keep_their_spaces_and_whole_characters():
    tokenizer = byte_tokenizer()
    ids = tokenizer("a é 🙂!")["input_ids"]
    shown = show(make_trace([0.0] * len(ids), ids=[ids]), tokenizer)
    assert texts(shown) == ["a", " ", "�", "é", " ", "�", "·", "·", "🙂", "!"]


def test_a_long_answer_of_characters_in_pieces_is_whole():
    tokenizer = byte_tokenizer()
    text = "日本語の映画は素晴らしい🙂" * 3
    ids = tokenizer(text)["input_ids"]
    assert re.sub("[�·]", "", "".join(texts(show(make_trace([0.0] * len(ids), ids=[ids]), tokenizer)))) == text


def test_sentencepiece_tokens_keep_their_spaces():
    tokenizer = Tokenizer(models.WordLevel({"▁a": 0, "▁good": 1, "s": 2, "▁film": 3}, unk_token="▁a"))
    tokenizer.decoder = decoders.Metaspace()
    trace = make_trace([0.0] * 4, ids=[[0, 1, 3, 2]])
    assert tokenizer.decode([1]) == "good"  # the space is lost where a token is decoded alone
    assert texts(show(trace, PreTrainedTokenizerFast(tokenizer_object=tokenizer))) == ["a", " good", " film", "s"]


def test_without_a_tokenizer_the_ids_are_shown():
    assert texts(show(make_trace([1.0, 2.0], ids=[[17, 402]]))) == [" 17", " 402"]


def test_a_row_ends_at_its_length():
    shown = show(make_trace([1.0, 2.0, 3.0], [9.0]), tiny_tokenizer())
    assert texts(shown) == ["w3", " w4", " w5", "w3"]
    assert "nan" not in str(shown)


@pytest.mark.parametrize(("rows", "expected"), [([], []), ([[], []], ["row 0: no tokens", "", "row 1: no tokens", ""])])
def test_a_trace_without_rows_or_without_tokens_can_be_shown(rows, expected):
    shown = show(make_trace(*rows), tiny_tokenizer())
    assert str(shown).split("\n")[1:] == expected
    assert Page(shown).tokens == []


# Figures


def lines(axis):
    """What the axis' lines and markers are of: {label: (x, y)}."""
    drawn = [line for line in axis.lines if line.get_label()[0] != "_"]
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in drawn}


def legend_texts(legend):
    return [text.get_text() for text in legend.get_texts()]


def drawn_inside(figure):
    """Draws the figure (a warning would be an error), and says whether all of it is on the canvas."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box = figure.get_tightbbox(canvas.get_renderer())  # inches
    return box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.get_figwidth() and box.y1 <= figure.get_figheight()


@pytest.fixture
def figure_rows():
    def row(method, kl, gain, ratio=1.25, distinct=0.75):
        judge = {"mean": gain, "low": gain - 0.5, "high": gain + 0.25}
        reward = {"mean": 2 * gain, "low": 2 * gain - 0.5, "high": 2 * gain + 0.25}
        columns = {"judge": judge, "reward": reward, "perplexity_ratio": ratio, "distinct_3": distinct}
        return {"method": method, "kl_per_answer": kl} | columns

    return [
        row("MLP head", 8.0, 1.5, 2.0, 0.5),
        row("linear head", 1.0, 0.75),
        row("MLP head", 2.0, 1.0),
        row("best-of-4", 0.5, 0.5),
        row("best-of-n", 1.5, 1.0),
        row("best-of-n", 0.25, 0.25),
    ]


@pytest.mark.parametrize("make", [lambda rows: trace_figure(make_trace([1.0])), overoptimization_figure])
def test_without_matplotlib_the_pip_command_is_given(make, figure_rows, monkeypatch):
    pytest.importorskip("matplotlib.figure")  # loaded before or not, it is looked for
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=re.escape('pip install "hf-recontrol[plots]"')):
        make(figure_rows)


def test_show_needs_no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert texts(show(make_trace([1.0]))) == [" 3"]


@pytest.mark.parametrize("make", [lambda rows: trace_figure(make_trace([1.0])), overoptimization_figure])
def test_figures_leave_pyplot_alone(make, figure_rows, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would raise
    assert drawn_inside(make(figure_rows))


def test_a_traces_figure_draws_its_row_up_to_the_end():
    trace = make_trace([9.0, 9.0, 9.0], [0.5, -1.0], kl=[[1.0, 1.0, 1.0], [0.25, 0.75, NAN]], capped=[(1, 1)])
    values, norms, kl = trace_figure(trace, 1).axes
    assert lines(values)["before the control"] == ([0, 1], [0.5, -1.0])
    assert lines(values)["after the control"] == ([0, 1], [1.5, 0.0])
    assert lines(norms)["after the control"] == ([0, 1], [2.0, 2.0])
    assert lines(kl)["after the control"] == ([0, 1], [0.25, 0.75])
    assert [lines(axis)["at the cap"] for axis in (values, norms, kl)] == [([1], [0.0]), ([1], [2.0]), ([1], [0.75])]
    assert "reward" in values.get_ylabel()
    assert "hidden state" in norms.get_ylabel()
    assert "nats" in kl.get_ylabel()
    assert kl.get_xlabel() == "token of the answer"


def test_a_traces_figure_points_out_the_unedited_tokens_once_in_its_legend():
    figure = trace_figure(make_trace([1.0, NAN, 3.0, 4.0, 5.0], unedited=[(0, 0), (0, 2)]))
    for axis in figure.axes:
        assert [line.get_xdata()[0] for line in axis.lines if line.get_linestyle() == ":"] == [0, 2]
    expected = ["before the control", "after the control", "at the cap", "left unedited"]
    assert legend_texts(figure.axes[0].get_legend()) == expected
    assert drawn_inside(figure)


def test_a_traces_figure_writes_the_tokens_under_the_axis():
    axis = trace_figure(make_trace([1.0, 2.0, 3.0]), tokenizer=tiny_tokenizer()).axes[-1]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["w3", "w4", "w5"]
    assert {label.get_rotation() for label in axis.get_xticklabels()} == {90}


@pytest.mark.parametrize(("length", "step"), [(60, 1), (61, 2), (150, 3)])
def test_at_most_sixty_tokens_are_written_each_at_its_place(length, step):
    pieces = [f" {i}" for i in range(length)]
    axis = trace_figure(*pieces_trace(*pieces)[:1], 0, Pieces(*pieces)).axes[-1]
    written = {label.get_text(): place for label, place in zip(axis.get_xticklabels(), axis.get_xticks(), strict=True)}
    assert written == {str(i): i for i in range(0, length, step)}


def test_tokens_that_look_like_formulas_or_nothing_or_run_on_are_drawn_as_they_are():
    trace, tokenizer = pieces_trace(" $", r"$\frac$", " ", "\n", "a" * 400)
    figure = trace_figure(trace, 0, tokenizer)
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == ["$", r"$\frac$", "␣", "⏎", "a" * 16]
    assert drawn_inside(figure)


def test_tokens_are_numbered_by_whole_numbers():
    figure = trace_figure(make_trace([1.0, 2.0]))
    figure.savefig(io.BytesIO())
    assert all(float(place).is_integer() for place in figure.axes[-1].get_xticks())


@pytest.mark.parametrize("row", [-1, 1, 3])
def test_a_row_that_is_not_there_or_empty_is_refused(row):
    with pytest.raises(ValueError, match=rf"row is {row}, but .* \[0, 2\]"):
        trace_figure(make_trace([1.0, 2.0], [], [3.0]), row)


def test_each_panel_draws_its_figure_against_kl_in_order(figure_rows):
    judge, reward, perplexity, distinct = overoptimization_figure(figure_rows).axes
    assert lines(judge)["MLP head"] == ([2.0, 8.0], [1.0, 1.5])
    assert lines(reward)["MLP head"] == ([2.0, 8.0], [2.0, 3.0])
    assert lines(perplexity)["MLP head"] == ([2.0, 8.0], [1.25, 2.0])
    assert lines(distinct)["MLP head"] == ([2.0, 8.0], [0.75, 0.5])
    assert lines(judge)["linear head"] == ([1.0], [0.75])
    for axis, unit in zip((judge, reward, perplexity, distinct), ("sd", "sd", "ratio", "share"), strict=True):
        assert axis.get_xscale() == "log"
        assert axis.get_xlabel() == "KL per answer (nats)"
        assert unit in axis.get_ylabel()
    assert [axis.get_yscale() for axis in (judge, reward, perplexity, distinct)] == [
        "linear",
        "linear",
        "log",
        "linear",
    ]


def test_a_small_range_of_perplexities_has_a_plain_axis(figure_rows):
    small = [row | {"perplexity_ratio": 1.0 + 0.1 * i} for i, row in enumerate(figure_rows)]
    assert overoptimization_figure(small).axes[2].get_yscale() == "linear"


def test_intervals_are_bands_about_lines_and_bars_about_points(figure_rows):
    from matplotlib.collections import LineCollection, PolyCollection

    judge = overoptimization_figure(figure_rows).axes[0]
    bands = [part for part in judge.collections if isinstance(part, PolyCollection)]
    corners = {tuple(corner) for corner in bands[0].get_paths()[0].vertices.tolist()}
    assert corners == {(2.0, 0.5), (2.0, 1.25), (8.0, 1.0), (8.0, 1.75)}
    assert len(bands) == 2  # of the heads, not of best-of-n
    bars = [
        segment.tolist()
        for part in judge.collections
        if isinstance(part, LineCollection)
        for segment in part.get_segments()
    ]
    assert [[0.5, 0.0], [0.5, 0.75]] in bars
    assert [[1.0, 0.25], [1.0, 1.0]] in bars


def test_best_of_n_is_points_because_its_kl_is_a_bound(figure_rows):
    for axis in overoptimization_figure(figure_rows).axes:
        drawn = {line.get_label(): line for line in axis.lines}
        for name in ("best-of-4 (KL is an upper bound)", "best-of-n (KL is an upper bound)"):
            assert drawn[name].get_linestyle() == "None"
            assert drawn[name].get_marker() not in ("", "None", None)
        assert drawn["MLP head"].get_linestyle() == "-"


def test_the_collapse_limits_are_dashed(figure_rows):
    dashed = [
        [line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == "--"]
        for axis in overoptimization_figure(figure_rows).axes
    ]
    assert dashed == [[], [], [1.5], [0.9]]


def test_one_legend_outside_the_panels_names_each_method_once(figure_rows):
    figure = overoptimization_figure(figure_rows)
    assert drawn_inside(figure)
    (legend,) = figure.legends
    bounds = ["best-of-4 (KL is an upper bound)", "best-of-n (KL is an upper bound)"]
    limits = "collapse: perplexity 1.5 × base, distinct-3 0.9"
    assert legend_texts(legend) == ["MLP head", "linear head", *bounds, limits]
    box = legend.get_window_extent()
    for axis in figure.axes:
        assert axis.get_legend() is None
        assert not box.overlaps(axis.get_tightbbox())


def test_each_method_has_one_colour_of_its_own_in_all_panels(figure_rows):
    panels = [
        {line.get_label(): line.get_color() for line in axis.lines if line.get_linestyle() != "--"}
        for axis in overoptimization_figure(figure_rows).axes
    ]
    assert all(panel == panels[0] for panel in panels)
    assert len(set(panels[0].values())) == len(panels[0]) == 4


def test_more_methods_than_colours_are_still_drawn(figure_rows):
    rows = [figure_rows[0] | {"method": f"method {i}"} for i in range(12)]
    judge = overoptimization_figure(rows).axes[0]
    looks = {(line.get_color(), line.get_marker()) for line in judge.lines}
    assert len(looks) == 12


@pytest.mark.parametrize("kl", [0.0, -1.0, NAN, math.inf])
def test_a_kl_that_a_logarithmic_axis_cannot_hold_is_refused(kl, figure_rows):
    figure_rows[2]["kl_per_answer"] = kl
    with pytest.raises(ValueError, match=f"Row 2 has kl_per_answer {kl}; .* Leave the row out"):
        overoptimization_figure(figure_rows)


def test_a_row_without_a_column_is_refused_by_its_name(figure_rows):
    del figure_rows[1]["distinct_3"]
    with pytest.raises(ValueError, match=r"Row 1 lacks \['distinct_3'\]"):
        overoptimization_figure(figure_rows)


def test_a_figure_of_no_rows_is_refused():
    with pytest.raises(ValueError, match="Got no rows"):
        overoptimization_figure([])
