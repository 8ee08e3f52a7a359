"""λ-returns against the plain recursion, and against the two well-known mistakes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_recontrol.objectives import lambda_returns


def packed(lengths: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    values = torch.randn(sum(lengths), dtype=dtype, generator=generator)
    rewards = torch.randn(len(lengths), dtype=dtype, generator=generator)
    return values, rewards, torch.tensor([0, *lengths]).cumsum(0)


def by_recursion(values: list[float], reward: float, td_lambda: float, gamma: float = 1.0) -> list[float]:
    """v_T = r, v_t = γ ((1 − λ) V(s_{t+1}) + λ v_{t+1}), as written in the paper's notation."""
    targets = [reward] * len(values)
    for t in reversed(range(len(values) - 1)):
        targets[t] = gamma * ((1 - td_lambda) * values[t + 1] + td_lambda * targets[t + 1])
    return targets


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 7), max_size=6), td_lambda=st.sampled_from([0.0, 0.3, 0.5, 0.95, 1.0]))
def test_the_targets_are_those_of_the_plain_recursion(lengths, td_lambda):
    values, rewards, offsets = packed(lengths)
    expected = []
    for i, reward in enumerate(rewards.tolist()):
        expected += by_recursion(values[offsets[i] : offsets[i + 1]].tolist(), reward, td_lambda)
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(lambda_returns(values, rewards, offsets, td_lambda), expected, rtol=0, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 7), max_size=6),
    td_lambda=st.sampled_from([0.0, 0.3, 1.0]),
    gamma=st.sampled_from([0.01, 0.5, 0.99, 1.0]),
)
def test_a_discount_takes_its_share_at_each_token(lengths, td_lambda, gamma):
    values, rewards, offsets = packed(lengths)
    expected = []
    for i, reward in enumerate(rewards.tolist()):
        expected += by_recursion(values[offsets[i] : offsets[i + 1]].tolist(), reward, td_lambda, gamma)
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(lambda_returns(values, rewards, offsets, td_lambda, gamma), expected)


@pytest.mark.parametrize("td_lambda", [0.0, 0.5, 1.0])
def test_the_reward_sits_on_the_last_token_of_each_answer(td_lambda):
    values, rewards, offsets = packed([3, 1, 0, 5])
    targets = lambda_returns(values, rewards, offsets, td_lambda)
    torch.testing.assert_close(targets[[2, 3, 8]], rewards[[0, 1, 3]], rtol=0, atol=0)
    if td_lambda < 1:
        assert targets[0] != rewards[0]
        assert targets[4] != rewards[3]


@pytest.mark.parametrize("td_lambda", [0.0, 0.5, 1.0])
def test_no_gradient_flows_through_the_targets(td_lambda):
    values, rewards, offsets = packed([3, 2])
    values.requires_grad_(True)
    targets = lambda_returns(values, rewards, offsets, td_lambda)
    assert not targets.requires_grad
    (gradient,) = torch.autograd.grad((values - targets).square().sum(), values)
    torch.testing.assert_close(
        gradient, 2 * (values - targets).detach()
    )  # of V(s_t) alone: nothing came back from V(s_{t+1})


def test_lambda_0_is_bellman_and_lambda_1_is_the_reward_everywhere():
    values, rewards, offsets = packed([4])
    torch.testing.assert_close(lambda_returns(values, rewards, offsets, 0.0), torch.cat([values[1:], rewards]))
    torch.testing.assert_close(lambda_returns(values, rewards, offsets, 1.0), rewards.expand(4))


def test_with_values_equal_to_the_reward_every_target_is_the_reward():
    values, rewards, offsets = packed([4, 2, 1])
    values = rewards.repeat_interleave(offsets.diff())
    for td_lambda in (0.0, 0.37, 1.0):
        torch.testing.assert_close(lambda_returns(values, rewards, offsets, td_lambda), values)


@pytest.mark.parametrize("td_lambda", [0.0, 0.5, 1.0])
def test_an_answer_does_not_depend_on_its_neighbours(td_lambda):
    values, rewards, offsets = packed([3, 4])
    alone = lambda_returns(values[3:], rewards[1:], torch.tensor([0, 4]), td_lambda)
    torch.testing.assert_close(lambda_returns(values, rewards, offsets, td_lambda)[3:], alone, rtol=0, atol=0)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [0, 2, 0]])
def test_empty_answers_have_no_targets_and_their_rewards_are_not_read(lengths):
    values, rewards, offsets = packed(lengths)
    rewards[[i for i, length in enumerate(lengths) if not length]] = torch.nan
    for td_lambda in (0.0, 0.5, 1.0):
        targets = lambda_returns(values, rewards, offsets, td_lambda)
        assert targets.shape == (sum(lengths),)
        assert targets.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_targets_have_the_dtype_of_the_values_and_the_values_are_not_written(dtype):
    values, rewards, offsets = packed([3, 2], dtype)
    before = values.clone()
    for td_lambda in (0.0, 0.5, 1.0):
        assert lambda_returns(values, rewards.float(), offsets, td_lambda).dtype == dtype
    torch.testing.assert_close(values, before, rtol=0, atol=0)


def test_lambda_out_of_bounds_and_wrong_offsets_are_refused():
    values, rewards, offsets = packed([3, 2])
    for td_lambda in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"td_lambda is .* from 0 \(Bellman\) to 1"):
            lambda_returns(values, rewards, offsets, td_lambda)
    for gamma in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"gamma is .* above 0, and 1 \(no discount\) or less"):
            lambda_returns(values, rewards, offsets, 0.5, gamma)
    with pytest.raises(ValueError, match=r"\(answers \+ 1,\)"):
        lambda_returns(values, rewards, offsets[:-1], 0.5)
    for wrong in ([0, 3, 4], [1, 3, 5], [0, 6, 5], [0, -1, 5]):
        with pytest.raises(ValueError, match="must rise from 0 to 5"):
            lambda_returns(values, rewards, torch.tensor(wrong), 0.5)
