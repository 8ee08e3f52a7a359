"""train_value: rounds of answers that the head so far steers; what it shares with train_control is tested there."""

import json

import pytest
import torch
from test_train_control import PROMPTS, TwoWords, files, little_garbage  # noqa: F401
from tiny import tiny_control_head, tiny_model, tiny_tokenizer

import hf_recontrol.on_policy as on_policy
from hf_recontrol import (
    ControlConfig,
    Controller,
    RecontrolTrainingArguments,
    RolloutDataset,
    ValueHead,
    ValueHeadConfig,
    collect_rollouts,
    train_value,
)

pytestmark = pytest.mark.versions


def train(folder, reward=None, **options):
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 10**6}
    defaults = {"iterations": 2, "num_return_sequences": 4, "max_new_tokens": 8, "block_size": 20, "progress": False}
    args = RecontrolTrainingArguments(str(folder / "training"), learning_rate=1e-2, num_train_epochs=6, **quiet)
    options = defaults | {"args": args, "strength": 0.4} | options
    return train_value(tiny_model(), tiny_tokenizer(), PROMPTS, reward or TwoWords(), folder, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder, the head that came of it, and what was collected under."""
    folder, used = tmp_path_factory.mktemp("run"), []

    def spy(*args, controller, **kwargs):
        used.append(controller)
        return collect_rollouts(*args, controller=controller, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_policy, "collect_rollouts", spy)
        return folder, train(folder), used


def test_the_answers_of_a_round_are_steered_by_the_head_of_the_round_before(run):
    folder, head, used = run
    assert used[0] is None
    first = ValueHead.from_pretrained(folder / "head-1")
    facts = Controller(first, ControlConfig(strength=0.4)).facts()
    assert used[1].facts() == facts == RolloutDataset(folder / "rollouts-2").fingerprint["control"]
    assert head.digest() not in (first.digest(), used[1].heads[0].digest())
    assert "control" not in RolloutDataset(folder / "rollouts-1").fingerprint


def test_steered_answers_earn_more_and_the_next_head_is_fitted_to_them(run):
    folder, head, _ = run
    rewards = [RolloutDataset(folder / f"rollouts-{i}").rewards for i in (1, 2)]
    errors = [x.std().item() / len(x) ** 0.5 for x in rewards]
    assert rewards[1].mean() > rewards[0].mean() + 2 * sum(errors)
    _, steered = RolloutDataset(folder / "rollouts-2").split(0.1)
    scale = head.config.reward
    values = torch.cat([head(steered[i]["hidden_states"]).detach() for i in range(len(steered))])
    expected = torch.cat([steered.rewards[i].expand(len(steered[i]["hidden_states"])) for i in range(len(steered))])
    base_mean = rewards[0].mean().item()
    fitted = (values * scale.std + scale.mean).mean().item()
    assert abs(fitted - expected.mean().item()) < abs(fitted - base_mean)  # V is of the steered answers


def test_the_states_are_those_before_the_edit(run):
    folder, _, _ = run
    answer = RolloutDataset(folder / "rollouts-2")[0]
    row = RolloutDataset(folder / "rollouts-2").row(0)
    ids = torch.tensor([row["prompt_token_ids"] + row["token_ids"]])
    with torch.no_grad():
        own = tiny_model().model(ids).last_hidden_state[0, len(row["prompt_token_ids"]) - 1 : -1]
    torch.testing.assert_close(answer["hidden_states"], own, rtol=1e-4, atol=1e-4)


def test_the_curves_are_kept_in_the_head(run):
    folder, head, _ = run
    curves = [json.loads(line) for line in (folder / "iterations.jsonl").read_text().splitlines()]
    assert curves == head.config.info["iterations"]
    assert {"reward", "explained_variance", "loss", "answers"} <= curves[0].keys()
    assert head.config.info["training"]["iterations"] == 2
    assert head.config.control.strength == 0.1
    assert "Rounds of answers collected: 2" in head.model_card()


@pytest.mark.parametrize("at", [2, 4], ids=["in the first iteration", "in the second"])
def test_an_interrupted_run_ends_bit_for_bit_as_an_unbroken_one(run, tmp_path, at):
    folder, head, _ = run
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, TwoWords(raises_at=at))
    torch.manual_seed(99)
    again = train(tmp_path)
    assert again.digest() == head.digest()
    assert files(tmp_path) == files(folder)


def test_a_head_that_is_calibrated_steers_the_first_answers_too(run, tmp_path):
    folder, _, _ = run
    head = ValueHead.from_pretrained(folder / "head-2")
    before = Controller(head, ControlConfig(strength=0.2)).facts()
    assert train(tmp_path, head=head, iterations=1, strength=0.2) is head
    assert RolloutDataset(tmp_path / "rollouts-1").fingerprint["control"] == before
    assert head.config.info["training"]["iterations"] == 3


def test_each_round_may_fit_an_ensemble(tmp_path):
    head = train(tmp_path, num_heads=2, kappa=0.5, iterations=2)
    training = head.config.info["training"]
    assert (training["heads"], training["kappa"], training["iterations"]) == (2, 0.5, 2)
    assert "control" in RolloutDataset(tmp_path / "rollouts-2").fingerprint


def test_a_head_that_could_not_be_calibrated_does_not_steer_in_silence(tmp_path):
    head = ValueHead(ValueHeadConfig(16))
    head.config.control.max_relative_norm = 1e-4
    with (
        pytest.warns(UserWarning, match="trained, but not calibrated"),
        pytest.raises(ValueError, match="the head is not calibrated, so nothing says how to spend it"),
    ):
        train(tmp_path, head=head)
    assert not (tmp_path / "rollouts-2").exists()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"strength": 0.0}, ValueError, r"strength is 0\.0; it must be above 0, and at most 0\.4 nats"),
        ({"strength": 0.5}, ValueError, r"strength is 0\.5"),
        ({"num_heads": 0}, ValueError, "num_heads is 0"),
        ({"controller": None}, ValueError, r"train_value sets \['controller'\] itself"),
        ({"head": tiny_control_head()}, TypeError, "head is a ControlHead; pass a ValueHead"),
        ({"args": RecontrolTrainingArguments("x", recipe="control", use_cpu=True)}, ValueError, 'recipe="paper", or'),
        ({"iterations": 0}, ValueError, "iterations is 0"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_any_answer(tmp_path, change, error, words):
    with pytest.raises(error, match=words):
        train(tmp_path, **change)
    assert not list(tmp_path.rglob("rollouts-*"))
