"""`transformers serve`, steered: each request names one of the heads that were read at the start.

The server makes its model in this process, out of our reach, so `enable_recontrol()` is called for all models before
it. Three functions of the server are wrapped while it runs, and nothing else of its insides is known: the one that
loads a model, the one by which all text endpoints look up the model of a request before they answer anything, and the
one that makes the app.
"""

import contextlib
import functools
import json
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import transformers
import typer
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import import_utils

from ..config_checks import shown
from ..generation import disable_recontrol, enable_recontrol
from ..hooks import lm_head
from ..keywords import IN_A_CONFIG, RecontrolKeywords, said_by
from ..registry import register_value_heads
from ..steering import check_mode

EXAMPLE = '{"recontrol_value_head": "polite", "recontrol_strength": 0.1}'


def serve(model: str, heads: Mapping[str, str], *, default: str | None = None, arguments: Sequence[str] = ()) -> None:
    """Serve the model until the process is interrupted. Steers every model of this process in that time.

    Args:
        model: an id on the Hub or a folder; what the server is pinned to.
        heads: name → a folder or an id on the Hub, "id@revision". Read before the model is; they stay registered.
        default: name of the head that steers requests which name none; None steers none of these.
        arguments: of `transformers serve`, such as "--port", "8001".

    Raises:
        ImportError: the extra `serve` is missing, or transformers has another server than the one wrapped here.
        ValueError, HeadError, HeadUnavailable, HeadMismatch: a head cannot be read, or used with the model.
    """
    if not import_utils.is_serve_available():
        raise ImportError("A server needs FastAPI, Uvicorn and openai. Install them: pip install 'hf-recontrol[serve]'")
    if default is not None and default not in heads:
        raise ValueError(
            f"The default head is {shown(default)}, but the heads are {', '.join(map(shown, heads)) or 'none'}. Name "
            "one of these, or add it: --head NAME=HEAD."
        )
    if "--continuous-batching" in arguments:
        raise ValueError(
            "Continuous batching steers all requests by one head, so requests could not choose. Leave "
            "--continuous-batching out."
        )
    register_value_heads(heads)
    enable_recontrol()
    try:
        with _steered(list(heads), default):
            _run(model, arguments)
    finally:
        disable_recontrol()


def _run(model: str, arguments: Sequence[str]) -> None:
    """`transformers serve MODEL ARGUMENTS`, by the class that is that command, without its look for updates."""
    from transformers.cli.serve import Serve

    command = typer.Typer(add_completion=False, rich_markup_mode=None)
    command.command()(Serve)
    with contextlib.suppress(typer.Abort):  # what older releases of Typer make of an interrupt, the way to end a server
        command([model, *arguments], prog_name="transformers serve", standalone_mode=False)


