"""In front of vLLM's HTTP server: what it would not hear, and so would answer with plain text, is refused."""

import json
from collections.abc import Iterator
from typing import Any

from ..config_checks import shown
from .vllm_requests import EXAMPLE, is_ours

XARGS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
"""Where vLLM hands a request's vllm_xargs on to the engine, when the request is JSON."""
GENERATE = "/inference/v1/generate"
"""Where it hands on the extra_args of sampling_params, and no vllm_xargs."""
SIGNS = (b"recontrol", b"value_head", b"generation_config")
"""A request without one of these, or an escaped letter, asks for nothing, and is not read."""
MEND = (
    f'Requests can be steered at {", ".join(XARGS)}, by JSON with {{"vllm_xargs": {EXAMPLE}}}, and at {GENERATE}, with '
    "the same as extra_args in sampling_params."
)
Place = tuple[str | int, ...]
"""Of an object in a request: the names that lead to it."""


class RefuseUnheard:
    """ASGI middleware: `vllm serve … --middleware hf_recontrol.serving.vllm_http.RefuseUnheard`.

    Not one of Starlette's HTTP middlewares: behind these vLLM does not see that a client has gone.
    """

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)  # type: ignore[no-any-return]
        messages, more = [], True
        while more:
            messages.append(await receive())
            more = messages[-1].get("more_body", False)
        reason = unheard(scope["path"], b"".join(message.get("body", b"") for message in messages))
        if reason is not None:
            from starlette.responses import JSONResponse

            error = {"message": reason, "type": "BadRequestError", "param": None, "code": 400}
            return await JSONResponse({"error": error}, status_code=400)(scope, receive, send)

        async def again() -> Any:
            return messages.pop(0) if messages else await receive()

        await self.app(scope, again, send)


def unheard(path: str, body: bytes) -> str | None:
    """Why vLLM would not steer a request that asks for it; None where it would, or nothing is asked for."""
    is_signed = any(sign in body for sign in SIGNS)
    if not is_signed and b"\\u" not in body:  # JSON may spell a name by escapes
        return None
    heard: Place = ("sampling_params", "extra_args") if path.endswith(GENERATE) else ("vllm_xargs",)
    try:
        request = json.loads(body)
    except RecursionError:
        return "The request is nested too deeply to be read."
    except ValueError:  # a form, say, as of speech
        return None if not is_signed else f"The request asks to be steered, but is no JSON. {MEND}"
    for place, name in _ours(request):
        if place != heard or not path.endswith((*XARGS, GENERATE)):
            where = ".".join(map(str, place)) or "the request itself"
            return f"The request has {shown(name)} in {shown(where)}, which {path} does not read. {MEND}"
        if request.get("use_beam_search"):
            return "vLLM's beam search does not read vllm_xargs, so it would not be steered. Leave use_beam_search out."
    return None


def _ours(request: Any) -> Iterator[tuple[Place, str]]:
    """Every name in a request that is meant to steer, and the place of the object that has it."""
    found: list[tuple[Place, Any]] = [((), request)]
    while found:
        place, value = found.pop()
        inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for name, one in inside:
            if isinstance(name, str) and (is_ours(name) or (name == "generation_config" and not place)):
                yield place, name
            elif isinstance(one, dict | list):
                found.append(((*place, name), one))
