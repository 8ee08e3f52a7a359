"""What is written so that it outlasts a crash and a power cut. A fault of the disk is a CollectError."""

import errno
import io
import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import CollectError

if sys.platform != "win32":
    import fcntl


@contextmanager
def faults(doing: str) -> Iterator[None]:
    """An OSError inside becomes a CollectError: "`doing` failed: …"."""
    try:
        yield
    except OSError as error:
        raise CollectError(
            f"{doing} failed: {error}. Earlier blocks are kept: make room or mend the disk, and call again with the "
            "same arguments."
        ) from error


def make_folder(folder: Path) -> None:
    """Make it and its parents. What is there already is synced too: who made it may have been killed before that."""
    folder = folder.absolute()
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
    with suppress(PermissionError):  # a parent that may not be read cannot be synced
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and new files in it outlast a power cut."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # so a file system answers that has nothing to sync there, as some network ones
            raise
    finally:
        os.close(descriptor)


def write_all(file: io.FileIO, data: bytes) -> None:
    """Write at the end of the file, and sync it. Linux takes at most 2 GiB at a time."""
    rest = memoryview(data)
    while rest:
        written = file.write(rest)
        if not written:
            raise OSError(errno.EIO, f"{len(rest)} bytes were not written")
        rest = rest[written:]
    os.fsync(file.fileno())


def write_file(path: Path, data: bytes) -> None:
    """Put the data where `path` is, whole or not at all. It takes sync_folder to make it last."""
    unfinished = path.with_name(f"{path.name}.tmp")
    with open(unfinished, "wb", buffering=0) as file:
        write_all(file, data)
    os.replace(unfinished, path)


def set_aside(path: Path) -> str:
    """Rename the file to the first name that is free of path.bad, path.bad2, path.bad3, …, which is returned."""
    names = (f"{path.name}.bad{n if n > 1 else ''}" for n in itertools.count(1))
    name = next(name for name in names if not path.with_name(name).exists())
    os.rename(path, path.with_name(name))
    return name


def is_locked(file: io.FileIO) -> bool:
    """Whether another opening of the file, here or in another process, holds its lock; it is taken where not.

    The system frees it when its process dies, in whatever way.
    """
    if sys.platform == "win32":  # no flock there: two collectors in one folder are the caller's to avoid
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):
            raise CollectError(
                f"The file system of {file.name!r} cannot lock files ({error}), so two runs could spoil each other's "
                "rollouts. Mount it with flock, or give an output_dir on another disk."
            ) from error
        raise
    return False
