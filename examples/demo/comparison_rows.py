"""The tables of several runs as one: means over runs, and intervals over runs and prompts."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_recontrol.comparison import slug
from hf_recontrol.intervals import crossed_bootstrap
from hf_recontrol.rewards import Rewards

Key = tuple[str, float | None]
"""A method and its setting."""
MEANS = (
    "kl_per_answer",
    "perplexity_ratio",
    "diversity_20",
    "distinct_3",
    "length",
    "forwards_per_token",
    "answers_cut",
    "answers_empty",
)
OF_HEADS = ("reference_kl", "reference_perplexity")
SAME = ("method", "setting", "placebo", "kl_is_bound")


def rows_of_runs(scorers: Rewards, folders: list[Path]) -> tuple[list[dict[str, Any]], dict[Key, dict[str, Tensor]]]:
    """A row for each method at each setting, as comparison.figures gives it; and its gains.

    Args:
        scorers: the judge and the reward, by name.
        folders: what `hf-recontrol evaluate` wrote, a folder for each run, on the same prompts.

    Returns:
        The rows, and for each of them by scorer float64 (runs, prompts): its gain in standard deviations of the run's
        base answers.
    """
    tables = [json.loads((folder / "results.json").read_text())["rows"] for folder in folders]
    scores = [
        {_key(row): _scores(scorers, folder, row) for row in rows} for folder, rows in zip(folders, tables, strict=True)
    ]
    merged, gains = [], {}
    for parts in zip(*tables, strict=True):
        key = _key(parts[0])
        if {_key(part) for part in parts} != {key}:
            raise ValueError(f"The runs differ in their rows: {sorted(map(_key, parts), key=str)}.")
        row: dict[str, Any] = {name: parts[0][name] for name in SAME} | {"runs": len(parts)}
        row |= {name: _mean([part[name] for part in parts]) for name in MEANS}
        row |= {name: _mean([part[name] for part in parts]) for name in OF_HEADS if name in parts[0]}
        of_runs = [_gains(run[key], run["base", None]) for run in scores]
        gains[key] = {name: torch.stack([gain[name] for gain in of_runs]) for name in scorers.names}
        row |= {name: asdict(crossed_bootstrap(gain)) for name, gain in gains[key].items()}
        if key != ("base", None):
            row["win_rate"] = asdict(crossed_bootstrap((1 + gains[key]["judge"].sign()) / 2))
        merged.append(row)
    return merged, gains


def _key(row: dict[str, Any]) -> Key:
    return row["method"], row["setting"]


def _scores(scorers: Rewards, folder: Path, row: dict[str, Any]) -> dict[str, Tensor]:
    """By scorer float64 (prompts,), in the prompts' alphabetical order, for each run draws its own."""
    method, setting = _key(row)
    label = method if setting is None else f"{method}, {setting:g} nats"
    lines = (folder / "answers" / f"{slug(label)}.jsonl").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    answers = sorted((json.loads(line)[0] for line in lines[1:]), key=lambda answer: str(answer["prompt"]))
    texts = [[answer[name] for answer in answers] for name in ("prompt", "completion", "token_ids")]
    return {name: torch.tensor(found, dtype=torch.float64) for name, found in scorers(*texts).per_function.items()}


def _gains(after: dict[str, Tensor], before: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: (after[name] - before[name]) / before[name].std() for name in after}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
