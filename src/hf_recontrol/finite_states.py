"""Answers with a hidden state that is not finite: they keep their row in the table, and lose their states."""

from typing import Any

import torch
from torch import Tensor

from .errors import CollectError

MOST = 0.05  # share of the answers; above it the model is at fault, not a row

Contents = tuple[Tensor, Tensor, Tensor, Tensor, list[dict[str, Any]]]
"""hidden_states, offsets, rewards, token_ids and rows, as RolloutStore.commit has them."""


def without_bad_states(contents: Contents) -> Contents:
    """The block without the states of answers in which one is not finite; their rows say `"finite": False`."""
    hidden_states, offsets, rewards, token_ids, rows = contents
    lengths = offsets.diff()
    answers = torch.arange(len(rows)).repeat_interleave(lengths)  # of each token
    bad = torch.zeros(len(rows), dtype=torch.bool)
    bad[answers[~hidden_states.isfinite().all(-1)]] = True
    if not bad.any():
        return contents
    kept = ~bad[answers]
    offsets = torch.cat([offsets[:1], lengths.masked_fill(bad, 0).cumsum(0)])
    rows = [{**row, "finite": not is_bad} for row, is_bad in zip(rows, bad.tolist(), strict=True)]
    return hidden_states[kept], offsets, rewards, token_ids[kept], rows


def check_share(answers: int, not_finite: int) -> None:
    """Raise CollectError if too many answers of a run have lost their states. A single one is never too many."""
    if not_finite > max(1, MOST * answers):
        raise CollectError(
            f"{not_finite} of {answers} answers have hidden states that are not finite; more than {MOST:.0%} means "
            "that the model overflows. Load it in bfloat16 or float32, and collect into another folder."
        )


def left_out(answers: int, not_finite: int, folder: object) -> str:
    """The warning that some were."""
    return (
        f"{not_finite} of {answers} answers in {folder} have hidden states that are not finite, and so no states to "
        'learn from; their rows say "finite": false. To silence this, load the model in bfloat16 or float32.'
    )
