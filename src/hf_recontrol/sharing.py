"""Heads on the Hub: sending one there with its card, and finding those of a language model."""

import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from .card_text import one_line
from .config_checks import shown
from .head import Head
from .head_files import edited_card
from .head_hub import (
    HUB_FAILURES,
    checked_token,
    is_hub_id,
    package_version,
    unavailable,
)
from .hub_deadline import Deadline, within
from .model_card import REWARD_TAG, TAGS

KINDS = ("value", "control")


@dataclass(frozen=True)
class SharedHead:
    """A head's repository as its owner's card describes it: one line each, printable, and not checked."""

    repo_id: str
    kind: str | None
    """"value" or "control"; None where the card has no such tag."""
    reward: str | None
    """What the reward is called."""
    license: str | None
    downloads: int | None
    """Of the last 30 days, as the Hub counts."""
    last_modified: datetime | None


def list_heads(
    base_model: str, *, kind: str | None = None, limit: int | None = None, token: str | bool | None = None
) -> list[SharedHead]:
    """The heads on the Hub whose cards name this base model, those downloaded most first. Loads none of them.

    Args:
        base_model: its id on the Hub.
        kind: "value" or "control"; both where None.
        limit: as many at most; all where None.
        token: to see private ones too; that of `hf auth login` where None.

    Raises:
        ValueError: a folder or a text that is no id, or another kind.
        HeadUnavailable: no network, or no answer in time.
    """
    if not is_hub_id(base_model):
        raise ValueError(
            f"The base model is {shown(base_model)}; heads are found by its id on the Hub, such as Qwen/Qwen3-0.6B."
        )
    if kind not in (None, *KINDS):
        raise ValueError(f'kind is {shown(kind)}; it must be "value" or "control", or None for both.')
    tags = [TAGS[0], f"base_model:adapter:{base_model}", *([f"{kind}-head"] if kind else [])]
    api = HfApi(token=checked_token(token), library_name="hf-recontrol", library_version=package_version())
    wanted: Any = ["downloads", "lastModified", "tags"]  # no card: one that cannot be parsed would end the whole list
    try:
        found = within(
            Deadline(),
            lambda: list(api.list_models(filter=tags, sort="downloads", limit=limit, expand=wanted)),
        )
    except HUB_FAILURES as error:
        raise unavailable(error, f"The list of heads for {shown(base_model)}", base_model) from error
    return [_described(model) for model in found]


def _described(model: Any) -> SharedHead:
    tags = [tag for tag in model.tags or [] if isinstance(tag, str)]
    kinds = [kind for kind in KINDS if f"{kind}-head" in tags]

    def after(prefix: str) -> str | None:
        return next((one_line(tag.removeprefix(prefix)) for tag in tags if tag.startswith(prefix)), None)

    return SharedHead(
        one_line(model.id),
        kinds[0] if len(kinds) == 1 else None,
        after(REWARD_TAG),
        after("license:"),
        model.downloads,
        model.last_modified,
    )


def push_head(
    head: str | os.PathLike[str] | Head,
    repo_id: str,
    *,
    base_model: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    replace_model_card: bool = False,
    custom_generate: bool = False,
) -> str:
    """Send a head to the Hub, checked, as `Head.push_to_hub` does; of a folder with the card that was edited there.

    Args:
        head: a folder, an id on the Hub, "id@revision", or a head itself.
        base_model: the base model's id on the Hub, put into the head's config: by it the head is found.
        replace_model_card: write the card anew, even if it was edited in the folder or the repository.

    Returns:
        The URL of the commit, or of the pull request.

    Raises:
        HeadError, HeadUnavailable, ValueError: as of `Head.from_pretrained` and `Head.push_to_hub`.
    """
    loaded = head if isinstance(head, Head) else Head.from_pretrained(head, token=token)
    if base_model is not None:
        if not is_hub_id(base_model):
            raise ValueError(f"base_model is {shown(base_model)}; expected is an id on the Hub, user/model.")
        loaded.config.base_model_name_or_path = base_model
    edited = None if isinstance(head, Head) or replace_model_card else edited_card(Path(head).expanduser())
    return loaded.push_to_hub(
        repo_id,
        revision=revision,
        token=token,
        private=private,
        commit_message=commit_message,
        create_pr=create_pr,
        replace_model_card=replace_model_card,
        custom_generate=custom_generate,
        model_card=edited,
    )
