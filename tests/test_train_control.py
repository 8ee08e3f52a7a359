"""train_control: rounds of answers, each collected under the control so far, and what is left of an interrupted run."""

import copy
import gc
import json
import math

import pytest
import torch
from tiny import tiny_control_head, tiny_head, tiny_model, tiny_tokenizer

import hf_recontrol.on_policy as on_policy
from hf_recontrol import (
    CollectError,
    ControlConfig,
    ControlHead,
    ControlHeadConfig,
    Controller,
    RecontrolTrainingArguments,
    RolloutDataset,
    collect_rollouts,
    train_control,
)
from hf_recontrol.errors import HeadMismatch

pytestmark = pytest.mark.versions
PROMPTS = [f"w{i} w{i + 1}" for i in range(3, 43)]


class TwoWords:
    """The reward, which may raise at its n-th call."""

    __name__ = "two_words"

    def __init__(self, raises_at=math.inf):
        self.left = raises_at

    def __call__(self, completions, **kwargs):
        self.left -= 1
        if self.left <= 0:
            raise KeyboardInterrupt
        return [float(sum(word in ("w7", "w9") for word in completion.split())) for completion in completions]


def arguments(folder, **settings):
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 10**6}
    more = {"recipe": "control", "learning_rate": 1e-2, "per_device_eval_batch_size": 64}
    return RecontrolTrainingArguments(output_dir=str(folder / "training"), **quiet | more | settings)


def train(folder, reward=None, prompts=PROMPTS, **options):
    options = {
        "iterations": 2,
        "args": arguments(folder),
        "num_return_sequences": 4,
        "max_new_tokens": 8,
        "block_size": 20,
        "progress": False,
    } | options
    return train_control(tiny_model(), tiny_tokenizer(), prompts, reward or TwoWords(), folder, **options)


@pytest.fixture(scope="module", autouse=True)
def little_garbage():
    """Trainer collects garbage each time that it starts, half a second over all that is imported here."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder, the head that came of it, and the controls that were collected under, as they then were."""
    folder, used = tmp_path_factory.mktemp("run"), []

    def spy(*args, controller, **kwargs):
        used.append((controller, None if controller is None else controller.facts()))
        return collect_rollouts(*args, controller=controller, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_policy, "collect_rollouts", spy)
        return folder, train(folder), used


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_iteration_raises_the_reward_of_the_answers(run, tmp_path):
    folder, head, _ = run
    last = collect_rollouts(
        *(tiny_model(), tiny_tokenizer(), PROMPTS, TwoWords(), tmp_path),
        num_return_sequences=12,
        max_new_tokens=8,
        progress=False,
        controller=Controller(head, ControlConfig(scale=1.0)),
    )
    rewards = [*(RolloutDataset(folder / f"rollouts-{i}").rewards for i in (1, 2)), last.rewards]
    means, errors = zip(*((x.mean().item(), x.std().item() / len(x) ** 0.5) for x in rewards), strict=True)
    assert means[1] > means[0] + 5 * math.hypot(*errors[:2])
    assert means[2] > means[1] + 2 * math.hypot(*errors[1:])


def test_the_first_answers_are_the_base_models_and_the_others_those_of_a_frozen_copy(run):
    folder, head, used = run
    assert used[0] == (None, None)
    controller, facts = used[1]
    assert controller.heads[0] is not head
    assert controller.facts() == facts  # it was not trained on
    assert controller.heads[0].digest() != head.digest()
    assert (controller.config.scale, controller.max_kl, controller.heads[0].training) == (1.0, None, False)
    fingerprints = [RolloutDataset(folder / f"rollouts-{i}").fingerprint for i in (1, 2)]
    assert "control" not in fingerprints[0]
    assert fingerprints[1]["control"] == facts
    assert [fingerprint["seed"] for fingerprint in fingerprints] == [1, 2]


def test_the_curves_are_of_held_out_answers(run):
    folder, head, _ = run
    curves = [json.loads(line) for line in (folder / "iterations.jsonl").read_text().splitlines()]
    assert curves == head.config.info["iterations"]
    for i, row in enumerate(curves, 1):
        _, held_out = RolloutDataset(folder / f"rollouts-{i}").split(0.1, seed=0)
        assert row["reward"] == pytest.approx(held_out.rewards.mean().item())
        assert row["answers"] == len(held_out)
        assert {"gain", "kl_per_token", "kl_per_answer", "clipped", "loss"} <= row.keys()
    assert curves[1]["kl_per_answer"] > curves[0]["kl_per_answer"]
    assert head.config.info["training"]["iterations"] == 2
    assert head.config.info["evaluation"]["gain"] == curves[1]["gain"]
    assert not head.training
    assert head.config.control.strength == 0.1
    head.save_pretrained(folder / "head")
    assert ControlHead.from_pretrained(folder / "head").config.info["iterations"] == curves
    assert "Rounds of answers collected" in (folder / "head/README.md").read_text()


