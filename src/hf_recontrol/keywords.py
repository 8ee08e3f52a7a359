"""What generate() takes besides its own keywords: read, checked against the model, and made into a control."""

import difflib
import functools
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .control import ControlConfig, Controller
from .errors import HeadMismatch
from .head_format import CONFIG_NAME, WEIGHTS_NAME
from .hooks import lm_head, model_name
from .value_head import ValueHead


@dataclass(frozen=True)
class RecontrolKeywords:
    """What generate() takes besides its own keywords, each with `recontrol_` in front."""

    value_head: "ValueHead | str | os.PathLike[str] | bool | None" = None
    """The head: an id on the Hub, "id@revision", a folder (which wins over an id of the same name), or a ValueHead.
    None or False is none: stock generate()."""
    step_size: float | None = None
    """α, ≥ 0; the head's where None. 0 is no control, bit for bit."""
    num_steps: int | None = None
    """n, 0 to 1024; the head's where None. 0 is no control, bit for bit."""
    revision: str | None = None
    """Branch, tag or commit of a head on the Hub."""
    token: str | None = None
    """Access token for a head on the Hub; the stored one where None."""
    strict: bool = False
    """Whether a head trained on another base model is an error; otherwise it is a warning."""

    @classmethod
    def pop(cls, kwargs: dict[str, Any]) -> "RecontrolKeywords":
        """Take ours out of generate()'s keywords."""
        ours = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("recontrol_")}
        known = ["recontrol_" + name for name in cls.__dataclass_fields__]
        for name in ours:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                raise ValueError(
                    f"generate() has no keyword {name!r}; the nearest is {nearest!r}. Ours: {', '.join(known)}."
                )
        return cls(**{name.removeprefix("recontrol_"): value for name, value in ours.items()})

    def controller(self, model: PreTrainedModel) -> Controller | None:
        """The control that was asked for, checked against the model; None where none was.

        Raises:
            TypeError, ValueError: a keyword has a wrong value, or does nothing as it stands.
            HeadError, HeadUnavailable, HeadMismatch: the head cannot be read, fetched, or used with this model.
        """
        if type(self.strict) is not bool:
            raise ValueError(f"recontrol_strict is {self.strict!r}; it must be True or False.")
        control = ControlConfig(step_size=self.step_size, num_steps=self.num_steps)
        if self.value_head is None or self.value_head is False:
            if self.value_head is None and self != RecontrolKeywords():
                raise ValueError(
                    "generate() was given recontrol_ keywords but no recontrol_value_head, so nothing would be "
                    "steered. Name a head, or leave the others out."
                )
            return None
        head = self._head()
        check_base_model(head, model, strict=self.strict)
        return Controller(head, control)

    def _head(self) -> ValueHead:
        head = self.value_head
        if isinstance(head, ValueHead):
            if self.revision is not None or self.token is not None:
                raise ValueError(
                    "recontrol_revision and recontrol_token are for a head on the Hub, but a ValueHead was given."
                )
            return head
        if isinstance(head, str | os.PathLike):
            return load_value_head(os.fspath(head), self.revision, self.token)
        raise TypeError(
            f"recontrol_value_head is a {type(head).__name__}; it must be an id on the Hub, a folder, a ValueHead, "
            "or False."
        )


class _HeadCache:
    """Heads already read, so that each generate() does not read again: one load each, also under threads.

    A folder is read again when its files change. A head on the Hub stays at the commit it was first resolved to.
    """

    def __init__(self, size: int = 16):
        self._size = size
        self._heads: OrderedDict[tuple[object, ...], ValueHead] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[object, ...], load: Callable[[], ValueHead]) -> ValueHead:
        with self._lock:
            if key not in self._heads:
                self._heads[key] = load()
            self._heads.move_to_end(key)
            while len(self._heads) > self._size:
                self._heads.popitem(last=False)
            return self._heads[key]


_HEADS = _HeadCache()


def load_value_head(name_or_path: str, revision: str | None = None, token: str | None = None) -> ValueHead:
    """The head of that folder or Hub id, read once per process."""
    files: tuple[object, ...] = ()
    if (folder := Path(name_or_path).expanduser()).is_dir():
        parts = [part for name in (CONFIG_NAME, WEIGHTS_NAME) if (part := folder / name).exists()]
        files = tuple((part.stat().st_mtime_ns, part.stat().st_size, part.stat().st_ino) for part in parts)
        name_or_path = str(folder.resolve())
    load = functools.partial(ValueHead.from_pretrained, name_or_path, revision=revision, token=token)
    return _HEADS.get((name_or_path, revision, token, files), load)


def check_base_model(head: ValueHead, model: PreTrainedModel, *, strict: bool = False) -> None:
    """Refuse a head of another width; warn of a head of another base model, or refuse it where `strict`.

    Raises:
        HeadMismatch: names both sides.
    """
    name, trained_on = model_name(model), head.config.base_model_name_or_path
    width = getattr(lm_head(model), "in_features", None) or model.config.get_text_config().hidden_size
    head.check_width(width, repr(name or type(model).__name__))
    kinds = head.config.base_model_type, model.config.model_type
    same = _may_be_same(trained_on, name) and (kinds[0] is None or kinds[0] == kinds[1])
    pair = f"The value head was trained on {trained_on!r} ({kinds[0]}), this model is {name!r} ({kinds[1]})"
    if strict and (not same or trained_on is None or trained_on != name or name.startswith("./")):
        raise HeadMismatch(
            f"{pair}, and recontrol_strict asks for the same Hub id, since a folder's name says little. Use the head's "
            "own base model, or leave recontrol_strict out."
        )
    if not same:
        warnings.warn(
            f"{pair}; its values may mean nothing there. If the two share their weights, silence this by "
            "warnings.filterwarnings.",
            UserWarning,
            stacklevel=5,
        )


def _may_be_same(trained_on: str | None, name: str | None) -> bool:
    """Whether two names may be of one model: a folder's last part is compared with a Hub id's."""
    if trained_on is None or name is None:
        return True
    if trained_on.startswith("./") or name.startswith("./"):
        return trained_on.rpartition("/")[2] == name.rpartition("/")[2]
    return trained_on == name


def refuse_unread_config(config: Any, model: PreTrainedModel, keywords: RecontrolKeywords) -> None:
    """A generation config that names a head or a strength is data, maybe a stranger's: never obeyed, never ignored."""
    if keywords.value_head is False:
        return
    for where, part in (("given", config), ("model's", model.generation_config)):
        found = [name for name in getattr(part, "__dict__", {}) if name.startswith("recontrol_")]
        if found:
            raise ValueError(
                f"The {where} generation config has {found[0]!r}. A config cannot choose what is loaded: pass it to "
                "generate() as a keyword, or pass recontrol_value_head=False for plain text."
            )
