"""hf-recontrol serve: the real server in a process of its own, asked by the real openai client."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import transformers
import typer
from steered import on_the_hub
from tiny import tiny_control_head, tiny_head, tiny_model, tiny_tokenizer
from transformers import GenerationMixin
from transformers.utils import import_utils

from hf_recontrol import ControlDefaults, enable_recontrol
from hf_recontrol.serving.transformers_serve import _check_request

pytestmark = pytest.mark.versions
CAN_SERVE = import_utils.is_serve_available()
MESSAGES = [{"role": "user", "content": "w5 w6 w7"}]
TEMPLATE = "<s>{% for message in messages %} {{ message['content'] }}{% endfor %} w9"
NEW_TOKENS = 12
ASKED = {
    "polite": {"recontrol_value_head": "polite"},
    "later": {"recontrol_value_head": "rude", "recontrol_start": 3},
    "rude": {"recontrol_value_head": "rude", "recontrol_scale": 1.5},
    "both": {
        "recontrol_value_head": {"polite": 1.0, "rude": 0.5},
        "recontrol_step_size": 1.0,
        "recontrol_scale": 0.5,
    },
    "plain": {"recontrol_value_head": False},
}


def heads():
    """A value head that carries its own step size, and a control head."""
    polite, rude = tiny_head(1), tiny_control_head(2)
    polite.config.control = ControlDefaults(step_size=2.0, num_steps=3)
    return {"polite": polite, "rude": rude}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model that chats and two heads."""
    folder, tokenizer = tmp_path_factory.mktemp("served"), tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    tiny_model().save_pretrained(folder / "model")
    for name, head in heads().items():
        head.save_pretrained(folder / name)
    return folder


class Server:
    """`hf-recontrol serve` on a port of its own choice."""

    def __init__(self, folder, log, *extra):
        named = [part for name in heads() for part in ("--head", f"{name}={folder / name}")]
        command = [sys.executable, "-m", "hf_recontrol", "serve", str(folder / "model"), *named, *extra]
        command += ["--host", "127.0.0.1", "--port", "0", "--", "--device", "cpu"]
        self.log, self.model = log, str(folder / "model")
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with log.open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        self.url = self._wait(r"running on (http://127\.0\.0\.1:\d+)")
        from openai import OpenAI

        self.client = OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def _wait(self, pattern):
        for _ in range(1200):
            if found := re.search(pattern, self.log.read_text()):
                return found[1]
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        self.stop()
        raise AssertionError(self.log.read_text())

    def stop(self, how=signal.SIGKILL):
        """End it; its exit status."""
        if hasattr(self, "client"):
            self.client.close()
        self.process.send_signal(how)
        return self.process.wait(60)

    def ask(self, endpoint="chat", stream=False, **config):
        """The text of the answer to a greedy request with this generation_config."""
        return self.ask_for({"generation_config": json.dumps({"do_sample": False, **config})}, endpoint, stream)

    def ask_for(self, extra, endpoint="chat", stream=False):
        """The text of the answer to a request with these fields of transformers' own."""
        asked = {"model": self.model, "stream": stream, "extra_body": extra}
        if endpoint == "chat":
            answer = self.client.chat.completions.create(messages=MESSAGES, max_tokens=NEW_TOKENS, **asked)
            if stream:
                return "".join(chunk.choices[0].delta.content or "" for chunk in answer)
            return answer.choices[0].message.content
        if endpoint == "completions":
            answer = self.client.completions.create(prompt="w5 w6 w7", max_tokens=NEW_TOKENS, **asked)
            return "".join(chunk.choices[0].text for chunk in answer) if stream else answer.choices[0].text
        answer = self.client.responses.create(input="w5 w6 w7", max_output_tokens=NEW_TOKENS, **asked)
        if stream:
            return "".join(event.delta for event in answer if event.type == "response.output_text.delta")
        return answer.output_text


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """Requests that name no head are steered by polite."""
    server = Server(folder, tmp_path_factory.mktemp("log") / "log", "--default", "polite")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def expected():
    """expected(asked, endpoint): what generate() says in this process; `asked` is one of ASKED."""
    model, tokenizer, of = enable_recontrol(tiny_model()), tiny_tokenizer(), heads()
    tokenizer.chat_template = TEMPLATE

    def text(asked, endpoint="chat"):
        if endpoint == "completions":
            inputs = tokenizer("w5 w6 w7", return_tensors="pt")
        else:
            inputs = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt")
        steer = dict(ASKED[asked])
        if isinstance(named := steer["recontrol_value_head"], dict):
            steer["recontrol_value_head"] = {of[name]: weight for name, weight in named.items()}
        elif named:
            steer["recontrol_value_head"] = of[named]
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        output = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS, **steer)
        return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)

    return text


