"""What a search of the control found: its trials, the best by an objective, and the Pareto front."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .config_checks import MAX_INFO_BYTES
from .control_config import multiplier_for, step_size_for
from .head import Head
from .head_config import ControlDefaults
from .search_ranges import Options

Figures = dict[str, float]
AGAINST = {"perplexity": -1, "coherence": 1}
"""What a front trades the reward for, and whether that is to be low or high."""
MAX_TUNING_BYTES = 4096
MAX_POINTS = 24
NOTED = ("reward", "perplexity", "coherence", "diversity", "kl_per_answer")


@dataclass(frozen=True)
class Trial:
    """A setting of the control, and what its answers are like."""

    number: int
    """0 is the model without control."""
    options: Options
    """Fields of ControlConfig; the others are as the head says."""
    figures: Figures
    """Of one answer to each prompt: "reward" (the mean, in the reward's units, of the answers that have one),
    "perplexity" (of the answers under the model without control), "perplexity_ratio" (to trial 0), "kl_per_answer"
    (nats), "diversity", "length" (tokens), and "coherence" where it was asked for."""
    score: float
    """By the objective; NaN where a figure is not finite."""

    @property
    def is_finite(self) -> bool:
        """Whether all of its figures are."""
        return all(math.isfinite(figure) for figure in self.figures.values())

    @property
    def can_win(self) -> bool:
        return math.isfinite(self.score)


@dataclass(frozen=True)
class Search:
    """What was tried on some prompts, and what is to be had of it."""

    trials: list[Trial]
    """In the order in which they were made."""
    objective: str
    """What the scores are called."""
    against: str
    """What the front trades the reward for: "perplexity" or "coherence"."""
    prompts: int
    """How many were answered in each trial."""
    max_perplexity_ratio: float | None = None
    """The bound of the objective "reward"; None where the objective has none."""

    @property
    def best(self) -> Trial:
        """Of the highest score; the first of equals, so that control has to earn its place.

        Raises:
            ValueError: none has a finite score.
        """
        able = [trial for trial in self.trials if trial.can_win]
        if not able:
            raise ValueError(
                f"None of the {len(self.trials)} trials has a finite score by {self.objective!r}, so none can be "
                "chosen. Let the objective return a finite number for answers that will do."
            )
        return max(able, key=lambda trial: trial.score)

    @property
    def front(self) -> list[Trial]:
        """Pareto-optimal trials: see pareto_front."""
        return pareto_front(self.trials, self.against)

    def apply_to(self, head: Head) -> None:
        """Make the best trial's control the head's own, and note the search for its card.

        Args:
            head: the one that was searched; changed in place: config.control, and config.info["tuning"] (at most 4 KiB
                of JSON: objective, its bound, against, trials, prompts, and as rows the chosen trial and the front).

        Raises:
            ValueError: no trial can win.
            HeadError: there is no room left in the head's info.
        """
        chosen = self.best
        set_control(head, chosen.options)
        info = head.config.info
        room = min(MAX_TUNING_BYTES, MAX_INFO_BYTES - len(json.dumps({**info, "tuning": ""})))
        head.config.info = {**info, "tuning": self._noted(chosen, room)}
        head.config.validate()

    def _noted(self, chosen: Trial, room: int) -> dict[str, Any]:
        """Plain JSON of at most `room` bytes, if that can be: a long front is thinned evenly, its ends stay longest."""
        noted: dict[str, Any] = {"objective": self.objective[:100], "against": self.against}
        if self.max_perplexity_ratio is not None:
            noted["max_perplexity_ratio"] = self.max_perplexity_ratio
        noted |= {"trials": len(self.trials), "prompts": self.prompts, "chosen": _row(chosen)}
        rows = [_row(trial) for trial in self.front]
        for keep in range(min(len(rows), MAX_POINTS), -1, -1):
            gap = (len(rows) - 1) / max(keep - 1, 1)
            noted["front"] = [rows[round(i * gap)] for i in range(keep)]
            if len(json.dumps(noted)) <= room:
                break
        return noted


def pareto_front(trials: Sequence[Trial], against: str) -> list[Trial]:
    """Those that no other equals or beats in both reward and `against`, by rising reward; of twins the first.

    Args:
        trials: one with a figure that is not finite is left out.
        against: "perplexity", of which less is better, or "coherence", of which more is.
    """
    sign = AGAINST[against]
    finite = [trial for trial in trials if trial.is_finite]
    found: list[Trial] = []
    for trial in sorted(finite, key=lambda trial: (-trial.figures["reward"], -sign * trial.figures[against])):
        if not found or sign * trial.figures[against] > sign * found[-1].figures[against]:
            found.append(trial)
    return found[::-1]


def set_control(head: Head, options: Options) -> None:
    """Write a trial's options into head.config.control: the head steers so unless told otherwise."""
    control = head.config.control
    if isinstance(control, ControlDefaults) and control.calibration and control.calibration_num_steps is None:
        control.calibration_num_steps = control.num_steps  # it stays where num_steps goes
    for name, value in options.items():
        setattr(control, name, value)
    if control.multiplier in options:
        control.strength = None
    elif control.strength is not None and isinstance(control, ControlDefaults):
        control.step_size = step_size_for(control.strength, control, control.num_steps)
    elif control.strength is not None:
        setattr(control, control.multiplier, multiplier_for(control.strength, control.calibration))


def _row(trial: Trial) -> dict[str, float | int]:
    """The options as they are, and figures of four digits."""
    return trial.options | {name: float(f"{trial.figures[name]:.4g}") for name in NOTED if name in trial.figures}
