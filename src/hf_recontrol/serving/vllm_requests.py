"""Which heads an engine of vLLM has, and what a request asks of them. Nothing of vLLM is needed here.

A request is read twice: in the process that takes it, where it can still be refused, and in each worker.
"""

import difflib
import functools
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..config_checks import shown
from ..control import Controller
from ..control_config import ControlConfig, as_float
from ..control_head import ControlHead
from ..head import Head
from ..keywords import CONTROL, IN_A_CONFIG
from ..registry import as_head
from .vllm_settings import KEY, ROUTER, V2, VARIABLE, check_settings, digest_of, pinned, settings_from

OPTIONS = [f"recontrol_{name}" for name in ("value_head", *CONTROL)]
CAPPED = ("step_size", "scale", "regularization")
LARGEST = 1e6
"""Of these, and of a head's weight, in a request: an edit that overflows leaves its row plain, and the text is sent."""
EXAMPLE = '{"recontrol_value_head": "polite", "recontrol_strength": 0.1}'


def steering_arguments(heads: Mapping[str, str | os.PathLike[str]], *, default: str | None = None) -> dict[str, Any]:
    """What vllm.LLM takes to be steered: LLM(model, **steering_arguments({"polite": "path/to/head"})).

    Reads the heads, those of the Hub at the commit that they have now. Sets HF_RECONTROL_VLLM and
    VLLM_USE_V2_MODEL_RUNNER=0 for this process and those it starts: requests are checked before they reach a worker,
    and workers are of vLLM's V1 model runner.

    Args:
        heads: name → a folder, an id on the Hub or "id@revision". Requests may name these and no others.
        default: name of the head that steers requests which name none; None steers none of these.

    Returns:
        logits_processors and additional_config. They also go to workers on other nodes, where no variable of this
        process does. Workers refuse to start with other heads than were read here.

    Raises:
        ValueError: no heads, a wrong name or a default that is not among them, other heads than an earlier call in this
            process gave, or vLLM's V2 model runner is asked for.
        HeadError, HeadUnavailable: a head cannot be read.
    """
    settings: dict[str, Any] = {"heads": {name: os.fspath(head) for name, head in heads.items()}, "default": default}
    check_settings(settings)
    settings["heads"] = {name: pinned(head) for name, head in settings["heads"].items()}
    settings["digests"] = {name: digest_of(head) for name, head in ServedHeads(settings).heads.items()}
    if os.environ.setdefault(V2, "0") != "0":
        raise ValueError(f"{V2} is {shown(os.environ[V2])}; vLLM's Model Runner V2 cannot be steered. Set it to 0.")
    text = json.dumps(settings)
    if os.environ.setdefault(VARIABLE, text) != text:
        raise ValueError(
            f"{VARIABLE} is set already, to other heads: {shown(os.environ[VARIABLE])}. Requests to all engines of a "
            "process are checked by these. Give one call all the heads, or start another process for another engine; "
            "where no engine uses them any more, unset the variable."
        )
    serve_heads(text)
    return {"logits_processors": [ROUTER], "additional_config": {KEY: settings}}


class _EagerController(Controller):
    """Without CUDA graphs, whose memory vLLM does not count: of each setting its own, and requests choose settings."""

    @torch.no_grad()
    def control(self, hidden_states: Tensor) -> Tensor:
        return self._control(hidden_states)


class ServedHeads:
    """The heads of an engine, by name; made from its settings.

    Raises:
        ValueError, HeadError, HeadUnavailable: wrong settings, or a head that cannot be read, does nothing or is not
            the one that the settings have the digest of.
    """

    def __init__(self, settings: Any):
        check_settings(settings)
        self.default: str | None = settings.get("default")
        self.heads = {name: as_head(head) for name, head in settings["heads"].items()}
        for name, head in self.heads.items():
            if isinstance(head, ControlHead) and head.is_zero():
                raise ValueError(f"The control head {shown(name)} is 0 everywhere and would steer nothing. Train it.")
            Controller(head)  # its own numbers
            if "digests" in settings and settings["digests"][name] != digest_of(head):
                raise ValueError(
                    f"The head {shown(name)}, {shown(settings['heads'][name])}, is not the one that was there when the "
                    "engine was started, so requests would be checked by the one and steered by the other. Start again."
                )
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
        for option in CAPPED:
            _check_size(f"recontrol_{option}", asked.get(option))
        control = ControlConfig(**asked)
        return self._cached(tuple(weights.items()), control)

    def _make(self, weights: tuple[tuple[str, float], ...], control: ControlConfig) -> Controller:
        heads: dict[Head, float] = {}
        for name, weight in weights:
            heads[self.heads[name]] = heads.get(self.heads[name], 0) + weight  # two names may be of one head
        return _EagerController(heads, control)

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
            _check_size(f"The weight of {shown(name)}", weight)
        return weights

    def _names(self) -> str:
        return ", ".join(map(shown, self.heads))


def _check_size(what: str, value: Any) -> None:
    if abs(as_float(value)) > LARGEST:
        raise ValueError(
            f"{what} is {shown(value)}; in vLLM it may be at most {LARGEST:g}, for edits that overflow are left out."
        )


def asked_for(extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """Our part of a request, by names without `recontrol_`; {} where it has none.

    Raises:
        ValueError: a keyword that does not exist, or not in vLLM.
    """
    ours = {name: value for name, value in (extra_args or {}).items() if is_ours(name)}
    for name in ours:
        if name not in OPTIONS:
            if name.removeprefix("recontrol_") in IN_A_CONFIG and name.startswith("recontrol_"):
                raise ValueError(f"{name} is for generate(); vLLM cannot do it. Leave it out.")
            nearest = difflib.get_close_matches(name[:80], OPTIONS, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"The request has no keyword {shown(name)}; the nearest is {nearest!r}. Ours: {', '.join(OPTIONS)}."
            )
    return {name.removeprefix("recontrol_"): value for name, value in ours.items() if value is not None}


def is_ours(name: str) -> bool:
    """Whether a name in a request is meant to steer, well written or not."""
    return name.startswith("recontrol") or name.endswith("value_head")


@functools.lru_cache(1)
def serve_heads(text: str) -> ServedHeads:
    """The heads by which this process checks requests, from the variable's text. Read once, when an engine starts.

    Raises:
        ValueError, HeadError, HeadUnavailable: as ServedHeads.
    """
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
    try:
        heads = serve_heads(text)
    except OSError as error:  # a HeadUnavailable is one; vLLM answers a ValueError alone with status 400
        raise ValueError(str(error)) from error
    heads.controller(extra_args)
