"""Win rates: the rule by which two orders make one outcome, their intervals, and rewards as judges."""

import math
import warnings

import pytest
from tiny import tiny_control_head, tiny_head, tiny_tokenizer

from hf_recontrol import CollectError, RewardJudge, RewardScale, win_rate
from hf_recontrol.intervals import wilson
from hf_recontrol.judging import warn_if_trained_by
from hf_recontrol.rewards import Rewards


def words(completions, **kwargs):
    return [float(len(text.split())) for text in completions]


def judge_of(forth, back):
    """Says `forth` of the pairs as they are, then `back` of the turned ones."""
    said = [forth, back]
    return lambda prompts, first, second: said.pop(0)


def rate_of(forth, back, **options):
    texts = ["text"] * len(forth)
    return win_rate(judge_of(forth, back), texts, texts, texts, **options)


@pytest.mark.parametrize(
    ("forth", "back", "outcome", "disagree"),
    [
        ((8, 3), (3, 8), "win", 0),
        ((3, 8), (8, 3), "loss", 0),
        ((5, 5), (7, 7), "tie", 0),
        ((9, 2), (9, 2), "tie", 1),  # always the first
        ((9, 2), (6, 5), "win", 1),  # 7 ahead as the first, 1 behind as the second
        ((6, 5), (9, 2), "loss", 1),
        ((6, 5), (5, 5), "win", 1),  # a tie is not what a win says
        (None, (3, 8), "unparsable", math.nan),
        ((8, 3), None, "unparsable", math.nan),
        ((math.nan, 3), (3, 8), "unparsable", math.nan),
    ],
)
def test_the_higher_mean_of_two_scores_wins(forth, back, outcome, disagree):
    result = rate_of([forth], [back])
    assert result.outcomes == (outcome,)
    assert result.order_disagreement == pytest.approx(disagree, nan_ok=True)


def counted(wins, ties, losses, unparsable=0):
    forth = [(9, 1)] * wins + [(5, 5)] * ties + [(1, 9)] * losses + [None] * unparsable
    return rate_of(forth, [pair and pair[::-1] for pair in forth])


def test_the_counts_make_the_rates_and_what_cannot_be_parsed_is_in_none():
    result = counted(5, 2, 1, unparsable=4)
    assert (result.wins, result.ties, result.losses, result.unparsable, result.n) == (5, 2, 1, 4, 12)
    assert (result.rate, result.strict) == (6 / 8, 5 / 8)
    assert (result.strict_low, result.strict_high) == wilson(5, 8)
    assert result.outcomes == ("win",) * 5 + ("tie",) * 2 + ("loss",) + ("unparsable",) * 4


def test_without_a_tie_the_rate_is_a_share_and_has_wilsons_interval():
    result = counted(8, 0, 2)
    assert (result.rate, result.low, result.high) == (0.8, *wilson(8, 10))


def test_half_wins_have_the_interval_of_a_bootstrap_over_prompts():
    result = counted(30, 40, 30)
    # 100 draws of 0, ½, 1 with sd √0.15: normal enough
    assert result.rate == 0.5
    assert result.low == pytest.approx(0.5 - 1.96 * math.sqrt(0.15 / 100), abs=0.01)
    assert result.high == pytest.approx(0.5 + 1.96 * math.sqrt(0.15 / 100), abs=0.01)
    assert (result.low, result.high) == (counted(30, 40, 30).low, counted(30, 40, 30).high)


def test_confidence_is_that_of_both_intervals():
    forth = [(9, 1)] * 6 + [(5, 5)] * 4 + [(1, 9)] * 6
    wide, narrow = (rate_of(forth, [pair[::-1] for pair in forth], confidence=c) for c in (0.99, 0.5))
    assert wide.low < narrow.low < narrow.high < wide.high
    assert (narrow.strict_low, narrow.strict_high) == wilson(6, 16, 0.5)


def test_swapping_the_sides_mirrors_the_rate():
    there, back = counted(6, 0, 3), counted(3, 0, 6)
    assert there.rate == pytest.approx(1 - back.rate)
    assert there.low == pytest.approx(1 - back.high)


