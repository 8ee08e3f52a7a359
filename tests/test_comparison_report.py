"""The report says what the rows say, and of what is not known that it is not."""

import json
import math

import pytest

from hf_recontrol import comparison_report
from hf_recontrol.comparison_report import table, write_report


def row(method, **changes):
    gain = {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 40}
    made = {"method": method, "setting": None, "placebo": False, "kl_is_bound": False, "kl_per_answer": 1.234}
    made |= {"judge": gain, "reward": gain, "perplexity_ratio": 1.5, "diversity_20": 0.8, "distinct_3": 0.99}
    made |= {"length": 12.5, "forwards_per_token": 11, "seconds_per_token": 0.00123}
    return made | changes


BASE = row("base", kl_per_answer=0.0, judge={"mean": 0.0, "low": 0.0, "high": 0.0, "n": 40})
ROWS = [
    BASE,
    row("best-of-4", kl_is_bound=True, kl_per_answer=0.64),
    row("RE-Control", setting=1.0),
    row("RE-Control", setting=4.0, kl_per_answer=3.9),
    row("random direction", setting=1.0, placebo=True, perplexity_ratio=math.nan),
    row("best-of-4 + prompting", kl_per_answer=math.nan),
]
FACTS = {"model": "tiny", "seed": 3, "more": ["not", "shown"]}


def cells(text):
    return [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line.startswith("|")
    ]


def test_each_row_is_a_line_with_its_numbers():
    title, rule, *lines = cells(table(ROWS, ["judge", "reward"], FACTS))
    assert title[:6] == ["method", "nats asked", "nats per answer", "judge", "reward", "perplexity"]
    assert set(rule) == {"---"}
    assert {len(line) for line in lines} == {len(title)} == {len(rule)}
    assert lines[2] == [
        "RE-Control", "1", "1.23", "+0.50 [+0.25, +0.75]", "+0.50 [+0.25, +0.75]",
        "1.50 ×", "0.800", "0.990", "12.5", "11", "1.23",
    ]  # fmt: skip
    assert lines[0][1:4] == ["", "0.00", "0"]
    assert lines[1][2] == "≤ 0.64"
    assert lines[4][0] == "random direction †"
    assert lines[4][5] == "?"
    assert lines[5][2] == "?"


def test_a_column_that_no_row_has_is_left_out_and_one_that_some_have_is_shown():
    assert "coherence" not in table(ROWS, ["judge"], FACTS).splitlines()[0]
    assert "asked" not in table([BASE], ["judge"], FACTS)
    title, _, *lines = cells(table([BASE, row("RE-Control", coherence=0.5)], ["judge"], FACTS))
    place = title.index("coherence")
    assert [line[place] for line in lines] == ["", "0.500"]


def test_the_notes_say_how_many_prompts_and_what_was_run():
    text = table(ROWS, ["judge"], FACTS)
    assert "bootstrap over 40 prompts" in text
    assert "†: a placebo" in text
    assert "model: tiny. seed: 3." in text
    assert "not" not in text.splitlines()[-1]
    assert "†" not in table([BASE], ["judge"], FACTS)


def test_the_folder_has_results_that_any_json_reader_takes(tmp_path):
    write_report(ROWS, tmp_path / "new", judges=["judge", "reward"], facts=FACTS, figures=False)
    text = (tmp_path / "new" / "results.json").read_text(encoding="utf-8")
    found = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert found["rows"][4]["perplexity_ratio"] is None
    assert found["rows"][3]["kl_per_answer"] == 3.9
    assert found["facts"] == FACTS
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"results.json", "table.md"}


def test_the_bars_are_of_one_setting(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    seen = []
    from hf_recontrol import comparison_figures

    stock = comparison_figures.comparison_figure
    monkeypatch.setattr(comparison_figures, "comparison_figure", lambda rows, by: seen.append(rows) or stock(rows, by))
    write_report(ROWS, tmp_path, judges=["judge"], facts=FACTS)
    assert [(one["method"], one["setting"]) for one in seen[0]] == [
        ("base", None), ("best-of-4", None), ("RE-Control", 4.0), ("best-of-4 + prompting", None),
    ]  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "table.md", "comparison.png", "kl.png"}


def test_the_curves_are_those_of_heads_and_of_best_of_n():
    cheap = {"forwards_per_token": 1}
    rows = [
        *ROWS,
        row("CD (ARGS)", setting=1.0),
        row("mine", setting=1.0, **cheap),
        row("mine + prompting", setting=1.0, **cheap),
        row("prompting", **cheap),
    ]
    drawn = [found["method"] for found in comparison_report._against_kl(rows)]
    assert drawn == ["mine", "best-of-4", "best-of-4 + prompting"]
    assert comparison_report._against_kl(ROWS) == ROWS
