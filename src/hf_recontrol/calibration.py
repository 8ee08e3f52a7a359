"""What a strength means for a head: the step size that spends so many nats a token, found on the model's own states."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .control import Controller
from .control_config import BELT, ControlConfig
from .forwards import logits_of
from .keywords import check_base_model
from .kl_bound import kl_divergence
from .rollout_blocks import evaluating
from .value_head import ValueHead

STRENGTHS = (0.02, 0.05, 0.1, 0.2, 0.4)
# On the demo 0.1 gains +1.0 sd by the judge for a perplexity of 1.2 × base, 0.2 +1.4 for 1.4 ×, and above 0.3 it is
# more than 1.5 ×: examples/demo/overoptimization.json. 0.1 leaves a margin for models that take less.
DEFAULT_STRENGTH = 0.1
MAX_STATES = 2048  # their mean KL has a standard error of 2 to 3 %
STATES_OF_AN_ANSWER = 16
TOLERANCE = 0.005
MAX_TRIALS = 60
LOGITS_AT_ONCE = 2**24  # 64 MiB in float32


def calibrate(head: ValueHead, model: PreTrainedModel, hidden_states: Tensor) -> None:
    """Write into head.config.control the step sizes that spend 0.02, 0.05, 0.1, 0.2, 0.4 nats a token, and a strength.

    α does not carry over between heads or models: it is in units of the hidden state per unit of ∇V. The mean KL per
    token, KL(p ‖ p_base), does. It is measured at the head's own n and other control options, with each token held at
    the head's max_kl, or at 4 × the mean as generate() will hold it. The default strength becomes 0.1, and step_size
    the one that belongs to it.

    Args:
        head: changed in place: config.control, and config.info["calibration"].
        model: the base model; only its LM head and what it does after it matter.
        hidden_states: float (tokens, hidden_size), states of the model's own answers, best of answers that the head
            was not fitted to: see sample_states. 2,048 give the mean KL within 2 to 3 %.

    Raises:
        HeadMismatch: states or model of another width.
        ValueError: no finite states, n = 0, or a head that does not reach these strengths (its gradient is zero nearly
            everywhere, or its control is held down by a norm cap, λ or a target value).
    """
    head.check_width(hidden_states.shape[-1], "the states")
    check_base_model(head, model, stacklevel=3)
    states = hidden_states[hidden_states.isfinite().all(-1)]
    if not len(states) or head.config.control.num_steps == 0:
        raise ValueError(
            f"There are {len(states)} finite states and {head.config.control.num_steps} steps; a head is calibrated at "
            "one step or more, on states of the model's own answers."
        )
    with evaluating(model):
        table: list[tuple[float, float]] = []
        step_size = _first_guess(head, states.to(head.input_mean.device))
        for strength in STRENGTHS:
            step_size = _step_size_at(head, model, states, strength, step_size)
            table.append((strength, step_size))
    control = head.config.control
    control.calibration_num_steps = control.num_steps
    control.calibration, control.strength = [list(pair) for pair in table], DEFAULT_STRENGTH
    control.step_size = dict(table)[DEFAULT_STRENGTH]
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
        for states in hidden_states.split(max(1, LOGITS_AT_ONCE // (2 * model.config.get_text_config().vocab_size))):
            states = states.to(model.device, model.dtype)
            base, edited = logits_of(model, torch.cat([states, controller(states)])).chunk(2)
            total += float(kl_divergence(edited, base).clamp(max=cap).sum())
    return total / len(hidden_states)


def _first_guess(head: ValueHead, states: Tensor) -> float:
    """A shift of about a tenth of the hidden state."""
    gradient = float(head.gradient(states).norm(dim=-1).mean())
    if not 0 < gradient < math.inf:
        raise ValueError(f"The head's gradient has norm {gradient} at these states, so it steers nowhere. Train it.")
    return 0.1 * float(states.float().norm(dim=-1).mean()) / gradient / head.config.control.num_steps


def _step_size_at(head: ValueHead, model: PreTrainedModel, states: Tensor, strength: float, step_size: float) -> float:
    """The α whose mean KL is `strength`, by secants in log α and log KL from a first guess."""
    tried: list[tuple[float, float]] = []
    for _ in range(MAX_TRIALS):
        controller = Controller(head, ControlConfig(step_size=step_size))
        kl = mean_kl(controller, model, states, head.config.control.max_kl or BELT * strength)
        if abs(kl / strength - 1) < TOLERANCE:
            return step_size
        if not 0 < kl < math.inf:
            break
        tried.append((math.log(step_size), math.log(kl)))
        step_size *= math.exp((math.log(strength) - math.log(kl)) / _slope(tried[-2:]))
    raise ValueError(
        f"No step size of this head spends {strength} nats a token: {step_size:.3g} gave {kl:.3g}. Its gradient may be "
        "zero at many states, or a norm cap, λ or a target value holds it down. Train it longer, or take those out."
    )


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """d log KL / d log α, 2 for small shifts; kept where a secant cannot run away."""
    (x, y), (other_x, other_y) = points[0], points[-1]
    return 2.0 if x == other_x else min(max((other_y - y) / (other_x - x), 0.7), 4.0)
