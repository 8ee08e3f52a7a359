"""A head from prompts and a reward: collect answers, fit it to them; then again, to answers that it steered itself."""

import copy
import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .calibration import DEFAULT_STRENGTH, STRENGTHS
from .control import Controller
from .control_checks import check_sampling
from .control_config import ControlConfig, as_float
from .control_head import ControlHead
from .ensemble import AnyHead, check_ensemble, fit_ensemble, seeded_head
from .head import Head
from .head_config import ControlHeadConfig, ValueHeadConfig
from .keywords import check_base_model
from .rewards import RewardFunc, Rewards
from .rollout_dataset import RolloutDataset
from .rollout_settings import generation_defaults
from .rollouts import collect_rollouts
from .trainer import RecontrolTrainer
from .training_args import RecontrolTrainingArguments
from .value_head import ValueHead

MOST_CURVES = 20  # of which a head's config has room
PLAIN = ControlConfig(scale=1.0, max_kl=math.inf, max_relative_norm=math.inf)  # u as it is in the objective


def train_control(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Any,
    reward_funcs: RewardFunc | list[RewardFunc] | Rewards,
    output_dir: str | os.PathLike[str],
    *,
    iterations: int = 1,
    head: ControlHead | None = None,
    args: RecontrolTrainingArguments | None = None,
    held_out: float = 0.1,
    seed: int = 0,
    **collecting: Any,
) -> ControlHead:
    """Fit a control head to a reward, and improve it on its own answers.

    A head that is new starts on answers of the base model. From then on, each iteration collects answers under the
    control so far (at scale 1, held to no max_kl), fits the critic to these, and goes on from the control's weights,
    with importance ratios against the control that wrote the answers. The KL in the objective stays the one from the
    base model.

    Interrupted, call it again with the same arguments, on the same machine and versions: answers that were collected
    are kept, the fits are done again and come out the same.

    Args:
        model: as collect_rollouts takes it.
        tokenizer: likewise.
        prompts: likewise.
        reward_funcs: likewise.
        output_dir: made. rollouts-1, … are the answers of each iteration, head-1, … the heads, iterations.jsonl the
            curves.
        iterations: ≥ 1. Each costs as much as the first.
        head: what to fit, a new one or one to improve; written in place when all is done. Where None, an MLP of the
            default shape.
        args: of the training; where None the defaults under recipe="control".
        held_out: the share of the prompts that the curves are measured on, and the calibration made.
        seed: of the answers and the new head. Iteration i collects with seed + i.
        collecting: more for collect_rollouts: num_return_sequences, max_new_tokens, block_size, …

    Returns:
        The head, in eval mode, calibrated: it will steer by a strength of 0.1, another multiple of u than the 1 that
        the curves are of. head.config.info["iterations"] (the last 20) and iterations.jsonl have what was measured on
        each iteration's held-out answers: "reward", the mean raw reward of the answers it was fitted to (the first
        are the base model's, each further one's show what the control before it earned); "gain", "kl_per_answer" and
        the rest as ControlObjective.metrics has them, after the fit.

    Raises:
        TypeError, ValueError: an argument that cannot be meant, or what collect_rollouts and RecontrolTrainer refuse.
        CollectError: as collect_rollouts.
    """
    folder = Path(output_dir)
    if args is None:
        args = RecontrolTrainingArguments(str(folder / "training"), recipe="control", save_strategy="no", seed=seed)
    _check(model, iterations, head, ControlHead, args, "paper", held_out)
    _check_sampling(model, collecting)

    def new(hidden_size: int) -> ControlHead:
        return seeded_head(ControlHead, ControlHeadConfig(hidden_size=hidden_size), seed)

    def under(head: ControlHead) -> Controller | None:
        return None if head.is_zero() else Controller(head, PLAIN)

    def fit(head: ControlHead, train: Any, test: Any, behavior: Controller | None) -> None:
        RecontrolTrainer(
            head, args, train_dataset=train, eval_dataset=test, base_model=model, behavior=behavior
        ).train()

    collect = partial(collect_rollouts, model, tokenizer, prompts, reward_funcs, **collecting)
    rounds: dict[str, Any] = {"iterations": iterations, "held_out": held_out, "seed": seed, "writes": args.should_save}
    return _improve(collect, new, under, fit, folder, head, **rounds)


