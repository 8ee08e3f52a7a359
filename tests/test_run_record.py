"""What a head tells of its run: curves that are thinned, fit, depend on no clock, and reach the card."""

import json
from itertools import pairwise

import pytest
from test_train_control import little_garbage  # noqa: F401
from test_trainer import arguments, fit, new_head, random_walk

from hf_recontrol import RecontrolTrainer, ValueHead
from hf_recontrol.config_checks import MAX_INFO_BYTES
from hf_recontrol.run_record import write_curves

pytestmark = pytest.mark.versions


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    return random_walk(tmp_path_factory.mktemp("rollouts")).split(0.25)


def history(steps, names=("loss", "grad_norm")):
    return [dict.fromkeys(names, 1.23456 / step) | {"step": step, "epoch": step / 9} for step in steps]


def test_the_curves_of_a_run_are_in_its_checkpoints_and_in_the_card(tmp_path, rollouts):
    settings = {"eval_strategy": "steps", "eval_steps": 3, "logging_steps": 2, "save_strategy": "steps"}
    trainer = fit(tmp_path, rollouts, max_steps=6, save_steps=6, **settings)
    curves = ValueHead.from_pretrained(tmp_path / "checkpoint-6").config.info["curves"]
    assert curves == trainer.model.config.info["curves"]
    assert [step for step, _ in curves["loss"]] == [2, 4, 6]
    assert [step for step, _ in curves["eval_explained_variance"]] == [3, 6]
    assert curves["eval_loss"][1][1] == pytest.approx(trainer.model.config.info["evaluation"]["loss"], rel=1e-3)
    assert not any("runtime" in name or "second" in name or name in ("epoch", "step") for name in curves)
    assert f"| `eval_loss` | 3: {curves['eval_loss'][0][1]:.4g}, 6:" in trainer.model.model_card()


def test_the_figures_of_a_run_have_a_seed_and_an_interval_in_its_card(tmp_path, rollouts):
    trainer = fit(tmp_path, rollouts, max_steps=2, seed=7)
    evaluation = trainer.model.config.info["evaluation"]
    low, high = evaluation["explained_variance_interval"]
    assert low < evaluation["explained_variance"] < high
    assert evaluation["seed"] == 7
    assert f"{evaluation['explained_variance']:.4g} [{low:.4g}, {high:.4g}]" in trainer.model.model_card()
    assert "seed 7; in brackets 95 % intervals" in trainer.model.model_card()


def test_what_is_evaluated_after_the_run_is_no_part_of_it(tmp_path, rollouts):
    trainer = fit(tmp_path, rollouts, max_steps=2, logging_steps=1)
    before = json.dumps(trainer.model.config.info["curves"])
    trainer.evaluate()
    RecontrolTrainer(trainer.model, arguments(tmp_path), eval_dataset=rollouts[1]).evaluate()
    assert json.dumps(trainer.model.config.info["curves"]) == before
    again = RecontrolTrainer(trainer.model, arguments(tmp_path, max_steps=1), train_dataset=rollouts[0])
    again.train()
    assert "curves" not in again.model.config.info  # nothing was logged in this run


def test_long_curves_keep_their_ends_and_points_evenly_between():
    info = {}
    write_curves(info, history(range(1, 1001)))
    steps = [step for step, _ in info["curves"]["loss"]]
    assert (steps[0], steps[-1], len(steps)) == (1, 1000, 24)
    assert max(b - a for a, b in pairwise(steps)) < 50
    assert info["curves"]["loss"][-1] == [1000, 0.001235]


@pytest.mark.parametrize("others", [0, 8000, 11000, 13000])
def test_curves_never_keep_a_head_from_being_saved(tmp_path, others):
    head = new_head()
    head.config.info["notes"] = "x" * others
    write_curves(head.config.info, history(range(1, 300), names=[f"eval_set{i}_loss" for i in range(12)]))
    assert len(json.dumps(head.config.info)) < MAX_INFO_BYTES - 2000 or not others < 13000
    assert ("curves" in head.config.info) == (others < 13000)
    head.save_pretrained(tmp_path)


def test_what_is_not_a_number_is_no_point():
    info = {"curves": "old"}
    write_curves(info, [{"loss": float("nan"), "step": 1}, {"loss": "high", "step": 2}])
    assert "curves" not in info


def test_the_settings_of_the_run_are_told(tmp_path, rollouts):
    head = fit(tmp_path, rollouts, max_steps=1, lr_scheduler_type="cosine", weight_decay=0.01).model
    training = head.config.info["training"]
    assert (training["lr_scheduler_type"], training["weight_decay"], training["max_grad_norm"]) == ("cosine", 0.01, 1)
    for words in ("Its schedule: `cosine`", "Weight decay: 0.01", "γ of the returns (1: no discount): 1.0"):
        assert words in head.model_card()
