"""What tells each process of vLLM which heads there are, and that they are the same ones everywhere."""

import hashlib
import json
from typing import Any

from ..config_checks import shown
from ..head import Head
from ..head_format import CONFIG_NAME, MAX_CONFIG_BYTES
from ..head_hub import HubHead, locate

VARIABLE = "HF_RECONTROL_VLLM"
"""The environment variable with the heads, as JSON: {"heads": {name: folder or Hub id}, "default": name,
"digests": {name: digest_of(head)}}, of which only the first must be there."""
KEY = "recontrol"
"""Where additional_config has the same."""
ROUTER = "hf_recontrol.serving.vllm:RequestRouter"
"""What --logits-processors takes."""
V2 = "VLLM_USE_V2_MODEL_RUNNER"
"""vLLM's variable: 0 chooses its V1 model runner, the one that can be steered."""


def pinned(head: str) -> str:
    """Of an id on the Hub that id at its present commit: workers may start later, when a branch has moved."""
    source = locate(head)
    if not isinstance(source, HubHead):
        return head
    source.path(CONFIG_NAME, MAX_CONFIG_BYTES)  # the first file that is fetched tells the commit
    return f"{source.repo_id}@{source.commit}"


def digest_of(head: Head) -> str:
    """A hash of all that the head's files say: its weights, defaults and calibration."""
    return hashlib.sha256((head.config.to_json_string() + head.digest()).encode()).hexdigest()


def check_settings(settings: Any) -> None:
    """Raise ValueError unless they are as VARIABLE says."""
    heads = settings.get("heads") if isinstance(settings, dict) else None
    if not isinstance(heads, dict) or not heads or set(settings) - {"heads", "default", "digests"}:
        raise ValueError(
            f"The heads for vLLM are {shown(settings)}; expected is "
            '{"heads": {"NAME": "folder or Hub id"}, "default": "NAME"}, where "default" may be left out.'
        )
    digests = settings.get("digests", heads)
    if not isinstance(digests, dict) or set(digests) != set(heads):
        raise ValueError(
            f"The digests of the heads are {shown(digests)}; expected is one for each of "
            f"{', '.join(map(shown, heads))}, as steering_arguments makes them, or no digests at all."
        )
    for name, head in heads.items():
        if not isinstance(name, str) or not 0 < len(name) <= 512 or not name.isprintable() or name.startswith("{"):
            raise ValueError(
                f"A head's name is {shown(name)}; it must be a text of 1 to 512 printable characters, not beginning "
                "with a brace."
            )
        if not isinstance(head, str):
            raise ValueError(f"The head {shown(name)} is {shown(head)}; it must be a folder or an id on the Hub.")
    default = settings.get("default")
    if default is not None and default not in heads:
        raise ValueError(
            f"The default head is {shown(default)}, but the heads are {', '.join(map(shown, heads))}. Name one of them."
        )


def settings_from(text: str | None) -> Any:
    """The settings in the environment variable's text; None where it is not set.

    Raises:
        ValueError: it is no JSON.
    """
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{VARIABLE} is {shown(text)}, which is no JSON: {error}.") from error