def train_value(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Any,
    reward_funcs: RewardFunc | list[RewardFunc] | Rewards,
    output_dir: str | os.PathLike[str],
    *,
    iterations: int = 1,
    strength: float = DEFAULT_STRENGTH,
    num_heads: int = 1,
    kappa: float = 1.0,
    head: ValueHead | None = None,
    args: RecontrolTrainingArguments | None = None,
    held_out: float = 0.1,
    seed: int = 0,
    **collecting: Any,
) -> ValueHead:
    """Fit a value head to a reward, and improve it on its own answers.

    RE-Control's V is that of the base model's answers, also where the text was steered before (Kong et al. 2024,
    arXiv:2406.05954, section 4). Here each further iteration collects answers that the head so far steers, at
    `strength`, and fits V to these, from its own weights: policy iteration, V of the policy that is improved next. The
    states are those before the edit, as the ascent starts from. Beyond the paper.

    Interrupted, call it again with the same arguments, on the same machine and versions: answers that were collected
    are kept, the fits are done again and come out the same.

    Args:
        model: as collect_rollouts takes it.
        tokenizer: likewise.
        prompts: likewise.
        reward_funcs: likewise.
        output_dir: as train_control's.
        iterations: ≥ 1. The first collects answers of the base model, unless `head` is calibrated.
        strength: mean KL per token in nats, 0 to 0.4, that the next answers are steered at.
        num_heads: 1, or how many heads of other seeds are fitted to each round's answers, of which the head then is
            the pessimistic sum; see fit_ensemble.
        kappa: κ of that.
        head: what to fit, a new one or one to improve; written in place when all is done. Where None, an MLP of the
            default shape.
        args: of the training; where None the defaults.
        held_out: the share of the prompts that the curves are measured on, and the calibration made.
        seed: of the answers and the new head. Iteration i collects with seed + i.
        collecting: more for collect_rollouts: num_return_sequences, max_new_tokens, block_size, …

    Returns:
        The head, in eval mode, calibrated. head.config.info["iterations"] (the last 20) and iterations.jsonl have
        what was measured on each iteration's held-out answers: "reward", the mean raw reward of the answers it was
        fitted to (each further one's show what the head before it earned), and what value_metrics has, after the fit.

    Raises:
        TypeError, ValueError: an argument that cannot be meant, what collect_rollouts and RecontrolTrainer refuse, or
            a head that could not be calibrated, and so cannot steer the next answers.
        CollectError: as collect_rollouts.
    """
    folder = Path(output_dir)
    if args is None:
        args = RecontrolTrainingArguments(str(folder / "training"), save_strategy="no", seed=seed)
    _check(model, iterations, head, ValueHead, args, "control", held_out)
    _check_taken(collecting, {"controller"}, "answers are written under the head so far")
    if not 0 < as_float(strength) <= STRENGTHS[-1]:
        raise ValueError(f"strength is {strength!r}; it must be above 0, and at most {STRENGTHS[-1]} nats a token.")
    if num_heads != 1:
        check_ensemble(num_heads, kappa)
    calibrated_first = head is not None and bool(head.config.control.calibration)

    def new(hidden_size: int) -> ValueHead:
        return seeded_head(ValueHead, ValueHeadConfig(hidden_size=hidden_size), seed)

    def under(so_far: ValueHead) -> Controller | None:
        untrained = not calibrated_first and "iterations" not in so_far.config.info
        return None if untrained else Controller(so_far, ControlConfig(strength=strength))

    def fit(head: ValueHead, train: Any, test: Any, behavior: Controller | None) -> None:
        options = {"args": args, "train_dataset": train, "eval_dataset": test, "base_model": model}
        if num_heads == 1:
            RecontrolTrainer(head, **options).train()
        else:
            fit_ensemble(head=head, num_heads=num_heads, kappa=kappa, **options)

    collect = partial(collect_rollouts, model, tokenizer, prompts, reward_funcs, **collecting)
    rounds: dict[str, Any] = {"iterations": iterations, "held_out": held_out, "seed": seed, "writes": args.should_save}
    return _improve(collect, new, under, fit, folder, head, **rounds)


