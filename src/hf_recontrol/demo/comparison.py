"""The demo's table: the same prompts answered with and without control, beside a placebo and best-of-n."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..control import Controller
from ..evaluation import Gain, best_of_n, best_of_n_kl_bound, distinct_n, evaluate_answers, paired_bootstrap
from ..rewards import Rewards
from ..rollout_blocks import end_of_answer, seeded
from ..value_head import ValueHead
from .assets import HEADS, MAX_NEW_TOKENS, Demo

Row = dict[str, Any]
ANSWERS = {"base": 4, "steered": 2}  # to each prompt


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
    demo: Demo,
    prompts: Sequence[str],
    answers: int,
    head: ValueHead | None = None,
    *,
    scorers: Rewards | None = None,
    first_seed: int = 0,
) -> tuple[list[list[Row]], float]:
    """`answers` rows for each prompt, with the scorers' numbers in them, and the seconds that generating took."""
    seconds = 0.0
    rows_of: list[list[Row]] = [[] for _ in prompts]
    for seed in range(first_seed, first_seed + answers):
        start = time.perf_counter()
        rows = sample(demo.model, demo.tokenizer, prompts, head, seed=seed)
        seconds += time.perf_counter() - start
        texts = [row["completion"] for row in rows]
        scores = (scorers or demo.scorers)(prompts, texts, [row["token_ids"] for row in rows])
        for i, row in enumerate(rows):
            rows_of[i].append(row | {name: values[i] for name, values in scores.per_function.items()})
    return rows_of, seconds


def compare(demo: Demo, prompts: Sequence[str], heads: Sequence[str] = tuple(HEADS)) -> Iterator[Result]:
    """The table's rows, one after the other: base, each head at its own setting, best-of-4 and best-of-16.

    Best-of-16 is made on the first quarter of the prompts, for time: it costs as much as all else together.
    """
    quarter = max(2, len(prompts) // 4)
    base, seconds = sample_scored(demo, prompts, ANSWERS["base"])
    seconds /= ANSWERS["base"]
    yield measure(demo, "base", base, base, seconds, 1, shared=quarter)
    for name in heads:
        head = demo.head(name)
        steered, steered_seconds = sample_scored(demo, prompts, ANSWERS["steered"], head)
        steered_seconds /= ANSWERS["steered"]
        yield measure(demo, HEADS[name], steered, base, steered_seconds, 1, Controller(head), shared=quarter)
    more, _ = sample_scored(demo, prompts[:quarter], 16 - ANSWERS["base"], first_seed=ANSWERS["base"])
    for n, candidates in ((4, base), (16, [a + b for a, b in zip(base[:quarter], more, strict=True)])):
        best = best_of_n([[row["reward"] for row in rows] for rows in candidates], n)
        chosen = [[rows[i]] for rows, i in zip(candidates, best, strict=True)]
        result = measure(demo, f"best-of-{n}", chosen, base[: len(chosen)], seconds * n, n, shared=quarter)
        result.figures["kl_per_answer"] = best_of_n_kl_bound(n)
        yield result


def measure(
    demo: Demo,
    name: str,
    answers: list[list[Row]],
    base: list[list[Row]],
    seconds: float,
    forwards_per_token: int,
    controller: Controller | None = None,
    *,
    shared: int,
) -> Result:
    """One row of the table. The gains pair the answers to each prompt with the base model's answers to it.

    Distinct-3 falls with the amount of text, so every row's is of the first `shared` prompts, one answer to each.
    """
    wanted = ("prompt", "completion", "token_ids")
    figures = evaluate_answers(
        [{key: row[key] for key in wanted} for rows in answers for row in rows[: ANSWERS["steered"]]],
        model=demo.model,
        tokenizer=demo.tokenizer,
        controller=controller,
        seconds=seconds,
        forwards_per_token=forwards_per_token,
    )
    figures["distinct_3"] = distinct_n([rows[0]["completion"] for rows in answers[:shared]])
    gains = {}
    for scorer in ("judge", "reward"):
        before, after = (torch.tensor([[row[scorer] for row in rows] for rows in part]) for part in (base, answers))
        figures[scorer] = float(after.mean())
        gains[scorer] = paired_bootstrap(before, after, in_baseline_sd=True)
    return Result(name, figures, gains)
