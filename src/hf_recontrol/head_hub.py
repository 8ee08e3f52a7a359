"""Where a head's files are: a folder, or one commit of a repository on the Hub."""

import errno
import functools
import logging
import os
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined, unused-ignore]

from .config_checks import shown
from .errors import HeadError, HeadUnavailable
from .head_format import CONFIG_NAME, WEIGHTS_NAME
from .hub_deadline import Deadline, within

CARD_NAME = "README.md"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)
"""What writing to the cache fails with when it is full, not ours, or no folder."""

# HfHubHTTPError is an OSError and the base error of the HTTP client in use, which is another one in huggingface_hub 1
# than in 2: so that client's errors (some pass through the Hub library bare) are caught without naming it. ValueError:
# what the library refuses before any request. RuntimeError: what hf_xet raises when a transfer breaks.
HUB_FAILURES: tuple[type[BaseException], ...] = (
    *hub_errors.HfHubHTTPError.__bases__,
    hub_errors.EntryNotFoundError,
    ValueError,
    RuntimeError,
)

logger = logging.getLogger(__name__)


def package_version() -> str | None:
    """The installed version of this package; None when it runs from a source tree that was never installed."""
    try:
        return metadata.version("hf-recontrol")
    except metadata.PackageNotFoundError:
        return None


@dataclass
class FolderHead:
    """A head in a local folder."""

    directory: Path

    def __str__(self) -> str:
        return f"folder {shown(str(self.directory))}"

    def path(self, name: str, size_limit: int, *, again: bool = False) -> Path:
        """The path of one of the head's files.

        Raises:
            HeadError: there is no such file, or a link that leads out of the folder.
        """
        path = self.directory / name
        if not os.path.lexists(path):
            present = os.listdir(self.directory) if self.directory.is_dir() else []
            raise _missing(name, present)
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(self._root()):
            raise HeadError(f"Its {name} is a link that leads out of the folder. Put the file itself there.")
        return path

    def _root(self) -> Path:
        """What links may lead to: the folder; of one in the Hub's cache, that cache, whose files are links."""
        folder = Path(os.path.realpath(self.directory))
        snapshots = [above for above in folder.parents if above.name == "snapshots"]
        cached = [above.parents[1] for above in snapshots if above.parent.name.startswith("models--")]
        return cached[0] if cached else folder


@dataclass
class HubHead:
    """A head in a repository on the Hub. All files come from the commit that the first one came from."""

    repo_id: str
    revision: str | None = None
    token: str | bool | None = None
    subfolder: str | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    commit: str | None = None
    """The commit that `revision` stood for when the first file was fetched."""
    deadline: Deadline | None = None
    """Of all files together; None before the first request."""

    def __str__(self) -> str:
        return f"Hub repository {shown(self.repo_id)} at revision {shown(self.commit or self.revision or 'main')}"

    def path(self, name: str, size_limit: int, *, again: bool = False) -> Path:
        """The path of one of the head's files in the cache, downloaded if it is not there.

        Args:
            name: the file's name; nothing else is downloaded.
            size_limit: bytes that the file can have at most; a larger one is not downloaded.
            again: download it even if it is in the cache (because what is there is damaged).

        Raises:
            HeadUnavailable: no network, no such repository, revision or file, no access, or no answer in time.
            HeadError: the file is too large, or the repository has pickled weights instead.
        """
        deadline = self.deadline = self.deadline or Deadline()
        try:
            path = within(deadline, lambda: self._fetch(name, size_limit, again, deadline))
        except HeadError:  # it is a ValueError, as are refusals of the Hub library
            raise
        except HUB_FAILURES as error:
            subject = f"The head in {self} (no folder here is called so)"
            raise self._missing_file(name, error) or unavailable(error, subject, self.repo_id) from error
        if self.commit is None:  # <cache>/models--…/snapshots/<commit>/[subfolder/]name
            self.commit = path.parents[len(Path(self.subfolder or "").parts)].name
            logger.info("The head %s is read at commit %s.", self.repo_id, self.commit)
        return path

    def _fetch(self, name: str, size_limit: int, again: bool, deadline: Deadline) -> Path:
        """The file's size is asked for first: a stranger's file may fill the disk long before the deadline."""
        revision = self.commit or self.revision
        ask = functools.partial(
            hf_hub_download,
            self.repo_id,
            name,
            subfolder=self.subfolder,
            revision=revision,
            token=self.token,
            cache_dir=self.cache_dir,
            local_files_only=self.local_files_only,
            force_download=again,
            library_name="hf-recontrol",
            library_version=package_version(),
        )
        there: Any = ask(dry_run=True)
        if there.will_download and (there.file_size or 0) > size_limit:
            raise too_large(name, there.file_size, size_limit)
        cached = try_to_load_from_cache(
            self.repo_id, "/".join(filter(None, (self.subfolder, name))), self.cache_dir, revision
        )
        if not again and cached == there.local_path:  # else the file is to come, or the cache does not know the branch
            return Path(cached)
        return Path(ask(tqdm_class=deadline.bar()))

    def _missing_file(self, name: str, error: BaseException) -> HeadError | None:
        """What to say of a repository without `name` that has pickled weights; None when there is nothing to add."""
        if not isinstance(error, hub_errors.EntryNotFoundError) or isinstance(
            error, hub_errors.LocalEntryNotFoundError
        ):
            return None
        api = HfApi(token=self.token, library_name="hf-recontrol", library_version=package_version())
        revision = self.commit or self.revision
        try:
            info = within(self.deadline or Deadline(), lambda: api.model_info(self.repo_id, revision=revision))
        except HUB_FAILURES:
            return None  # the first failure is the one to report
        folder = f"{self.subfolder}/" if self.subfolder else ""
        present = [sibling.rfilename for sibling in info.siblings or []]
        names = [path.removeprefix(folder) for path in present if path.startswith(folder)]
        return _missing(name, names) if any(path.endswith(PICKLE_SUFFIXES) for path in names) else None


