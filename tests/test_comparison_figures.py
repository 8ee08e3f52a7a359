"""What the figures that compare methods show: each is read back from its bars, lines, points and names."""

import math
import re
import sys
from itertools import combinations

import pytest

pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex
from matplotlib.text import Text
from test_plots import drawn_inside, legend_texts, lines

from hf_recontrol.figure_style import PLACEBO
from hf_recontrol.plots import comparison_figure, kl_figure, sweep_figure, time_figure, win_rate_figure

NAN = math.nan
FIGURES = [comparison_figure, kl_figure, sweep_figure, time_figure, win_rate_figure]


def gain(mean, n=400):
    return {"mean": mean, "low": mean - 0.25, "high": mean + 0.125, "n": n}


def row(method, kl, judge, **columns):
    """A row that every figure can draw."""
    return {
        "method": method,
        "setting": 4.0,
        "judge": gain(judge),
        "reward": gain(2 * judge),
        "win_rate": {"mean": 0.5 + judge / 8, "low": 0.5, "high": 0.75, "n": 400},
        "kl_per_answer": kl,
        "kl_is_bound": False,
        "diversity_20": 0.5 + judge / 8,
        "coherence": 0.25 + judge / 8,
        "seconds_per_token": kl / 64,
        "batch_size": 8,
        "step_size": kl / 16,
        "num_steps": 5,
    } | columns


@pytest.fixture
def rows():
    return [
        row("value head", 4.0, 1.0),
        row("control head", 2.0, 1.5),
        row("best-of-4", 0.5, 0.5, kl_is_bound=True, setting=None),
        row("random direction", 1.0, -0.5, placebo=True),
    ]


def bars(axis):
    """{name: (start, end)} of the bars, as they stand."""
    names = [label.get_text() for label in axis.get_yticklabels()]
    places = {round(bar.get_y() + bar.get_height() / 2): bar for bar in axis.patches}
    return {name: (places[i].get_x(), places[i].get_x() + places[i].get_width()) for i, name in enumerate(names)}


def segments(axis):
    """The ends of the intervals, in the order drawn."""
    return [segment.tolist() for part in axis.collections for segment in part.get_segments()]


def looks(axis):
    return {line.get_label(): line for line in axis.lines if line.get_label()[0] != "_"}


def names_apart(figure):
    """Whether all of the figure is on the canvas and no two of its texts touch."""
    assert drawn_inside(figure)
    (axis,) = figure.axes
    texts = [text for text in [*axis.texts, *axis.get_yticklabels(), *axis.get_xticklabels()] if text.get_text()]
    boxes = [Text.get_window_extent(text) for text in texts]  # of the words alone: an annotation's has its point in it
    return not any(one.overlaps(other) for one, other in combinations(boxes, 2))


# For all of them


@pytest.mark.parametrize("make", FIGURES)
def test_without_matplotlib_the_pip_command_is_given(make, rows, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=re.escape('pip install "hf-recontrol[plots]"')):
        make(rows)


