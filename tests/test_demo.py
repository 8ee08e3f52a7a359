"""The demo: what is shipped, that it runs with no network, and that its table says what the README says."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from hf_recontrol import Head
from hf_recontrol.demo.assets import FOLDER, HEADS, Demo
from hf_recontrol.demo.comparison import compare, sample
from hf_recontrol.demo.report import CAUTION, show
from hf_recontrol.demo.training import make_heads


@pytest.fixture(scope="module")
def demo():
    return Demo()


def test_the_package_data_is_small():
    sizes = {path: path.stat().st_size for path in FOLDER.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert max(sizes.values()) < 10_000_000
    assert sum(sizes.values()) <= 12_000_000


@pytest.mark.parametrize("part", ["language_model", "reward", "judge", *HEADS])
def test_every_part_has_a_card_with_its_data_and_licence(part):
    card = (FOLDER / part / "README.md").read_text(encoding="utf-8")
    assert "cc-by-4.0" in card
    assert "Pang and Lee" in card
    assert str(Path.home()) not in card


@pytest.mark.parametrize("name", sorted(set(HEADS) - {"random_direction"}))
def test_a_heads_card_is_what_its_config_says(name):
    assert (FOLDER / name / "README.md").read_text(encoding="utf-8") == Head.from_pretrained(FOLDER / name).model_card()


def test_the_prompts_are_six_whole_words_and_held_out(demo):
    prompts = demo.prompts
    assert {name: len(prompts[name]) for name in ("validation", "test")} == {"validation": 200, "test": 400}
    every = [prompt for part in prompts.values() for prompt in part]
    assert all(len(prompt.split(" ")) == 6 for prompt in every)
    assert len(set(every)) == len(every)


def test_the_scorers_tell_praise_from_blame(demo):
    texts = ["a warm, funny and moving film", "a dull, lifeless and tedious mess"]
    scores = demo.scorers(["", ""], texts, [[], []])
    for good, bad in scores.per_function.values():
        assert good > bad


def test_a_sample_is_the_same_again_and_leaves_the_random_state_alone(demo):
    state = torch.get_rng_state()
    first = sample(demo.model, demo.tokenizer, demo.prompts["test"][:3], seed=5)
    assert sample(demo.model, demo.tokenizer, demo.prompts["test"][:3], seed=5) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_the_demo_shows_texts_and_a_table(demo):
    lines = []
    results = show(demo, 10, lines.append)
    text = "\n".join(lines)
    assert [result.name for result in results] == ["base", *HEADS.values(), "best-of-4", "best-of-16"]
    assert CAUTION in text
    assert "≤ 1.84" in text  # best-of-16: log 16 − 15/16
    assert results[0].gains["judge"].mean == 0
    assert max(len(line) for line in "\n".join(lines).split("\n")) <= 140


@pytest.mark.slow
def test_the_heads_gain_by_the_judge_and_the_texts_stay_sound(demo):
    results = {result.name: result for result in compare(demo, demo.prompts["test"])}
    base, placebo = results["base"].figures, results["random direction"]
    for name, perplexity in (("constant control", 1.1), ("control head", 1.05), ("MLP value head", 1.3)):
        steered, gain = results[name].figures, results[name].gains["judge"]
        assert gain.mean >= 0.8
        assert gain.low > max(placebo.gains["judge"].high, results["best-of-4"].gains["judge"].high)
        assert steered["perplexity"] <= perplexity * base["perplexity"]
        assert steered["diversity_20"] >= 0.95 * base["diversity_20"]
        assert steered["distinct_3"] >= 0.95
        assert abs(steered["length"] / base["length"] - 1) <= 0.1
        assert steered["kl_per_answer"] == pytest.approx(placebo.figures["kl_per_answer"], rel=0.15)
    assert results["control head"].gains["judge"].mean >= results["best-of-16"].gains["judge"].mean


@pytest.mark.slow
def test_the_heads_can_be_made_anew(tmp_path):
    heads = make_heads(Demo(), tmp_path, prompts=100, answers=4)
    assert set(heads) == set(HEADS)
    for name in HEADS:
        config = Demo(heads_folder=tmp_path).head(name).config
        assert json.loads(json.dumps(config.info)) == config.info
        assert [kl for kl, _ in config.control.calibration] == [0.02, 0.05, 0.1, 0.2, 0.4]


@pytest.mark.slow
def test_one_strength_means_the_same_for_models_of_every_width():
    """Models of three widths beside the demo's, with two heads each: the KL of their texts is what was asked for."""
    example = Path(__file__).parents[1] / "examples" / "strength_across_models.py"
    sizes = ["--widths", "32", "64", "96", "--texts", "600", "--epochs", "3", "--prompts", "80", "--test-prompts", "50"]
    rows = runpy.run_path(str(example))["main"](sizes)
    assert len({row["model"] for row in rows}) == 4
    for row in rows:
        for strength, kl in row["kl_per_token"].items():
            assert kl == pytest.approx(strength, rel=0.2), row
