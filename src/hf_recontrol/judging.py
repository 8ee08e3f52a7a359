"""Win rates: two answers to each prompt, scored by a judge in both orders."""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .head import Head
from .intervals import paired_bootstrap, wilson
from .reward_models import Text, answer_text
from .rewards import RewardFunc, Rewards

Scores = tuple[float, float]
"""Of the answer that the judge saw first, and of the second."""
Judge = Callable[[Sequence[Text], Sequence[Text], Sequence[Text]], list[Scores | None]]
"""(prompts, first answers, second answers) → the scores of each prompt, higher is better; None: no verdict."""
OUTCOMES = ("win", "tie", "loss", "unparsable")


@dataclass(frozen=True)
class WinRate:
    """How often answers beat those of an opponent. NaN where no prompt has a verdict."""

    wins: int
    """Prompts whose answer had the higher mean of its two scores."""
    ties: int
    """Prompts with equal means."""
    losses: int
    """Prompts whose answer had the lower mean."""
    unparsable: int
    """Prompts without a verdict in one order or both. In no other figure but n."""
    rate: float
    """(wins + ties/2) / (wins + ties + losses)."""
    low: float
    """Lower end of its interval: Wilson's where nothing tied, else a percentile bootstrap's over prompts, for the half
    wins are no share. NaN where it would need a second prompt."""
    high: float
    """Upper end of that interval."""
    strict: float
    """wins / (wins + ties + losses)."""
    strict_low: float
    """Lower end of its Wilson interval."""
    strict_high: float
    """Upper end of that interval."""
    order_disagreement: float
    """Share of the prompts with a verdict whose two orders did not say the same: one a win, the other a loss or a tie.
    1 for a judge that always prefers the first; then all are ties, and the rate says nothing."""
    n: int
    """Prompts."""
    outcomes: tuple[str, ...]
    """Of each prompt: win, tie, loss or unparsable."""


