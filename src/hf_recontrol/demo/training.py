"""How the demo's heads are made: rollouts of the base model, value and control heads fitted to them and calibrated."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..calibration import calibrate, sample_states
from ..comparison_heads import random_direction
from ..control_fitting import fit_constant_control
from ..control_head import ControlHead
from ..fitting import fit_linear_head
from ..head import Head
from ..head_config import ControlHeadConfig, ValueHeadConfig
from ..on_policy import train_control
from ..rollout_dataset import RolloutDataset
from ..rollouts import collect_rollouts
from ..trainer import RecontrolTrainer
from ..training_args import RecontrolTrainingArguments
from ..value_head import ValueHead
from .assets import MAX_NEW_TOKENS, Demo

ROWS_PER_BATCH = 200
DATA = {
    "data": "texts written by the demo's own language model, which was trained on Sentence Polarity Dataset 1.0 "
    "(Pang and Lee 2005) and Sentiment Polarity Dataset 2.0 (Pang and Lee 2004), both CC BY 4.0",
    "license": "cc-by-4.0",
    "language": "en",
}
PLACEBO_CARD = """---
library_name: hf-recontrol
license: cc-by-4.0
language: en
---

# A random direction

A placebo: a linear head whose direction is random, calibrated as the demo's other heads are, so that at one strength it
moves the language model as far (in KL) as they do. It was trained on nothing and predicts nothing. What it gains, any
push would gain. The demo's language model was trained on Sentence Polarity Dataset 1.0 (Pang and Lee 2005) and
Sentiment Polarity Dataset 2.0 (Pang and Lee 2004), both CC BY 4.0.
"""


def collect(demo: Demo, prompts: Sequence[str], output_dir: Path, *, answers: int, seed: int = 0) -> RolloutDataset:
    """`answers` sampled answers of the base model to each prompt, with the reward and the hidden states."""
    return collect_rollouts(
        demo.model, demo.tokenizer, list(prompts), demo.reward, output_dir, seed=seed, **collecting(answers)
    )


def collecting(answers: int) -> dict[str, Any]:
    """collect_rollouts' arguments."""
    return {
        "num_return_sequences": answers,
        "block_size": max(1, ROWS_PER_BATCH // answers),
        "max_new_tokens": MAX_NEW_TOKENS,
    }


def training_arguments(output_dir: Path, recipe: str | None = None, **settings: Any) -> RecontrolTrainingArguments:
    """RecontrolTrainer's own defaults; nothing but the final head is kept."""
    return RecontrolTrainingArguments(
        output_dir=str(output_dir), recipe=recipe, report_to="none", save_strategy="no", use_cpu=True, **settings
    )


def train_value_head(demo: Demo, train: Any, held_out: Any, args: RecontrolTrainingArguments) -> ValueHead:
    """The MLP head: one hidden layer as wide as the model; calibrated."""
    torch.manual_seed(args.seed)
    head = ValueHead(ValueHeadConfig(hidden_size=train.hidden_size))
    RecontrolTrainer(head, args, train_dataset=train, eval_dataset=held_out, base_model=demo.model).train()
    return head.eval()


def train_control_head(demo: Demo, train: Any, held_out: Any, args: RecontrolTrainingArguments) -> ControlHead:
    """The control head: one hidden layer as wide as the model; its critic is the linear value head."""
    torch.manual_seed(args.seed)
    head = ControlHead(ControlHeadConfig(hidden_size=train.hidden_size))
    RecontrolTrainer(head, args, train_dataset=train, eval_dataset=held_out, base_model=demo.model).train()
    return head.eval()


def make_heads(
    demo: Demo,
    output_dir: Path,
    *,
    prompts: int,
    answers: int,
    rollouts_dir: Path | None = None,
    iterations: int = 1,
    seed: int = 0,
) -> dict[str, Head]:
    """Collect rollouts, fit two value heads and two controls, calibrate them and the placebo, and save the five.

    Args:
        demo: the language model, the reward and the prompts.
        output_dir: where a folder for each of HEADS goes.
        prompts: how many training prompts are answered, by `answers` answers each.
        rollouts_dir: where rollouts are kept, and resumed; a temporary folder where None.
        iterations: of the control head: 1 is on these rollouts alone, each further one collects as many under it.
        seed: of the rollouts.

    Returns:
        The heads by the names of HEADS.
    """
    arguments = training_arguments(output_dir)  # before the rollouts: it wants the extra `train`
    control_arguments = training_arguments(output_dir, "control")
    with tempfile.TemporaryDirectory() as scratch:
        folder = rollouts_dir or Path(scratch, "rollouts")
        rollouts = collect(demo, demo.prompts["train"][:prompts], folder, answers=answers, seed=seed)
        train, held_out = rollouts.split(0.1, seed=0)
        control = train_control_head(demo, train, held_out, control_arguments)
        if iterations > 1:
            control = train_control(
                demo.model,
                demo.tokenizer,
                demo.prompts["train"][:prompts],
                demo.reward,
                Path(f"{folder}-under-control"),
                iterations=iterations - 1,
                head=control,
                args=control_arguments,
                seed=seed,
                **collecting(answers),
            )
        heads: dict[str, Head] = {
            "constant_control": fit_constant_control(train, demo.model),
            "control_head": control,
            "linear_head": fit_linear_head(train),
            "value_head": train_value_head(demo, train, held_out, arguments),
            "random_direction": random_direction(rollouts.hidden_size),
        }
        for head in heads.values():
            if not head.config.control.calibration:
                calibrate(head, demo.model, sample_states(held_out))
    for name, head in heads.items():
        head.config.info |= DATA
        head.save_pretrained(output_dir / name)
    (output_dir / "random_direction" / "README.md").write_text(PLACEBO_CARD, encoding="utf-8")
    return heads
