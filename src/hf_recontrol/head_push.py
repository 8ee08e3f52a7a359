"""How a head's files get to the Hub: in one commit, and a generate.py, which names that commit, in a second."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo

from .config_checks import shown
from .custom_generate import GENERATE_NAME
from .head_hub import (
    CARD_NAME,
    HUB_FAILURES,
    check_repo_id,
    checked_token,
    package_version,
    unavailable,
)
from .hub_deadline import Deadline, within
from .model_card import is_as_written

MAX_CARD_BYTES = 2**20

Files = dict[str, bytes]
Second = Callable[[str, str], Files]
"""From a repository's full id and the commit of a head to what is sent after it: a generate.py, which names that
commit, and the card that speaks of it."""


def push_files(
    repo_id: str,
    files: Files,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    replace_model_card: bool = False,
    second: Second | None = None,
) -> str:
    """Send `files` to the Hub in one commit, all or none, and return the URL of the commit or pull request.

    Makes the repository and the branch if they do not exist. A card there that was edited by hand stays, with a
    warning, unless `replace_model_card`. A custom_generate/generate.py that is there steers by the head of before: it
    is taken away, and if no `second` brings another, with a warning.

    Raises:
        ValueError: no repository can be called so, or the card is no UTF-8.
        HeadUnavailable: no network, no token, no right to write, no answer in time, or somebody else pushed meanwhile.
            Where it was the second commit that failed, the message says so.
    """
    check_repo_id(repo_id)
    check_card(files.get(CARD_NAME, b""))
    api = HfApi(token=checked_token(token), library_name="hf-recontrol", library_version=package_version())
    try:
        repo_id, there = within(Deadline(), lambda: _target(api, repo_id, revision, private))
        present = {sibling.rfilename for sibling in there.siblings or []}
        keeps_card = not replace_model_card and within(Deadline(), lambda: _has_edited_card(api, there))
        sent = {name: data for name, data in files.items() if not (keeps_card and name == CARD_NAME)}
        stale = [CommitOperationDelete(GENERATE_NAME)] if GENERATE_NAME in present else []
        commit = _commit(
            api,
            repo_id,
            sent,
            stale,
            commit_message=commit_message or "Upload a head",
            revision=revision,
            create_pr=create_pr,
            parent_commit=there.sha,  # a push by somebody else in between is an error, not overwritten
        )
    except HUB_FAILURES as error:
        late = " (it may still arrive: look before you push again)" if isinstance(error, TimeoutError) else ""
        raise unavailable(error, f"The head was not pushed to {shown(repo_id)}{late}: it", repo_id) from error
    if keeps_card:
        warnings.warn(
            f"The card of {shown(repo_id)} was edited by hand and is kept: what it says of the head"
            f"{' and of custom_generate' if second or stale else ''} is for you to bring up to date. To have it "
            "written anew, push with replace_model_card=True.",
            stacklevel=3,
        )
    if second is None:
        if stale:
            warnings.warn(
                f"{GENERATE_NAME} of {shown(repo_id)} steered by the head of before, and was taken away. To have it "
                "again, push with custom_generate=True.",
                stacklevel=3,
            )
        return str(commit.pr_url or commit.commit_url)
    last = _push_second(api, repo_id, second(repo_id, commit.oid), commit, revision, keeps_card)
    return str(commit.pr_url or last.commit_url)


def check_card(data: bytes) -> None:
    """Raise ValueError unless a card is text."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"The card is not UTF-8 ({error}). Save {CARD_NAME} as UTF-8.") from error


def _target(api: HfApi, repo_id: str, revision: str | None, private: bool | None) -> tuple[str, ModelInfo]:
    """The repository's full id and what it has, made if it does not exist."""
    found = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(found, branch=revision, exist_ok=True)
    return found, api.model_info(found, revision=revision, files_metadata=True)


def _has_edited_card(api: HfApi, there: ModelInfo) -> bool:
    """Whether the repository has a card, and not one that was written by us and left so."""
    sizes = [sibling.size or 0 for sibling in there.siblings or [] if sibling.rfilename == CARD_NAME]
    if not sizes or sizes[0] > MAX_CARD_BYTES:
        return bool(sizes)
    return not is_as_written(Path(api.hf_hub_download(there.id, CARD_NAME, revision=there.sha)).read_bytes())


def _commit(
    api: HfApi, repo_id: str, files: Files, stale: Sequence[CommitOperationDelete] = (), **how: Any
) -> CommitInfo:
    """One commit, in the time that a slow line needs."""
    added = [CommitOperationAdd(name, content) for name, content in files.items()]
    deadline = Deadline(sum(map(len, files.values())))
    commit: CommitInfo = within(deadline, lambda: api.create_commit(repo_id, [*added, *stale], **how))
    return commit


def _push_second(
    api: HfApi, repo_id: str, files: Files, first: CommitInfo, revision: str | None, keeps_card: bool
) -> CommitInfo:
    """The commit of generate.py upon that of the head."""
    sent = {name: data for name, data in files.items() if not (keeps_card and name == CARD_NAME)}
    message, branch = f"{GENERATE_NAME} for {first.oid[:7]}", first.pr_revision or revision
    try:
        return _commit(api, repo_id, sent, commit_message=message, revision=branch, parent_commit=first.oid)
    except HUB_FAILURES as error:
        subject = f"The head was pushed to {shown(repo_id)}, but without {GENERATE_NAME} (push again): the repository"
        raise unavailable(error, subject, repo_id) from error
