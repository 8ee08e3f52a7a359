"""hf-recontrol tune --objective, from files on the disk to a head that steers as was chosen."""

import json
import sys

import pytest
from saved import save_all
from test_coherence import bert, save
from tiny import tiny_control_head, tiny_head

from hf_recontrol import Head
from hf_recontrol.sampling import Sampler

pytest.importorskip("datasets")
pytest.importorskip("optuna")

OBJECTIVE = """
def spends(figures):
    return figures["kl_per_answer"]

def idle(figures):
    return -figures["kl_per_answer"]
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    files = save_all(folder)
    (folder / "objectives.py").write_text(OBJECTIVE, encoding="utf-8")
    files.objectives = str(folder / "objectives.py")
    files.encoder = str(save(bert(), folder / "encoder"))
    return files


@pytest.fixture
def head(tmp_path):
    tiny_head().save_pretrained(tmp_path / "head")
    return tmp_path / "head"


@pytest.fixture
def given(files):
    source = ("--dataset", files.prompts, "--limit", 16, "--reward", f"{files.rewards}:two_words")
    return ("--model", files.model, *source, "--max-new-tokens", 6, "--trials", 4)


def test_the_head_steers_as_was_chosen_and_its_card_has_the_front(command, files, head, given):
    printed = command("tune", head, *given, "--objective", f"{files.objectives}:spends", "--encoder", files.encoder)
    lines = [line.split("\t") for line in printed.splitlines()]
    assert lines[0][:2] == ["trial", "control"]
    assert [line[0] for line in lines[1:5]] == ["0", "1", "2", "3"]
    assert lines[1][1] == "step_size=0"
    kl, score = (lines[0].index(name) for name in ("kl_per_answer", "score"))
    assert [line[kl] for line in lines[1:5]] == [line[score] for line in lines[1:5]]
    best = max(lines[1:5], key=lambda line: float(line[score]))
    assert [line[-1].endswith("best") for line in lines[1:5]] == [line is best for line in lines[1:5]]
    config = Head.from_pretrained(head).config
    assert best[1] == f"step_size={config.control.step_size:g} num_steps={config.control.num_steps}"
    tuning = config.info["tuning"]
    assert (tuning["objective"], tuning["trials"], tuning["prompts"]) == ("spends()", 4, 16)
    assert tuning["chosen"]["step_size"] == config.control.step_size
    assert {"reward", "perplexity", "coherence", "diversity", "kl_per_answer"} < set(tuning["front"][0])
    card = (head / "README.md").read_text(encoding="utf-8")
    assert "the best of 4 settings by `spends()`, on 16 validation prompts" in card
    for row in tuning["front"]:
        assert f" | {row['reward']:.4g} | {row['perplexity']:.4g} | {row['coherence']:.4g} |" in card


def test_the_papers_objective_takes_an_encoder_and_a_card_edited_by_hand_stays(command, files, head, given, tmp_path):
    (head / "README.md").write_text("mine", encoding="utf-8")
    paper = ("--objective", "paper", "--against", "coherence", "--encoder", files.encoder)
    command("tune", head, *given, *paper)
    tuning = Head.from_pretrained(head).config.info["tuning"]
    assert (tuning["objective"], tuning["against"]) == ("paper", "coherence")
    assert (head / "README.md").read_text(encoding="utf-8") == "mine"
    command("tune", head, *given, *paper, "--output", tmp_path / "other")
    assert "by the sum of coherence, diversity and reward" in (tmp_path / "other" / "README.md").read_text("utf-8")


def test_a_control_head_is_tuned_in_the_range_that_is_named(command, files, given, tmp_path):
    tiny_control_head().save_pretrained(tmp_path / "head")
    to = ("--output", tmp_path / "out")
    named = ("--objective", f"{files.objectives}:spends", "--range", "scale=0.5:0.7")
    command("tune", tmp_path / "head", *given, *named, *to)
    assert 0.5 <= Head.from_pretrained(tmp_path / "out").config.control.scale <= 0.7
    assert Head.from_pretrained(tmp_path / "head").config.control.scale == 1
    assert command("tune", tmp_path / "head", *given, "--objective", f"{files.objectives}:idle", *to)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["control"]["scale"] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--objective", "best"), "The objective is 'best'; expected is 'reward' or 'paper'"),
        (("--objective", "FILE"), "a file; name the function in it: FILE:objective"),
        (("--objective", "FILE:nothing"), "no function 'nothing'. It has ['idle', 'spends']"),
        (("--objective", "reward", "--calibrate"), "are two runs"),
        (("--objective", "reward", "--prompts", "FILE"), "With --objective pass --dataset"),
        (("--objective", "reward", "--against", "kl"), "against is 'kl'"),
        (("--objective", "reward", "--range", "step_size=1"), "it must be such as step_size=0.1:2"),
        (("--objective", "reward", "--range", "scale=1:2"), "of a value head they may be strength, step_size"),
        (("--objective", "reward", "--range", "strength=0.1:0.2"), "the head is not calibrated"),
        (("--objective", "reward", "--split", "test"), "'test'"),
        (("--calibrate",), "--dataset, --reward, --encoder and --range are for --objective"),
        ((), "There is nothing to do: pass --calibrate, or --objective"),
    ],
)
def test_bad_input_is_refused_before_the_model_is_loaded(command, files, head, given, arguments, words, monkeypatch):
    monkeypatch.setattr("hf_recontrol.cli_tune.language_model", lambda *_, **__: pytest.fail("loaded"))
    filled = [str(argument).replace("FILE", files.objectives) for argument in arguments]
    before = (head / "config.json").read_bytes()
    error = command("tune", head, *given, *filled, status=2)
    assert words.replace("FILE", files.objectives) in error
    assert (head / "config.json").read_bytes() == before


def test_what_the_search_needs_is_asked_for_before_the_model_is_loaded(command, files, head, monkeypatch):
    monkeypatch.setattr("hf_recontrol.cli_tune.language_model", lambda *_, **__: pytest.fail("loaded"))
    asked = ("tune", head, "--model", files.model, "--objective", "reward")
    assert "pass --dataset DATASET and --reward REWARD" in command(*asked, status=2)
    assert "pass --dataset DATASET" in command(*asked, "--dataset", files.prompts, status=2)
    rewarded = ("--dataset", files.prompts, "--reward", f"{files.rewards}:two_words")
    assert "pass --output FOLDER" in command("tune", "user/head", *asked[2:], *rewarded, status=2)
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert "pip install 'hf-recontrol[eval]'" in command(*asked, *rewarded, status=2)


def test_a_search_that_breaks_off_leaves_the_head_as_it_was(command, head, given, monkeypatch):
    before = {path.name: path.read_bytes() for path in head.iterdir()}
    stock, calls = Sampler.__call__, []

    def breaks(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise OSError("no power")
        return stock(*arguments, **options)

    monkeypatch.setattr(Sampler, "__call__", breaks)
    assert "no power" in command("tune", head, *given, "--objective", "reward", status=2)
    assert {path.name: path.read_bytes() for path in head.iterdir()} == before