def test_nothing_parsable_has_no_rate():
    result = counted(0, 0, 0, unparsable=3)
    assert (result.unparsable, result.n) == (3, 3)
    figures = (result.rate, result.low, result.high, result.strict, result.strict_low, result.order_disagreement)
    assert all(map(math.isnan, figures))


def test_one_tie_alone_has_no_interval():
    result = counted(0, 1, 0)
    assert result.rate == 0.5
    assert math.isnan(result.low)
    assert math.isnan(result.high)


def test_what_does_not_pair_is_refused_before_the_judge_is_asked():
    def never(*texts):
        raise AssertionError

    with pytest.raises(ValueError, match="2 prompts, 1 answers and 2 opponents"):
        win_rate(never, ["a", "b"], ["c"], ["d", "e"])
    with pytest.raises(ValueError, match="one or more prompts"):
        win_rate(never, [], [], [])
    with pytest.raises(ValueError, match="0 < confidence < 1"):
        win_rate(never, ["a"], ["b"], ["c"], confidence=95)
    with pytest.raises(ValueError, match="resamples ≥ 1"):
        win_rate(never, ["a"], ["b"], ["c"], resamples=0)


def test_a_judge_that_loses_a_prompt_is_refused():
    with pytest.raises(ValueError, match="0 verdicts on 1 prompts"):
        rate_of([(1, 2)], [])


# Rewards as judges

PROMPTS, ANSWERS, OPPONENTS = ["p"] * 4, ["a b", "a", "a b c", ""], ["a", "a b", "c d e", "b"]


def test_the_higher_reward_wins_and_equal_ones_tie():
    result = win_rate(RewardJudge(words), PROMPTS, ANSWERS, OPPONENTS)
    assert result.outcomes == ("win", "loss", "tie", "loss")
    assert result.order_disagreement == 0


def test_each_answer_is_scored_once():
    asked = []

    def counting(completions, **kwargs):
        asked.extend(completions)
        return words(completions)

    win_rate(RewardJudge(counting), PROMPTS, ANSWERS, OPPONENTS)
    assert asked == ANSWERS + OPPONENTS


def test_several_rewards_judge_by_their_weighted_sum():
    def fewer(completions, **kwargs):
        return [-reward for reward in words(completions)]

    judge = RewardJudge(Rewards([words, fewer], [1.0, 2.0]))
    assert win_rate(judge, PROMPTS, ANSWERS, OPPONENTS).outcomes == ("loss", "win", "tie", "win")


def test_an_answer_without_a_reward_has_no_verdict():
    def of_even(completions, **kwargs):
        return [None if reward % 2 else reward for reward in words(completions)]

    result = win_rate(RewardJudge(of_even), ["p"] * 2, ["a b", "a b"], ["a", "a b c d"])
    assert result.outcomes == ("unparsable", "loss")


def test_functions_that_read_token_ids_need_the_tokenizer():
    def tokens(completion_ids, **kwargs):
        return [float(len(ids)) for ids in completion_ids]

    judge = RewardJudge(tokens, tokenizer=tiny_tokenizer())
    assert judge(["p"], ["w5 w6"], [[{"role": "assistant", "content": "w7"}]]) == [(2, 1)]
    with pytest.raises(CollectError, match="tokens"):
        RewardJudge(Rewards(tokens, retries=0))(["p"], ["w5 w6"], ["w7"])


# A judge that trained the head


def trained_by(name, make=tiny_head):
    return make(reward=RewardScale(name=name))


@pytest.mark.parametrize("name", ["words", "harmless + 0.5 · words", "0.25 · words + harmless"])
@pytest.mark.parametrize("make", [tiny_head, tiny_control_head])
def test_the_reward_that_trained_the_head_is_warned_of_as_a_judge(name, make):
    with pytest.warns(UserWarning, match=r"The judge 'words'.*filterwarnings\('ignore'") as caught:
        warn_if_trained_by(trained_by(name, make), Rewards(words))
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize("name", ["reward", "swords", "words_2", "harmless + 0.5 · wordless"])
def test_another_judge_is_not_warned_of(name):
    warn_if_trained_by(trained_by(name), Rewards(words))  # a warning is an error here


def test_the_warning_is_silenced_as_it_says():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The judge")
        warn_if_trained_by(trained_by("words"), RewardJudge(words).rewards)
