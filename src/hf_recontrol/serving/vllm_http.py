"""In front of vLLM's HTTP server: what it would not hear, and so would answer with plain text, is refused."""

import json
from collections.abc import Mapping
from typing import Any

from ..config_checks import shown
from .vllm_requests import EXAMPLE

STEERABLE = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/inference/v1/generate")
"""Where vLLM hands a request's vllm_xargs, or its extra_args, on to the engine."""


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
    try:
        request = json.loads(body)
    except ValueError:  # not JSON: a sound, say, or vLLM's to refuse
        return None
    if not isinstance(request, Mapping):
        return None
    for name in request:
        if name == "generation_config" or name.startswith("recontrol"):
            return (
                f"The request has {shown(name)}, which vLLM does not read. Put what steers into vllm_xargs: "
                f'{{"vllm_xargs": {EXAMPLE}}}.'
            )
    xargs = request.get("vllm_xargs")
    if not isinstance(xargs, Mapping) or not any(name.startswith("recontrol") for name in xargs):
        return None
    if request.get("use_beam_search"):
        return "vLLM's beam search does not read vllm_xargs, so it would not be steered. Leave use_beam_search out."
    if not path.endswith(STEERABLE):
        return f"{path} does not read vllm_xargs. Requests can be steered at {', '.join(STEERABLE)}."
    return None
