"""A control head from prompts and a reward: collect answers, fit critic and control; then again, under the control."""

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .control import Controller
from .control_checks import check_sampling
from .control_config import ControlConfig, as_float
from .control_head import ControlHead
from .head_config import ControlHeadConfig
from .keywords import check_base_model
from .rewards import RewardFunc, Rewards
from .rollouts import collect_rollouts, generation_defaults
from .trainer import RecontrolTrainer
from .training_args import RecontrolTrainingArguments

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
        model, tokenizer, prompts, reward_funcs: as collect_rollouts takes them.
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
    _check(model, iterations, head, args, held_out, collecting)
    given, head = head, copy.deepcopy(head)  # interrupted, the caller's is as it was, and the call can be repeated
    rounds = _rounds(head)
    curves: list[dict[str, float]] = []
    for i in range(1, iterations + 1):
        # of a copy: the head is trained on while its answers are weighed by what it was
        behavior = None if head is None or head.is_zero() else Controller(copy.deepcopy(head).eval(), PLAIN)
        rollouts = collect_rollouts(
            model,
            tokenizer,
            prompts,
            reward_funcs,
            folder / f"rollouts-{i}",
            seed=seed + i,
            controller=behavior,
            **collecting,
        )
        if head is None:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                head = ControlHead(ControlHeadConfig(hidden_size=rollouts.hidden_size))
        train, test = rollouts.split(held_out, seed=seed)
        trainer = RecontrolTrainer(
            head, args, train_dataset=train, eval_dataset=test, base_model=model, behavior=behavior
        )
        trainer.train()
        curves.append({"reward": float(test.rewards.mean()), **head.config.info["evaluation"]})
        (folder / "iterations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curves), encoding="utf-8")
        head.config.info["training"]["iterations"] = rounds + i
        head.config.info["iterations"] = curves[-MOST_CURVES:]
        head.save_pretrained(folder / f"head-{i}", replace_model_card=True)
    assert head is not None  # for the type checker: iterations ≥ 1
    if given is None:
        return head.eval()
    given.load_state_dict(head.state_dict())
    given.config = head.config
    return given.eval()


def _rounds(head: ControlHead | None) -> int:
    """How many rounds of answers a head has been fitted to."""
    training = {} if head is None else head.config.info.get("training", {})
    return int(training.get("iterations", 1)) if training else 0


def _check(
    model: PreTrainedModel, iterations: int, head: object, args: object, held_out: float, collecting: dict[str, Any]
) -> None:
    """What would only be noticed after the first answers were collected."""
    if type(iterations) is not int or iterations < 1:
        raise ValueError(f"iterations is {iterations!r}; it must be an integer ≥ 1.")
    if head is not None and not isinstance(head, ControlHead):
        raise TypeError(f"head is a {type(head).__name__}; pass a ControlHead, or None for a new one.")
    if isinstance(head, ControlHead):
        check_base_model(head, model, stacklevel=4)
    if not isinstance(args, RecontrolTrainingArguments) or args.recipe == "paper":
        raise ValueError('args must be RecontrolTrainingArguments with recipe="control", or None.')
    if not 0 < as_float(held_out) < 1:
        raise ValueError(f"held_out is {held_out!r}; it must be a share of the prompts, between 0 and 1.")
    more = {name: value for name, value in (collecting.get("generation_kwargs") or {}).items() if value is not None}
    check_sampling(
        generation_defaults(model) | {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0} | more
    )
    if taken := sorted(collecting.keys() & {"controller", "temperature", "top_p", "top_k"}):
        raise ValueError(
            f"train_control sets {taken} itself: answers are sampled from the model's own distribution, under the "
            "control so far. Leave them out."
        )
