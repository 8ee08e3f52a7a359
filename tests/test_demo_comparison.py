"""examples/demo/comparison.py: several runs become one table, and its claims are differences with intervals."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_head, tiny_model, tiny_tokenizer

from hf_recontrol import ControlConfig
from hf_recontrol.baselines import Base, BestOfN, Steered
from hf_recontrol.comparison import Comparison, Entry, figures
from hf_recontrol.comparison_report import write_report
from hf_recontrol.intervals import crossed_bootstrap
from hf_recontrol.rewards import Rewards
from hf_recontrol.sampling import Sampler

PROMPTS = [f"w{i} w{i + 1}" for i in range(5, 17)]


def judge(completions, **_):
    return [float(len(set(text))) for text in completions]


def reward(completions, **_):
    return [float(text.count("7")) + 0.1 * len(text) for text in completions]


SCORERS = Rewards([judge, reward])


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples" / "demo"))
    import comparison_claims
    import comparison_rows

    yield comparison_rows.rows_of_runs, comparison_claims.claims
    for module in ("comparison", "comparison_claims", "comparison_rows"):
        sys.modules.pop(module, None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs, each of other prompts' order and other seeds, as the command writes them."""
    folders, model = [], tiny_model()
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp(f"run-{seed}")
        sampler = Sampler(model, tiny_tokenizer(), max_new_tokens=6, batch_size=6, seed=seed)
        comparison = Comparison(sampler, PROMPTS[seed:] + PROMPTS[:seed], folder)
        base = comparison.answered(Entry(Base()))
        scorers = {name: Rewards(function) for name, function in (("judge", judge), ("reward", reward))}
        entries = [Entry(Base()), Entry(BestOfN(scorers["reward"], 2))]
        for name, alpha in (("RE-Control", 20.0), ("random direction", 2.0)):
            method = Steered(name, tiny_head(), ControlConfig(step_size=alpha, num_steps=1))
            entries.append(Entry(method, 4.0, name == "random direction"))
        rows = [figures(comparison.answered(entry), base, scorers) for entry in entries]
        write_report(rows, folder, judges=["judge", "reward"], facts={}, figures=False)
        folders.append(folder)
    return folders


def scores_of(folder, name):
    lines = (folder / "answers" / f"{name}.jsonl").read_text().splitlines()[1:]
    return {row["prompt"]: judge([row["completion"]])[0] for (row,) in map(json.loads, lines)}


def test_gains_pair_the_answers_to_one_prompt_whatever_its_place(example, runs):
    rows_of_runs, _ = example
    rows, gains = rows_of_runs(SCORERS, runs)
    expected = []
    for folder in runs:
        before, after = scores_of(folder, "base"), scores_of(folder, "re-control-4-nats")
        unit = torch.tensor(list(before.values()), dtype=torch.float64).std()
        expected.append([(after[prompt] - before[prompt]) / float(unit) for prompt in sorted(PROMPTS)])
    found = gains["RE-Control", 4.0]["judge"]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    row = next(row for row in rows if row["method"] == "RE-Control")
    assert row["judge"] == dataclasses.asdict(crossed_bootstrap(found))
    of_runs = [json.loads((folder / "results.json").read_text())["rows"] for folder in runs]
    kls = [row["kl_per_answer"] for rows in of_runs for row in rows if row["method"] == "RE-Control"]
    assert row["kl_per_answer"] == pytest.approx(sum(kls) / 2)
    assert (row["runs"], row["setting"], row["placebo"]) == (2, 4.0, False)
    wins = ((found > 0).double() + 0.5 * (found == 0)).mean()
    assert row["win_rate"]["mean"] == pytest.approx(float(wins))


def test_runs_of_other_methods_are_refused(example, runs, tmp_path):
    rows_of_runs, _ = example
    results = json.loads((runs[1] / "results.json").read_text())
    results["rows"][-1]["method"] = "another"
    (tmp_path / "answers").symlink_to(runs[1] / "answers")
    (tmp_path / "answers" / "another-4-nats.jsonl").write_bytes(
        (runs[1] / "answers" / "random-direction-4-nats.jsonl").read_bytes()
    )
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match="The runs differ in their rows"):
        rows_of_runs(SCORERS, [runs[0], tmp_path])


def test_a_claim_is_a_difference_with_its_interval(example, runs):
    rows_of_runs, claims = example
    rows, gains = rows_of_runs(SCORERS, runs)
    rows = [row | {"forwards_per_token": 1} for row in rows]
    text = claims([*rows, *(row | {"method": name} for row in rows for name in OTHERS if row["setting"])], gains)
    gain = crossed_bootstrap(gains["RE-Control", 4.0]["judge"] - gains["random direction", 4.0]["judge"])
    cell = f"{gain.mean:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}]"
    assert f"| 4 | {f'**{cell}**' if gain.low > 0 else cell} | not compared |" in text
    assert "best-of-2 (" in text


OTHERS = ("control head", "constant control")


def test_where_a_gain_is_met_lies_on_the_line_between_two_settings(example):
    _, claims = example
    met = claims.__globals__["_met"]
    points = [{"kl_per_answer": kl, "judge": {"mean": mean}} for kl, mean in ((1.0, 0.4), (4.0, 1.0))]
    assert met(points, 0.2) == "0.5"
    assert met(points, 0.7) == "2.5"
    assert met(points, 1.1) == "not by 4.0"


def made_once(make_heads):
    """The second run has the first one's heads and rollouts, for time: its answers are others."""

    def copied(demo, work, prompts, run):
        for name in ("heads", "rollouts") if run > 1 else ():
            shutil.copytree(work / f"{name}-1", work / f"{name}-{run}")
        return make_heads(demo, work, prompts, run)

    return copied


@pytest.mark.slow
def test_from_rollouts_to_the_tables_and_what_they_claim(example, tmp_path, monkeypatch):
    import comparison

    monkeypatch.setattr(comparison, "RUNS", (1, 2))
    monkeypatch.setattr(comparison, "BATCH_SIZES", (1,))
    monkeypatch.setattr(comparison, "BEST_OF", (2,))
    monkeypatch.setattr(comparison, "make_heads", made_once(comparison.make_heads))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    small = ["--prompts", "60", "--test-prompts", "6", "--tuning-prompts", "4", "--nats", "1"]
    folders = ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["comparison.py", *small, *folders])
    comparison.main()
    table, other = ((tmp_path / "out" / part / "table.md").read_text(encoding="utf-8") for part in ("", "other"))
    assert "3 runs" not in table
    assert "2 runs and 6 prompts" in table
    for method in ("RE-Control", "control head", "constant control", "CD prefix, FUDGE", "random direction †"):
        assert f"| {method} | 1 |" in table
        assert f"| {method} | 1 |" in other
    assert "KL on given texts" in other
    assert (tmp_path / "out" / "claims.md").read_text(encoding="utf-8").count("RE-Control") > 1
    for picture in ("comparison", "kl", "sweep", "time", "win_rate", "landscape", "answer"):
        assert (tmp_path / "out" / f"{picture}.png").is_file()
