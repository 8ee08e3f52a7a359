"""The example that goes from preference pairs to a table, on made-up pairs: whole, resumed, and without a reward."""

import json
import random
import runpy
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
EXAMPLES = Path(__file__).parents[1] / "examples"
SUBJECTS = ["bread", "tea", "maps", "kites", "clocks", "boats", "bees", "wool", "chess", "rain"]
KIND, CURT = "gladly here is a friendly guide to", "no go away and read about"


@pytest.fixture
def main(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))  # as python does with a script's folder
    return runpy.run_path(str(EXAMPLES / "hh_pipeline.py"))["main"]


def write_pairs(file, chosen=KIND, rejected=CURT, rows=120):
    """Dialogues of one or two turns; what is chosen and what rejected differs in a few words."""
    generator = random.Random(0)
    with file.open("w", encoding="utf-8") as lines:
        for i in range(rows):
            first, second = generator.sample(SUBJECTS, 2)
            prompt = f"\n\nHuman: Question {i}, what of {first}?\n\nAssistant:"
            if i % 2:
                prompt += f" It depends.\n\nHuman: And {second}?\n\nAssistant:"
            pair = {"chosen": f"{prompt} {chosen} {first}.", "rejected": f"{prompt} {rejected} {first}."}
            lines.write(json.dumps(pair) + "\n")
    return str(file)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_pairs_become_a_table_which_a_second_run_only_reads(main, tmp_path, capsys):
    arguments = [write_pairs(tmp_path / "pairs.jsonl"), "--output", str(tmp_path / "made"), "--tiny"]
    rows = main(arguments)
    printed = capsys.readouterr().out
    assert printed.count("95 % interval") == 5  # two scorers twice, and the shorter answer
    assert [row["method"] for row in rows] == [
        "base", "linear value head", "MLP value head", "constant control", "MLP control", "random direction",
    ]  # fmt: skip
    assert rows[0]["kl_per_answer"] == 0
    assert all(row["kl_per_answer"] > 0 for row in rows[1:])
    assert all(len(row["gains"]) == 2 for row in rows)
    assert all(row["method"] in printed for row in rows)
    assert not any(text in printed for text in ("gladly", "go away", "Question", "kites"))  # real pairs may offend
    assert main(arguments) == rows
    assert "made in" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"made with other pairs_sha256\. Give another --output"):
        main([write_pairs(tmp_path / "others.jsonl", rows=60), *arguments[1:]])


def test_pairs_that_teach_no_reward_give_no_table(main, tmp_path, capsys):
    alike = write_pairs(tmp_path / "pairs.jsonl", chosen=KIND, rejected=KIND)
    assert main([alike, "--output", str(tmp_path / "made"), "--tiny"]) is None
    printed = capsys.readouterr().out
    assert "right on 50.0% of the held-out pairs, less than 60%: no table" in printed
    assert not (tmp_path / "made" / "rollouts").exists()
