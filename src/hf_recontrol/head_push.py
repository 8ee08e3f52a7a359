"""How a head's files get to the Hub: in one commit, and a generate.py, which names that commit, in a second."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo

from .config_checks import shown
from .custom_generate import GENERATE_NAME
from .head_hub import (
    CARD_NAME,
    DEADLINE_SECONDS,
    HUB_FAILURES,
    SLOWEST_BYTES_PER_SECOND,
    checked_token,
    package_version,
    unavailable,
    within,
)
from .model_card import is_as_written


def push_files(
    repo_id: str,
    files: Mapping[str, bytes],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    replace_model_card: bool = False,
    generate_py: Callable[[str, str], str] | None = None,
) -> str:
    """Send `files` to the Hub in one commit, all or none, and return the URL of the commit or pull request.

    Makes the repository and the branch if they do not exist. A card there that was edited by hand stays, unless
    `replace_model_card`. A custom_generate/generate.py that is there steers by the head of before: it is taken away,
    with a warning.

    Args:
        generate_py: from the repository's full id and the commit of `files` to a custom_generate/generate.py. It is
            sent in a second commit, since it names the first, together with the card, which speaks of it.

    Raises:
        HeadUnavailable: no network, no token, no right to write, no answer in time, or somebody else pushed meanwhile.
            Where it was the second commit that failed, the message says so.
    """
    api = HfApi(token=checked_token(token), library_name="hf-recontrol", library_version=package_version())
    commit_message = commit_message or "Upload a head"

    def prepare() -> tuple[str, ModelInfo, bool]:
        found = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(found, branch=revision, exist_ok=True)
        info = api.model_info(found, revision=revision)
        has_card = CARD_NAME in {sibling.rfilename for sibling in info.siblings or []}
        edited = has_card and not replace_model_card and not is_as_written(_card(api, found, info.sha))
        return found, info, edited

    try:
        repo_id, there, keeps_card = within(DEADLINE_SECONDS, prepare)
        present = {sibling.rfilename for sibling in there.siblings or []}
        sent = {name: data for name, data in files.items() if not (keeps_card and name == CARD_NAME)}
        later = {} if generate_py is None else {name: sent.pop(name) for name in {CARD_NAME} & sent.keys()}
        stale = [CommitOperationDelete(GENERATE_NAME)] if generate_py is None and GENERATE_NAME in present else []
        commit = _commit(
            api,
            repo_id,
            sent,
            stale,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=there.sha,  # a push by somebody else in between is an error, not overwritten
        )
    except HUB_FAILURES as error:
        late = " (it may still arrive: look before you push again)" if isinstance(error, TimeoutError) else ""
        raise unavailable(error, f"The head was not pushed to {shown(repo_id)}{late}: it", repo_id) from error
    if stale:
        warnings.warn(
            f"{GENERATE_NAME} of {shown(repo_id)} steered by the head of before, and was taken away. To have it again, "
            "push with custom_generate=True.",
            stacklevel=3,
        )
    if generate_py is None:
        return str(commit.pr_url or commit.commit_url)
    later[GENERATE_NAME] = generate_py(repo_id, commit.oid).encode()
    last = _push_second(api, repo_id, later, commit, revision)
    return str(commit.pr_url or last.commit_url)


def _commit(
    api: HfApi, repo_id: str, files: Mapping[str, bytes], stale: Sequence[CommitOperationDelete] = (), **how: Any
) -> CommitInfo:
    """One commit, in the time that a slow line needs."""
    added = [CommitOperationAdd(name, content) for name, content in files.items()]
    seconds = DEADLINE_SECONDS + sum(map(len, files.values())) / SLOWEST_BYTES_PER_SECOND
    commit: CommitInfo = within(seconds, lambda: api.create_commit(repo_id, [*added, *stale], **how))
    return commit


def _card(api: HfApi, repo_id: str, revision: str | None) -> bytes:
    return Path(api.hf_hub_download(repo_id, CARD_NAME, revision=revision)).read_bytes()


def _push_second(
    api: HfApi, repo_id: str, files: Mapping[str, bytes], first: CommitInfo, revision: str | None
) -> CommitInfo:
    """The commit of generate.py upon that of the head; with a warning where the card is silent about it."""
    try:
        message, branch = f"{GENERATE_NAME} for {first.oid[:7]}", first.pr_revision or revision
        last = _commit(api, repo_id, files, commit_message=message, revision=branch, parent_commit=first.oid)
        card = files.get(CARD_NAME) or within(DEADLINE_SECONDS, lambda: _card(api, repo_id, last.oid))
    except HUB_FAILURES as error:
        subject = f"The head was pushed to {shown(repo_id)}, but without {GENERATE_NAME} (push again): the repository"
        raise unavailable(error, subject, repo_id) from error
    if b"custom_generate" not in card:
        warnings.warn(
            f"The card of {shown(repo_id)} is kept, and does not speak of custom_generate. Add it "
            "there, or push with replace_model_card=True.",
            stacklevel=4,
        )
    return last
