"""Intervals, checked by laws, by a slow solution, and by how often they hold the truth."""

import doctest
import math

import pytest
import torch

from hf_recontrol import intervals
from hf_recontrol.intervals import crossed_bootstrap, paired_bootstrap, ratio_interval, wilson


def scores(n=40, answers=3, seed=0):
    return torch.randn(n, answers, generator=torch.Generator().manual_seed(seed))


def test_equal_answers_gain_nothing():
    gain = paired_bootstrap(scores(), scores())
    assert (gain.mean, gain.low, gain.high, gain.n) == (0, 0, 0, 40)


def test_a_shift_is_the_gain_and_certain():
    gain = paired_bootstrap(scores(), scores() + 0.25)
    assert (gain.mean, gain.low, gain.high) == pytest.approx((0.25, 0.25, 0.25))


def test_swapping_the_sides_mirrors_the_interval():
    there, back = paired_bootstrap(scores(), scores(seed=1)), paired_bootstrap(scores(seed=1), scores())
    assert (back.mean, back.low, back.high) == pytest.approx((-there.mean, -there.high, -there.low))
    assert there.low < there.mean < there.high


def test_prompts_are_drawn_whole_with_their_answers():
    by_prompt = paired_bootstrap(scores().mean(1), scores(seed=1).mean(1))
    repeated = paired_bootstrap(scores().repeat(1, 50), scores(seed=1).repeat(1, 20).tolist())  # no new information
    assert (repeated.low, repeated.high) == pytest.approx((by_prompt.low, by_prompt.high))


def test_pairing_takes_the_differences_of_the_prompts_out():
    hard = 100 * torch.randn(40, 1, generator=torch.Generator().manual_seed(5))
    paired, plain = paired_bootstrap(scores() + hard, scores(seed=1) + hard), paired_bootstrap(scores(), scores(seed=1))
    assert (paired.low, paired.high) == pytest.approx((plain.low, plain.high), abs=1e-4)


def test_gains_in_baseline_sd_do_not_depend_on_the_unit_of_the_reward():
    base, treated = scores().double(), scores(seed=1).double()
    in_sd = paired_bootstrap(7 * base - 3, 7 * treated - 3, in_baseline_sd=True)
    raw = paired_bootstrap(base, treated)
    assert in_sd.mean == pytest.approx(raw.mean / float(base.std()))
    assert in_sd.high == pytest.approx(raw.high / float(base.std()))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for repeat in range(400):
        base = torch.randn(40, 2, generator=generator)
        gain = paired_bootstrap(base, base + 0.3 + torch.randn(40, 2, generator=generator), resamples=400, seed=repeat)
        covered += gain.low <= 0.3 <= gain.high
    assert 0.90 <= covered / 400 <= 0.97


def test_a_seed_gives_the_same_interval_and_the_global_generator_is_left_alone():
    state = torch.random.get_rng_state()
    first, second, third = (paired_bootstrap(scores(), scores(seed=1), seed=seed, resamples=500) for seed in (0, 0, 1))
    assert first == second != third
    assert first.mean == third.mean
    torch.testing.assert_close(torch.random.get_rng_state(), state, rtol=0, atol=0)


def test_more_confidence_is_a_wider_interval():
    narrow, wide = (paired_bootstrap(scores(), scores(seed=1), confidence=c) for c in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_values_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match=r"\(40,\).*\(39,\).*the same two or more prompts"):
        paired_bootstrap(torch.zeros(40), torch.zeros(39))
    with pytest.raises(ValueError, match="two or more prompts"):
        paired_bootstrap([1.0], [2.0])
    with pytest.raises(ValueError, match="NaN or infinite"):
        paired_bootstrap([1.0, float("nan")], [2.0, 3.0])
    with pytest.raises(ValueError, match="sd is 0"):
        paired_bootstrap([1.0, 1.0], [2.0, 3.0], in_baseline_sd=True)


@pytest.mark.parametrize("wrong", [{"confidence": 95}, {"confidence": 0.0}, {"resamples": 0}])
def test_a_bootstrap_without_sense_is_refused(wrong):
    with pytest.raises(ValueError, match="0 < confidence < 1"):
        paired_bootstrap([1.0, 2.0], [2.0, 3.0], **wrong)


