"""An engine of vLLM that cannot be steered does not start, and never writes plain text for what was to be steered."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_head, tiny_model, tiny_tokenizer

from hf_recontrol.errors import HeadUnavailable
from hf_recontrol.serving.vllm_settings import KEY, ROUTER, V2, VARIABLE

pytest.importorskip("vllm", reason="vLLM is not installed")
from vllm_engine import EngineError, run_engine

with warnings.catch_warnings(action="ignore"):  # of torch and vLLM, when they are imported
    from hf_recontrol.serving import vllm as ours

pytestmark = pytest.mark.vllm
STEERED = {"prompt_token_ids": [1, 5, 6], "max_tokens": 3, "extra_args": {"recontrol_value_head": "polite"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused")
    tiny_model(hidden_size=64).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for name, width in (("polite", 64), ("narrow", 32)):
        tiny_head(hidden_size=width).save_pretrained(folder / name)
    return folder


def refused(folder, told, *, head="polite", engine=None, **how):
    """Start it, and see it end by an error that says `told`."""
    heads = {"polite": str(folder / head)}
    with pytest.raises(EngineError, match=told):
        run_engine(folder, [[STEERED]], heads=heads, engine={"model": str(folder / "model"), **(engine or {})}, **how)


def variable(folder):
    return {VARIABLE: json.dumps({"heads": {"polite": str(folder / "polite")}})}


def test_heads_without_the_router(folder):
    refused(folder, "heads for vLLM, but no router", steered=False, variables=variable(folder))


def test_the_router_without_heads(folder):
    refused(folder, "but there are no heads", steered=False, engine={"logits_processors": [ROUTER]})


def test_model_runner_v2_by_name(folder):
    refused(
        folder,
        "Model Runner V2 cannot be steered. Set VLLM_USE_V2_MODEL_RUNNER=0",
        steered=False,
        variables={V2: "1", **variable(folder)},
        engine={"logits_processors": [ROUTER]},
    )


def test_a_head_of_another_width(folder):
    refused(folder, "reads hidden states 32 wide .* are 64 wide", head="narrow")


def test_speculation(folder):
    speculation = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    refused(folder, "not supported when speculative decoding", engine={"speculative_config": speculation})


def test_plugins_without_ours(folder):
    refused(folder, "VLLM_PLUGINS is", variables={"VLLM_PLUGINS": "another"})


def test_an_engine_whose_logits_go_by_the_layer_ends_without_a_text(folder):
    refused(folder, "SteeringNotApplied: vLLM made logits without its layer", broken="layer")


def config(**changed):
    """As much of a VllmConfig as is looked at."""
    parallel = SimpleNamespace(enable_batch_sharded_sampling=changed.pop("sharded", False))
    found = {"additional_config": {}, "use_v2_model_runner": False, "speculative_config": None}
    return SimpleNamespace(**found | {"parallel_config": parallel} | changed)


@pytest.fixture
def registered():
    ours.register()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"use_v2_model_runner": True}, "Model Runner V2 cannot be steered"),
        ({"speculative_config": object()}, "Speculative decoding is configured"),
        ({"sharded": True}, "enable_batch_sharded_sampling"),
    ],
)
def test_a_configuration_that_cannot_be_steered(registered, changed, told):
    with pytest.raises(ValueError, match=told):
        ours._check_engine(config(**changed))


def test_a_version_of_vllm_that_was_not_tested(registered, monkeypatch):
    ours._check_engine(config())
    monkeypatch.setattr(ours.vllm, "__version__", "0.33.0")
    with pytest.raises(ValueError, match=r"vLLM is 0\.33\.0; .* Install that: pip install 'vllm==0\.32\.\*'"):
        ours._check_engine(config())


def test_a_layer_that_another_plugin_has_taken_is_left_to_it_and_said(monkeypatch):
    monkeypatch.setitem(ours.op_registry_oot, ours.LAYER, dict)
    ours.register()
    assert ours.op_registry_oot[ours.LAYER] is dict
    with pytest.raises(ValueError, match="is that of builtins, not ours"):
        ours._check_engine(config())


def test_heads_that_differ_between_the_configuration_and_the_environment(folder, monkeypatch):
    monkeypatch.setenv(VARIABLE, variable(folder)[VARIABLE])
    with pytest.raises(ValueError, match="Requests are checked by the one and steered by the other"):
        ours._settings(config(additional_config={KEY: {"heads": {"other": "folder"}}}))


def generates(**changed):
    model = {"runner_type": "generate", "logits_processors": [ROUTER], "architectures": ["Odd"]} | changed
    return config(additional_config={KEY: {"heads": {"polite": "folder"}}}, model_config=SimpleNamespace(**model))


@pytest.mark.parametrize(("before", "takes_logits"), [(object(), False), (None, True)])
def test_a_model_in_which_the_lm_heads_input_is_not_known(monkeypatch, before, takes_logits):
    monkeypatch.setattr(ours, "_made", [ours._Routing(None, layer=before)])
    with pytest.raises(ValueError, match="several layers LogitsProcessor, or one whose input is logits"):
        ours._routing_of(generates(), SimpleNamespace(logits_as_input=takes_logits))


def test_a_pooling_model_is_left_alone():
    assert ours._routing_of(generates(runner_type="pooling"), SimpleNamespace(logits_as_input=False)) is None


def test_a_layer_of_model_runner_v2_is_refused_by_name(monkeypatch):
    """Watermarks choose V2 whatever the variable says, and V2 makes no router before its model."""
    monkeypatch.setattr(ours, "_made", [])
    v2 = generates()
    v2.use_v2_model_runner = True
    with pytest.raises(ValueError, match=r"Model Runner V2 cannot be steered\..*--watermark-config"):
        ours._routing_of(v2, SimpleNamespace(logits_as_input=False))


def test_heads_that_cannot_be_read_are_refused_where_requests_are_taken_too(monkeypatch):
    """vLLM calls this when that process starts; the first request may be hours away."""
    monkeypatch.setenv(VARIABLE, json.dumps({"heads": {"polite": "/gone"}}))
    with pytest.raises(HeadUnavailable, match="neither a folder nor the id of a Hub repository"):
        ours.register()


@pytest.fixture
def warned(monkeypatch):
    """(what was warned of: the counts; the clock, which stands still)."""
    counts, clock = [], SimpleNamespace(monotonic=lambda: clock.now, now=100.0)
    monkeypatch.setattr(ours.logger, "warning", lambda text, count: counts.append(count))
    monkeypatch.setattr(ours, "time", clock)
    return counts, clock


def test_rows_that_were_left_plain_are_warned_of_at_once_and_then_now_and_then(warned):
    counts, clock = warned
    routing = ours._Routing(None)
    for count in (0, 2, 3, 0):
        routing.note(torch.tensor(count))
    assert counts == [2]
    clock.now += ours.SECONDS_BETWEEN_WARNINGS
    routing.warn()
    routing.warn()
    assert counts == [2, 3]


def test_an_accelerators_count_is_read_when_it_has_arrived(warned):
    counts, _ = warned
    router = object.__new__(ours.RequestRouter)
    router.routing, router.control = ours._Routing(None), None
    event = SimpleNamespace(query=lambda: event.arrived, arrived=False)
    router.routing.counts.append((torch.tensor(2), event))
    router.update_state(None)
    assert counts == []
    event.arrived = True
    router.update_state(None)
    assert counts == [2]