def needs_server(test):
    """For tests of the real server: its start takes seconds."""
    return pytest.mark.slow(pytest.mark.skipif(not CAN_SERVE, reason="needs the extra serve")(test))


@needs_server
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("endpoint", ["chat", "completions", "responses"])
def test_a_request_gets_the_text_that_generate_makes_with_the_head_it_names(server, expected, endpoint, stream):
    texts = {asked: server.ask(endpoint, stream, **config) for asked, config in ASKED.items()}
    assert texts == {asked: expected(asked, endpoint) for asked in ASKED}
    assert len(set(texts.values())) == len(ASKED)


@needs_server
def test_requests_at_once_are_each_steered_by_their_own_head(server, expected):
    requests = [*ASKED] * 3
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda asked: server.ask(stream=asked == "rude", **ASKED[asked]), requests))
    assert answers == [expected(asked) for asked in requests]


@needs_server
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"recontrol_value_head": "kind"}, r"'kind', which is not registered .*registered: 'polite', 'rude'"),
        ({"recontrol_value_head": {"polite": 1.0, "kind": 1.0}}, "'kind', which is not registered"),
        ({"recontrol_value_head": "polite", "recontrol_start": -1}, "must be a number of tokens"),
        ({"recontrol_value_head": ["polite"]}, "must be the name of a registered head"),
        ({"recontrol_value_head": 3}, "must be the name of a registered head"),
        ({"recontrol_value_head": "polite", "recontrol_stepsize": 1.0}, "nearest is 'recontrol_step_size'"),
        ({"recontrol_value_head": "polite", "recontrol_step_size": "large"}, "must be a finite number"),
        ({"recontrol_value_head": "polite", "recontrol_strength": 0.1}, "the head is not calibrated"),
        ({"recontrol_value_head": "polite", "recontrol_scale": 1.0}, "multiplies a control head's u"),
        ({"recontrol_value_head": "polite", "recontrol_trace": True}, "not part of a server's answer"),
        ({"recontrol_value_head": "polite", "recontrol_token": "hf_x"}, "no keyword 'recontrol_token'"),
        ({"re_control_value_head": "polite"}, "write 'recontrol_value_head'"),
        ({"value_head": "polite"}, "write 'recontrol_value_head'"),
    ],
)
def test_what_cannot_be_steered_is_refused_before_the_answer_begins(server, expected, config, words, stream):
    from openai import BadRequestError

    with pytest.raises(BadRequestError, match=words):
        server.ask(stream=stream, **config)
    assert server.ask(**ASKED["polite"]) == expected("polite")


@needs_server
@pytest.mark.parametrize("given", ["polite", "[1]", {"recontrol_value_head": "polite"}, 3])
def test_a_generation_config_that_is_no_json_object_is_refused_with_an_example(server, given):
    from openai import BadRequestError

    with pytest.raises(BadRequestError, match="must be a JSON object in a string, such as"):
        server.ask_for({"generation_config": given})


@needs_server
def test_a_keyword_outside_the_generation_config_is_refused(server):
    from openai import UnprocessableEntityError

    with pytest.raises(UnprocessableEntityError, match="recontrol_value_head"):
        server.ask_for({"recontrol_value_head": "polite"})


