"""What a strength means for a head: the step size, of a control head the scale, that spends so many nats a token."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .answers import evaluating
from .control import Controller
from .control_config import BELT, ControlConfig
from .forwards import logits_at_once, logits_of
from .head import Head
from .head_config import ControlDefaults
from .keywords import check_base_model
from .kl_bound import kl_divergence

STRENGTHS = (0.02, 0.05, 0.1, 0.2, 0.4)
# On the demo 0.1 gains +1.0 sd by the judge for a perplexity of 1.2 × base, 0.2 +1.4 for 1.4 ×, and above 0.3 it is
# more than 1.5 ×: examples/demo/overoptimization.json. 0.1 leaves a margin for models that take less.
DEFAULT_STRENGTH = 0.1
MAX_STATES = 2048  # their mean KL has a standard error of 2 to 3 %
STATES_OF_AN_ANSWER = 16
TOLERANCE = 0.005
JUMP = 0.05  # of few states the mean KL jumps where a gate flips; their sampling error is larger than that
MAX_TRIALS = 60


def calibrate(head: Head, model: PreTrainedModel, hidden_states: Tensor) -> None:
    """Write into head.config.control what spends 0.02, 0.05, 0.1, 0.2, 0.4 nats a token, and a strength.

    That is the step_size of a value head and the scale of a control head. Neither carries over between heads or models;
    the mean KL per token, KL(p ‖ p_base), does. It is measured at the head's own n and other control options, with each
    token held at the head's max_kl, or at 4 × the mean as generate() will hold it. The default strength becomes 0.1,
    and step_size or scale the one that belongs to it.

    Args:
        head: changed in place: config.control, and config.info["calibration"].
        model: the base model; only its LM head and what it does after it matter.
        hidden_states: float (tokens, hidden_size), states of the model's own answers, best of answers that the head
            was not fitted to: see sample_states. 2,048 give the mean KL within 2 to 3 %.

    Raises:
        HeadMismatch: states or model of another width.
        ValueError: no finite states, n = 0, or a head that does not reach these strengths (its control is zero nearly
            everywhere, or held down by a norm cap, λ or a target value).
    """
    head.check_width(hidden_states.shape[-1], "the states")
    check_base_model(head, model, stacklevel=3)
    states, control = hidden_states[hidden_states.isfinite().all(-1)], head.config.control
    steps = control.num_steps if isinstance(control, ControlDefaults) else None
    if not len(states) or steps == 0:
        raise ValueError(
            f"There are {len(states)} finite states" + ("" if steps is None else f" and {steps} steps") + "; a "
            "head is calibrated on states of the model's own answers, a value head at one step or more."
        )
    with evaluating(model):
        table: list[tuple[float, float]] = []
        multiplier = _first_guess(head, states.to(head.input_mean.device))
        for strength in STRENGTHS:
            multiplier = _multiplier_at(head, model, states, strength, multiplier)
            table.append((strength, multiplier))
    control.calibration, control.strength = [list(pair) for pair in table], DEFAULT_STRENGTH
    setattr(control, control.multiplier, dict(table)[DEFAULT_STRENGTH])
    if isinstance(control, ControlDefaults):
        control.calibration_num_steps = control.num_steps
    head.config.info["calibration"] = {"states": len(states)}
    head.config.validate()


def sample_states(dataset: Any, at_most: int = MAX_STATES, *, seed: int = 0) -> Tensor:
    """Hidden states of answers drawn from a RolloutDataset (or a part of one): up to 16 of each, (tokens, hidden_size).

    Args:
        at_most: so many states; fewer where the dataset is small.
        seed: of the draws; the global generator is left alone.
    """
    generator = torch.Generator().manual_seed(seed)
    parts, tokens = [], 0
    for i in torch.randperm(len(dataset), generator=generator).tolist():
        states = dataset[i]["hidden_states"]
        parts.append(states[torch.randperm(len(states), generator=generator)[:STATES_OF_AN_ANSWER]])
        tokens += len(parts[-1])
        if tokens >= at_most:
            break
    if not parts:
        raise ValueError("There are no answers to take hidden states from. Collect rollouts first.")
    return torch.cat(parts)[:at_most]


def mean_kl(controller: Controller, model: PreTrainedModel, hidden_states: Tensor, cap: float = math.inf) -> float:
    """Mean over states of KL(p ‖ p_base) in nats, each state's held at `cap`; without the controller's own max_kl."""
    total = 0.0
    with torch.no_grad():
        for states in hidden_states.split(logits_at_once(model)):
            states = states.to(model.device, model.dtype)
            base, edited = logits_of(model, torch.cat([states, controller(states)])).chunk(2)
            total += float(kl_divergence(edited, base).clamp(max=cap).sum())
    return total / len(hidden_states)


def _at(head: Head, multiplier: float) -> Controller:
    return Controller(head, ControlConfig.of({head.config.control.multiplier: multiplier}))


def _first_guess(head: Head, states: Tensor) -> float:
    """A shift of about a tenth of the hidden state."""
    shift = float(_at(head, 1.0).control(states[:256]).norm(dim=-1).mean())
    if not 0 < shift < math.inf:
        raise ValueError(f"The head's control has norm {shift} at these states, so it steers nowhere. Train it.")
    return 0.1 * float(states.float().norm(dim=-1).mean()) / shift


def _multiplier_at(head: Head, model: PreTrainedModel, states: Tensor, strength: float, multiplier: float) -> float:
    """The multiplier whose mean KL is `strength`, by secants in log multiplier and log KL from a first guess; or, where
    it jumps over it, the nearest that was tried."""
    tried: list[tuple[float, float]] = []
    for _ in range(MAX_TRIALS):
        kl = mean_kl(_at(head, multiplier), model, states, head.config.control.max_kl or BELT * strength)
        if abs(kl / strength - 1) < TOLERANCE:
            return multiplier
        if not 0 < kl < math.inf:
            break
        tried.append((math.log(multiplier), math.log(kl)))
        multiplier *= math.exp((math.log(strength) - math.log(kl)) / _slope(tried[-2:]))
    nearest = min(tried, key=lambda point: abs(point[1] - math.log(strength)), default=(math.inf, math.inf))
    if abs(math.exp(nearest[1]) / strength - 1) < JUMP:
        return math.exp(nearest[0])
    name = head.config.control.multiplier.replace("_", " ")
    raise ValueError(
        f"No {name} of this head spends {strength} nats a token: {multiplier:.3g} gave {kl:.3g}. Its control may be "
        "zero at many states, or a norm cap, λ or a target value holds it down. Train it longer, or take those out."
    )


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """d log KL / d log multiplier, 2 for small shifts; kept where a secant cannot run away."""
    (x, y), (other_x, other_y) = points[0], points[-1]
    return 2.0 if x == other_x else min(max((other_y - y) / (other_x - x), 0.7), 4.0)