def test_a_spread_between_runs_widens_the_interval_that_one_between_prompts_leaves_narrow():
    generator = torch.Generator().manual_seed(0)
    prompts_alone = 1 + torch.randn(1, 100, generator=generator).expand(3, -1)
    gain = crossed_bootstrap(prompts_alone)
    pooled = paired_bootstrap(torch.zeros(100), prompts_alone[0])
    assert (gain.mean, gain.n) == (pytest.approx(pooled.mean), 100)
    assert (gain.low, gain.high) == (pytest.approx(pooled.low, abs=0.02), pytest.approx(pooled.high, abs=0.02))
    with_runs = crossed_bootstrap(prompts_alone + torch.tensor([[-1.0], [0.0], [1.0]]))
    assert with_runs.high - with_runs.low > 2 * (gain.high - gain.low)
    assert with_runs == crossed_bootstrap(prompts_alone + torch.tensor([[-1.0], [0.0], [1.0]]))


def test_the_crossed_interval_covers_the_truth_about_as_often_as_it_says():
    """Ten runs, thirty prompts: run, prompt and residual effects. With as few runs it is a little too narrow."""
    generator, covered = torch.Generator().manual_seed(0), 0
    for trial in range(100):
        runs, prompts, rest = (torch.randn(shape, generator=generator) for shape in ((10, 1), (1, 30), (10, 30)))
        gain = crossed_bootstrap(runs + prompts + rest, resamples=300, seed=trial)
        covered += gain.low <= 0 <= gain.high
    assert 84 <= covered <= 100


@pytest.mark.parametrize("gains", [[1.0, 2.0], [[1.0], [2.0]], torch.zeros(0, 3), [[1.0, math.nan]]])
def test_gains_that_are_not_runs_by_prompts_are_refused(gains):
    with pytest.raises(ValueError, match=r"\(runs, prompts\)"):
        crossed_bootstrap(gains)


def test_the_interval_of_a_ratio_is_as_wide_as_its_prompts_differ():
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(100, 1, generator=generator).expand(100, 4).flatten()  # four answers, all alike
    ones, together = torch.ones(400), [i // 4 for i in range(400)]
    low, high = ratio_interval(prompts, ones, together)
    mean, error = float(prompts.mean()), float(prompts.std()) / 10
    assert (low, high) == (pytest.approx(mean - 1.96 * error, abs=0.03), pytest.approx(mean + 1.96 * error, abs=0.03))
    alone = ratio_interval(prompts, ones, range(400))
    assert alone[1] - alone[0] == pytest.approx((high - low) / 2, rel=0.1)
    halved = ratio_interval(prompts, 2 * ones, together)
    assert halved == (pytest.approx(low / 2), pytest.approx(high / 2))
    assert ratio_interval([1.0, 2.0], [1.0, 1.0], ["a", "a"]) is None
    assert ratio_interval([1.0, 2.0], [0.0, 1.0], ["a", "b"]) is None


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(8, 10, 0.490, 0.943), (0, 10, 0.0, 0.278), (10, 10, 0.722, 1.0), (1, 2, 0.095, 0.905), (81, 263, 0.255, 0.366)],
)
def test_wilsons_interval_has_its_known_values(successes, n, low, high):
    assert wilson(successes, n) == (pytest.approx(low, abs=5e-4), pytest.approx(high, abs=5e-4))


@pytest.mark.parametrize(("confidence", "z"), [(0.95, 1.959963985), (0.5, 0.674489750), (0.99, 2.575829304)])
def test_wilsons_ends_are_where_the_score_test_turns(confidence, z):
    def end(share, n, outside, inside):  # bisection
        for _ in range(80):
            middle = (outside + inside) / 2
            accepted = abs(share - middle) <= z * math.sqrt(middle * (1 - middle) / n)
            outside, inside = (outside, middle) if accepted else (middle, inside)
        return inside

    for successes, n in [(0, 1), (1, 7), (3, 7), (50, 300), (300, 300)]:
        share = successes / n
        direct = (end(share, n, 0.0, share), end(share, n, 1.0, share))
        assert wilson(successes, n, confidence) == pytest.approx(direct, abs=1e-7)


def test_wilsons_interval_never_leaves_the_shares():
    ends = [wilson(successes, n, c) for n in range(1, 80) for successes in (0, n) for c in (0.5, 0.9, 0.95)]
    assert all(0 <= low < high <= 1 for low, high in ends)


@pytest.mark.parametrize("wrong", [(-1, 3), (4, 3), (0, 0), (1, 2, 95.0), (1, 2, 0.0)])
def test_a_share_without_sense_is_refused(wrong):
    with pytest.raises(ValueError, match="0 ≤ successes ≤ n"):
        wilson(*wrong)


def test_the_example_shows_its_result():
    assert doctest.testmod(intervals) == (0, 1)
