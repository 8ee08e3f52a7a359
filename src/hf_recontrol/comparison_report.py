"""A comparison as a person reads it: results.json, table.md and figures in a folder."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
Cell = Callable[[Row], str]


def write_report(
    rows: Sequence[Row],
    output_dir: str | Path,
    *,
    judges: Sequence[str],
    facts: Mapping[str, Any],
    more: Mapping[str, Sequence[Row]] | None = None,
    figures: bool = True,
) -> str:
    """Write results.json, table.md, and with `figures` (matplotlib) comparison.png, kl.png, and those of `more`.

    Args:
        rows: one for each method at each setting; see comparison.figures.
        output_dir: made if it does not exist.
        judges: the names of the judges in the rows, the one that matters first.
        facts: of the run, for results.json and the line under the table.
        more: rows of other figures: "sweep" and "time", see comparison_sweeps.

    Returns:
        The text of table.md.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    results = {"facts": dict(facts), "judges": list(judges), "rows": list(rows), **(more or {})}
    data = json.dumps(_without_nan(results), indent=1, ensure_ascii=False) + "\n"
    (folder / "results.json").write_text(data, encoding="utf-8")
    text = table(rows, judges, facts)
    (folder / "table.md").write_text(text, encoding="utf-8")
    if figures:
        for name, figure in _figures(rows, judges[0], more or {}).items():
            figure.savefig(folder / f"{name}.png", dpi=100)
    return text


def _figures(rows: Sequence[Row], judge: str, more: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    from .comparison_figures import comparison_figure, kl_figure, sweep_figure, time_figure, win_rate_figure

    settings = sorted({row["setting"] for row in rows if row["setting"] is not None})
    shown = settings[len(settings) // 2] if settings else None
    bars = [row for row in rows if row["setting"] in (None, shown)]
    figures: dict[str, Any] = {"comparison": comparison_figure(bars, by=judge), "kl": kl_figure(_against_kl(rows))}
    if "sweep" in more:
        figures["sweep"] = sweep_figure(more["sweep"])
    if "time" in more:
        figures["time"] = time_figure([row for row in more["time"] if row.get("drawn", True)])
        if timed := _timed(rows, more["time"]):
            figures["win_rate"] = win_rate_figure(timed)
    return figures


def _against_kl(rows: Sequence[Row]) -> list[Row]:
    """The heads, each a curve of one forward a token, and best-of-n; more would hide them. All where these are none."""
    curves = [row for row in rows if row["setting"] is not None and row["forwards_per_token"] == 1]
    curves = [row for row in curves if not row["method"].endswith("+ prompting")]
    return [*curves, *(row for row in rows if row["method"].startswith("best-of-"))] if curves else list(rows)


def _timed(rows: Sequence[Row], time: Sequence[Row]) -> list[Row]:
    """The rows at the strongest setting, with the seconds that a token took in the largest batch."""
    largest, strongest = max(row["batch_size"] for row in time), max((row["setting"] or 0) for row in rows)
    seconds = {row["method"]: row["seconds_per_token"] for row in time if row["batch_size"] == largest}
    known = [row for row in rows if row.get("win_rate") and row["setting"] in (None, strongest)]
    return [{**row, "seconds_per_token": seconds[row["method"]]} for row in known if row["method"] in seconds]


def table(rows: Sequence[Row], judges: Sequence[str], facts: Mapping[str, Any]) -> str:
    """Markdown: the rows, and what the columns mean. Columns that no row has are left out."""
    rows = [{**row, **_milliseconds(row)} for row in rows]
    columns: list[tuple[str, Cell]] = [("method", lambda row: row["method"] + (" †" if row["placebo"] else ""))]
    if any(row["setting"] is not None for row in rows):
        columns.append(("nats asked", lambda row: "" if row["setting"] is None else f"{row['setting']:g}"))
    columns.append(("nats per answer", _nats))
    columns += [(name, lambda row, name=name: _gain(row[name])) for name in judges]  # type: ignore[misc]
    columns += [
        (title, lambda row, key=key, form=form: _number(row[key], form) if key in row else "")  # type: ignore[misc]
        for title, key, form in (
            ("perplexity", "perplexity_ratio", "{:.2f} ×"),
            ("diversity", "diversity_20", "{:.3f}"),
            ("distinct-3", "distinct_3", "{:.3f}"),
            ("coherence", "coherence", "{:.3f}"),
            ("win rate", "win_rate", "{:.2f}"),
            ("length", "length", "{:.1f}"),
            ("forwards", "forwards_per_token", "{:g}"),
            ("ms per token", "ms_per_token", "{:.2f}"),
            ("KL on given texts", "reference_kl", "{:.3f}"),
            ("perplexity of given texts", "reference_perplexity", "{:.3f} ×"),
        )
        if any(row.get(key) is not None for row in rows)
    ]
    lines = [" | ".join(title for title, _ in columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(cell(row) for _, cell in columns) for row in rows]
    return "\n".join(f"| {line} |" for line in lines) + "\n\n" + _notes(rows, judges, facts)


def _milliseconds(row: Row) -> dict[str, float]:
    return {"ms_per_token": 1000 * row["seconds_per_token"]} if "seconds_per_token" in row else {}


def _nats(row: Row) -> str:
    number = row["kl_per_answer"]
    if number is None or math.isnan(number):
        return "?"
    return f"{'≤ ' if row['kl_is_bound'] else ''}{number:.2f}"


def _gain(gain: Mapping[str, float]) -> str:
    if gain["low"] == gain["high"] == 0:
        return "0"
    return f"{gain['mean']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]"


def _number(value: Any, form: str) -> str:
    if isinstance(value, Mapping):
        value = value["mean"]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "?"
    return form.format(value)


def _notes(rows: Sequence[Row], judges: Sequence[str], facts: Mapping[str, Any]) -> str:
    counts = " or ".join(map(str, sorted({row[name]["n"] for row in rows for name in judges})))
    runs = max(row.get("runs", 1) for row in rows)
    over = f"{runs} runs and {counts} prompts" if runs > 1 else f"{counts} prompts"
    columns = (
        f"{' and '.join(judges)}: gain over base in standard deviations of its answers, with the 95 % interval of a "
        f"bootstrap over {over}. Nats per answer: KL from the base model, measured; ≤: an upper bound. "
        "Perplexity: under the base model, over that of its own answers. "
        "Diversity: of the first 20 words. Length: in tokens. Forwards: rows of a model for each token."
    )
    if any(row["setting"] is not None for row in rows):
        columns += " Nats asked: what a strength was chosen for, on other prompts."
    if any("seconds_per_token" in row for row in rows) and "ms per token" not in facts:
        columns += " ms per token: of all answers together, in batches; of CD with the measuring of its KL."
    if any(row.get("win_rate") for row in rows):
        columns += " Win rate: of the first answer to each prompt over base's, a tie as half a win."
    if any("reference_kl" in row for row in rows):
        columns += " Given texts: not written by the method; KL in nats a token, perplexity over that without the head."
    if any(row["placebo"] for row in rows):
        columns += " †: a placebo, which has nothing to find."
    run = " ".join(f"{name}: {value}." for name, value in facts.items() if isinstance(value, str | int | float))
    return f"{columns}\n\n{run}\n"


def _without_nan(value: Any) -> Any:
    """JSON has none."""
    if isinstance(value, Mapping):
        return {name: _without_nan(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