@needs_server
def test_a_request_never_decides_what_is_loaded(server, hub, folder, tmp_path):
    from openai import BadRequestError

    on_the_hub(hub, "user/head", tiny_head(1), tmp_path)
    for name in ("user/head", str(folder / "polite")):
        with pytest.raises(BadRequestError, match="is not registered"):
            server.ask(recontrol_value_head=name)
    assert hub.paths() == []


@needs_server
def test_the_default_head_steers_requests_that_name_none(server, expected):
    for endpoint in ("chat", "completions", "responses"):
        assert server.ask(endpoint) == server.ask_for({}, endpoint) == expected("polite", endpoint)
        assert server.ask(endpoint, recontrol_value_head=None) == expected("polite", endpoint)
    assert server.ask(recontrol_num_steps=0) == expected("plain")


@needs_server
def test_the_default_head_stays_when_the_server_loads_the_model_again(server, expected):
    reset = urllib.request.Request(f"{server.url}/reset", method="POST")
    with urllib.request.urlopen(reset) as answer:
        assert answer.status == 200
    assert server.ask_for({}) == expected("polite")


@needs_server
@pytest.mark.slow  # for another server
def test_without_a_default_only_requests_that_name_a_head_are_steered_until_a_sigterm(folder, tmp_path, expected):
    from openai import BadRequestError

    server = Server(folder, tmp_path / "log")
    try:
        assert server.ask() == server.ask_for({}) == expected("plain")
        assert server.ask(**ASKED["rude"]) == expected("rude")
        with pytest.raises(BadRequestError, match="has recontrol_step_size but names no head"):
            server.ask(recontrol_step_size=1.0)
        assert server.stop(signal.SIGTERM) == -signal.SIGTERM
    finally:
        server.process.kill()
    assert_ended_cleanly(server)


def assert_ended_cleanly(server):
    log = server.log.read_text()
    assert "Application shutdown complete" in log
    assert "Traceback" not in log


@needs_server
def test_settings_without_a_head_are_refused_where_there_is_no_default():
    from fastapi import HTTPException

    model = enable_recontrol(tiny_model())
    for body in ({}, {"generation_config": None}, {"generation_config": '{"recontrol_value_head": false}'}):
        _check_request(body, model, None)
    with pytest.raises(HTTPException, match="has recontrol_max_kl but names no head") as refused:
        _check_request({"generation_config": '{"recontrol_max_kl": 0.5}'}, model, None)
    assert refused.value.status_code == 400


@needs_server
def test_messages_to_a_model_without_a_chat_template_are_refused():
    from fastapi import HTTPException

    model, tokenizer = enable_recontrol(tiny_model()), tiny_tokenizer()
    _check_request({"prompt": "w1"}, model, tokenizer)
    for body in ({"messages": MESSAGES}, {"input": "w1"}):
        with pytest.raises(HTTPException, match=r"no chat template.*/v1/completions") as refused:
            _check_request(body, model, tokenizer)
        assert refused.value.status_code == 400
    tokenizer.chat_template = TEMPLATE
    _check_request({"messages": MESSAGES}, model, tokenizer)


@pytest.fixture
def as_before():
    """What the launcher changes in this process, and must put back."""

    def state():
        names = ("generate", "generate_batch", "init_continuous_batching", "_update_model_kwargs_for_generation")
        found = [getattr(GenerationMixin, name) for name in names]
        if CAN_SERVE:
            from transformers.cli.serving import server
            from transformers.cli.serving.model_manager import ModelManager
            from transformers.cli.serving.utils import BaseHandler

            found += [ModelManager.load_model_and_processor, BaseHandler._resolve_model, server.build_server]
        return found

    before = state()
    yield
    assert state() == before