@contextlib.contextmanager
def _steered(names: Sequence[str], default: str | None) -> Iterator[None]:
    """For the time: models are checked when they are loaded, requests before they are answered."""
    manager, handler, factory = _parts_of_the_server()
    load, resolve, build = manager.load_model_and_processor, handler._resolve_model, factory.build_server
    prepared: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()

    @functools.wraps(load)
    def load_and_prepare(*args: Any, **kwargs: Any) -> Any:
        model, processor = load(*args, **kwargs)
        if model not in prepared:  # also where it was loaded again, after /reset
            _prepare(model, names, default)
            prepared.add(model)
        return model, processor

    @functools.wraps(resolve)
    def resolve_and_check(self: Any, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        resolved = resolve(self, body, *args, **kwargs)
        _check_request(body, resolved[1], resolved[2])
        return resolved

    @functools.wraps(build)
    def build_and_explain(*args: Any, **kwargs: Any) -> Any:
        return _explaining(build(*args, **kwargs))

    manager.load_model_and_processor, handler._resolve_model = load_and_prepare, resolve_and_check
    factory.build_server = build_and_explain
    try:
        yield
    finally:
        manager.load_model_and_processor, handler._resolve_model, factory.build_server = load, resolve, build


def _parts_of_the_server() -> tuple[Any, Any, Any]:
    """The class that loads models, that of all handlers of requests for text, and the module that makes the app."""
    try:
        from transformers.cli.serving import server
        from transformers.cli.serving.chat_completion import ChatCompletionHandler
        from transformers.cli.serving.completion import CompletionHandler
        from transformers.cli.serving.model_manager import ModelManager
        from transformers.cli.serving.response import ResponseHandler
        from transformers.cli.serving.utils import BaseHandler

        resolve = BaseHandler._resolve_model
        known = callable(ModelManager.load_model_and_processor) and callable(server.build_server)
        handlers = ChatCompletionHandler, CompletionHandler, ResponseHandler
        known = known and all(handler._resolve_model is resolve for handler in handlers)
    except (ImportError, AttributeError):
        known = False
    if not known:  # else requests might go by the check, and their text be plain
        raise ImportError(
            f"The server of transformers {transformers.__version__} is not the one that hf-recontrol can steer, that "
            "of 5.17 to 5.23. Install one of these: pip install 'transformers[serving]==5.23.*'"
        )
    return ModelManager, BaseHandler, server


def _explaining(app: Any) -> Any:
    """The app, whose refusals say why in OpenAI's form too: its client shows a user nothing else."""
    from fastapi import HTTPException
    from fastapi.responses import JSONResponse

    async def explain(request: Any, refusal: HTTPException) -> JSONResponse:
        error = {"message": str(refusal.detail), "type": "invalid_request_error", "param": None, "code": None}
        content = {"detail": refusal.detail, "error": error}
        return JSONResponse(content, status_code=refusal.status_code, headers=refusal.headers)

    app.add_exception_handler(HTTPException, explain)
    return app


def _prepare(model: PreTrainedModel, names: Sequence[str], default: str | None) -> None:
    """Check every head with the model, and give it its default, in place of one that was saved with it."""
    lm_head(model)  # first: a model that cannot generate has no generation config
    config: Any = model.generation_config
    if default is not None:
        for saved in [name for name in vars(config) if name.startswith("recontrol_")]:
            delattr(config, saved)
        config.recontrol_value_head = default
    for name in names:
        RecontrolKeywords().request(model, GenerationConfig(recontrol_value_head=name))
    _check(model, None)


def _check_request(body: Mapping[str, Any], model: PreTrainedModel, processor: Any) -> None:
    """Answer with status 400 what generate() would refuse, or what would be meant to steer and does not.

    Here, because later is too late: an error in generate() is a status 500, or the end of a stream that has begun.
    """
    from fastapi import HTTPException

    try:
        if ("messages" in body or "input" in body) and not getattr(processor, "chat_template", None):
            raise ValueError(
                "The model has no chat template, so it answers texts, not messages: ask /v1/completions, or serve a "
                "model with a template."
            )
        said = _said(body.get("generation_config"))
        _check(model, None if said is None else GenerationConfig(**said))
    except (TypeError, ValueError) as error:  # a HeadError and a HeadMismatch are ValueErrors
        raise HTTPException(status_code=400, detail=str(error)) from error


def _said(given: Any) -> dict[str, Any] | None:
    """A request's generation_config, which is JSON in a string."""
    if given is None:
        return None
    try:
        said = json.loads(given)
    except (TypeError, ValueError):
        said = None
    if not isinstance(said, dict):
        raise ValueError(
            f"generation_config is {shown(given)}; it must be a JSON object in a string, such as {EXAMPLE!r}."
        )
    stock, ours = vars(GenerationConfig()), tuple(IN_A_CONFIG)
    for name in said:  # transformers keeps what it does not know, and ignores it
        if name.endswith(ours) and not name.startswith("recontrol_") and name not in stock:
            meant = max((known for known in ours if name.endswith(known)), key=len)
            raise ValueError(
                f"generation_config has {shown(name)}, which means nothing to transformers. To steer, write "
                f"'recontrol_{meant}'; otherwise leave it out."
            )
    return said


def _check(model: PreTrainedModel, given: GenerationConfig | None) -> None:
    """Raise unless generate() can do what the request's config and the model's ask for."""
    asked = RecontrolKeywords().request(model, given)
    check_mode(asked, {}, (given, model.generation_config))
    if asked.trace:
        raise ValueError("recontrol_trace is not part of a server's answer. Leave it out, or use generate().")
    said = {name: value for name, value in said_by(given, "request").items() if value is not None}
    if said and asked.controller is None and said.get("value_head") is not False:
        raise ValueError(
            f"The request has recontrol_{next(iter(said))} but names no head, and this server has no default one. "
            f"Name one, such as {EXAMPLE!r}, or leave recontrol_{next(iter(said))} out."
        )
