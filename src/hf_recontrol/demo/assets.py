"""What the demo brings along, and how it is loaded. Nothing is downloaded."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from ..generation import enable_recontrol
from ..head import Head
from ..rewards import Rewards

FOLDER = Path(__file__).parent
MAX_NEW_TOKENS = 40
HEADS = {
    "constant_control": "constant control",
    "control_head": "control head",
    "linear_head": "linear value head",
    "value_head": "MLP value head",
    "random_direction": "random direction",
}


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' bars for the loading of weights, which here takes milliseconds."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@dataclass(frozen=True)
class Demo:
    """The demo's parts, each read when it is first asked for."""

    folder: Path = FOLDER
    """Holds language_model/, reward/, judge/ and prompts.json."""
    heads_folder: Path | None = None
    """Holds a folder for each of HEADS; `folder` where None."""

    @cached_property
    def model(self) -> Any:
        """The language model, enabled, in float32: its arithmetic is fastest so on a CPU."""
        with _quietly():
            model = AutoModelForCausalLM.from_pretrained(self.folder / "language_model", dtype=torch.float32)
        return enable_recontrol(model.eval())

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The language model's tokenizer."""
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.folder / "language_model")
        return tokenizer

    @cached_property
    def scorers(self) -> Rewards:
        """The reward that heads are trained on, and the judge that none has seen: named "reward" and "judge"."""
        with _quietly():
            return Rewards([str(self.folder / "reward"), str(self.folder / "judge")])

    @cached_property
    def reward(self) -> Rewards:
        """The reward alone."""
        with _quietly():
            return Rewards(str(self.folder / "reward"))

    @cached_property
    def prompts(self) -> dict[str, list[str]]:
        """The first six words of sentences: "train"; and of held-out ones, "validation" (200) and "test" (400)."""
        prompts: dict[str, list[str]] = json.loads((self.folder / "prompts.json").read_text(encoding="utf-8"))
        return prompts

    def head(self, name: str) -> Any:
        """One of HEADS, calibrated."""
        return Head.from_pretrained((self.heads_folder or self.folder) / name)
