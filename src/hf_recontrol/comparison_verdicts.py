"""Which of two answers is better: a comparison's win rates over the base model, kept where asking costs money."""

import json
from pathlib import Path
from typing import Any

from .baselines import rewards_of_answers
from .chat_judge import ChatJudge
from .comparison import Answered, slug
from .disk import faults, make_folder, write_file
from .errors import CollectError
from .fingerprints import sha256_of
from .judging import Scores, WinRate, win_rate
from .rewards import Rewards, Text

Cell = dict[str, Any]
CELL = ("mean", "low", "high", "n", "ties", "unparsable", "order_disagreement")


def win_rate_over(answered: Answered, base: Answered, judge: Rewards | ChatJudge, folder: str | Path) -> Cell:
    """How often a method's answers beat the base model's to the same prompts, the first answer to each.

    Args:
        judge: a reward, whose higher number wins; or a chat model, which is asked in both orders.
        folder: a chat model is asked once, and what it said is kept there.

    Returns:
        {"mean", "low", "high" (of the rate in which a tie is half a win), "n" (prompts with a verdict), "ties",
        "unparsable", "order_disagreement"}; see WinRate.

    Raises:
        CollectError: what is kept is damaged, or the disk refused.
    """
    texts = _texts(answered, base)
    if isinstance(judge, Rewards):
        return _cell(win_rate(_Scored(judge, answered, base), *texts))
    file = Path(folder) / f"{slug(answered.entry.label)}.verdicts.json"
    asked = {"judge": judge.facts(), "texts_sha256": sha256_of([json.dumps(texts, sort_keys=True)])}
    if (known := _known(file, asked)) is not None:
        return known
    cell = _cell(win_rate(judge, *texts))
    with faults(f"Writing {file}"):
        make_folder(file.parent)
        write_file(file, json.dumps({"asked": asked, "win_rate": cell}, indent=1).encode())
    return cell


def _known(file: Path, asked: dict[str, Any]) -> Cell | None:
    """What the same judge said of the same texts."""
    if not file.exists():
        return None
    with faults(f"Reading {file}"):
        text = file.read_text(encoding="utf-8")
    try:
        kept = json.loads(text)
        found = {name: kept["win_rate"][name] for name in CELL}
        return found if kept["asked"] == asked else None
    except (ValueError, KeyError, TypeError) as error:
        raise CollectError(f"{file} is damaged ({error}). Delete it, and the judge is asked again.") from error


class _Scored:
    """A reward as a judge, with the token ids that it may read."""

    position_blind = True

    def __init__(self, judge: Rewards, *sides: Answered):
        first, second = ([row[0] for row in _scores(judge, side)] for side in sides)
        self.scores = [None if a is None or b is None else (a, b) for a, b in zip(first, second, strict=True)]

    def __call__(self, *texts: object) -> list[Scores | None]:
        return list(self.scores)


def _scores(judge: Rewards, side: Answered) -> list[list[float | None]]:
    return rewards_of_answers(judge, [rows[:1] for rows in side.answers])


def _texts(answered: Answered, base: Answered) -> tuple[list[Text], list[Text], list[Text]]:
    """Prompts, answers and opponents."""
    first, opponents = ([rows[0] for rows in side.answers] for side in (answered, base))
    prompts, answers = ([row[name] for row in first] for name in ("prompt", "completion"))
    return prompts, answers, [row["completion"] for row in opponents]


def _cell(found: WinRate) -> Cell:
    counts = {name: getattr(found, name) for name in ("ties", "unparsable", "order_disagreement")}
    return {"mean": found.rate, "low": found.low, "high": found.high, "n": found.n - found.unparsable, **counts}
