"""Heads that this process has read: those it was told of by name, and those it fetched for a call."""

import functools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future

from .config_checks import shown
from .errors import HeadUnavailable
from .head import Head
from .head_format import CONFIG_NAME, WEIGHTS_NAME
from .head_hub import folder_at

_REGISTERED: dict[str, Head] = {}


def register_value_heads(
    heads: "Mapping[str, str | os.PathLike[str] | Head | None]", *, token: str | None = None
) -> None:
    """Give heads names by which a generation config may ask for them. Reads each one now, from the Hub too.

    A generation config is data: it comes with a model, or with a request to a server. What it names is looked up here
    and nowhere else, so data never decides what is loaded.

    Args:
        heads: name → a folder, an id on the Hub, "id@revision", or a head of either kind; None takes the name off the
            list. A name that is there is replaced; a head on the Hub stays at the commit it has now.
        token: access token for heads on the Hub; the stored one where None.

    Raises:
        ValueError, TypeError: a name that is no text of 1 to 512 printable characters, or a head that is none.
        HeadError, HeadUnavailable: a head cannot be read or fetched. Nothing is registered then.
    """
    if not isinstance(heads, Mapping):
        raise TypeError(f"heads is a {type(heads).__name__}; pass a dict from names to heads.")
    for name in heads:
        if not isinstance(name, str) or not 0 < len(name) <= 512 or not name.isprintable():
            raise ValueError(f"A head's name is {shown(name)}; it must be a text of 1 to 512 printable characters.")
    loaded = {name: head if head is None else as_head(head, token=token) for name, head in heads.items()}
    for name, head in loaded.items():
        if head is None:
            _REGISTERED.pop(name, None)
        else:
            _REGISTERED[name] = head


def registered_head(name: str, where: str) -> Head:
    """The head of that name.

    Raises:
        ValueError: it is not registered; says how to register it.
    """
    head = _REGISTERED.get(name)  # at once: another thread may take it off
    if head is None:
        known = ", ".join(map(shown, list(_REGISTERED))) or "none"
        raise ValueError(
            f"The {where} names the head {shown(name)}, which is not registered in this process "
            f"(registered: {known}). A config never decides what is loaded. If you trust that head, "
            f"register_value_heads({{{shown(name)}: …}}) or model.set_recontrol_defaults(value_head=…), or start the "
            "server with --head NAME=HEAD; for plain text pass recontrol_value_head=False."
        )
    return head


def as_head(head: "str | os.PathLike[str] | Head", *, revision: str | None = None, token: str | None = None) -> Head:
    """A head as given, or read from the folder or Hub id that was given.

    Raises:
        TypeError: it is neither.
        HeadError, HeadUnavailable: as Head.from_pretrained.
    """
    if isinstance(head, Head):
        return head
    if isinstance(head, str | os.PathLike):
        return load_head(os.fspath(head), revision, token)
    raise TypeError(
        f"recontrol_value_head is of type {type(head).__name__}; it must be an id on the Hub, a folder, a ValueHead or "
        "ControlHead, a dict of these with their weights, or False."
    )


class _HeadCache:
    """Heads already read, so that each generate() does not read again: one load each, also under threads.

    A folder is read again when its files change. A head on the Hub stays at the commit it was first resolved to while
    it is among the last 16; pin a revision to have it stay for good.
    """

    def __init__(self, size: int = 16):
        self._size = size
        self._heads: OrderedDict[tuple[object, ...], Future[Head]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[object, ...], load: Callable[[], Head]) -> Head:
        """The head of that key, from load() the first time. Who asks while it is loaded gets what comes of it."""
        with self._lock:
            head = self._heads.get(key)
            is_mine = head is None
            if head is None:
                head = self._heads[key] = Future()
            self._heads.move_to_end(key)
            while len(self._heads) > self._size:
                self._heads.popitem(last=False)
        if is_mine:  # outside the lock: a Hub that hangs keeps nobody from the heads that are here
            self._load(key, load, head)
        return head.result()

    def _load(self, key: tuple[object, ...], load: Callable[[], Head], head: "Future[Head]") -> None:
        try:
            head.set_result(load())
        except BaseException as error:
            with self._lock:
                if self._heads.get(key) is head:
                    del self._heads[key]  # the next call tries again
            interrupted = HeadUnavailable("The thread that was loading this head was interrupted. Call again.")
            head.set_exception(error if isinstance(error, Exception) else interrupted)
            raise


_HEADS = _HeadCache()


def load_head(name_or_path: str, revision: str | None = None, token: str | None = None) -> Head:
    """The head of that folder or Hub id, read once per process."""
    files: tuple[object, ...] = ()
    if folder := folder_at(name_or_path):
        parts = [part for name in (CONFIG_NAME, WEIGHTS_NAME) if (part := folder / name).exists()]
        files = tuple((part.stat().st_mtime_ns, part.stat().st_size, part.stat().st_ino) for part in parts)
        name_or_path = str(folder.resolve())
    load = functools.partial(Head.from_pretrained, name_or_path, revision=revision, token=token)
    return _HEADS.get((name_or_path, revision, token, files), load)
