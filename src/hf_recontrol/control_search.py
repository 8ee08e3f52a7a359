"""Chooses how hard a head steers on validation prompts: a few settings are tried, and the best by an objective wins."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers.utils import logging

from .baselines import rewards_of_answers
from .coherence import Coherence
from .control import Controller
from .control_config import ControlConfig, as_float
from .evaluation import evaluate_answers
from .head import Head
from .keywords import check_base_model
from .rewards import Rewards, Text
from .sampling import Sampler
from .search_ranges import Options, Range, own_options, search_ranges, suggest
from .search_results import AGAINST, Figures, Search, Trial
from .token_statistics import token_statistics

Objective = Callable[[Figures], float]
OBJECTIVES = ("reward", "paper")
MAX_PERPLEXITY_RATIO = 1.2
AT_RANDOM = 5
"""Trials that TPE makes at random before it has something to go by; 10 of optuna's own would be half of them."""
OUT = -1e30


def search_control(
    head: Head,
    sampler: Sampler,
    prompts: Sequence[Text],
    rewards: Rewards,
    *,
    objective: str | Objective = "reward",
    against: str = "perplexity",
    trials: int = 20,
    coherence: Coherence | None = None,
    ranges: Mapping[str, Range] | None = None,
    max_perplexity_ratio: float = MAX_PERPLEXITY_RATIO,
    seed: int = 0,
) -> Search:
    """Try settings of a head's control on validation prompts: optuna's TPE, and an objective that says what is best.

    Each trial generates an answer to every prompt, from the same seeds. Trial 0 does not steer, so that this can win.
    The best was chosen for its figures on these prompts, which flatter it: test it on others.

    Kong et al. 2024 (arXiv:2406.05954) choose α and n by the sum coherence + diversity + reward on a validation set:
    "paper". Departure: the default is another objective, since the sum takes a reward in its own units, and one of a
    large scale then decides alone.

    Args:
        head: a value or control head; left as it is. Search.apply_to writes the choice into it.
        sampler: how answers are generated, and by which model.
        prompts: texts or message lists that nothing is tested on.
        rewards: their total is the reward.
        objective: "reward": the highest one at a perplexity of at most max_perplexity_ratio × that without control.
            "paper": coherence + diversity + reward. Or a callable, from a trial's figures (see Trial) to a number; what
            is not finite cannot win.
        against: "perplexity" or "coherence": what the front trades the reward for.
        trials: with the one that does not steer, ≥ 2.
        coherence: for "paper", for a front against it, or to have it in the figures.
        ranges: from an option's name (strength, step_size, num_steps, scale) to its lowest and highest value. Where
            None: strength, within the calibration, of a calibrated head; else step_size or scale from a tenth of the
            head's own to ten times it, and num_steps from 1 to 64.
        max_perplexity_ratio: for "reward", ≥ 1.
        seed: of the settings that are tried; the answers have the sampler's.

    Raises:
        ImportError: the extra `eval` is not installed.
        HeadMismatch: the head reads another width.
        ValueError: an objective or range that cannot be, no prompts, or figures without control that are not finite.
    """
    optuna = load_optuna()
    name, score = named_objective(objective, max_perplexity_ratio)
    check_coherence(name, against, coherence is not None)
    _check_sizes(prompts, trials)
    searched = search_ranges(head, ranges)
    check_base_model(head, sampler.model, stacklevel=3)
    rewards.check(conversational=not isinstance(prompts[0], str))
    measure = _Measure(head, sampler, list(prompts), rewards, coherence)
    done = [_trial(0, {head.config.control.multiplier: 0.0}, measure.untouched(), score)]
    study = _study(optuna, seed, own_options(head, searched))
    for number in logging.tqdm(range(1, trials), desc="trials"):
        asked = study.ask()
        options = suggest(asked, searched)
        done.append(_trial(number, options, measure(options), score))
        study.tell(asked, _guide(done[-1]))
    return Search(done, name, against, len(prompts), max_perplexity_ratio if name == "reward" else None)


def named_objective(objective: str | Objective, max_perplexity_ratio: float) -> tuple[str, Objective]:
    """What an objective is called, and from a trial's figures to its score.

    Raises:
        ValueError: no such objective, or a ratio below 1.
    """
    if callable(objective):
        return f"{getattr(objective, '__name__', type(objective).__name__)}()", objective
    if objective not in OBJECTIVES:
        raise ValueError(
            f"The objective is {objective!r}; expected is {' or '.join(map(repr, OBJECTIVES))}, or a callable from a "
            "dict of figures to a number (on the command line file.py:function)."
        )
    if not 1 <= max_perplexity_ratio < math.inf:
        raise ValueError(
            f"max_perplexity_ratio is {max_perplexity_ratio}; it must be finite and ≥ 1, the ratio without control."
        )
    if objective == "paper":
        return objective, lambda figures: figures["coherence"] + figures["diversity"] + figures["reward"]
    return (
        objective,
        lambda figures: figures["reward"] if figures["perplexity_ratio"] <= max_perplexity_ratio else -math.inf,
    )