@pytest.fixture
def deaf(monkeypatch):
    """A server in this process that is ready to listen has not noticed what is wrong."""
    uvicorn = pytest.importorskip("uvicorn")
    monkeypatch.setattr(uvicorn.Server, "run", lambda self: pytest.fail("the server listens"))


@pytest.fixture
def narrow(tmp_path):
    """A head of another model."""
    tiny_head(hidden_size=8).save_pretrained(tmp_path / "narrow")
    return tmp_path / "narrow"


@needs_server
@pytest.mark.usefixtures("as_before", "deaf", "hub")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--head", "polite"), "must be a name and what it stands for, such as polite=user/head"),
        (("--head", "=user/head"), "must be a name and what it stands for"),
        (("--head", "a=user/x", "--head", "a=user/y"), "'user/x' and 'user/y'. Give each its own name"),
        (("--head", "polite=POLITE", "--default", "rude"), "default head is 'rude', but the heads are 'polite'"),
        (("--head", "polite=POLITE", "--", "--continuous-batching"), "Leave --continuous-batching out"),
        (("--head", "polite=no/such-head"), "no/such-head"),
        (("--head", "polite=POLITE", "--head", "narrow=NARROW"), "8 wide"),
        (("--head", "polite=POLITE", "--", "--no-such-option"), "--no-such-option"),
    ],
)
def test_what_is_wrong_at_the_start_is_said_before_the_server_listens(command, folder, narrow, arguments, words):
    places = {"POLITE": folder / "polite", "NARROW": narrow}
    filled = [re.sub("POLITE|NARROW", lambda found: str(places[found[0]]), text) for text in arguments]
    assert words in command("serve", folder / "model", *filled, status=2)


@needs_server
@pytest.mark.usefixtures("as_before", "deaf")
@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ({"recontrol_value_head": "kind"}, "'kind', which is not registered"),
        ({"recontrol_value_head": "polite", "recontrol_trace": True}, "not part of a server's answer"),
    ],
)
def test_a_models_own_defaults_are_checked_at_the_start(command, folder, tmp_path, saved, words):
    shutil.copytree(folder / "model", tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    own = json.loads(path.read_text())
    del own["_from_model_config"]  # transformers takes no other names from such a file
    path.write_text(json.dumps(own | saved))
    assert words in command("serve", tmp_path / "model", "--head", f"polite={folder / 'polite'}", status=2)


@needs_server
@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, typer.Abort])
def test_an_interrupt_is_no_error_whatever_typer_makes_of_it(command, monkeypatch, folder, interrupt):
    def interrupted(force_model: str):
        raise interrupt

    monkeypatch.setattr("transformers.cli.serve.Serve", interrupted)
    assert command("serve", folder / "model", "--head", f"polite={folder / 'polite'}") == ""


@pytest.mark.usefixtures("as_before")
def test_without_the_extra_the_command_says_what_to_install(command, monkeypatch):
    monkeypatch.setattr(import_utils, "is_serve_available", lambda: False)
    error = command("serve", "no/such-model", "--head", "polite=no/such-head", status=2)
    assert "pip install 'hf-recontrol[serve]'" in error


@needs_server
@pytest.mark.usefixtures("as_before", "deaf")
@pytest.mark.parametrize("other", ["renamed", "overridden"])
def test_a_server_that_is_not_known_is_refused_by_its_version(command, monkeypatch, folder, other):
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.utils import BaseHandler

    if other == "renamed":
        monkeypatch.delattr(BaseHandler, "_resolve_model")
    else:
        monkeypatch.setattr(ChatCompletionHandler, "_resolve_model", lambda self, body: None, raising=False)
    error = command("serve", folder / "model", "--head", f"polite={folder / 'polite'}", status=2)
    assert f"server of transformers {transformers.__version__} is not the one" in error
    monkeypatch.undo()


@needs_server
def test_an_interrupt_ends_the_server_cleanly(server):
    """The last test, since it ends the server of the others."""
    assert server.ask()
    assert server.stop(signal.SIGINT) == 0
    assert_ended_cleanly(server)
