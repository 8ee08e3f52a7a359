"""What a row of a comparison says: its numbers, whether they can be drawn, and the words beside them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
LOGARITHMIC = {"kl_per_answer", "step_size", "batch_size", "seconds_per_token"}
"""Columns that are drawn on logarithmic axes, which have no place for a number that is not above 0."""
LABELS = {
    "diversity_20": "diversity of the\nfirst 20 words (0 to 1)",
    "coherence": "coherence with the\nprompt (cosine)",
    "seconds_per_token": "seconds per token",
    "win_rate": "win rate (0 to 1)",
}


def number(row: Row, column: str) -> float:
    """The number in a column, of an interval its mean; NaN where there is none that can be drawn."""
    cell = row.get(column)
    cell = cell.get("mean") if isinstance(cell, Mapping) else cell
    value = math.nan if cell is None else float(cell)
    return value if math.isfinite(value) and (value > 0 or column not in LOGARITHMIC) else math.nan


def interval(row: Row, column: str) -> tuple[float, float] | None:
    """The ends of a column's interval; None where it has none."""
    cell = row.get(column)
    ends = (cell.get("low"), cell.get("high")) if isinstance(cell, Mapping) else (None, None)
    low, high = (math.nan if end is None else float(end) for end in ends)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def drawable(rows: Sequence[Row], *columns: str) -> list[Row]:
    """The rows that have a number in each of the columns.

    Raises:
        ValueError: there is none, or a row has no method.
    """
    if not rows:
        raise ValueError("Got no rows, but a figure needs one. Pass one for each method and setting.")
    for i, row in enumerate(rows):
        if "method" not in row:
            raise ValueError(f"Row {i} lacks 'method', the name that its point bears. Add it.")
    found = [row for row in rows if not any(math.isnan(number(row, column)) for column in columns)]
    if not found:
        raise ValueError(
            f"None of the {len(rows)} rows has a number in {' and '.join(columns)}, but this figure draws them. Add "
            f"them; rows have {sorted(set().union(*rows))}."
        )
    return found


def label(column: str) -> str:
    """What an axis says of a column, with the unit."""
    return LABELS.get(column, f"{column.replace('_', ' ')} gain\n(sd of base answers)")


def sample_size(rows: Sequence[Row], column: str) -> str:
    """', n = 400' where all rows have that n, else nothing."""
    sizes = {row[column].get("n") for row in rows if isinstance(row[column], Mapping)}
    return f", n = {sizes.pop()}" if len(sizes) == 1 and None not in sizes else ""


def name_and_setting(row: Row) -> str:
    """'control head (4 nats)'."""
    asked = number(row, "setting")
    return str(row["method"]) + (f" ({asked:g} nats)" if math.isfinite(asked) else "")
