"""Packing, scales, the closed-form linear head and the metrics: all of training that is not the optimiser."""

import pytest
import torch
from torch.utils.data import ConcatDataset, Subset

from hf_recontrol.errors import HeadMismatch
from hf_recontrol.fitting import (
    check_answers,
    check_one_model,
    fit_linear_head,
    pack_answers,
    reward_scale,
    set_scales,
    warn_of_empty,
)
from hf_recontrol.head_config import RewardScale, ValueHeadConfig
from hf_recontrol.value_fitting import rank_correlation, value_metrics
from hf_recontrol.value_head import ValueHead


class Answers(torch.utils.data.Dataset):
    """Random answers in memory; the reward is a linear function of each state, the same all along the answer."""

    def __init__(self, count=60, width=6, seed=0, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        self.fingerprint = {"base_model_name_or_path": "org/base", "base_model_revision": "abc"}
        self.items = []
        for length in torch.randint(1, 9, (count,), generator=generator).tolist():
            states = torch.randn(length, width, generator=generator) * torch.arange(1, width + 1) + 5
            states[:, 0] = torch.randn((), generator=generator) * 3
            self.items.append({"hidden_states": states.to(dtype), "reward": 2 * states[0, 0] - 7})

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def all_states(answers):
    return torch.cat([answers[i]["hidden_states"] for i in range(len(answers))])


def all_rewards(answers):
    return torch.stack([answers[i]["reward"] for i in range(len(answers))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_loses_nothing_and_keeps_the_dtype(dtype):
    answers = Answers(5, dtype=dtype)
    batch = pack_answers([answers[i] for i in range(5)])
    torch.testing.assert_close(batch["hidden_states"], all_states(answers), rtol=0, atol=0)
    torch.testing.assert_close(batch["rewards"], all_rewards(answers), rtol=0, atol=0)
    pieces = batch["hidden_states"].split(batch["offsets"].diff().tolist())
    assert [len(piece) for piece in pieces] == [len(answer["hidden_states"]) for answer in answers.items]


def test_the_head_gets_the_mean_and_std_of_rewards_and_states():
    answers, head = Answers(), ValueHead(ValueHeadConfig(hidden_size=6))
    set_scales(head, answers)
    rewards, states = all_rewards(answers), all_states(answers)
    assert head.config.reward.mean == pytest.approx(rewards.mean().item())
    assert head.config.reward.std == pytest.approx(rewards.std(unbiased=False).item())
    torch.testing.assert_close(head.input_mean, states.mean(0))
    torch.testing.assert_close(head.input_std, states.std(0, unbiased=False))
    assert head.config.base_model_name_or_path == "org/base"


def test_without_standardised_inputs_the_buffers_stay_as_they_are():
    head = ValueHead(ValueHeadConfig(hidden_size=6))
    set_scales(head, Answers(), standardize_inputs=False)
    assert not head.input_mean.any()
    assert (head.input_std == 1).all()
    assert head.config.reward.std != 1


def test_a_head_that_was_trained_before_keeps_its_scales():
    head = ValueHead(ValueHeadConfig(hidden_size=6))
    set_scales(head, Answers(seed=0))
    mean, scale = head.input_mean.clone(), head.config.reward
    set_scales(head, Answers(seed=1))
    torch.testing.assert_close(head.input_mean, mean, rtol=0, atol=0)
    assert head.config.reward == scale


@pytest.mark.parametrize("value", [0.0, 0.1, 1234.567, -7e4 / 3])  # most are not binary fractions: their sums round
def test_a_dimension_that_never_moves_is_not_divided_by_zero(value):
    answers, head = Answers(dtype=torch.float64), ValueHead(ValueHeadConfig(hidden_size=6))
    for answer in answers.items:
        answer["hidden_states"][:, 3] = value
    set_scales(head, answers)
    assert head.input_std[3] == 1
    assert fit_linear_head(answers).layers[0].weight[0, 3].abs() < 1e-6


def test_equal_rewards_warn_and_take_the_std_as_one():
    answers = Answers(3)
    for answer in answers.items:
        answer["reward"] = torch.tensor(0.1)
    with pytest.warns(UserWarning, match=r"All 3 rewards are 0\.1.*std is taken as 1"):
        scale = reward_scale(answers)
    assert scale == RewardScale(mean=pytest.approx(0.1), std=1.0)


def test_scales_follow_subsets_and_concatenations():
    answers = Answers()
    halves = ConcatDataset([Subset(answers, range(20)), Subset(answers, range(20, 60))])
    assert reward_scale(halves) == reward_scale(answers)


def test_rewards_that_are_not_numbers_are_refused_with_their_count():
    answers = Answers()
    answers[3]["reward"] = torch.tensor(float("nan"))
    answers[7]["reward"] = torch.tensor(float("inf"))
    with pytest.raises(ValueError, match="train_dataset has 60 answers, 2 of them without a finite reward"):
        check_answers(answers, "train_dataset", 6)


def test_states_of_another_width_are_refused_with_both_widths_named():
    with pytest.raises(HeadMismatch, match=r"16 wide, but those of train_dataset are 6 wide"):
        check_answers(Answers(), "train_dataset", 16)
    with pytest.raises(HeadMismatch, match=r"6 and 8 wide"):
        fit_linear_head(ConcatDataset([Answers(3, width=6), Answers(3, width=8)]))


class Written:
    """A part of a dataset that says which model wrote it."""

    def __init__(self, **fingerprint):
        self.fingerprint = fingerprint


def test_rollouts_of_two_models_are_refused_and_both_are_named():
    one = Written(base_model_name_or_path="org/one", dtype="float32", weights_sample_sha256="a")
    other = Written(base_model_name_or_path="org/other", dtype="float32", weights_sample_sha256="b")
    with pytest.raises(HeadMismatch, match=r"2 models, by their name \(train: org/one, test: org/other\)"):
        check_one_model({"train": one, "test": other})
    trained_on = Written(base_model_name_or_path="org/one", dtype="float32", weights_sample_sha256="c")
    with pytest.raises(HeadMismatch, match="2 models, by their weights in float32"):
        check_one_model({"train": ConcatDataset([[1], [2]]), "test": one, "more": trained_on})
    rounded = Written(base_model_name_or_path="org/one", dtype="bfloat16", weights_sample_sha256="d")
    check_one_model({"train": one, "test": rounded, "hand-made": [2]})


def test_answers_without_states_are_passed_over_with_a_warning():
    answers = Answers()
    metrics = value_metrics(all_states(answers)[:, 0], all_rewards(answers), packed_offsets(answers), 0.5)
    empty = {"hidden_states": torch.zeros(0, 6), "reward": torch.tensor(-99.0)}
    for place in (30, 0):
        answers.items.insert(place, empty)
    answers.items.append(empty)
    with pytest.warns(UserWarning, match="3 of 63 answers of held_out have no hidden states: they are passed over"):
        warn_of_empty(answers, "held_out")
    offsets = packed_offsets(answers)
    assert value_metrics(all_states(answers)[:, 0], all_rewards(answers), offsets, 0.5) == pytest.approx(metrics)
    answers.items = [empty]
    with pytest.raises(ValueError, match="None of the 1 answers of held_out has a hidden state"):
        warn_of_empty(answers, "held_out")


def packed_offsets(answers):
    return torch.tensor([0, *(len(answer["hidden_states"]) for answer in answers.items)]).cumsum(0)


def test_a_discounted_linear_head_expects_less_of_early_tokens():
    answers = Answers()
    early, plain = fit_linear_head(answers, gamma=0.5), fit_linear_head(answers)
    offsets = packed_offsets(answers)
    scale = plain.config.reward
    rewards = (all_rewards(answers) - scale.mean) / scale.std
    returns = torch.cat(
        [
            reward * 0.5 ** torch.arange(int(length) - 1, -1, -1)
            for reward, length in zip(rewards, offsets.diff(), strict=True)
        ]
    )
    errors = [(head(all_states(answers)) - returns).square().mean() for head in (early, plain)]
    assert errors[0] < 0.5 * errors[1]
    assert early.config.info["training"]["gamma"] == 0.5


def test_states_that_are_not_finite_are_refused():
    answers = Answers()
    answers[3]["hidden_states"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        fit_linear_head(answers)


def test_the_linear_head_finds_a_linear_reward():
    answers = Answers()
    head = fit_linear_head(answers, ridge=0)
    assert head.config.num_hidden_layers == 0
    predicted = head(all_states(answers)) * head.config.reward.std + head.config.reward.mean
    torch.testing.assert_close(predicted, 2 * all_states(answers)[:, 0] - 7, rtol=1e-4, atol=1e-4)
    expected = torch.tensor([2.0, 0, 0, 0, 0, 0]) / head.config.reward.std
    torch.testing.assert_close(head.gradient(torch.zeros(6)), expected, rtol=1e-4, atol=1e-5)


def test_the_linear_head_solves_the_ridge_normal_equations():
    answers, ridge = Answers(seed=3), 0.3
    for i, answer in enumerate(answers.items):
        answer["reward"] = answer["reward"] + torch.tensor(i % 7)
    head = fit_linear_head(answers, ridge=ridge)
    lengths = torch.tensor([len(answer["hidden_states"]) for answer in answers.items])
    x = (all_states(answers).double() - head.input_mean) / head.input_std
    error = head.double()(all_states(answers)) - (
        (all_rewards(answers) - head.config.reward.mean) / head.config.reward.std
    ).repeat_interleave(lengths)
    # the gradient of mean (V − G)² + ridge · ‖w‖², which is 0 at its minimum
    gradient = error @ x / len(x) + ridge * head.layers[0].weight[0]
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-5)
    assert error.mean().item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("ridge", [-1.0, float("nan")])
def test_a_senseless_ridge_is_refused(ridge):
    with pytest.raises(ValueError, match="ridge is"):
        fit_linear_head(Answers(), ridge=ridge)


def packed(seed=0, answers=40):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (answers,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    return torch.randn(answers, generator=generator), lengths, offsets


@pytest.mark.parametrize("td_lambda", [0.0, 0.7, 1.0])
def test_a_perfect_v_has_every_metric_at_its_best(td_lambda):
    rewards, lengths, offsets = packed()
    metrics = value_metrics(rewards.repeat_interleave(lengths), rewards, offsets, td_lambda)
    best = {"loss": 0, "explained_variance": 1, "calibration_slope": 1} | {
        f"rank_correlation_q{q}": 1 for q in (1, 2, 3, 4)
    }
    assert metrics == pytest.approx(best, abs=1e-12)


def test_the_best_constant_explains_nothing():
    rewards, lengths, offsets = packed()
    returns = rewards.repeat_interleave(lengths)
    metrics = value_metrics(returns.mean().expand_as(returns), rewards, offsets, 1.0)
    assert metrics["explained_variance"] == pytest.approx(0, abs=1e-6)
    assert metrics["rank_correlation_q4"] == 0
    assert metrics["loss"] == pytest.approx(returns.var(unbiased=False).item(), rel=1e-5)


def test_quarters_are_counted_from_the_start_of_the_answer():
    rewards, lengths, offsets = packed()
    for quarter in (1, 2, 3, 4):
        values = torch.full((int(offsets[-1]),), -9.0)
        for i, length in enumerate(lengths.tolist()):
            values[offsets[i] + -(-length * quarter // 4) - 1] = rewards[i]  # the last state of that quarter
        metrics = value_metrics(values, rewards, offsets, 1.0)
        assert metrics[f"rank_correlation_q{quarter}"] == pytest.approx(1)


def test_metrics_of_equal_rewards_are_numbers():
    _, lengths, offsets = packed()
    metrics = value_metrics(torch.randn(int(lengths.sum())), torch.zeros(len(lengths)), offsets, 1.0)
    assert all(value == value for value in metrics.values())


def test_rank_correlation_sees_order_only_and_gives_ties_their_mean_rank():
    x = torch.randn(30)
    assert rank_correlation(x, x.exp()) == pytest.approx(1)
    assert rank_correlation(x, -x) == pytest.approx(-1)
    # by hand: ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4
    assert rank_correlation(torch.tensor([0.0, 1, 1, 2]), torch.arange(4.0)) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
