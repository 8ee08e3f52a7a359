"""What a comparison leaves in a head's config, info["comparison"], and the part of the card that says it."""

from collections.abc import Mapping, Sequence
from typing import Any

from .card_text import code, escaped, mapping, number

MAX_ROWS = 24
GAIN = ("mean", "low", "high")
COLUMNS = {
    "kl_per_answer": "nats an answer",
    "perplexity_ratio": "perplexity",
    "reference_kl": "KL on given texts, nats a token",
    "reference_perplexity": "perplexity of given texts",
}
RATIOS = ("perplexity_ratio", "reference_perplexity")


def comparison_info(
    name: str, rows: Sequence[Mapping[str, Any]], judges: Sequence[str], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """A part of a comparison, as plain JSON for a config: what the card of one of its heads shows.

    Args:
        name: of the head in the comparison.
        rows: of the comparison; see comparison.figures. Kept are the head's own, those without a strength, and
            placebos at the strongest setting.
        judges: the names of the gains in the rows, the one that counts first.
        facts: texts and numbers: "dataset", "judges", "reward", "seed".
    """
    strongest = max((row["setting"] or 0 for row in rows), default=0)
    kept = [
        row
        for row in rows
        if row["method"] == name or row["setting"] is None or (row["placebo"] and row["setting"] == strongest)
    ]
    kept.sort(key=lambda row: row["method"] != name)  # its own first: a card shows so many rows at most
    return {
        "method": name,
        "judges": list(judges),
        "facts": {key: value for key, value in facts.items() if isinstance(value, str | int | float)},
        "rows": [_kept(row, judges) for row in kept if row["method"] != "base"],
    }


def _kept(row: Mapping[str, Any], judges: Sequence[str]) -> dict[str, Any]:
    found = {key: row[key] for key in ("method", "setting", "placebo", "kl_is_bound")}
    found |= {key: value for key in COLUMNS if (value := number(row.get(key))) is not None}
    return found | {judge: {end: row[judge][end] for end in (*GAIN, "n")} for judge in judges}


def comparison_lines(info: Mapping[str, Any]) -> list[str]:
    """Sentences and Markdown tables: on prompts of the comparison, and of another kind; nothing if not known."""
    noted = mapping(info, "comparison")
    lines = _table(noted)
    other = _table(mapping(noted, "other"))
    if lines and other:
        lines += ["", "With the same strengths on prompts of another kind:", "", *other]
    return lines


def comparison_gains(info: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The head's own gains, for the Hub's model-index: {"judge", "nats", "mean", "n", "interval", "seed"}."""
    noted = mapping(info, "comparison")
    seed, found = number(mapping(noted, "facts").get("seed")), []
    for row in _rows(noted):
        nats = number(row.get("setting"))
        for judge in _judges(noted):
            gain, n = _gain(row, judge), number(mapping(row, judge).get("n"))
            if gain is not None and nats is not None and row.get("method") == noted.get("method"):
                own = {"judge": judge, "nats": nats, "mean": gain[0], "interval": list(gain[1:])}
                found.append({**own, "n": n, "seed": seed})
    return found


def _table(noted: Mapping[str, Any]) -> list[str]:
    rows, judges = _rows(noted), _judges(noted)
    if not rows or not judges:
        return []
    columns = [name for name in COLUMNS if any(number(row.get(name)) is not None for row in rows)]
    titles = ["method", *(escaped(judge) for judge in judges), *(COLUMNS[name] for name in columns)]
    lines = [_sentence(noted, rows, judges), "", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = [_method(row), *(_gain_text(_gain(row, judge)) for judge in judges)]
        lines.append("| " + " | ".join([*cells, *(_cell(row, name) for name in columns)]) + " |")
    return lines


def _sentence(noted: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], judges: Sequence[str]) -> str:
    facts = mapping(noted, "facts")
    prompts = number(mapping(rows[0], judges[0]).get("n"))
    where = f" of {code(facts['dataset'])}" if isinstance(facts.get("dataset"), str) else ""
    over = f"{prompts} prompts" if prompts is not None else "prompts"
    by = f" Judge: {code(facts['judges'])}." if isinstance(facts.get("judges"), str) else ""
    placebo = " †: a placebo." if any(row.get("placebo") is True for row in rows) else ""
    return (
        f"Gain over the base model in standard deviations of its answers, with 95 % intervals over {over}{where}; "
        f"strengths were chosen on other prompts.{by}{placebo}"
    )


def _rows(noted: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = noted.get("rows")
    return [dict(row) for row in rows if isinstance(row, Mapping)][:MAX_ROWS] if isinstance(rows, list) else []


def _judges(noted: Mapping[str, Any]) -> list[str]:
    judges = noted.get("judges")
    return [judge for judge in judges if isinstance(judge, str)][:4] if isinstance(judges, list) else []


def _method(row: Mapping[str, Any]) -> str:
    asked = number(row.get("setting"))
    name = escaped(row.get("method")) + (f", {asked:g} nats" if asked is not None else "")
    return name + (" †" if row.get("placebo") is True else "")


def _gain(row: Mapping[str, Any], judge: str) -> tuple[float, float, float] | None:
    mean, low, high = (number(mapping(row, judge).get(end)) for end in GAIN)
    return None if mean is None or low is None or high is None else (mean, low, high)


def _gain_text(gain: tuple[float, float, float] | None) -> str:
    return "" if gain is None else "{:+.2f} [{:+.2f}, {:+.2f}]".format(*gain)


def _cell(row: Mapping[str, Any], name: str) -> str:
    value = number(row.get(name))
    if value is None:
        return ""
    if name == "kl_per_answer":
        return f"{'≤ ' if row.get('kl_is_bound') is True else ''}{value:.2f}"
    return f"{value:.3f}" + (" ×" if name in RATIOS else "")
