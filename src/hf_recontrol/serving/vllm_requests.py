"""Which heads an engine of vLLM has, and what a request asks of them. Nothing of vLLM is needed here.

A request is read twice: in the process that takes it, where it can still be refused, and in each worker.
"""

import difflib
import functools
import json
import os
from collections.abc import Mapping
from typing import Any

from ..config_checks import shown
from ..control import Controller
from ..control_config import ControlConfig
from ..control_head import ControlHead
from ..head import Head
from ..keywords import CONTROL, IN_A_CONFIG
from ..registry import as_head

VARIABLE = "HF_RECONTROL_VLLM"
"""The environment variable with the heads, as JSON: {"heads": {name: folder or Hub id}, "default": name}."""
KEY = "recontrol"
"""Where additional_config has the same."""
ROUTER = "hf_recontrol.serving.vllm:RequestRouter"
"""What --logits-processors takes."""
V2 = "VLLM_USE_V2_MODEL_RUNNER"
"""vLLM's variable: 0 chooses its V1 model runner, the one that can be steered."""
OPTIONS = [f"recontrol_{name}" for name in ("value_head", *CONTROL)]
EXAMPLE = '{"recontrol_value_head": "polite", "recontrol_strength": 0.1}'


def steering_arguments(heads: Mapping[str, str | os.PathLike[str]], *, default: str | None = None) -> dict[str, Any]:
    """What vllm.LLM takes to be steered: LLM(model, **steering_arguments({"polite": "path/to/head"})).

    Sets HF_RECONTROL_VLLM and VLLM_USE_V2_MODEL_RUNNER=0 for this process and those it starts: requests are checked
    before they reach a worker, and workers are of vLLM's V1 model runner.

    Args:
        heads: name → a folder, an id on the Hub or "id@revision". Requests may name these and no others.
        default: name of the head that steers requests which name none; None steers none of these.

    Returns:
        logits_processors and additional_config. They also go to workers on other nodes, where no variable of this
        process does.

    Raises:
        ValueError: no heads, a wrong name or a default that is not among them, or vLLM's V2 model runner is asked for.
    """
    settings = {"heads": {name: os.fspath(head) for name, head in heads.items()}, "default": default}
    _check_settings(settings)
    if os.environ.setdefault(V2, "0") != "0":
        raise ValueError(f"{V2} is {shown(os.environ[V2])}; vLLM's Model Runner V2 cannot be steered. Set it to 0.")
    os.environ[VARIABLE] = json.dumps(settings)
    return {"logits_processors": [ROUTER], "additional_config": {KEY: settings}}


class ServedHeads:
    """The heads of an engine, by name; made from its settings.

    Raises:
        ValueError, HeadError, HeadUnavailable: wrong settings, or a head that cannot be read or does nothing.
    """

    def __init__(self, settings: Any):
        _check_settings(settings)
        self.default: str | None = settings.get("default")
        self.heads = {name: as_head(head) for name, head in settings["heads"].items()}
        for name, head in self.heads.items():
            if isinstance(head, ControlHead) and head.is_zero():
                raise ValueError(f"The control head {shown(name)} is 0 everywhere and would steer nothing. Train it.")
            Controller(head)  # its own numbers
        self._cached = functools.lru_cache(256)(self._make)

    def controller(self, extra_args: Mapping[str, Any] | None) -> Controller | None:
        """What a request asks for; None is plain text. Requests that ask for the same get the same Controller.

        Args:
            extra_args: of vLLM's SamplingParams, or vllm_xargs of an HTTP request.

        Raises:
            ValueError: an unknown head or keyword, or a value that is not allowed.
        """
        asked = asked_for(extra_args)
        named = asked.pop("value_head", None)
        # JSON's false arrives as 0 over HTTP. A number is no head's name, so nothing else can be meant.
        if named is False or (type(named) is int and named == 0):
            return None
        if named is None and self.default is None:
            if asked:
                raise ValueError(
                    f"The request has recontrol_{next(iter(asked))} but names no head, and there is no default one. "
                    f"Name one: {EXAMPLE}; the heads are {self._names()}."
                )
            return None
        weights = {self.default: 1.0} if named is None else self._weights(named)
        control = ControlConfig(**asked)
        return self._cached(tuple(weights.items()), control)

    def _make(self, weights: tuple[tuple[str, float], ...], control: ControlConfig) -> Controller:
        heads: dict[Head, float] = {}
        for name, weight in weights:
            heads[self.heads[name]] = heads.get(self.heads[name], 0) + weight  # two names may be of one head
        return Controller(heads, control)

    def _weights(self, named: Any) -> dict[str, Any]:
        """{name: weight} of a name, or of a JSON object, which HTTP allows as a string only."""
        weights = {named: 1.0} if isinstance(named, str) else named
        if isinstance(named, str) and named.startswith("{"):
            try:
                weights = json.loads(named)
            except ValueError:
                weights = None
        if not isinstance(weights, dict) or not weights:
            raise ValueError(
                f"recontrol_value_head is {shown(named)}; expected is a head's name, names with weights as a JSON "
                f'object in a string, \'{{"polite": 1.0, "brief": 0.5}}\', or false. The heads are {self._names()}.'
            )
        for name, weight in weights.items():
            if name not in self.heads:
                raise ValueError(f"The head {shown(name)} is none of this engine's, which are {self._names()}.")
            if type(weight) not in (int, float):
                raise ValueError(f"The weight of {shown(name)} is {shown(weight)}; it must be a number other than 0.")
        return weights

    def _names(self) -> str:
        return ", ".join(map(shown, self.heads))


def asked_for(extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """Our part of a request, by names without `recontrol_`; {} where it has none.

    Raises:
        ValueError: a keyword that does not exist, or not in vLLM.
    """
    ours = {name: value for name, value in (extra_args or {}).items() if _is_meant_for_us(name)}
    for name in ours:
        if name not in OPTIONS:
            if name.removeprefix("recontrol_") in IN_A_CONFIG and name.startswith("recontrol_"):
                raise ValueError(f"{name} is for generate(); vLLM cannot do it. Leave it out.")
            nearest = difflib.get_close_matches(name[:80], OPTIONS, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"The request has no keyword {shown(name)}; the nearest is {nearest!r}. Ours: {', '.join(OPTIONS)}."
            )
    return {name.removeprefix("recontrol_"): value for name, value in ours.items() if value is not None}


def _is_meant_for_us(name: str) -> bool:
    return name.startswith("recontrol") or name.endswith("value_head")


def _check_settings(settings: Any) -> None:
    """Raise ValueError unless they are {"heads": {name: text, …}, "default": name or null}."""
    heads = settings.get("heads") if isinstance(settings, dict) else None
    if not isinstance(heads, dict) or not heads or set(settings) - {"heads", "default"}:
        raise ValueError(
            f"The heads for vLLM are {shown(settings)}; expected is "
            '{"heads": {"NAME": "folder or Hub id"}, "default": "NAME"}, where "default" may be left out.'
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


@functools.lru_cache(1)
def _served(text: str) -> ServedHeads:
    return ServedHeads(settings_from(text))


def check_request(extra_args: Mapping[str, Any] | None) -> None:
    """In the process that takes requests: raise ValueError unless a worker can do what this one asks for."""
    if not asked_for(extra_args):
        return
    if (text := os.environ.get(VARIABLE)) is None:
        raise ValueError(
            f"A request asks to be steered, but {VARIABLE} is not set in the process that takes requests, so heads are "
            "not known there. Start with `hf-recontrol serve --engine vllm` or steering_arguments()."
        )
    _served(text).controller(extra_args)
