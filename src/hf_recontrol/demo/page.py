"""The page of the demo: its own language model, and its heads or others for that model."""

from collections.abc import Mapping
from typing import Any

from ..head import Head
from ..page import build_page
from .assets import HEADS, Demo


def demo_page(heads: Mapping[str, Head] | None = None) -> Any:
    """The page, a gradio.Blocks; `launch_page` serves it.

    Args:
        heads: name → head for the demo's language model; the demo's own where None or empty.
    """
    demo = Demo()
    named = dict(heads or {}) or {HEADS[name]: demo.head(name) for name in ("control_head", "value_head", *HEADS)}
    return build_page(demo.model, demo.tokenizer, named, demo.prompts["test"][:4])
