"""Static RE reads the end of the prompt only; the placebos have nothing to find, and go everywhere as rollouts do."""

import pytest
import torch
from stored import write
from torch.utils.data import ConcatDataset, Subset

from hf_recontrol import (
    Controller,
    RecontrolTrainer,
    RecontrolTrainingArguments,
    RolloutDataset,
    ValueHead,
    ValueHeadConfig,
    fit_linear_head,
)
from hf_recontrol.comparison_heads import FirstStates, ShuffledRewards, fit_static_head, random_direction


def answers(count=200, seed=0):
    """The first state's direction 0 tells the reward; the later states' direction 1 does."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        reward = torch.randn((), generator=generator)
        states = torch.randn(4, 6, generator=generator)
        states[0, 0] += 2 * reward
        states[1:, 1] += 2 * reward
        made.append({"hidden_states": states, "reward": reward})
    return made


def test_static_re_is_the_regression_of_the_reward_on_the_first_state():
    dataset = answers()
    head = fit_static_head(dataset, ridge=0.0)
    first = torch.stack([answer["hidden_states"][0] for answer in dataset]).double()
    rewards = torch.stack([answer["reward"] for answer in dataset]).double()
    centred = (first - first.mean(0)) / first.std(0, unbiased=False)
    expected = torch.linalg.lstsq(centred, ((rewards - rewards.mean()) / rewards.std(unbiased=False))[:, None]).solution
    torch.testing.assert_close(head.layers[0].weight.detach().double(), expected.T, rtol=1e-4, atol=1e-5)
    assert "first state" in head.config.info["training"]["recipe"]
    assert head.config.info["training"]["tokens"] == len(dataset)


def test_static_re_shifts_every_state_alike_and_elsewhere_than_the_linear_head():
    dataset = answers()
    static, linear = fit_static_head(dataset), fit_linear_head(dataset)
    shifts = [Controller(head).control(torch.randn(5, 6)) for head in (static, linear)]
    for shift in shifts:
        torch.testing.assert_close(shift, shift[:1].expand(5, -1))
    assert shifts[0][0].abs().argmax() == 0
    assert shifts[1][0].abs().argmax() == 1


def test_shuffled_rewards_are_the_same_rewards_in_other_places(tmp_path):
    write(tmp_path, *range(8), lengths=(3, 4, 2))
    rollouts = RolloutDataset(tmp_path)
    shuffled = ShuffledRewards(rollouts, seed=1)
    assert sorted(shuffled.rewards.tolist()) == sorted(rollouts.rewards.tolist())
    assert shuffled.rewards.tolist() != rollouts.rewards.tolist()
    assert [float(shuffled[i]["reward"]) for i in range(len(shuffled))] == shuffled.rewards.tolist()
    assert torch.equal(shuffled[3]["hidden_states"], rollouts[3]["hidden_states"])
    assert shuffled.fingerprint == rollouts.fingerprint
    assert ShuffledRewards(rollouts, seed=1).rewards.tolist() == shuffled.rewards.tolist()
    assert ShuffledRewards(rollouts, seed=2).rewards.tolist() != shuffled.rewards.tolist()


def test_a_head_of_shuffled_rewards_has_nothing_to_find():
    train, held_out = answers(400), answers(400, seed=1)
    states = torch.cat([answer["hidden_states"] for answer in held_out])
    rewards = torch.stack([answer["reward"] for answer in held_out]).repeat_interleave(4)
    with torch.no_grad():
        found, placebo = (
            torch.corrcoef(torch.stack([head(states), rewards]))[0, 1]
            for head in (fit_linear_head(train), fit_linear_head(ShuffledRewards(train)))
        )
    assert found > 0.6
    assert abs(placebo) < 0.3


def test_first_states_are_one_for_each_answer(tmp_path):
    write(tmp_path, 0, 1)
    rollouts = RolloutDataset(tmp_path)
    first = FirstStates(rollouts)
    assert len(first) == len(rollouts) == 4
    assert all(item["hidden_states"].shape == (1, 4) and item["token_ids"].shape == (1,) for item in first)
    assert torch.equal(first[1]["hidden_states"][0], rollouts[1]["hidden_states"][0])
    assert torch.equal(first.rewards, rollouts.rewards.double())


@pytest.mark.parametrize("part", [lambda whole: Subset(whole, [0, 3, 5]), lambda whole: ConcatDataset([whole, whole])])
def test_parts_and_unions_of_rollouts_are_taken(tmp_path, part):
    write(tmp_path, 0, 1, 2)
    dataset = part(RolloutDataset(tmp_path))
    assert len(ShuffledRewards(dataset)) == len(FirstStates(dataset)) == len(dataset)
    assert fit_static_head(dataset).config.hidden_size == 4


def test_the_trainer_takes_shuffled_rewards(tmp_path):
    write(tmp_path / "rollouts", *range(4), lengths=(3, 4, 2))
    dataset = ShuffledRewards(RolloutDataset(tmp_path / "rollouts"))
    settings = {"num_train_epochs": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    args = RecontrolTrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, **settings)
    head = ValueHead(ValueHeadConfig(hidden_size=4))
    RecontrolTrainer(head, args, train_dataset=dataset).train()
    assert head.config.reward.std > 0


def test_a_random_direction_has_unit_norm_and_a_seed():
    first, again, other = random_direction(16, 1), random_direction(16, 1), random_direction(16, 2)
    weight = first.layers[0].weight
    torch.testing.assert_close(weight.norm(), torch.tensor(1.0))
    assert torch.equal(weight, again.layers[0].weight)
    assert not torch.equal(weight, other.layers[0].weight)
