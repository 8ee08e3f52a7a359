"""What a stranger's value becomes in a card: one line of text that Markdown takes as it is, or a finite number."""

import re
from collections.abc import Mapping
from typing import Any

MAX_TEXT = 500


def one_line(value: object) -> str:
    """The value as one line of printable characters, at most 500: no line break, control or bidirectional character."""
    words = "".join(character if character.isprintable() else " " for character in str(value)).split()
    return " ".join(words)[:MAX_TEXT]


def escaped(value: object) -> str:
    """One line that Markdown shows as it is: no markup, no HTML, no link, no table cell."""
    escaped = "".join(
        "\\" + character if character in "\\`*_{}[]()<>#+!|~&$:@" else character for character in one_line(value)
    )
    return re.sub(r"(?i)\b(www)\.", r"\1\\.", escaped)


def code(value: object) -> str | None:
    """One line as a code span, in which Markdown interprets nothing; None for None."""
    return None if value is None else "`" + (one_line(value).replace("`", "'").replace("|", "¦") or " ") + "`"


def mapping(info: Mapping[str, Any], name: str) -> dict[str, Any]:
    """info[name], if it is an object; else an empty one."""
    value = info.get(name)
    return {str(key): entry for key, entry in value.items()} if isinstance(value, Mapping) else {}


def number(value: object) -> int | float | None:
    """The value, if it is a finite number that a float can hold, and no boolean."""
    return value if type(value) in (int, float) and abs(value) < 1e300 else None  # type: ignore[return-value, arg-type]


def pair(value: object) -> list[int | float] | None:
    """The value, if it is two numbers."""
    ends = [number(end) for end in value] if isinstance(value, list | tuple) and len(value) == 2 else []
    return [end for end in ends if end is not None] if ends and None not in ends else None