@pytest.mark.parametrize("at", [2, 4], ids=["in the first iteration", "in the second"])
def test_an_interrupted_run_ends_bit_for_bit_as_an_unbroken_one(run, tmp_path, at):
    folder, head, _ = run
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, TwoWords(raises_at=at))
    counted = TwoWords(raises_at=4 - (at - 1) + 1)  # enough for the blocks that are left, and for no more
    torch.manual_seed(99)
    again = train(tmp_path, counted)
    assert counted.left == 1
    assert again.digest() == head.digest()
    assert again.config.to_json_string() == head.config.to_json_string()
    kept = files(folder)
    assert files(tmp_path) == {name: data for name, data in kept.items() if not name.startswith("head/")}


def test_a_run_with_another_seed_or_reward_does_not_go_on_in_the_folder(run):
    folder, _, _ = run
    for change in ({"seed": 1}, {"max_new_tokens": 9}, {"reward": len}):
        with pytest.raises(CollectError, match="made with other settings"):
            train(folder, **change)


def test_a_head_that_is_given_is_fitted_in_place_from_its_own_answers(tmp_path):
    head = ControlHead(ControlHeadConfig(hidden_size=16, num_hidden_layers=0, rank=0))
    assert train(tmp_path / "new", head=head, iterations=1) is head
    assert "control" not in RolloutDataset(tmp_path / "new/rollouts-1").fingerprint  # it was 0
    before, scale = Controller(head, ControlConfig(scale=1.0, max_kl=math.inf)).facts(), head.config.reward
    train(tmp_path / "old", head=head, iterations=1)
    assert RolloutDataset(tmp_path / "old/rollouts-1").fingerprint["control"] == before
    assert head.config.reward == scale


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
def test_without_arguments_the_recipe_for_controls_is_followed(tmp_path):
    head = train(tmp_path, args=None, iterations=1, seed=3)
    training = head.config.info["training"]
    assert (training["recipe"], training["epochs"], training["seed"]) == ("control", 1.0, 3)
    assert not list(tmp_path.rglob("checkpoint-*"))


@pytest.mark.parametrize("iterations", [0, -1, 1.0, True, "2"])
def test_a_senseless_number_of_iterations_is_refused(tmp_path, iterations):
    with pytest.raises(ValueError, match=f"iterations is {iterations!r}; it must be an integer ≥ 1"):
        train(tmp_path, iterations=iterations)
    assert not list(tmp_path.rglob("rollouts-*"))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"held_out": 1.5}, ValueError, r"held_out is 1\.5"),
        ({"prompts": ["w5"]}, ValueError, r"Cannot hold out 0\.1 of 1 different prompts"),
        ({"temperature": 0.5}, ValueError, r"train_control sets \['temperature'\] itself"),
        ({"controller": None}, ValueError, r"train_control sets \['controller'\] itself"),
        ({"head": tiny_control_head(hidden_size=8)}, HeadMismatch, "8 wide"),
        ({"head": tiny_head()}, TypeError, "head is a ValueHead; pass a ControlHead"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path, change, error, words):
    with pytest.raises(error, match=words):
        train(tmp_path, **change)
    if "prompts" not in change:
        assert not list(tmp_path.rglob("block-*"))


def test_arguments_for_a_value_head_are_refused(tmp_path):
    with pytest.raises(ValueError, match='RecontrolTrainingArguments with recipe="control"'):
        train(tmp_path, args=arguments(tmp_path, recipe="paper"))


def test_a_head_to_improve_is_as_it_was_until_all_is_done(tmp_path):
    head = tiny_control_head(intermediate_size=16)
    before = copy.deepcopy(head.state_dict())
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, TwoWords(raises_at=4), head=head, iterations=2)
    torch.testing.assert_close(head.state_dict(), before, rtol=0, atol=0)
    assert head.config.control.calibration == []
    assert train(tmp_path, head=head, iterations=2) is head  # the same call again
    assert not torch.equal(head.bias, before["bias"])
    assert head.config.control.calibration


def test_sampling_that_a_control_cannot_be_fitted_to_is_refused_before_any_answer(tmp_path):
    with pytest.raises(ValueError, match=r"collected with \{'min_p': 0\.1\}"):
        train(tmp_path, generation_kwargs={"min_p": 0.1})
    model = tiny_model()
    model.generation_config.repetition_penalty = 1.1
    with pytest.raises(ValueError, match=r"repetition_penalty.*generation_kwargs=\{"):
        train_control(model, tiny_tokenizer(), PROMPTS, TwoWords(), tmp_path)
    assert not list(tmp_path.rglob("block-*"))


def test_the_card_counts_the_rounds_of_all_calls(tmp_path):
    head = train(tmp_path / "first", iterations=1)
    assert head.config.info["training"]["iterations"] == 1
    assert train(tmp_path / "second", head=head, iterations=2).config.info["training"]["iterations"] == 3
    assert "Rounds of answers collected: 3" in head.model_card()
