"""`vllm serve` with the flags that steer it."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

from .vllm_requests import KEY, ROUTER, VARIABLE, ServedHeads, settings_from, steering_arguments

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
    ServedHeads(settings_from(os.environ[VARIABLE]))
    sys.stdout.flush()
    os.execv(command[0], command)


def command_line(
    model: str, heads: Mapping[str, str], *, default: str | None = None, arguments: Sequence[str] = ()
) -> list[str]:
    """The command of `serve`. Sets the environment variables that go with it, as `steering_arguments` does."""
    for argument in arguments:
        if argument.split("=")[0].replace("_", "-") in OURS:
            raise ValueError(f"{argument} is set by hf-recontrol serve. To set it yourself, start vllm serve by hand.")
    settings = steering_arguments(heads, default=default)["additional_config"][KEY]
    ours = ["--logits-processors", ROUTER, "--additional-config", json.dumps({KEY: settings})]
    vllm = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
    return [*vllm, *ours, "--middleware", MIDDLEWARE, *arguments]
