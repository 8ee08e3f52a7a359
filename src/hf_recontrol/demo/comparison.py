"""The demo's table: the same prompts answered with and without control, beside a placebo and best-of-n."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..answers import end_of_answer, seeded
from ..control import Controller
from ..control_config import ControlConfig
from ..evaluation import best_of_n, best_of_n_kl_bound, distinct_n, evaluate_answers
from ..head import Head
from ..intervals import Gain, paired_bootstrap
from .assets import HEADS, MAX_NEW_TOKENS, Demo

Row = dict[str, Any]
STRENGTH = 0.1  # nats a token: what every head is asked for, and the default of a calibrated head
CONTROL = ControlConfig(strength=STRENGTH)
ROUNDS = 2  # answers to each prompt by each method


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
    head: Head | None = None,
    config: ControlConfig | None = None,
    *,
    seed: int = 0,
    temperature: float = 1.0,
) -> list[Row]:
    """One answer to each prompt, 40 new tokens at most, from the whole vocabulary (top_p 1, top_k 0).

    Args:
        config: how hard the head steers; as it is calibrated where None.

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
            recontrol_config=config,
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
    seeds: Sequence[int],
    head: Head | None = None,
    config: ControlConfig | None = None,
) -> tuple[list[list[Row]], list[float]]:
    """A row of each prompt for each seed, with the scorers' numbers in it, and the seconds that each seed took."""
    seconds: list[float] = []
    rows_of: list[list[Row]] = [[] for _ in prompts]
    for seed in seeds:
        start = time.perf_counter()
        rows = sample(demo.model, demo.tokenizer, prompts, head, config, seed=seed)
        seconds.append(time.perf_counter() - start)
        texts = [row["completion"] for row in rows]
        scores = demo.scorers(prompts, texts, [row["token_ids"] for row in rows])
        for i, row in enumerate(rows):
            rows_of[i].append(row | {name: values[i] for name, values in scores.per_function.items()})
    return rows_of, seconds


def compare(demo: Demo, prompts: Sequence[str]) -> list[Result]:
    """The table's rows: base, each head at the same strength, best-of-4 and best-of-16.

    The methods take turns, so that a machine whose speed drifts does not favour one of them. Best-of-16 is made on the
    first quarter of the prompts: it costs as much as all else together.
    """
    methods: dict[str, Head | None] = {"base": None} | {HEADS[name]: demo.head(name) for name in HEADS}
    answers: dict[str, list[list[Row]]] = {name: [[] for _ in prompts] for name in methods}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    quarter = max(2, len(prompts) // 4)
    with logging.tqdm(total=ROUNDS * len(methods) + 3, desc="sampling", leave=False) as bar:
        for seed in range(ROUNDS):
            for name, head in methods.items():
                rows_of, took = sample_scored(demo, prompts, [seed], head, CONTROL)
                seconds[name] += took
                answers[name] = [a + b for a, b in zip(answers[name], rows_of, strict=True)]
                bar.update()
        more, _ = sample_scored(demo, prompts, range(ROUNDS, 4))
        bar.update()
        four = answers["base"] = [a + b for a, b in zip(answers["base"], more, strict=True)]
        more, _ = sample_scored(demo, prompts[:quarter], range(4, 16))
        bar.update(2)
        candidates = {4: four, 16: [a + b for a, b in zip(four, more, strict=False)]}

    time_ratio = {name: sum(took) / sum(seconds["base"]) for name, took in seconds.items()}
    results = [
        measure(demo, name, answers[name], four, quarter, 1, time_ratio[name], head) for name, head in methods.items()
    ]
    for n, rows_of in candidates.items():
        best = best_of_n([[row["reward"] for row in rows] for rows in rows_of], n)
        chosen = [[rows[i]] for rows, i in zip(rows_of, best, strict=True)]
        results.append(measure(demo, f"best-of-{n}", chosen, four, quarter, n, float(n)))
        results[-1].figures["kl_per_answer"] = best_of_n_kl_bound(n)
    return results


def measure(
    demo: Demo,
    name: str,
    answers: list[list[Row]],
    base: list[list[Row]],
    shared: int,
    forwards: int,
    time_ratio: float,
    head: Head | None = None,
) -> Result:
    """One row of the table.

    Gains pair the answers to each prompt with the base model's to it, in standard deviations of all base answers.
    Perplexity and KL are of one answer to each prompt. Distinct-3 falls with the amount of text, so every row's is of
    the first `shared` prompts, one answer to each.
    """
    first = [rows[0] for rows in answers]
    controller = None if head is None else Controller(head, CONTROL)
    figures = evaluate_answers(first, model=demo.model, tokenizer=demo.tokenizer, controller=controller)
    figures |= {"forwards_per_token": forwards, "time": time_ratio}
    figures["distinct_3"] = distinct_n([row["completion"] for row in first[:shared]])
    gains = {}
    for scorer in ("judge", "reward"):
        before, after = (
            torch.tensor([[row[scorer] for row in rows] for rows in part], dtype=torch.float64)
            for part in (base, answers)
        )
        figures[scorer] = float(after.mean())
        gains[scorer] = paired_bootstrap(before[: len(after)] / before.std(), after / before.std())
    return Result(name, figures, gains)
