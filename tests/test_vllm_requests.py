"""What requests to vLLM may ask for, and what a batch gets of it; without vLLM."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from hub_server import Repository
from tiny import tiny_control_head, tiny_head, tiny_model

from hf_recontrol import ControlConfig, ControlDefaults, ControlHead, ControlHeadConfig, Controller
from hf_recontrol.cuda_graph import CudaGraphs
from hf_recontrol.errors import HeadUnavailable, SteeringNotApplied
from hf_recontrol.forwards import logits_of, steered_logits
from hf_recontrol.head import Head
from hf_recontrol.serving.vllm_batch import BatchControl
from hf_recontrol.serving.vllm_requests import ServedHeads, check_request, steering_arguments
from hf_recontrol.serving.vllm_serve import command_line
from hf_recontrol.serving.vllm_settings import KEY, ROUTER, V2, VARIABLE, digest_of, settings_from


@pytest.fixture
def named(tmp_path):
    """A value head with a step size of its own, and a control head; their folders by name."""
    polite, rude = tiny_head(1), tiny_control_head(2)
    polite.config.control = ControlDefaults(step_size=2.0, num_steps=3)
    polite.save_pretrained(tmp_path / "polite")
    rude.save_pretrained(tmp_path / "rude")
    return {name: str(tmp_path / name) for name in ("polite", "rude")}


def digests_of(named):
    return {name: digest_of(Head.from_pretrained(folder)) for name, folder in named.items()}


@pytest.fixture
def served(named):
    return ServedHeads({"heads": named})


@pytest.fixture
def variables(monkeypatch):
    """The variables as they are set in a test; afterwards as they were."""
    for name in (VARIABLE, V2):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_a_request_that_asks_for_nothing_is_plain(served):
    assert served.controller(None) is None
    assert served.controller({"other_plugin": 3}) is None


@pytest.mark.parametrize("none", [False, 0])  # HTTP makes a 0 of JSON's false
def test_a_request_can_turn_the_default_head_off(named, none):
    served = ServedHeads({"heads": named, "default": "polite"})
    assert served.controller({"recontrol_value_head": none, "recontrol_step_size": 1.0}) is None
    assert served.controller(None).heads == [served.heads["polite"]]


def test_a_request_decides_how_hard_it_is_steered(served):
    asked = {"recontrol_value_head": "polite", "recontrol_step_size": 0.5, "recontrol_num_steps": 7}
    controller = served.controller(asked | {"recontrol_max_kl": 0.2})
    assert (controller.step_size, controller.num_steps, controller.max_kl) == (0.5, 7, 0.2)
    assert served.controller({"recontrol_value_head": "rude", "recontrol_scale": 1.5}).config.scale == 1.5


def test_requests_that_ask_for_the_same_share_a_controller(served):
    first, again, other = (
        served.controller({"recontrol_value_head": "polite", "recontrol_step_size": a}) for a in (1, 1, 2)
    )
    assert first is again
    assert first is not other


@pytest.mark.parametrize("weights", [{"polite": 1.0, "rude": -0.5}, '{"polite": 1.0, "rude": -0.5}'])
def test_several_heads_come_with_weights_over_http_as_a_string(served, weights):
    controller = served.controller(
        {"recontrol_value_head": weights, "recontrol_step_size": 1.0, "recontrol_scale": 0.5}
    )
    assert dict(zip(controller.heads, controller.weights, strict=True)) == {
        served.heads["polite"]: 1.0,
        served.heads["rude"]: -0.5,
    }


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"recontrol_value_head": "kind"}, r"'kind' is none of this engine's, which are 'polite', 'rude'"),
        ({"recontrol_value_head": "/etc"}, "none of this engine's"),
        ({"recontrol_value_head": 3}, "expected is a head's name"),
        ({"recontrol_value_head": True}, "expected is a head's name"),
        ({"recontrol_value_head": ["polite"]}, "expected is a head's name"),
        ({"recontrol_value_head": "{polite: 1}"}, "expected is a head's name"),
        ({"recontrol_value_head": {}}, "expected is a head's name"),
        ({"recontrol_value_head": {"polite": "1"}}, "must be a number other than 0"),
        ({"recontrol_value_head": {"polite": 0}}, "must be a finite number other than 0"),
        ({"recontrol_value_head": "polite", "recontrol_step_size": "1"}, "step_size is '1'"),
        ({"recontrol_value_head": "polite", "recontrol_step_size": math.nan}, "step_size is nan"),
        ({"recontrol_value_head": "polite", "recontrol_step_size": 1e30}, "recontrol_step_size is 1e.30; .* 1e.06"),
        ({"recontrol_value_head": "rude", "recontrol_scale": 2e6}, "recontrol_scale is 2000000.0; .* at most 1e.06"),
        ({"recontrol_value_head": "polite", "recontrol_regularization": 1e9}, "at most 1e.06"),
        ({"recontrol_value_head": {"polite": -1e9}}, "weight of 'polite' is -1000000000.0; .* at most 1e.06"),
        ({"recontrol_value_head": "polite", "recontrol_num_steps": 2.5}, "num_steps is 2.5"),
        ({"recontrol_value_head": "polite", "recontrol_max_kl": 0}, "max_kl is 0"),
        ({"recontrol_value_head": "polite", "recontrol_scale": 1.0}, "multiplies a control head's u"),
        ({"recontrol_value_head": "rude", "recontrol_strength": 0.1}, "the head is not calibrated"),
        ({"recontrol_value_head": "polite", "recontrol_trace": True}, "vLLM cannot do it"),
        ({"recontrol_value_head": "polite", "recontrol_start": 3}, "vLLM cannot do it"),
        ({"recontrol_strenght": 0.1}, "nearest is 'recontrol_strength'"),
        ({"value_head": "polite"}, "nearest is 'recontrol_value_head'"),
        ({"recontrol_strength": 0.1}, "names no head, and there is no default one"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(served, asked, told):
    with pytest.raises(ValueError, match=told):
        served.controller(asked)


def test_a_request_is_refused_where_the_heads_are_not_known(variables):
    check_request(None)
    with pytest.raises(ValueError, match="HF_RECONTROL_VLLM is not set in the process that takes requests"):
        check_request({"recontrol_value_head": "polite"})


def test_a_request_is_checked_by_the_heads_of_the_environment(named, variables):
    steering_arguments(named)
    check_request({"recontrol_value_head": "polite"})
    with pytest.raises(ValueError, match="none of this engine's"):
        check_request({"recontrol_value_head": "kind"})


def test_requests_are_checked_by_the_heads_that_were_read_at_the_start(named, variables):
    """Workers have read them then; an answer that they cannot give must be refused, and one that they can be given."""
    settings = steering_arguments(named)["additional_config"][KEY]
    head = tiny_head(1)
    head.config.control = ControlDefaults(step_size=2.0, num_steps=3, calibration=[[0.1, 1.0]], calibration_num_steps=3)
    head.save_pretrained(named["polite"])
    shutil.rmtree(named["rude"])
    with pytest.raises(ValueError, match="the head is not calibrated"):
        check_request({"recontrol_value_head": "polite", "recontrol_strength": 0.1})
    check_request({"recontrol_value_head": "rude"})
    head.save_pretrained(named["rude"])
    with pytest.raises(ValueError, match=r"'polite', .*, is not the one that was there when the engine was started"):
        ServedHeads(settings)


def test_a_head_with_another_default_is_another_head():
    head, digests = tiny_head(1), set()
    for step_size in (1.0, 2.0):
        head.config.control = ControlDefaults(step_size=step_size, num_steps=3)
        digests.add(digest_of(head))
    assert len({*digests, digest_of(tiny_head(2))}) == 3


def test_heads_that_cannot_be_read_any_more_are_a_wrong_request(variables, monkeypatch):
    monkeypatch.setenv(VARIABLE, '{"heads": {"polite": "/gone"}}')
    with pytest.raises(ValueError, match="neither a folder nor the id of a Hub repository"):
        check_request({"recontrol_value_head": "polite"})


def test_a_head_of_the_hub_is_the_one_of_its_present_commit(named, variables, hub):
    repository = hub.repositories["user/head"] = Repository()
    old, new = ({path.name: path.read_bytes() for path in Path(named[name]).iterdir()} for name in ("polite", "rude"))
    commit = repository.commit(old, "v1")
    settings = steering_arguments({"polite": "user/head@v1"})["additional_config"][KEY]
    repository.commit(new, "v1")
    assert settings["heads"] == {"polite": f"user/head@{commit}"}
    assert ServedHeads(settings).heads["polite"].digest() == tiny_head(1).digest()


def test_a_process_has_one_set_of_heads(named, variables):
    arguments = steering_arguments(named)
    assert steering_arguments(named) == arguments
    with pytest.raises(ValueError, match="HF_RECONTROL_VLLM is set already, to other heads"):
        steering_arguments({"polite": named["rude"]})
    check_request({"recontrol_value_head": "rude"})


def test_settings_that_clients_choose_record_no_cuda_graphs(served, monkeypatch):
    """Of each setting its own, in memory that vLLM does not count."""
    monkeypatch.setattr(CudaGraphs, "can_take", lambda rows: True)
    monkeypatch.setattr(CudaGraphs, "__call__", lambda *arguments: pytest.fail("a graph"))
    asked = served.controller({"recontrol_value_head": "polite"})
    h = torch.randn(2, 16)
    with pytest.raises(pytest.fail.Exception):
        Controller(served.heads["polite"])(h)
    assert not torch.equal(asked(h), h)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (None, "expected is"),
        ([], "expected is"),
        ({"heads": {}}, "expected is"),
        ({"heads": {"polite": "."}, "defualt": "polite"}, "expected is"),
        ({"heads": {"polite": "."}, "digests": {"rude": "0"}}, "expected is one for each of 'polite'"),
        ({"heads": {"polite": 3}}, "must be a folder or an id"),
        ({"heads": {"{": "."}}, "not beginning with a brace"),
        ({"heads": {"polite": "."}, "default": "rude"}, "the heads are 'polite'"),
    ],
)
def test_wrong_settings_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        ServedHeads(settings)


def test_a_variable_that_is_no_json_is_refused():
    with pytest.raises(ValueError, match="HF_RECONTROL_VLLM is 'polite', which is no JSON"):
        settings_from("polite")


def test_heads_that_cannot_steer_are_refused_at_the_start(tmp_path):
    ControlHead(ControlHeadConfig(hidden_size=16)).save_pretrained(tmp_path / "new")
    with pytest.raises(ValueError, match="'new' is 0 everywhere"):
        ServedHeads({"heads": {"new": str(tmp_path / "new")}})
    with pytest.raises(HeadUnavailable):
        ServedHeads({"heads": {"gone": str(tmp_path / "gone")}})


def test_steering_arguments_are_for_the_engine_and_its_processes(named, variables, monkeypatch):
    arguments = steering_arguments(named, default="rude")
    assert arguments == {
        "logits_processors": [ROUTER],
        "additional_config": {KEY: {"heads": named, "default": "rude", "digests": digests_of(named)}},
    }
    assert json.loads(os.environ[VARIABLE]) == arguments["additional_config"][KEY]
    assert os.environ[V2] == "0"


def test_model_runner_v2_is_refused_by_name(named, variables, monkeypatch):
    monkeypatch.setenv(V2, "1")
    with pytest.raises(ValueError, match=r"Model Runner V2 cannot be steered\. Set it to 0"):
        steering_arguments(named)


def test_serve_starts_vllm_with_its_flags(named, variables):
    command = command_line("folder", named, arguments=["--port", "8001"])
    assert command[1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", "folder"]
    assert command[-2:] == ["--port", "8001"]
    assert command[command.index("--logits-processors") + 1] == ROUTER
    assert json.loads(command[command.index("--additional-config") + 1]) == {
        KEY: {"heads": named, "default": None, "digests": digests_of(named)}
    }
    with pytest.raises(ValueError, match=r"--additional_config=\{\} is set by hf-recontrol serve"):
        command_line("folder", named, arguments=["--additional_config={}"])
    with pytest.raises(ValueError, match=r"--watermark-config.key makes vLLM run its Model Runner V2"):
        command_line("folder", named, arguments=["--watermark-config.key", "1"])


@pytest.mark.parametrize("whole_batches", [False, True])  # as an LM head with LoRA adapters takes them
def test_each_row_of_a_batch_is_under_its_own_control(whole_batches):
    model, value, control = tiny_model(), tiny_head(1), tiny_control_head(2)
    controllers = [
        None,
        Controller(value, ControlConfig(step_size=2.0, num_steps=3)),
        Controller(value, ControlConfig(step_size=2.0, num_steps=3, max_kl=0.1)),
        Controller(control, ControlConfig(scale=1.0)),
        Controller(control, ControlConfig(scale=1.0, max_kl=0.3)),
        Controller(value, ControlConfig(step_size=0.0)),
    ]
    h = torch.randn(6, 16)
    before, asked = h.clone(), []

    def lm_head(states):
        asked.append(len(states))
        return logits_of(model, states)

    with torch.no_grad():
        logits, unsound = BatchControl(controllers).logits(h, lm_head, whole_batches=whole_batches)
        for row, controller in enumerate(controllers):
            one = h[row : row + 1]
            expected = logits_of(model, one) if controller is None else steered_logits(model, one, controller)
            torch.testing.assert_close(logits[row : row + 1], expected)
    assert int(unsound) == 0
    assert asked == ([6, 6] if whole_batches else [6 + 2])
    torch.testing.assert_close(h, before, rtol=0, atol=0)


def test_a_row_that_is_not_finite_stays_plain_and_is_counted():
    control = BatchControl([Controller(tiny_control_head(2), ControlConfig(scale=1.0))] * 2)
    h = torch.randn(2, 16)
    h[1, 3] = torch.nan
    edited, unsound = control.logits(h, lambda states: states)
    assert int(unsound) == 1
    assert not torch.equal(edited[0], h[0])


def test_a_rank_without_the_logits_returns_none():
    control = BatchControl([Controller(tiny_control_head(2), ControlConfig(scale=1.0, max_kl=0.1))])
    assert control.logits(torch.randn(1, 16), lambda states: None)[0] is None


def test_other_rows_than_requests_are_refused():
    control = BatchControl([Controller(tiny_control_head(2), ControlConfig(scale=1.0))])
    with pytest.raises(SteeringNotApplied, match="2 rows for 1 requests"):
        control.logits(torch.randn(2, 16), lambda states: states)
