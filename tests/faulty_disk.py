"""A hand between the store and the disk: it sees each file operation before it happens."""

import builtins
import fcntl
import io
import os

import pytest

OS_CALLS = ["fsync", "listdir", "mkdir", "open", "rename", "replace", "stat", "unlink"]
METHODS = ["close", "read", "readall", "readinto", "truncate", "write"]
open_file = open


class Disk:
    """While it is open, `before(name, path, *arguments)` is called before each file operation below `root`.

    What it raises, the operation raises; what it returns, if not None, are the operation's arguments instead. The one
    exception is close, which closes all the same, as close() does. Nothing is really synced.
    """

    def __init__(self, root, before):
        self.root, self.before = str(root), before
        self.paths = {}  # of descriptors
        self.files = []

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for name in OS_CALLS:
            self.patch.setattr(os, name, self._os_call(name, getattr(os, name)))
        self.patch.setattr(fcntl, "flock", self._flock(fcntl.flock))
        for module in (builtins, io):
            self.patch.setattr(module, "open", self._open)
        return self

    def __exit__(self, *exception):
        self.patch.undo()
        for file in self.files:  # those that a killed process leaves open
            file.before = None
            file.close()

    def _os_call(self, name, real):
        def call(path, *arguments, **keywords):
            where = self.paths.get(path) if isinstance(path, int) else os.fspath(path)
            ours = isinstance(where, str) and where.startswith(self.root)
            if ours:
                self.before(name, where, *map(str, arguments))
            if ours and name == "fsync":
                return None
            result = real(path, *arguments, **keywords)
            if ours and name == "open":
                self.paths[result] = where
            return result

        return call

    def _flock(self, real):
        def flock(file, operation):
            self.before("flock", file.name)
            return real(file, operation)

        return flock

    def _open(self, path, mode="r", *arguments, **keywords):
        if isinstance(path, int) or not os.fspath(path).startswith(self.root) or "b" not in mode:
            return open_file(path, mode, *arguments, **keywords)
        self.before("create", os.fspath(path), mode)
        file = _File(os.fspath(path), mode.replace("b", ""))
        file.before = self.before
        self.files.append(file)
        self.paths[file.fileno()] = file.name
        return file


class _File(io.FileIO):
    before = None


def _method(name):
    real = getattr(io.FileIO, name)

    def method(self, *arguments):
        if self.closed or self.before is None:
            return real(self, *arguments)
        if name == "close":
            real(self)
        instead = self.before(name, self.name, *arguments)
        return real(self, *arguments) if instead is None else real(self, *instead)

    return method


for _name in METHODS:
    setattr(_File, _name, _method(_name))


class PowerCut:
    """A disk that keeps what was synced, and of the rest what it likes: the worst that POSIX allows.

    It is told what is done, as Disk's `before`, and after it `lay_out` writes down what the disk may hold.
    """

    def __init__(self, root):
        self.live = {str(root): None}  # path → file, None for a folder
        self.kept = dict(self.live)
        self.pending = []  # changes of folders that are not synced: (folder, {path: file, or "" where it is removed})

    def __call__(self, name, path, *arguments):
        match name:
            case "mkdir":
                self._link({path: None})
            case "create" if path not in self.live and arguments[0][0] in "wax":
                self._link({path: _Contents()})
            case "create" if arguments[0][0] == "w":
                self.live[path].becomes(b"")
            case "write":
                self.live[path].becomes(self.live[path].now + bytes(arguments[0]))
            case "truncate":
                self.live[path].becomes(self.live[path].now[: arguments[0]])
            case "rename" | "replace":
                self._link({arguments[0]: self.live[path], path: ""})
            case "unlink":
                self._link({path: ""})
            case "fsync" if self.live[path] is None:
                for folder, change in self.pending:
                    if folder == path:
                        _apply(self.kept, change)
                self.pending = [(folder, change) for folder, change in self.pending if folder != path]
            case "fsync":
                self.live[path].sync()

    def _link(self, change):
        self.pending.append((os.path.dirname(next(iter(change))), change))
        _apply(self.live, change)

    def lay_out(self, root, target, chance, mode):
        """What is there after the power cut: all that was done ("all"), what was synced ("none"), or by chance."""
        entries = dict(self.kept)
        for _, change in self.pending:
            if mode == "all" or (mode == "chance" and chance.random() < 0.5):
                _apply(entries, change)
        target.mkdir()
        for path, file in sorted(entries.items()):
            there = target / os.path.relpath(path, root)
            if there.parent.is_dir() and file is None:
                there.mkdir(exist_ok=True)
            elif there.parent.is_dir():
                there.write_bytes(file.after(chance, mode))


def _apply(entries, change):
    for path, file in change.items():
        if file == "":
            entries.pop(path, None)
        else:
            entries[path] = file


class _Contents:
    def __init__(self):
        self.now = self.synced = b""
        self.since = []  # what it was, between then and now

    def becomes(self, data):
        self.now = data
        self.since.append(data)

    def sync(self):
        self.synced, self.since = self.now, []

    def after(self, chance, mode):
        if mode != "chance":
            return self.now if mode == "all" else self.synced
        some = chance.choice([self.synced, *self.since])
        some = some[: chance.randint(min(len(self.synced), len(some)), len(some))]
        longer = max(map(len, self.since), default=0) - len(some)
        return some + bytes(chance.choice([0, max(0, longer)]))  # the length may come before the data