def _improve(
    collect: Callable[..., RolloutDataset],
    new: Callable[[int], AnyHead],
    under: Callable[[AnyHead], Controller | None],
    fit: Callable[[AnyHead, Any, Any, Controller | None], None],
    folder: Path,
    head: AnyHead | None,
    *,
    iterations: int,
    held_out: float,
    seed: int,
    writes: bool,
) -> AnyHead:
    """Collect and fit, `iterations` times; write the curves and each round's head into the folder.

    Args:
        collect: collect_rollouts, but for its folder, seed and controller.
        new: a head that reads states of a width.
        under: what a head's answers are collected under; None is the base model.
        fit: (head, training answers, held-out answers, what they were collected under); trains the head in place.
        writes: whether this process does; of several, the first.
    """
    given, head = head, copy.deepcopy(head)  # interrupted, the caller's is as it was, and the call can be repeated
    rounds = _rounds(head)
    curves: list[dict[str, float]] = []
    for i in range(1, iterations + 1):
        # of a copy: the head is trained on while its answers are weighed by what it was
        behavior = None if head is None else under(copy.deepcopy(head).eval())
        rollouts = collect(folder / f"rollouts-{i}", seed=seed + i, controller=behavior)
        if head is None:
            head = new(rollouts.hidden_size)
        train, test = rollouts.split(held_out, seed=seed)
        fit(head, train, test, behavior)
        curves.append({"reward": float(test.rewards.mean()), **head.config.info["evaluation"]})
        head.config.info["training"]["iterations"] = rounds + i
        head.config.info["iterations"] = curves[-MOST_CURVES:]
        if writes:
            table = "".join(json.dumps(row) + "\n" for row in curves)
            (folder / "iterations.jsonl").write_text(table, encoding="utf-8")
            head.save_pretrained(folder / f"head-{i}")
    assert head is not None  # for the type checker: iterations ≥ 1
    if given is None:
        return head.eval()
    given.load_state_dict(head.state_dict())
    given.config = head.config
    return given.eval()


def _rounds(head: Head | None) -> int:
    """How many rounds of answers a head has been fitted to."""
    training = {} if head is None else head.config.info.get("training", {})
    return int(training.get("iterations", 1)) if training else 0


def _check(
    model: PreTrainedModel,
    iterations: int,
    head: object,
    kind: type[Head],
    args: object,
    other_recipe: str,
    held_out: float,
) -> None:
    """What would only be noticed after the first answers were collected."""
    if type(iterations) is not int or iterations < 1:
        raise ValueError(f"iterations is {iterations!r}; it must be an integer ≥ 1.")
    if head is not None and not isinstance(head, kind):
        raise TypeError(f"head is a {type(head).__name__}; pass a {kind.__name__}, or None for a new one.")
    if isinstance(head, Head):
        check_base_model(head, model, stacklevel=4)
    if not isinstance(args, RecontrolTrainingArguments) or args.recipe == other_recipe:
        own = "control" if other_recipe == "paper" else "paper"
        raise ValueError(f'args must be RecontrolTrainingArguments with recipe="{own}", or None.')
    if not 0 < as_float(held_out) < 1:
        raise ValueError(f"held_out is {held_out!r}; it must be a share of the prompts, between 0 and 1.")


def _check_sampling(model: PreTrainedModel, collecting: dict[str, Any]) -> None:
    """A control is fitted to answers of the model's own distribution."""
    more = {name: value for name, value in (collecting.get("generation_kwargs") or {}).items() if value is not None}
    check_sampling(
        generation_defaults(model) | {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0} | more
    )
    reason = "answers are sampled from the model's own distribution, under the control so far"
    _check_taken(collecting, {"controller", "temperature", "top_p", "top_k"}, reason)


def _check_taken(collecting: dict[str, Any], own: set[str], reason: str) -> None:
    if taken := sorted(collecting.keys() & own):
        name = "train_value" if own == {"controller"} else "train_control"
        raise ValueError(f"{name} sets {taken} itself: {reason}. Leave them out.")
