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
from .head_hub import (
    CARD_NAME,
    DEADLINE_SECONDS,
    HUB_FAILURES,
    checked_token,
    is_hub_id,
    package_version,
    unavailable,
    within,
)
from .model_card import TAGS, is_as_written

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
    wanted: Any = ["cardData", "downloads", "lastModified", "tags"]
    try:
        found = within(
            DEADLINE_SECONDS,
            lambda: list(api.list_models(filter=tags, sort="downloads", limit=limit, expand=wanted)),
        )
    except HUB_FAILURES as error:
        raise unavailable(error, f"The list of heads for {shown(base_model)}", base_model) from error
    return [_described(model) for model in found]


def _described(model: Any) -> SharedHead:
    card = model.card_data.to_dict() if model.card_data is not None else {}
    kinds = [kind for kind in KINDS if f"{kind}-head" in (model.tags or [])]

    def text(name: str) -> str | None:
        return one_line(card[name]) if isinstance(card.get(name), str) else None

    return SharedHead(
        one_line(model.id),
        kinds[0] if len(kinds) == 1 else None,
        text("reward"),
        text("license"),
        model.downloads,
        model.last_modified,
    )


def push_head(
    head: str | os.PathLike[str] | Head,
    repo_id: str,
    *,
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
        replace_model_card: write the card anew, even if it was edited in the folder or the repository.

    Returns:
        The URL of the commit, or of the pull request.

    Raises:
        HeadError, HeadUnavailable, ValueError: as of `Head.from_pretrained` and `Head.push_to_hub`.
    """
    loaded = head if isinstance(head, Head) else Head.from_pretrained(head, token=token)
    edited = None
    if not isinstance(head, Head) and not replace_model_card:
        card = Path(head).expanduser() / CARD_NAME
        data = card.read_bytes() if card.is_file() else None
        edited = None if data is None or is_as_written(data) else data.decode("utf-8")
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
