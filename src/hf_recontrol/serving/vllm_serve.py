"""`vllm serve` with the flags that steer it."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

from .vllm_requests import steering_arguments
from .vllm_settings import KEY, ROUTER

MIDDLEWARE = "hf_recontrol.serving.vllm_http.RefuseUnheard"
OURS = ("--logits-processors", "--additional-config")


def serve(model: str, heads: Mapping[str, str], *, default: str | None = None, arguments: Sequence[str] = ()) -> None:
    """Become `vllm serve`: this process is replaced, so signals reach vLLM itself. Never returns.

    Args:
        model: an id on the Hub or a folder.
        heads: name → a folder or an id on the Hub, "id@revision". Read once here, before vLLM starts, to say at once
            what is wrong with one.
        default: name of the head that steers requests which name none; None steers none of these.
        arguments: of `vllm serve`, such as "--port", "8001".

    Raises:
        ImportError: vLLM is not installed.
        ValueError, HeadError, HeadUnavailable: a head cannot be read, or an argument is one that is set here.
    """
    if find_spec("vllm") is None:
        raise ImportError("This needs vLLM. Install it: pip install 'hf-recontrol[vllm]'")
    command = command_line(model, heads, default=default, arguments=arguments)
    sys.stdout.flush()
    os.execv(command[0], command)


def command_line(
    model: str, heads: Mapping[str, str], *, default: str | None = None, arguments: Sequence[str] = ()
) -> list[str]:
    """The command of `serve`. Reads the heads and sets the environment variables, as `steering_arguments` does."""
    for argument in arguments:
        flag = argument.split("=")[0].split(".")[0].replace("_", "-")
        if flag in OURS:
            raise ValueError(f"{argument} is set by hf-recontrol serve. To set it yourself, start vllm serve by hand.")
        if flag == "--watermark-config":
            raise ValueError(f"{argument} makes vLLM run its Model Runner V2, which cannot be steered. Leave it out.")
    settings = steering_arguments(heads, default=default)["additional_config"][KEY]
    ours = ["--logits-processors", ROUTER, "--additional-config", json.dumps({KEY: settings})]
    vllm = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
    return [*vllm, *ours, "--middleware", MIDDLEWARE, *arguments]
