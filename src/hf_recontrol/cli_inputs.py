"""What `rollouts` and `train` are given on the command line: a model and rewards; and how SIGTERM ends them."""

import os
import runpy
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from .rewards import RewardFunc, Rewards

TERMINATED = 128 + signal.SIGTERM


def language_model(
    name: str, *, dtype: str = "auto", device: Any = None, revision: str | None = None
) -> tuple[Any, Any]:
    """(model, tokenizer), the model on its device; without the bars of loading."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, revision=revision)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    finally:
        if shows_bars:
            logging.enable_progress_bar()
    return model.to(device or own_device()).eval(), tokenizer


def own_device() -> str:
    """This process's accelerator, of which `accelerate launch` and torchrun give each one; the CPU without any."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None else f"{accelerator.type}:{os.environ.get('LOCAL_RANK', '0')}"


def is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def reward_functions(
    named: Sequence[str],
    weights: Sequence[float] | None,
    *,
    device: Any = None,
    timeout: float | None = None,
    retries: int = 2,
) -> Rewards:
    """From --reward, each: a sequence classifier, or file.py:function."""
    functions: list[RewardFunc] = [_reward_function(text) for text in named]
    return Rewards(functions, list(weights) if weights else None, device=device, timeout=timeout, retries=retries)


def _reward_function(text: str) -> RewardFunc:
    function: RewardFunc = function_or_name(text, "--reward")
    return function


def function_or_name(text: str, option: str) -> Any:
    """The function that file.py:function stands for; a text of another form as it is."""
    path, _, name = text.rpartition(":")
    if text.endswith(".py"):
        raise ValueError(f"{option} is {text!r}, a file; name the function in it: {text}:{option.lstrip('-')}.")
    if not path.endswith(".py"):
        return text
    if not os.path.isfile(path):
        raise ValueError(f"{option} is {text!r}, but there is no file {path!r}. Give file.py:function.")
    # As `python file.py` would: the user's own file, which the user names on this command line. No dataset, config.json
    # or other data is ever asked for the name of a function.
    try:
        found = runpy.run_path(path)
    except Exception as error:  # whatever the file's own code raises
        raise ValueError(f"{option} is {text!r}, but {path} cannot be run: {_told(error, path)}.") from error
    if not callable(found.get(name)):
        functions = sorted(key for key, value in found.items() if callable(value) and not key.startswith("_"))
        raise ValueError(f"{option} is {text!r}, but {path} has no function {name!r}. It has {functions}.")
    return found[name]


def named_heads(named: Sequence[str], option: str) -> dict[str, str]:
    """From "polite=user/head", each."""
    heads: dict[str, str] = {}
    for text in named:
        name, equals, head = text.partition("=")
        if not (name and equals and head):
            raise ValueError(
                f"{option} is {text!r}; it must be a name and what it stands for, such as polite=user/head."
            )
        if name in heads:
            raise ValueError(
                f"{option} gives {name!r} two meanings, {heads[name]!r} and {head!r}. Give each its own name."
            )
        heads[name] = head
    return heads


def _told(error: Exception, path: str) -> str:
    """Class, message and line of an error in the user's file."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    where = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {message}" + (f" (line {where})" if where else "")


def as_named(reference: str) -> str:
    """What a card says of a Hub id or a path, which goes to others: of a path its last part."""
    path = Path(reference).expanduser()
    return path.name if path.exists() else reference


@contextmanager
def ends_at_sigterm() -> Iterator[None]:
    """SIGTERM ends what is in it as SystemExit(143) does: what was committed is kept, and no traceback is shown."""
    if threading.current_thread() is not threading.main_thread():  # Python handles signals nowhere else
        yield
        return
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit(signum: int, frame: object) -> NoReturn:
    raise SystemExit(TERMINATED)