@pytest.mark.parametrize("make", FIGURES)
def test_figures_leave_pyplot_alone_and_fit_their_canvas(make, rows, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would raise
    figure = make(rows)
    assert drawn_inside(figure)
    assert figure.get_figwidth() == 8


@pytest.mark.parametrize("make", FIGURES)
def test_a_figure_of_no_rows_is_refused(make):
    with pytest.raises(ValueError, match=r"Got no rows, but a figure needs one\. Pass one for each"):
        make([])


@pytest.mark.parametrize("make", FIGURES)
@pytest.mark.parametrize("nothing", [None, NAN, {"mean": NAN, "low": NAN, "high": NAN, "n": 0}])
def test_rows_without_a_number_to_draw_are_refused_with_what_they_have(make, nothing):
    column = {"mean": NAN} if isinstance(nothing, dict) else nothing
    with pytest.raises(ValueError, match=r"None of the 2 rows has a number in .*; rows have \['judge', 'kl_per_answer"):
        make([{"method": "a", "judge": nothing, "kl_per_answer": column}, {"method": "b"}])


@pytest.mark.parametrize("make", FIGURES)
def test_a_row_without_a_method_is_refused_by_its_number(make, rows):
    del rows[2]["method"]
    with pytest.raises(ValueError, match="Row 2 lacks 'method'"):
        make(rows)


@pytest.mark.parametrize("make", FIGURES)
def test_a_row_of_which_all_is_missing_changes_nothing_in_the_others(make, rows):
    with_more = make([*rows, {"method": "not measured", "judge": None, "kl_per_answer": NAN}])
    for axis, other in zip(make(rows).axes, with_more.axes, strict=True):
        assert segments(axis) == segments(other)
        assert lines(axis) == lines(other)
        assert "not measured" not in [text.get_text() for text in [*other.texts, *other.get_yticklabels()]]


@pytest.mark.parametrize("ends", [{}, {"low": 0.25}, {"low": NAN, "high": 2.0}])
@pytest.mark.parametrize("make", [comparison_figure, kl_figure, sweep_figure, win_rate_figure])
def test_a_missing_interval_leaves_the_point(make, ends, rows):
    before = [len(segments(axis)) for axis in make(rows).axes]
    for column in ("judge", "reward", "win_rate"):
        rows[0][column] = {"mean": rows[0][column]["mean"], **ends}
    figure = make(rows)
    has_interval = [0, 0, 1] if make is sweep_figure else [1] * len(before)
    assert [len(segments(axis)) for axis in figure.axes] == [
        n - one for n, one in zip(before, has_interval, strict=True)
    ]
    assert drawn_inside(figure)


@pytest.mark.parametrize("make", FIGURES)
def test_a_name_that_looks_like_a_formula_is_drawn_as_it_is(make, rows):
    name = r"costs $5, $\frac$"
    figure = make([row(name, 1.0, 0.5, setting=None), rows[0] | {"method": r"$\frac$"}])
    assert drawn_inside(figure)  # a broken formula would raise
    texts = [text.get_text() for axis in figure.axes for text in [*axis.texts, *axis.get_yticklabels()]]
    texts += [text for legend in figure.legends for text in legend_texts(legend)]
    assert any(text.startswith(name) for text in texts) or make is sweep_figure


# Bars


def test_the_bars_are_the_gains_from_the_highest_down(rows):
    (axis,) = comparison_figure(rows).axes
    assert bars(axis) == {
        "random direction (4 nats)": (0.0, -0.5),
        "best-of-4": (0.0, 0.5),
        "value head (4 nats)": (0.0, 1.0),
        "control head (4 nats)": (0.0, 1.5),
    }
    assert axis.get_ylim()[0] < axis.get_ylim()[1]  # the last is on top
    assert axis.get_xlabel().startswith("judge gain (sd of base answers), n = 400\n")
    assert "KL per answer" in axis.get_xlabel()


def test_the_intervals_are_on_their_bars_and_the_numbers_beside_them(rows):
    (axis,) = comparison_figure(rows).axes
    assert segments(axis) == [
        [[-0.75, 0.0], [-0.375, 0.0]],
        [[0.25, 1.0], [0.625, 1.0]],
        [[0.75, 2.0], [1.125, 2.0]],
        [[1.25, 3.0], [1.625, 3.0]],
    ]
    written = [(text.get_text(), *text.xy) for text in axis.texts]
    assert written == [("−0.50", 0.0, 0), ("+0.50", 0.625, 1), ("+1.00", 1.125, 2), ("+1.50", 1.625, 3)]


def test_placebos_alone_are_grey_bars(rows):
    (axis,) = comparison_figure(rows).axes
    colours = [to_hex(bar.get_facecolor()).upper() for bar in axis.patches]
    assert [colour == PLACEBO for colour in colours] == [True, False, False, False]


def test_by_chooses_the_judge(rows):
    (axis,) = comparison_figure(rows, by="reward").axes
    assert bars(axis)["value head (4 nats)"] == (0.0, 2.0)
    assert axis.get_xlabel().startswith("reward gain (sd")
    rows[1]["second_judge"] = gain(0.75)
    (axis,) = comparison_figure(rows, by="second_judge").axes
    assert bars(axis) == {"control head (4 nats)": (0.0, 0.75)}
    assert axis.get_xlabel().startswith("second judge gain (sd")


def test_bars_of_win_rates_start_at_a_draw(rows):
    (axis,) = comparison_figure(rows, by="win_rate").axes
    assert bars(axis)["value head (4 nats)"] == (0.5, 0.625)
    assert "0.62" in [text.get_text() for text in axis.texts]
    assert axis.get_xlabel().startswith("win rate (0 to 1), n = 400")


def test_a_method_at_two_settings_has_no_one_bar(rows):
    with pytest.raises(ValueError, match=r"\['value head'\] have several rows, but .* Pass one row of each"):
        comparison_figure([*rows, row("value head", 1.0, 0.5)])


def test_unequal_sample_sizes_and_no_settings_are_not_written(rows):
    rows = [one | {"setting": None} for one in rows]
    rows[0]["judge"]["n"] = 200
    (axis,) = comparison_figure(rows).axes
    assert axis.get_xlabel() == "judge gain (sd of base answers)"
    assert "value head" in bars(axis)


@pytest.mark.parametrize("make", [comparison_figure, win_rate_figure])
def test_twenty_methods_have_names_that_do_not_touch(make):
    rows = [row(f"method {i}, with $ome more of a name", 1.0 + i / 8, 0.5 - i % 3 / 64) for i in range(20)]
    assert names_apart(make(rows))


# Lines


def test_each_method_is_a_line_against_kl_in_order(rows):
    judge, reward = kl_figure([*rows, row("value head", 1.0, 0.25)]).axes
    assert lines(judge)["value head"] == ([1.0, 4.0], [0.25, 1.0])
    assert lines(reward)["value head"] == ([1.0, 4.0], [0.5, 2.0])
    assert [[1.0, 0.0], [1.0, 0.375]] in segments(judge)
    assert [[4.0, 1.75], [4.0, 2.125]] in segments(reward)
    assert (judge.get_xscale(), reward.get_xlabel()) == ("log", "KL per answer (nats)")
    assert judge.get_xlim() == reward.get_xlim()
    assert [axis.get_ylabel() for axis in (judge, reward)] == [
        "judge gain\n(sd of base answers)",
        "reward gain\n(sd of base answers)",
    ]


def test_a_bound_of_the_kl_is_a_hollow_point_with_an_arrow_to_the_left(rows):
    for axis, mean in zip(kl_figure(rows).axes, (0.5, 1.0), strict=True):
        drawn = looks(axis)
        bound, measured = drawn["best-of-4 (KL: at most)"], drawn["value head"]
        assert (bound.get_markerfacecolor(), bound.get_linestyle()) == ("white", "None")
        assert (measured.get_markerfacecolor(), measured.get_linestyle()) == (measured.get_color(), "-")
        (arrow,) = axis.texts
        assert arrow.xy == (0.5, mean)
        assert (arrow.xyann[0] < 0, arrow.xyann[1], arrow.arrowprops["arrowstyle"]) == (True, 0, "<-")


def test_placebos_alone_are_grey_lines_and_colours_are_the_methods_own(rows):
    for make in (kl_figure, time_figure):
        for axis in make(rows).axes:
            drawn = looks(axis)
            grey = {name for name, line in drawn.items() if line.get_color() == PLACEBO}
            assert grey == {"random direction"}
            assert len({line.get_color() for line in drawn.values()}) == 4
    assert looks(kl_figure(rows).axes[0])["value head"].get_color() == looks(axis)["value head"].get_color()


@pytest.mark.parametrize("kl", [0.0, -1.0, NAN, None, math.inf])
def test_a_kl_without_a_place_on_the_axis_is_left_out(kl, rows):
    judge, _ = kl_figure([*rows, row("base", 1.0, 0.0, kl_per_answer=kl)]).axes
    assert lines(judge) == lines(kl_figure(rows).axes[0])


def test_what_one_panel_lacks_the_other_shows(rows):
    rows[0]["judge"] = None
    judge, reward = kl_figure(rows).axes
    assert "value head" not in lines(judge)
    assert judge.get_xlim() == reward.get_xlim()
    assert "value head" in lines(reward)
    for one in rows:
        one["judge"] = None
    (reward,) = kl_figure(rows).axes
    assert reward.get_ylabel().startswith("reward")


@pytest.mark.parametrize("make", [kl_figure, sweep_figure, time_figure])
def test_one_legend_below_the_panels_names_each_line_once(make, rows):
    rows = [*rows, row("another one, whose name is long enough for a column", 1.0, 0.5)]
    rows += [row(f"method {i}", 1.0, 0.5) for i in range(8)]
    figure = make(rows)
    assert drawn_inside(figure)
    (legend,) = figure.legends
    assert sorted(legend_texts(legend)) == sorted(set().union(*map(lines, figure.axes)))
    for axis in figure.axes:
        assert not legend.get_window_extent().overlaps(axis.get_tightbbox())


def test_a_sweep_is_a_line_for_each_number_of_steps():
    cells = [(0.5, 30, 0.5), (0.125, 30, 0.25), (0.5, 5, 0.125), (0.125, 5, 0.0)]
    rows = [row("value head", 1.0, judge, step_size=alpha, num_steps=n) for alpha, n, judge in cells]
    diversity, coherence, reward = sweep_figure(rows).axes
    assert list(lines(diversity)) == ["n = 5", "n = 30"]
    assert lines(diversity)["n = 30"] == ([0.125, 0.5], [0.53125, 0.5625])
    assert lines(coherence)["n = 30"] == ([0.125, 0.5], [0.28125, 0.3125])
    assert lines(reward)["n = 5"] == ([0.125, 0.5], [0.0, 0.25])
    assert segments(diversity) == segments(coherence) == []
    assert [[0.5, 0.75], [0.5, 1.125]] in segments(reward)
    assert reward.get_xscale() == "log"
    assert reward.get_xlabel() == "step size α (units of the hidden state per unit of ∇V)"
    for axis, words in zip((diversity, coherence, reward), ("20 words", "coherence", "sd of base"), strict=True):
        assert words in axis.get_ylabel()


def test_a_sweep_without_coherence_has_two_panels(rows):
    for one in rows:
        del one["coherence"]
    assert len(sweep_figure(rows).axes) == 2


def test_a_sweep_of_several_methods_keeps_them_apart(rows):
    assert list(lines(sweep_figure(rows[:2]).axes[0])) == ["value head, n = 5", "control head, n = 5"]


def test_time_is_drawn_against_the_batch_sizes_that_were_measured(rows):
    rows = [row("value head", 1.0, 0.0, batch_size=b, seconds_per_token=s) for b, s in ((32, 0.25), (1, 1.0), (8, 0.5))]
    (axis,) = time_figure([*rows, row("control head", 1.0, 0.0, batch_size=64, seconds_per_token=NAN)]).axes
    assert lines(axis) == {"value head": ([1.0, 8.0, 32.0], [1.0, 0.5, 0.25])}
    assert (axis.get_xscale(), axis.get_yscale(), axis.xaxis.get_transform().base) == ("log", "log", 2)
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "8", "32"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("batch size (answers)", "seconds per token")


def test_a_bound_of_the_kl_is_measured_in_time(rows):
    assert looks(time_figure(rows).axes[0])["best-of-4"].get_markerfacecolor() != "white"


# Points


def test_win_rates_are_points_with_intervals_and_names(rows):
    (axis,) = win_rate_figure(rows).axes
    points = {
        (line.get_xdata()[0], line.get_ydata()[0]) for line in axis.lines if line.get_transform() != axis.transAxes
    }
    assert {(4 / 64, 0.625), (2 / 64, 0.6875), (0.5 / 64, 0.5625), (1 / 64, 0.4375)} <= points
    assert [[4 / 64, 0.5], [4 / 64, 0.75]] in segments(axis)
    named = {text.get_text(): text.xy for text in axis.texts}
    assert named["value head (4 nats)"] == (4 / 64, 0.625)
    assert named["best-of-4"] == (0.5 / 64, 0.5625)
    assert [line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == "--"] == [0.5]
    assert axis.get_xscale() == "log"
    assert axis.get_xlabel() == "seconds per token"
    assert axis.get_ylabel() == "win rate (0 to 1), n = 400"


def test_beside_each_name_stands_the_mark_of_its_point(rows):
    (axis,) = win_rate_figure(rows).axes
    keys = {line.get_ydata()[0]: line for line in axis.lines if line.get_transform() == axis.transAxes}
    points = {line.get_ydata()[0]: line for line in axis.lines if line.get_transform() == axis.transData}
    for text in axis.texts:
        key, point = keys[text.xyann[1]], points[text.xy[1]]
        assert (key.get_color(), key.get_marker()) == (point.get_color(), point.get_marker())
        assert (key.get_color() == PLACEBO) == text.get_text().startswith("random direction")