def locate(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> FolderHead | HubHead:
    """The folder or the Hub repository that `name` stands for. An existing folder wins. Nothing is fetched.

    Raises:
        ValueError: a revision said twice, or asked of a folder, or a subfolder elsewhere.
        HeadError: the subfolder is a link that leads out of the folder.
        HeadUnavailable: `name` is a path and leads to no folder.
    """
    text = os.fspath(name)
    repo_id, at, pinned = text.rpartition("@")
    if not (at and repo_id and pinned) or folder_at(text):
        repo_id, pinned = text, ""
    if pinned and revision is not None:
        raise ValueError(f"The head is {text!r} and revision={revision!r}: say the revision once.")
    if subfolder and (Path(subfolder).is_absolute() or ".." in Path(subfolder).parts):
        raise ValueError(f'subfolder is {shown(subfolder)}; it is a place in the head\'s folder, such as "polite".')
    directory = folder_at(repo_id)
    if directory is not None:
        if pinned or revision is not None:
            raise ValueError(
                f"{repo_id!r} is a folder here, and a folder has no revision {pinned or revision!r}. Leave the "
                "revision out, or call from another working directory to get the Hub repository of that name."
            )
        inside = directory / (subfolder or "")
        if not Path(os.path.realpath(inside)).is_relative_to(os.path.realpath(directory)):
            raise HeadError(f"The subfolder {shown(subfolder)} is a link that leads out of {shown(str(directory))}.")
        return FolderHead(inside)
    if isinstance(name, os.PathLike) or not is_head_id(repo_id):
        raise HeadUnavailable(
            f"{shown(text)} is neither a folder nor the id of a Hub repository. Expected a folder that "
            f'Head.save_pretrained wrote (it holds {CONFIG_NAME} and {WEIGHTS_NAME}), or an id like "user/head".'
        )
    return HubHead(repo_id, pinned or revision, checked_token(token), subfolder, cache_dir, local_files_only)


def folder_at(name: str) -> Path | None:
    """The folder that `name` leads to, if it leads to one."""
    try:
        folder = Path(name).expanduser()
        return folder if name and folder.is_dir() else None
    except (OSError, RuntimeError):  # longer than a path can be; ~somebody who is not known here
        return None


def is_head_id(name: str) -> bool:
    """Whether `name` can be the id of a head on the Hub: a user's, so with one slash."""
    return "/" in name and _may_be_on_the_hub(name) and not Path(name).is_file()


def is_hub_id(name: str | None) -> bool:
    """Whether `name` can be the id of a Hub repository and is no path on this machine."""
    return name is not None and _may_be_on_the_hub(name) and not Path(name).expanduser().exists()


def _may_be_on_the_hub(name: str) -> bool:
    try:
        validate_repo_id(name)
    except hub_errors.HFValidationError:
        return False
    return name.isascii()


def check_repo_id(repo_id: str) -> None:
    """Raise ValueError unless a repository on the Hub can have this name."""
    if not isinstance(repo_id, str) or not _may_be_on_the_hub(repo_id):
        raise ValueError(
            f'repo_id is {shown(repo_id)}, and no repository on the Hub can be called so. Expected is "user/head": '
            "letters, digits, -, _ and . after the user's name and one slash."
        )


def checked_token(token: str | bool | None) -> str | bool | None:
    """`token`, if it can be sent. An HTTP client would quote one that cannot in its error message."""
    if isinstance(token, str) and not (token.isascii() and token.isprintable() and " " not in token):
        raise ValueError(
            "The token holds a space, a line break or another character that no token has. Pass token.strip()."
        )
    return token


def unavailable(error: BaseException, subject: str, repo_id: str) -> HeadUnavailable:
    """A HeadUnavailable that says what failed and what to do. Quotes nothing that may hold a token."""
    chain = _chain(error)
    statuses = [getattr(getattr(link, "response", None), "status_code", None) for link in chain]
    status = next((status for status in statuses if status is not None), 0)
    mend = "Check the network, HF_ENDPOINT and https://status.huggingface.co, and try again."

    def is_a(name: str) -> bool:  # by name: not every version of the Hub library has every class
        kind = getattr(hub_errors, name, None)
        return kind is not None and any(isinstance(link, kind) for link in chain)

    if any(getattr(link, "errno", None) in NO_ROOM for link in chain):
        words = "cannot be kept in the cache, which is full or cannot be written to. Make room, or pass cache_dir=."
    elif is_a("LocalEntryNotFoundError") and (len(chain) == 1 or is_a("OfflineModeIsEnabled")):
        words = (
            "is not in the cache, and HF_HUB_OFFLINE=1 or local_files_only=True forbids fetching it. Do so once online."
        )
    elif is_a("OfflineModeIsEnabled"):
        words = "cannot be had while HF_HUB_OFFLINE=1 is set: it takes the Hub. Unset it."
    elif is_a("GatedRepoError"):
        page = f"https://huggingface.co/{repo_id}"
        words = f"is gated. Accept its terms at {page}, then pass token= or run `hf auth login`."
    elif is_a("RevisionNotFoundError"):
        words = "has no such revision. Check the branch, tag or commit."
    elif status == 403:
        words = "does not admit this token (403). Pass one with the right access, or run `hf auth login`."
    elif is_a("RepositoryNotFoundError"):
        words = "does not exist, or is private. Check the id; for a private one pass "
        words += "token= or run `hf auth login`."
    elif status == 401 or is_a("LocalTokenNotFoundError"):
        words = "needs a valid token (401). Pass token= or run `hf auth login`."
    elif status == 412:
        words = "was changed by somebody else meanwhile (412). Look at the new commit, and push again."
    elif status == 429:
        words = "cannot be had now: too many requests (429). Wait some minutes, or pass token=."
    elif status in (400, 402, 409, 413, 422):
        words = f"was refused by the Hub ({status}): {_said(chain)}"
    elif status >= 500:
        words = f"cannot be had now: the Hub failed ({status}). {mend}"
    elif any(isinstance(link, TimeoutError) for link in chain):
        words = f"cannot be had now: no answer from the Hub in time. {mend}"
    elif is_a("EntryNotFoundError") and not is_a("LocalEntryNotFoundError"):
        words = f"lacks a file: a head has {CONFIG_NAME} and {WEIGHTS_NAME}. Is it a head at all?"
    else:
        words = f"could not be reached ({', '.join(type(link).__name__ for link in chain)}). {mend}"
    return HeadUnavailable(f"{subject} {words}")


def _said(chain: list[BaseException]) -> str:
    """What the Hub says of a request that it refuses."""
    said = next((str(text) for link in chain if (text := getattr(link, "server_message", None))), "it gives no reason.")
    return "its words are kept back, since they may hold a token." if "hf_" in said else shown(said, 500)


def _chain(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__
    return chain


def too_large(name: str, size: int, limit: int) -> HeadError:
    """What to say of a file beyond its limit."""
    return HeadError(f"Its {name} has {size} bytes; this head's can have {limit} at most. Save the head again.")


def _missing(name: str, present: list[str]) -> HeadError:
    pickles = sorted(path for path in present if path.endswith(PICKLE_SUFFIXES))
    if pickles:
        return HeadError(
            f"It has no {name}, only {shown(pickles)}: safetensors only; such a file can run code when it is opened, "
            "so it never is. Load it where you trust it, copy the weights into a ValueHead, and call save_pretrained."
        )
    return HeadError(
        f"It has no {name}. A head has {CONFIG_NAME} and {WEIGHTS_NAME}; Head.save_pretrained writes them."
    )
