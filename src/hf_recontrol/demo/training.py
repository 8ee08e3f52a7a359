"""How the demo's heads are made: rollouts of the base model, two heads fitted to them, a strength chosen for each."""

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..control import Controller
from ..evaluation import distinct_n, evaluate_answers
from ..fitting import fit_linear_head
from ..head_config import ValueHeadConfig
from ..rollout_store import RolloutDataset
from ..rollouts import collect_rollouts
from ..trainer import RecontrolTrainer
from ..training_args import RecontrolTrainingArguments
from ..value_head import ValueHead
from .assets import MAX_NEW_TOKENS, Demo
from .comparison import Row, sample_scored

MAX_PERPLEXITY_RATIO = 1.4  # a tenth below the 1.5 that a steered text may cost at most, for the noise of 200 prompts
MIN_RATIO = 0.95  # of diversity and of distinct-3
MAX_LENGTH_CHANGE = 0.1
NUM_STEPS = 30
SMALLEST_SHIFT = 0.1  # of the norm of the hidden state: where the search for α begins
ROWS_PER_BATCH = 200
MAX_TRIALS = 30
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

A placebo: a linear head whose direction is random, scaled so that it moves the demo's language model as far (in KL) as
its MLP value head does. It was trained on nothing and predicts nothing. What it gains, any push would gain. The demo's
language model was trained on Sentence Polarity Dataset 1.0 (Pang and Lee 2005) and Sentiment Polarity Dataset 2.0 (Pang
and Lee 2004), both CC BY 4.0.
"""


def collect(demo: Demo, prompts: Sequence[str], output_dir: Path, *, answers: int) -> RolloutDataset:
    """`answers` sampled answers of the base model to each prompt, with the reward and the hidden states."""
    return collect_rollouts(
        demo.model,
        demo.tokenizer,
        list(prompts),
        demo.reward,
        output_dir,
        num_return_sequences=answers,
        block_size=max(1, ROWS_PER_BATCH // answers),
        max_new_tokens=MAX_NEW_TOKENS,
    )


def training_arguments(output_dir: Path) -> RecontrolTrainingArguments:
    """RecontrolTrainer's own defaults; nothing but the final head is kept."""
    return RecontrolTrainingArguments(output_dir=str(output_dir), report_to="none", save_strategy="no", use_cpu=True)


def train_value_head(train: Any, held_out: Any, args: RecontrolTrainingArguments) -> ValueHead:
    """The MLP head: one hidden layer as wide as the model."""
    torch.manual_seed(0)
    head = ValueHead(ValueHeadConfig(hidden_size=train.hidden_size))
    RecontrolTrainer(head, args, train_dataset=train, eval_dataset=held_out).train()
    return head.eval()