def check_coherence(objective: str, against: str, given: bool) -> None:
    """Raise ValueError if the coherence is needed but not given, or `against` is nothing that a front has."""
    if against not in AGAINST:
        raise ValueError(f"against is {against!r}; expected is {' or '.join(map(repr, AGAINST))}.")
    if not given and (objective == "paper" or against == "coherence"):
        why = (
            "objective 'paper' is coherence + diversity + reward" if objective == "paper" else f"against is {against!r}"
        )
        raise ValueError(f"The {why}, but nothing measures coherence. Pass coherence=Coherence().")


def load_optuna() -> Any:
    """The module, or an ImportError with the command that installs it."""
    try:
        import optuna
    except ImportError as error:
        raise ImportError("The search needs optuna. Install the extra: pip install 'hf-recontrol[eval]'") from error
    return optuna


class _Measure:
    """Generates with a trial's options, and measures the answers."""

    def __init__(
        self,
        head: Head,
        sampler: Sampler,
        prompts: Sequence[Text],
        rewards: Rewards,
        coherence: Coherence | None,
    ):
        self.head, self.sampler, self.prompts = head, sampler, prompts
        self.rewards, self.coherence = rewards, coherence
        self.base_perplexity = math.nan

    def untouched(self) -> Figures:
        """Of the model without control, whose perplexity the others' is then compared with."""
        figures = self._figures(None, None)
        self.base_perplexity = figures["perplexity"]
        figures["perplexity_ratio"] = figures["perplexity"] / self.base_perplexity
        if not all(map(math.isfinite, figures.values())):
            raise ValueError(
                f"Without control the figures are {figures}; expected are finite numbers, to compare with. Are all "
                "answers empty or without a reward? Raise max_new_tokens, or mend the reward."
            )
        return figures

    def __call__(self, options: Options) -> Figures:
        return self._figures(self.head, ControlConfig.of(options))

    def _figures(self, head: Head | None, config: ControlConfig | None) -> Figures:
        answers = self.sampler(self.prompts, head=head, config=config)
        rows = [row for of_prompt in answers for row in of_prompt]
        rewarded = [value for of_prompt in rewards_of_answers(self.rewards, answers) for value in of_prompt]
        known = [value for value in rewarded if value is not None]
        statistics = token_statistics(
            self.sampler.model,
            [self.sampler.prompt_token_ids(row["prompt"]) for row in rows],
            [row["token_ids"] for row in rows],
            None if head is None else Controller(head, config),
            batch_size=self.sampler.batch_size,
        )
        figures = {"reward": math.fsum(known) / len(known) if known else math.nan}
        figures |= {"perplexity": statistics.perplexity, "kl_per_answer": statistics.kl_per_answer}
        figures["perplexity_ratio"] = figures["perplexity"] / self.base_perplexity
        measured = evaluate_answers(rows, coherence=self.coherence)
        return figures | {name: measured[name] for name in ("diversity", "coherence", "length") if name in measured}


def _trial(number: int, options: Options, figures: Figures, objective: Objective) -> Trial:
    trial = Trial(number, options, figures, math.nan)
    if not trial.is_finite:
        return trial
    try:
        said = objective(dict(figures))
    except KeyError as error:
        raise ValueError(
            f"The objective asks for {error}, but a trial's figures are {', '.join(figures)}. Take one of these; "
            "coherence is among them where a Coherence is given (on the command line --encoder)."
        ) from error
    score = as_float(said)
    if math.isnan(score) and not isinstance(said, float):
        raise ValueError(f"The objective returned {said!r} for {figures}; expected is a number. Return a float.")
    return Trial(number, options, figures, score)


def _guide(trial: Trial) -> float:
    """What TPE is told, which goes by ranks: trials that cannot win stand below all others, the worse the lower."""
    if trial.can_win:
        return trial.score
    ratio = trial.figures["perplexity_ratio"]
    return OUT * (ratio if math.isfinite(ratio) else 1e6)


def _study(optuna: Any, seed: int, first: Options | None) -> Any:
    """Made without a word; its log level is optuna's own state, so it is put back."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=AT_RANDOM)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        if first is not None:
            study.enqueue_trial(first)
    finally:
        optuna.logging.set_verbosity(verbosity)
    return study


def _check_sizes(prompts: Sequence[Text], trials: int) -> None:
    if trials < 2 or not len(prompts):
        raise ValueError(
            f"There are {len(prompts)} prompts and trials={trials}; expected are one prompt or more, and two trials or "
            "more, of which the first does not steer."
        )
