"""What vLLM would not hear, and so would answer with plain text, is refused in front of its server; without vLLM."""

import json

import pytest

from hf_recontrol.serving.vllm_http import unheard

CHAT, GENERATE = "/v1/chat/completions", "/inference/v1/generate"
POLITE = {"recontrol_value_head": "polite"}


@pytest.mark.parametrize(
    ("path", "request_", "told"),
    [
        (CHAT, {"generation_config": "{}"}, "'generation_config' in 'the request itself', which /v1/chat/completions"),
        (CHAT, POLITE, "in 'the request itself', which /v1/chat/completions does not read"),
        (CHAT, {"extra_args": POLITE}, "in 'extra_args', which /v1/chat/completions does not read"),
        (CHAT, {"sampling_params": {"extra_args": POLITE}}, "in 'sampling_params.extra_args', which"),
        (CHAT, {"extra_body": {"vllm_xargs": POLITE}}, "in 'extra_body.vllm_xargs', which"),
        (CHAT, {"messages": [{"vllm_xargs": POLITE}]}, "in 'messages.0.vllm_xargs', which"),
        (CHAT, [{"vllm_xargs": POLITE}], "in '0.vllm_xargs', which"),
        (CHAT, {"vllm_xargs": POLITE}, None),
        (CHAT, {"vllm_xargs": {"recontrol_value_head": {"recontrol-1": 1}}}, None),  # a head's name
        (CHAT, {"messages": [{"content": "What is recontrol_value_head?"}]}, None),
        (GENERATE, {"vllm_xargs": POLITE}, "in 'vllm_xargs', which /inference/v1/generate does not read"),
        (GENERATE, {"sampling_params": {"vllm_xargs": POLITE}}, "in 'sampling_params.vllm_xargs', which"),
        (GENERATE, {"sampling_params": {"extra_args": POLITE}}, None),
        ("/v1/completions", {"use_beam_search": True, "vllm_xargs": POLITE}, "beam search"),
        ("/v1/completions", {"use_beam_search": True, "vllm_xargs": {"value_head": "polite"}}, "beam search"),
        ("/generative_scoring", {"vllm_xargs": POLITE}, "which /generative_scoring does not read"),
        ("/v1/completions", {"vllm_xargs": POLITE}, None),
        ("/v1/completions", {"use_beam_search": True, "vllm_xargs": {"other": 1}}, None),
        ("/v1/completions", [], None),
    ],
)
def test_what_vllm_would_not_hear_is_refused(path, request_, told):
    reason = unheard(path, json.dumps(request_).encode())
    assert reason is None if told is None else told in reason


def test_a_name_that_is_spelled_by_escapes_is_read_as_it_is():
    body = json.dumps(POLITE).replace("recontrol", "\\u0072econtrol").replace("value", "\\u0076alue").encode()
    assert json.loads(body) == POLITE
    assert b"recontrol" not in body
    assert "does not read" in unheard(CHAT, body)
    assert unheard(CHAT, json.dumps({"messages": [{"content": "Glück"}]}).encode()) is None


def test_what_is_no_json_is_left_to_vllm_unless_it_asks_to_be_steered():
    assert unheard("/v1/audio/transcriptions", b"\xff\xfe") is None
    assert unheard("/v1/audio/transcriptions", b"\xff\\u") is None
    form = (
        b'--b\r\nContent-Disposition: form-data; name="vllm_xargs"\r\n\r\n{"recontrol_value_head": "polite"}\r\n--b--'
    )
    assert "is no JSON" in unheard("/v1/audio/transcriptions", form)


def test_a_request_that_is_nested_too_deeply_is_read_where_it_asks_to_be_steered_alone():
    deep = b"[" * 200_000
    assert unheard(CHAT, deep) is None
    assert "nested too deeply" in unheard(CHAT, deep + b'"recontrol_value_head"')