def win_rate(
    judge: Judge,
    prompts: Sequence[Text],
    answers: Sequence[Text],
    opponents: Sequence[Text],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> WinRate:
    """How often `answers` beat `opponents`, each pair judged twice, the second time in the other order.

    An answer wins where the mean of its two scores is higher, so that a judge's preference for a position cancels
    (Zheng et al. 2023, arXiv:2306.05685). Departs from Kong et al. 2024 (arXiv:2406.05954), where each pair is judged
    once, the sides drawn at random, and the win rate is `strict`.

    Args:
        judge: a ChatJudge, a RewardJudge, or a callable (prompts, first answers, second answers) → for each prompt the
            two scores, or None (or NaN) for no verdict. It is called twice; once where `judge.position_blind` is true.
        prompts: texts or message lists.
        answers: texts or message lists, one for each prompt.
        opponents: likewise: the base model's answers, or references.
        confidence: of the intervals, between 0 and 1.
        resamples: of the bootstrap, ≥ 1.
        seed: of the bootstrap.

    Raises:
        ValueError: no prompt, unequal lengths, a number out of bounds, or a judge with too few or too many scores.
    """
    if not len(prompts) or not len(prompts) == len(answers) == len(opponents):
        raise ValueError(
            f"Got {len(prompts)} prompts, {len(answers)} answers and {len(opponents)} opponents; pass one answer and "
            "one opponent for each of one or more prompts."
        )
    if not 0 < confidence < 1 or resamples < 1:  # asked here too, before the judge is paid
        raise ValueError(f"confidence is {confidence}, resamples {resamples}; pass 0 < confidence < 1, resamples ≥ 1.")
    forth = _checked(judge(prompts, answers, opponents), len(prompts))
    if getattr(judge, "position_blind", False):
        leads = [None if scores is None else (scores[0] - scores[1],) * 2 for scores in forth]
    else:
        back = _checked(judge(prompts, opponents, answers), len(prompts))
        leads = [_leads(*both) for both in zip(forth, back, strict=True)]
    return _summary(leads, confidence, resamples, seed)


def _checked(scores: list[Scores | None], count: int) -> list[Scores | None]:
    if len(scores) != count:
        raise ValueError(f"The judge gave {len(scores)} verdicts on {count} prompts; it must give one for each.")
    return [pair if pair is not None and all(map(math.isfinite, pair)) else None for pair in scores]


def _leads(forth: Scores | None, back: Scores | None) -> tuple[float, float] | None:
    """By how much the answer leads, shown first and shown second."""
    return None if forth is None or back is None else (forth[0] - forth[1], back[1] - back[0])


def _summary(leads: Sequence[tuple[float, float] | None], confidence: float, resamples: int, seed: int) -> WinRate:
    verdicts = [lead for lead in leads if lead is not None]
    outcomes = tuple("unparsable" if lead is None else OUTCOMES[1 - _sign(sum(lead))] for lead in leads)
    counts = Counter(outcomes)
    n, nan = len(verdicts), math.nan
    points = [(1 + _sign(sum(lead))) / 2 for lead in verdicts]
    strict_low, strict_high = wilson(counts["win"], n, confidence) if n else (nan, nan)
    low, high = strict_low, strict_high
    if counts["tie"]:
        low, high = nan, nan
        if n > 1:
            gain = paired_bootstrap([0.0] * n, points, resamples=resamples, seed=seed, confidence=confidence)
            low, high = gain.low, gain.high
    return WinRate(
        wins=counts["win"],
        ties=counts["tie"],
        losses=counts["loss"],
        unparsable=counts["unparsable"],
        rate=math.fsum(points) / n if n else nan,
        low=low,
        high=high,
        strict=counts["win"] / n if n else nan,
        strict_low=strict_low,
        strict_high=strict_high,
        order_disagreement=sum(_sign(first) != _sign(second) for first, second in verdicts) / n if n else nan,
        n=len(leads),
        outcomes=outcomes,
    )


def _sign(number: float) -> int:
    return (number > 0) - (number < 0)


class RewardJudge:
    """A reward model or function as a judge: the higher reward wins, equal rewards tie.

    Each answer is scored once, as a reward knows no order. Several functions judge by their weighted sum. The reward
    that a head was trained on is no judge of that head: see warn_if_trained_by.

    Args:
        reward_funcs: in TRL's convention, or a Rewards with its weights, device and batch size.
        tokenizer: of the model that wrote the answers, for functions that read `completion_ids`: the ids of the texts,
            without special tokens. Without one, the ids are None.

    Attributes:
        rewards: the Rewards that judge.
    """

    position_blind = True

    def __init__(self, reward_funcs: Rewards | RewardFunc | list[RewardFunc], *, tokenizer: Any = None):
        self.rewards = reward_funcs if isinstance(reward_funcs, Rewards) else Rewards(reward_funcs)
        self.tokenizer = tokenizer

    def __call__(self, prompts: Sequence[Text], first: Sequence[Text], second: Sequence[Text]) -> list[Scores | None]:
        """The rewards of both answers to each prompt; None where one has no reward.

        Raises:
            CollectError: a function failed, or returned something else than rewards.
        """
        both = [self._rewards(prompts, answers) for answers in (first, second)]
        return [None if a is None or b is None else (a, b) for a, b in zip(*both, strict=True)]

    def _rewards(self, prompts: Sequence[Text], answers: Sequence[Text]) -> list[float | None]:
        ids: list[Any] = [None] * len(answers)  # what reads them fails: empty lists would pass for empty answers
        if self.tokenizer is not None:
            texts = [answer_text(answer) for answer in answers]
            ids = [list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        return self.rewards(prompts, answers, ids).total


def warn_if_trained_by(head: Head, rewards: Rewards, *, stacklevel: int = 2) -> None:
    """Warn where a judge goes by the name of a reward that the head was trained on: it would be asked about itself.

    A head raises the reward that trained it past what that reward is worth (Gao et al. 2022, arXiv:2210.10760), so its
    gain in that reward is no evidence of better answers. Only names are compared: those of the functions, with the
    terms of `head.config.reward.name`, which reads "a + 0.5 · b" where several trained it.

    Args:
        head: a value or control head.
        rewards: the judge's, such as RewardJudge.rewards.
        stacklevel: of the warning; 2 is the caller.
    """
    trained_by = {term.rpartition(" · ")[2] for term in head.config.reward.name.split(" + ")}
    if same := sorted(trained_by & set(rewards.names)):
        warnings.warn(
            f"The judge {', '.join(map(repr, same))} has the name of the reward that the head was trained on, "
            f"{head.config.reward.name!r}; a judge should be another one. Judge by a reward that trained nothing here. "
            "If it only shares the name, rename the function, or silence this by warnings.filterwarnings('ignore', "
            "message='The judge').",
            UserWarning,
            stacklevel=stacklevel,
        )
