"""The demo's table: the same prompts answered with and without control, beside a placebo and best-of-n."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..control import Controller
from ..evaluation import Gain, best_of_n, best_of_n_kl_bound, evaluate_answers, paired_bootstrap
from ..rewards import Rewards
from ..rollout_blocks import end_of_answer, seeded
from ..value_head import ValueHead
from .assets import HEADS, MAX_NEW_TOKENS, Demo

Row = dict[str, Any]
STEERED_ANSWERS, BASE_ANSWERS = 4, 16


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    name: str
    figures: dict[str, float]
    """What evaluate_answers measured; "kl_per_answer" of best-of-n is an upper bound."""
    gains: dict[str, Gain]
    """By "judge" and "reward": gain over base in baseline standard deviations, with its 95 % interval over prompts."""


def sample(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    head: ValueHead | None = None,
    *,
    seed: int = 0,
    temperature: float = 1.0,
) -> list[Row]:
    """One answer to each prompt, 40 new tokens at most, from the whole vocabulary (top_p 1, top_k 0).

    Returns:
        {"prompt", "completion", "token_ids"} for each prompt, in order.
    """
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    with seeded(model.device.type, seed):
        sequences = model.generate(
            **inputs.to(model.device),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=True,
            temperature=temperature,
            top_p=1.0,
            top_k=0,
            recontrol_value_head=head or False,
        )
    rows = []
    for prompt, ids in zip(prompts, sequences[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
        ids = ids[: end_of_answer(ids, [tokenizer.eos_token_id])[0]]
        completion = tokenizer.decode(ids, skip_special_tokens=True)
        rows.append({"prompt": prompt, "completion": completion, "token_ids": ids})
    return rows


def sample_scored(
    demo: Demo, prompts: Sequence[str], answers: int, head: ValueHead | None = None, *, scorers: Rewards | None = None
) -> tuple[list[list[Row]], float]:
    """`answers` rows for each prompt, with the scorers' numbers in them, and the seconds that generating took."""
    seconds, rows_of = 0.0, [[] for _ in prompts]  # type: tuple[float, list[list[Row]]]
    for seed in range(answers):
        start = time.perf_counter()
        rows = sample(demo.model, demo.tokenizer, prompts, head, seed=seed)
        seconds += time.perf_counter() - start
        texts = [row["completion"] for row in rows]
        scores = (scorers or demo.scorers)(prompts, texts, [row["token_ids"] for row in rows])
        for i, row in enumerate(rows):
            rows_of[i].append(row | {name: values[i] for name, values in scores.per_function.items()})
    return rows_of, seconds


def compare(demo: Demo, prompts: Sequence[str], heads: Sequence[str] = tuple(HEADS)) -> Iterator[Result]:
    """The table's rows, one after the other: base, each head at its own setting, best-of-4 and best-of-16."""
    base, base_seconds = sample_scored(demo, prompts, BASE_ANSWERS)
    yield measure(demo, "base", base[:], base, base_seconds / BASE_ANSWERS, 1.0)
    for name in heads:
        head = demo.head(name)
        steered, seconds = sample_scored(demo, prompts, STEERED_ANSWERS, head)
        yield measure(demo, HEADS[name], steered, base, seconds / STEERED_ANSWERS, 1.0, Controller(head))
    for n in (4, 16):
        best = best_of_n([[row["reward"] for row in rows] for rows in base], n)
        chosen = [[rows[i]] for rows, i in zip(base, best, strict=True)]
        result = measure(demo, f"best-of-{n}", chosen, base, base_seconds / BASE_ANSWERS * n, float(n))
        result.figures["kl_per_answer"] = best_of_n_kl_bound(n)
        yield result


def measure(
    demo: Demo,
    name: str,
    answers: list[list[Row]],
    base: list[list[Row]],
    seconds: float,
    forwards_per_token: float,
    controller: Controller | None = None,
) -> Result:
    """One row of the table. The gains pair the answers to each prompt with the base model's answers to it.

    Distinct-3 falls with the amount of text, so texts of all rows are compared at one answer to each prompt.
    """
    first = [rows[0] for rows in answers]
    wanted = ("prompt", "completion", "token_ids")
    figures = evaluate_answers(
        [{key: row[key] for key in wanted} for rows in answers[:] for row in rows[:STEERED_ANSWERS]],
        model=demo.model,
        tokenizer=demo.tokenizer,
        controller=controller,
        seconds=seconds,
        forwards_per_token=forwards_per_token,
    )
    figures["distinct_3"] = evaluate_answers(first)["distinct_3"]
    gains = {}
    for scorer in ("judge", "reward"):
        before, after = (torch.tensor([[row[scorer] for row in rows] for rows in part]) for part in (base, answers))
        figures[scorer] = float(after.mean())
        gains[scorer] = paired_bootstrap(before, after, in_baseline_sd=True)
    return Result(name, figures, gains)
