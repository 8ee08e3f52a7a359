"""hf-recontrol evaluate, from files on the disk to a table: every row once, and only what is missing is made."""

import json
import shutil
import sys
from functools import partial

import pytest
import torch
from chat_server import ChatServer
from saved import save_all
from tiny import tiny_head

from hf_recontrol import Coherence, baselines, cli_evaluate, comparison, comparison_run

FIXED = ("CD (ARGS), top 10 only", "CD prefix, block-wise")
SMALL = ("--max-new-tokens", 5, "--limit", 12, "--tuning-prompts", 8, "--split", "train", "--nats", 0.5, "--best-of", 2)


def without(*names):
    """What takes long is left out, but where it is looked for."""
    return [part for name in names for part in ("--skip", name)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    files = save_all(folder)
    tiny_head().save_pretrained(folder / "head")
    files.head = str(folder / "head")
    (folder / "judge.py").write_text(
        "def sevens(completions, **_):\n    return [float(c.count('7')) for c in completions]\n"
    )
    files.sevens = f"{folder / 'judge.py'}:sevens"
    return files


@pytest.fixture
def given(files):
    rewards = ("--reward", f"{files.rewards}:two_words", "--judge", files.sevens)
    return ("--model", files.model, "--dataset", files.prompts, *rewards, "--head", f"RE-Control={files.head}", *SMALL)


@pytest.mark.filterwarnings("ignore:The value head was trained on:UserWarning")
def test_the_table_has_every_method_and_a_second_run_makes_nothing(command, files, given, tmp_path, monkeypatch):
    folder = tmp_path / "rollouts"
    command(
        "rollouts", *given[:4], "--reward", files.rewards + ":two_words", "--output-dir", folder, "--max-new-tokens", 6
    )
    extra = ("--rollouts", folder, "--checkpoint", f"DPO={files.model}", "--output-dir", tmp_path / "out")
    printed = command("evaluate", *given, *extra)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = {(row["method"], row["setting"]): row for row in results["rows"]}
    assert set(rows) == {
        ("base", None),
        ("prompting", None),
        ("best-of-2", None),
        ("CD (ARGS), top 10 only", None),
        ("CD prefix, block-wise", None),
        ("DPO", None),
        ("RE-Control", 0.5),
        ("random direction", 0.5),
        ("Static RE", 0.5),
        ("linear head", 0.5),
        ("linear head, shuffled rewards", 0.5),
        ("RE-Control + prompting", 0.5),
        ("CD (ARGS)", 0.5),
        ("CD prefix", 0.5),
        ("CD prefix + prompting", 0.5),
    }
    for row in rows.values():
        assert row["judge"]["n"] == row["reward"]["n"] == 12
    assert rows["DPO", None]["kl_per_answer"] == pytest.approx(0, abs=1e-5)  # the model itself
    assert rows["RE-Control", 0.5]["kl_per_answer"] == pytest.approx(0.5, rel=0.6)  # tuned on 8 other prompts
    assert {method for (method, _), row in rows.items() if row["placebo"]} == {
        "random direction",
        "linear head, shuffled rewards",
    }
    table = (tmp_path / "out" / "table.md").read_text()
    assert printed.strip() == table.strip()
    assert table.count("\n| ") == len(rows) + 1  # and the line under the titles
    assert "| random direction † |" in table
    assert "| best-of-2 |  | ≤ 0.19 |" in table
    for picture in ("comparison.png", "kl.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(comparison.Comparison, "_answer", lambda *_: pytest.fail("made again"))
    monkeypatch.setattr("hf_recontrol.tuning.match_kl", lambda *_, **__: pytest.fail("tuned again"))
    assert command("evaluate", *given, *extra) == printed


@pytest.mark.filterwarnings("ignore:The value head was trained on:UserWarning")
def test_a_run_that_was_stopped_goes_on_where_it_was(command, given, tmp_path, monkeypatch):
    skipped = without("CD prefix", "CD prefix + prompting", "CD (ARGS)", "RE-Control + prompting")
    arguments = ("evaluate", *given, "--output-dir", tmp_path, *skipped, "--no-plots")
    stock = baselines.BestOfN.answer

    def stopped(*_):
        raise OSError("no power")

    monkeypatch.setattr(baselines.BestOfN, "answer", stopped)
    assert "no power" in command(*arguments, status=2)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "answers").iterdir()}
    assert set(kept) == {"base.jsonl", "prompting.jsonl"}
    monkeypatch.setattr(baselines.BestOfN, "answer", stock)
    command(*arguments)
    assert {name: (tmp_path / "answers" / name).stat().st_mtime_ns for name in kept} == kept
    methods = [row["method"] for row in json.loads((tmp_path / "results.json").read_text())["rows"]]
    assert methods == ["base", "prompting", "best-of-2", *FIXED, "RE-Control", "random direction"]
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.filterwarnings("ignore:The value head was trained on:UserWarning")
def test_the_sweep_and_the_times_are_drawn_and_kept(command, given, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison_run, "sweep_rows", partial(comparison_run.sweep_rows, step_sizes=(1.0,)))
    skipped = without("CD prefix", "CD prefix + prompting", "CD (ARGS)")
    extra = ("--sweep", "--batch-sizes", 1, "--batch-sizes", 2, "--output-dir", tmp_path)
    command("evaluate", *given, *skipped, *extra)
    results = json.loads((tmp_path / "results.json").read_text())
    assert {(row["method"], row["num_steps"]) for row in results["sweep"]} >= {("RE-Control", 3), ("RE-Control", 100)}
    assert {row["batch_size"] for row in results["time"]} == {1, 2}
    assert {"base", "prompting", "RE-Control", "best-of-2"} <= {row["method"] for row in results["time"]}
    for picture in ("sweep.png", "time.png", "win_rate.png", "landscape.png", "answer.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_coherence_is_measured_where_an_encoder_is_named(command, given, tmp_path, monkeypatch):
    names = ("CD prefix", "CD prefix + prompting", "CD (ARGS)", "CD (ARGS), top 10 only", "best-of-2", "prompting")
    stub = Coherence(lambda texts: torch.ones(len(texts), 2))
    asked = []
    monkeypatch.setattr(cli_evaluate, "Coherence", lambda name, device: asked.append(name) or stub)
    skipped = without(*names, "RE-Control + prompting", "RE-Control", "random direction")
    printed = command("evaluate", *given, *skipped, "--encoder", "some/model", "--output-dir", tmp_path, "--no-plots")
    assert asked == ["some/model"]
    title, _, base = (line.split(" | ") for line in printed.splitlines()[:3])
    assert base[title.index("coherence")] == "1.000"


def test_a_judge_that_trained_the_head_is_warned_of(command, files, given, tmp_path):
    head = tiny_head()
    head.config.reward.name = "sevens"
    head.save_pretrained(tmp_path / "head")
    taken = ("--head", f"random direction={files.head}", "--head", f"mine={tmp_path / 'head'}")  # refused afterwards
    with pytest.warns(UserWarning, match="The judge 'sevens' has the name of the reward"):
        command("evaluate", *given, *taken, "--output-dir", tmp_path / "out", status=2)


def test_a_name_that_the_comparison_uses_is_refused(command, files, given, tmp_path):
    error = command("evaluate", *given, "--head", f"random direction={files.head}", "--output-dir", tmp_path, status=2)
    assert "--head names ['random direction']" in error


def test_bad_input_is_refused_before_anything_is_generated(command, given, tmp_path):
    to = ("--output-dir", tmp_path / "out")
    assert "has 40 prompts in 'train'" in command("evaluate", *given, *to, "--tuning-prompts", 39, status=2)
    assert "--head is 'x'" in command("evaluate", *given, *to, "--head", "x", status=2)
    assert "gives 'RE-Control' two meanings" in command("evaluate", *given, *to, "--head", "RE-Control=x", status=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        assert 'pip install "hf-recontrol[plots]"' in command("evaluate", *given, *to, status=2)
    assert not (tmp_path / "out" / "answers").exists()


@pytest.mark.filterwarnings("ignore:The value head was trained on:UserWarning")
def test_strengths_can_be_chosen_on_another_split(command, files, given, tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    for split, first in (("validation", 30), ("test", 3)):
        lines = [json.dumps({"prompt": f"w{first + i}"}) for i in range(10)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    given = [*given[:2], "--dataset", folder, *given[4:]]
    given[given.index("--split") + 1] = "test"
    skipped = without("CD prefix", "CD prefix + prompting", "CD (ARGS)", "RE-Control")
    command(
        "evaluate", *given, *skipped, "--tuning-split", "validation", "--output-dir", tmp_path / "out", "--no-plots"
    )
    answers = (tmp_path / "out" / "answers" / "base.jsonl").read_text().splitlines()[1:]
    assert {rows[0]["prompt"] for rows in map(json.loads, answers)} == {f"w{3 + i}" for i in range(10)}


@pytest.fixture
def others(tmp_path):
    """Prompts of another kind, with texts that follow them."""
    lines = [json.dumps({"prompt": f"w{20 + i}", "completion": f" w{5 + i} w7 w9"}) for i in range(12)]
    (tmp_path / "others.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "others.jsonl"


@pytest.mark.filterwarnings("ignore:The value head was trained on:UserWarning")
def test_prompts_of_another_kind_get_the_same_strengths_and_cards_say_both(command, files, given, others, tmp_path):
    own = tmp_path / "head"
    shutil.copytree(files.head, own)
    given = [part if part != f"RE-Control={files.head}" else f"RE-Control={own}" for part in given]
    skipped = without("CD prefix", "CD prefix + prompting", "CD (ARGS)", "RE-Control + prompting", *FIXED)
    extra = ("--other-prompts", others, "--cards", "--output-dir", tmp_path / "out", "--no-plots")
    printed = command("evaluate", *given, *skipped, *extra)
    tables = [(tmp_path / "out" / part / "table.md").read_text() for part in ("", "other")]
    assert printed.strip() == "\n".join(text.strip() + "\n" for text in tables).strip()
    rows = json.loads((tmp_path / "out" / "other" / "results.json").read_text())["rows"]
    effects = {row["method"]: row.get("reference_kl") for row in rows}
    assert effects["base"] is effects["best-of-2"] is None
    assert effects["RE-Control"] > 0
    assert {len(json.loads(line)) for line in answers_of(tmp_path / "out" / "other", "base")} == {1}
    strengths = json.loads((tmp_path / "out" / "strengths.json").read_text())
    assert sorted(found["method"] for found in strengths.values()) == ["RE-Control", "random direction"]
    card = (own / "README.md").read_text(encoding="utf-8")
    assert "## Comparison" in card
    assert "prompts of another kind" in card
    assert "KL on given texts" in card
    assert command("evaluate", *given, *skipped, *extra) == printed  # a noted head is the same head
    written = own.joinpath("README.md")
    written.write_text("By hand.", encoding="utf-8")
    command("evaluate", *given, *skipped, *extra)
    assert written.read_text(encoding="utf-8") == "By hand."


@pytest.mark.filterwarnings("ignore:The value head was trained on:UserWarning")
def test_two_answers_to_each_prompt_and_two_judges(command, files, given, tmp_path):
    others = tmp_path / "others"
    others.mkdir()
    lines = [json.dumps({"prompt": f"w{20 + i}"}) for i in range(12)]  # and no text that follows
    (others / "test.jsonl").write_text("\n".join(lines), encoding="utf-8")
    skipped = without("CD prefix", "CD prefix + prompting", "CD (ARGS)", "RE-Control + prompting", *FIXED)
    skipped += without("best-of-2", "prompting", "random direction")
    extra = ("--judge", f"{files.rewards}:two_words", "--answers", 2, "--no-plots", "--output-dir", tmp_path / "out")
    command("evaluate", *given, *skipped, *extra, "--other-prompts", others, "--other-split", "test")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["judges"] == ["judge", "judge_2", "reward"]
    steered = results["rows"][1]
    assert steered["judge_2"] == steered["reward"] != steered["judge"]  # the same function
    answers = [json.loads(line) for line in answers_of(tmp_path / "out", "re-control-0.5-nats")]
    assert {len(rows) for rows in answers} == {2}
    assert any(one["completion"] != other["completion"] for one, other in answers)
    assert steered["judge"]["n"] == 12  # an interval over prompts, not over answers
    base, steered = json.loads((tmp_path / "out" / "other" / "results.json").read_text())["rows"]
    assert "reference_kl" not in base
    assert steered["reference_kl"] > 0  # on the base model's own answers
    assert {rows[0]["prompt"] for rows in map(json.loads, answers_of(tmp_path / "out" / "other", "base"))} == {
        f"w{20 + i}" for i in range(12)
    }


def answers_of(folder, name):
    return (folder / "answers" / f"{name}.jsonl").read_text().splitlines()[1:]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (("--nats", 0), "expected are KLs per answer, each > 0"),
        (("--best-of", 2), "['best-of-2'] are names of several rows"),
        (("--checkpoint", "prompting={model}"), "['prompting'] are names of several rows"),
        (("--head", "CD (ARGS)={head}"), "['CD (ARGS)'] are names of several rows"),
        (("--head", "re control={head}"), "['RE-Control', 're control'] are names of several rows"),
        (("--skip", "RE-Controll"), "--skip names ['RE-Controll']"),
    ],
)
def test_options_that_make_no_table_are_refused_before_anything_is_generated(
    command, files, given, tmp_path, extra, words
):
    extra = [str(part).format(model=files.model, head=files.head) for part in extra]
    error = command("evaluate", *given, *extra, "--output-dir", tmp_path, status=2)
    assert words in error
    assert not (tmp_path / "answers").exists()


def test_cards_are_written_into_folders_only(command, given, tmp_path):
    more = ("--head", "far=user/head", "--cards", "--output-dir", tmp_path)
    assert "--cards writes into folders of heads, and ['user/head'] are none" in command(
        "evaluate", *given, *more, status=2
    )


@pytest.mark.filterwarnings("ignore:The value head was trained on:UserWarning")
def test_scorers_take_the_first_heads_place_in_cd_prefix(command, files, given, tmp_path):
    skipped = without("prompting", "best-of-2", "CD (ARGS)", "RE-Control", "RE-Control + prompting", "random direction")
    skipped += without(FIXED[0], "CD prefix, Q + prompting")
    extra = ("--prefix-scorer", f"Q={files.head}", "--output-dir", tmp_path, "--no-plots")
    command("evaluate", *given, *skipped, *extra)
    methods = [row["method"] for row in json.loads((tmp_path / "results.json").read_text())["rows"]]
    assert methods == ["base", "CD prefix, Q, block-wise", "CD prefix, Q"]


@pytest.mark.filterwarnings("ignore:The value head was trained on:UserWarning")
def test_a_chat_judge_gives_the_win_rates_and_is_asked_once(command, given, tmp_path):
    pytest.importorskip("openai")
    skipped = without("CD prefix", "CD prefix + prompting", "CD (ARGS)", "RE-Control + prompting", *FIXED, "best-of-2")
    skipped += without("prompting", "random direction")
    with ChatServer(lambda messages: "Scores: A=7 B=7") as server:
        extra = ("--chat-judge", "m", "--chat-judge-url", server.url, "--output-dir", tmp_path, "--no-plots")
        command("evaluate", *given, *skipped, *extra)
        asked = len(server.requests)
        command("evaluate", *given, *skipped, *extra)
    assert asked == len(server.requests) == 2 * 12
    base, steered = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert "win_rate" not in base
    assert steered["win_rate"]["mean"] == 0.5
    assert steered["win_rate"]["ties"] == steered["win_rate"]["n"] == 12
