"""examples/demo/training_recipes.py at tiny settings, from end to end."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch

from hf_recontrol.fitting import pack_answers
from hf_recontrol.value_fitting import value_metrics

DEMO = Path(__file__).parents[1] / "examples" / "demo"
TINY = ["--seeds", "1", "--sizes", "20", "--held-out-prompts", "4", "--test-prompts", "3"]

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*pin_memory.*")]


@pytest.fixture
def example(monkeypatch):
    pytest.importorskip("accelerate")
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(DEMO))
    return runpy.run_path(str(DEMO / "training_recipes.py"))


def test_a_run_that_was_cut_off_goes_on_and_comes_out_the_same(example, tmp_path):
    paths = ["--output", str(tmp_path / "recipes"), "--work", str(tmp_path / "work")]
    example["main"]([*TINY, *paths])
    whole = json.loads((tmp_path / "recipes.json").read_text())
    assert (tmp_path / "recipes.png").stat().st_size > 0
    assert [row["method"] for row in whole["recipes"]] == list(example["compared_with"]([20]))
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("*.json")}
    shutil.rmtree(tmp_path / "work" / "heads-1" / "ensemble, κ = 0")  # of heads that are made before the iterations
    lost = list((tmp_path / "work").glob("ensemble, κ = 0 *.json"))
    assert len(lost) == len(example["KL_PER_ANSWER"])
    for path in lost:
        path.unlink()
    example["main"]([*TINY, *paths])
    assert json.loads((tmp_path / "recipes.json").read_text()) == whole
    assert all(path.stat().st_mtime_ns == kept[path] for path in kept.keys() - set(lost))


def test_the_parts_of_the_prompts_have_the_explained_variance_as_their_mean(example, tmp_path):
    run = example["Run"].collect(example["Demo"](), tmp_path, [20], 3, 1)
    held_out, head = run.held_out, example["fit_linear_head"](run.rollouts)
    packed = pack_answers([held_out[i] for i in range(len(held_out))])
    with torch.no_grad():
        values = head(packed["hidden_states"])
    rewards = (packed["rewards"] - head.config.reward.mean) / head.config.reward.std
    expected = value_metrics(values, rewards, packed["offsets"], 1.0)["explained_variance"]
    parts = example["explained_parts"](head, held_out)
    assert parts.shape == (3,)
    assert float(parts.mean()) == pytest.approx(expected, abs=1e-5)


def test_gains_that_grow_with_the_root_of_the_kl_are_found_at_the_kl_asked_for(example):
    base = [[{"judge": 0.0}, {"judge": 2.0}]] * 3

    def cell(nats):
        answers = [[{"judge": 1 + nats**0.5 * prompt}] for prompt in range(3)]
        return {"answers": answers, "figures": {"kl_per_answer": nats}}

    cells = {0.5: [cell(0.45), cell(0.6)], 1.0: [cell(1.1), cell(0.9)], 4.0: [cell(4.4), cell(3.5)]}
    sd = torch.tensor([0.0, 2.0] * 3, dtype=torch.float64).std()
    for asked, gains in example["gains_at_equal_kl"](cells, base, "judge").items():
        expected = torch.tensor([[0.0, asked**0.5, 2 * asked**0.5]] * 2, dtype=torch.float64)
        torch.testing.assert_close(gains * sd, expected)