def random_direction(hidden_size: int, seed: int = 0) -> ValueHead:
    """The placebo: a linear head whose one direction is random."""
    head = ValueHead(ValueHeadConfig(hidden_size=hidden_size, num_hidden_layers=0))
    direction = torch.randn(hidden_size, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        weight, bias = head.layers[0].parameters()
        weight.copy_(direction / direction.norm())
        bias.zero_()
    head.config.info["training"] = {"recipe": "none: a random direction, for comparison", "seed": seed}
    return head.eval()


def make_heads(
    demo: Demo,
    output_dir: Path,
    *,
    prompts: int,
    answers: int,
    validation_answers: int = 4,
    rollouts_dir: Path | None = None,
    echo: Callable[[str], None],
) -> dict[str, ValueHead]:
    """Collect rollouts, fit the two heads, choose a strength for each, and save them and the placebo.

    Args:
        demo: the language model, the reward and the prompts.
        output_dir: where linear_head, value_head and random_direction go.
        prompts: how many training prompts are answered, by `answers` answers each.
        validation_answers: to each validation prompt, at each strength that is tried.
        rollouts_dir: where rollouts are kept, and resumed; a temporary folder where None.
        echo: is told each setting that was tried.

    Returns:
        The three heads by their names.
    """
    validation = demo.prompts["validation"]
    arguments = training_arguments(output_dir)  # before the rollouts: it wants the extra `train`
    with tempfile.TemporaryDirectory() as scratch:
        folder = rollouts_dir or Path(scratch, "rollouts")
        rollouts = collect(demo, demo.prompts["train"][:prompts], folder, answers=answers)
        train, held_out = rollouts.split(0.1, seed=0)
        heads = {
            "linear_head": fit_linear_head(train),
            "value_head": train_value_head(train, held_out, arguments),
        }
    for name, head in heads.items():
        echo(f"Choosing the strength of {name} on {len(validation)} prompts:")
        choose_step_size(demo, head, validation, answers=validation_answers, echo=echo)
        head.config.info |= DATA
    target = heads["value_head"].config.info["validation"]["chosen"]["kl_per_answer"]
    echo(f"Bringing a random direction to {target:.2f} nats an answer:")
    heads["random_direction"] = random_direction(rollouts.hidden_size)
    match_kl(demo, heads["random_direction"], validation, target, echo=echo)
    for name, head in heads.items():
        head.save_pretrained(output_dir / name, replace_model_card=True)
    (output_dir / "random_direction" / "README.md").write_text(PLACEBO_CARD, encoding="utf-8")
    return heads


def choose_step_size(
    demo: Demo, head: ValueHead, prompts: Sequence[str], *, answers: int, echo: Callable[[str], None]
) -> None:
    """Set the head's α to the one with the highest reward whose texts are still sound, on validation prompts.

    Sound: perplexity at most 1.4 × the base model's, diversity on 20 words and distinct-3 at least 0.95 ×, mean length
    within 10 %. By the reward, not by the judge, who is kept for the test. α grows by a quarter until it is too much;
    then the last quarter is halved twice.

    Raises:
        ValueError: even the smallest α did harm, or none did any.
    """
    head.config.control.num_steps = 1 if head.config.num_hidden_layers == 0 else NUM_STEPS
    base = _figures(demo, sample_scored(demo, prompts, range(answers), scorers=demo.reward)[0], None)
    states = _states_after(demo, prompts)
    ratio = float(states.norm(dim=-1).mean() / head.gradient(states).norm(dim=-1).mean())
    step_size, sound, unsound = SMALLEST_SHIFT * ratio / head.config.control.num_steps, 0.0, math.inf
    tried: list[dict[str, float]] = []
    while unsound / (sound or 1) > 1.07:
        if len(tried) == MAX_TRIALS:
            raise ValueError(f"A step size of {step_size:.3g} still does nothing. Is the head's gradient zero?")
        head.config.control.step_size = step_size
        rows, _ = sample_scored(demo, prompts, range(answers), head, scorers=demo.reward)
        tried.append({"step_size": step_size, **_figures(demo, rows, head)})
        echo(_listed(tried[-1]))
        if _is_sound(tried[-1], base):
            sound = step_size
        else:
            unsound = step_size
        if not sound:
            raise ValueError(f"A step size of {step_size:.3g} does harm already. Train the head on more rollouts.")
        step_size = sound * 1.25 if unsound == math.inf else math.sqrt(sound * unsound)
    chosen = max((row for row in tried if _is_sound(row, base)), key=lambda row: row["reward"])
    head.config.control.step_size = chosen["step_size"]
    head.config.info["validation"] = {"prompts": len(prompts), "answers": answers, "base": base, "chosen": chosen}


def match_kl(
    demo: Demo, head: ValueHead, prompts: Sequence[str], kl_per_answer: float, *, echo: Callable[[str], None]
) -> None:
    """Set the head's α so that its texts are `kl_per_answer` nats away from the base model, by bisection in log α.

    Raises:
        ValueError: no α came within 10 %.
    """
    head.config.control.num_steps = 1
    low, high, reached = 1e-3, 1e3, math.inf
    for _ in range(16):
        step_size = head.config.control.step_size = math.sqrt(low * high)
        rows, _ = sample_scored(demo, prompts, range(2), head, scorers=demo.reward)
        figures = _figures(demo, rows, head)
        echo(_listed({"step_size": step_size, **figures}))
        reached = figures["kl_per_answer"] / kl_per_answer
        if abs(reached - 1) < 0.03:
            break
        low, high = (step_size, high) if reached < 1 else (low, step_size)
    if not 0.9 < reached < 1.1:
        raise ValueError(f"The placebo reached {reached:.2f} times the KL asked for; within 10 % was expected.")
    head.config.info["validation"] = {"prompts": len(prompts), "answers": 2, "chosen": figures}


def _listed(figures: dict[str, float]) -> str:
    return "  " + ", ".join(f"{name} {figure:.4g}" for name, figure in figures.items() if name != "n")


def _figures(demo: Demo, rows_of: list[list[Row]], head: ValueHead | None) -> dict[str, float]:
    rows = [row for rows in rows_of for row in rows]
    controller = None if head is None else Controller(head)
    figures = evaluate_answers(rows, model=demo.model, tokenizer=demo.tokenizer, controller=controller)
    figures["distinct_3"] = distinct_n([rows[0]["completion"] for rows in rows_of])
    figures["reward"] = sum(row["reward"] for rows in rows_of for row in rows) / len(rows)
    return figures


def _is_sound(figures: dict[str, float], base: dict[str, float]) -> bool:
    ratio = {name: figures[name] / base[name] for name in ("perplexity", "diversity_20", "distinct_3", "length")}
    return (
        ratio["perplexity"] <= MAX_PERPLEXITY_RATIO
        and min(ratio["diversity_20"], ratio["distinct_3"]) >= MIN_RATIO
        and abs(ratio["length"] - 1) <= MAX_LENGTH_CHANGE
    )


@torch.no_grad()
def _states_after(demo: Demo, prompts: Sequence[str]) -> torch.Tensor:
    inputs = demo.tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    states: torch.Tensor = demo.model.model(inputs["input_ids"], attention_mask=inputs["attention_mask"])[0][:, -1]
    return states
