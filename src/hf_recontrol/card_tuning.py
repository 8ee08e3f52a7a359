"""The part of a head's card that says how its control was chosen, from what the search noted in info["tuning"]."""

from collections.abc import Mapping
from typing import Any

from .card_text import code, mapping, number

MAX_ROWS = 24
FIGURES = {
    "reward": "reward",
    "perplexity": "perplexity",
    "coherence": "coherence",
    "diversity": "diversity",
    "kl_per_answer": "KL, nats an answer",
}
AGAINST = {"perplexity": "as low a perplexity", "coherence": "as high a coherence"}


def tuning_lines(info: Mapping[str, Any]) -> list[str]:
    """A sentence, an empty line, and a Markdown table of the chosen control and of the front; nothing if not known."""
    noted = mapping(info, "tuning")
    front = noted.get("front")
    points = [row for row in front if isinstance(row, Mapping)][:MAX_ROWS] if isinstance(front, list) else []
    chosen = mapping(noted, "chosen")
    if not chosen:
        return []
    if chosen not in points:
        points = [chosen, *points]
    columns = [name for name in FIGURES if any(number(row.get(name)) is not None for row in points)]
    lines = [_sentence(noted), "", "| control | " + " | ".join(FIGURES[name] for name in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for row in points:
        cells = [_control(row) + (", chosen" if row == chosen else "")]
        cells += ["" if (value := number(row.get(name))) is None else f"{value:.4g}" for name in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _sentence(noted: Mapping[str, Any]) -> str:
    by, bound = code(noted.get("objective")), number(noted.get("max_perplexity_ratio"))
    if noted.get("objective") == "paper":
        by = "the sum of coherence, diversity and reward"
    elif noted.get("objective") == "reward":
        by = "the reward" + ("" if bound is None else f" at a perplexity of at most {bound:g} × that without control")
    trials, prompts = number(noted.get("trials")), number(noted.get("prompts"))
    among = "" if trials is None else f" of {trials} settings"
    on = "validation prompts" if prompts is None else f"{prompts} validation prompts"
    other = AGAINST.get(str(noted.get("against")), "figures as good")
    return (
        f"The control is the best{among} by {by or 'an objective'}, on {on}, where its figures are flattered by the "
        f"choice. Others are shown where none had a higher reward at {other}."
    )


def _control(row: Mapping[str, Any]) -> str:
    known = {name: number(row.get(name)) for name in ("strength", "step_size", "scale", "num_steps")}
    if 0 in (known["step_size"], known["scale"]):
        return "none"
    signs = {"strength": "strength ", "step_size": "α = ", "scale": "scale ", "num_steps": "n = "}
    return ", ".join(f"{signs[name]}{value:.4g}" for name, value in known.items() if value is not None)
