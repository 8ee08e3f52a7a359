"""What a head's config may hold: the checks of a value from an untrusted file, each with an error that names it."""

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from .errors import HeadError

MAX_STRING = 512
MAX_INFO_BYTES = 16 * 1024


def shown(value: object, most: int = 80) -> str:
    """A value from an untrusted file, fit for a terminal and a log: ASCII, at most so many characters."""
    try:
        text = ascii(value)
    except ValueError:  # an integer of more digits than Python prints
        text = f"a {type(value).__name__} too long to print"
    return text if len(text) <= most else text[: most - 3] + "..."


def only_known(kind: type, values: Mapping[str, Any], where: str, version: object) -> Mapping[str, Any]:
    """The values, if each is a field of the dataclass `kind`."""
    known = [f.name for f in fields(kind)]
    unknown = sorted(str(name) for name in values if name not in known)
    if unknown:
        wrote = f" It was written by hf_recontrol {shown(version)}; a newer release may read it." if version else ""
        raise HeadError(f"{where} has unknown fields {shown(unknown)}; allowed are {', '.join(known)}.{wrote}")
    return values


def refuse(name: str, value: object, allowed: str) -> None:
    """Raise HeadError."""
    raise HeadError(f"A head's config has {name} = {shown(value)}; allowed: {allowed}.")


def check(name: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        refuse(name, value, allowed)


def check_integer(name: str, value: object, low: int, high: int) -> None:
    check(name, value, type(value) is int and low <= value <= high, f"an integer from {low} to {high}")


def check_number(name: str, value: object, low: float) -> None:
    holds = type(value) in (int, float) and low <= value <= 1e30  # type: ignore[operator]  # False for NaN
    check(name, value, holds, f"a number from {low:g} to 1e30")


def check_string(name: str, value: object, *, optional: bool = False) -> None:
    holds = isinstance(value, str) and len(value) <= MAX_STRING and value.isprintable()
    check(name, value, holds or (optional and value is None), f"up to {MAX_STRING} printable characters")


def check_info(info: object) -> None:
    check("info", type(info).__name__, isinstance(info, dict), "an object")
    try:
        size = len(json.dumps(info, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise HeadError(
            f"A head's info must be plain JSON of finite numbers, but it holds: {shown(str(error))}."
        ) from error
    check("info", f"{size} bytes", size <= MAX_INFO_BYTES, f"at most {MAX_INFO_BYTES} bytes of JSON")
