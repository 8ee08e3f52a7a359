"""The recontrol_ keywords, what configs may say in their place, and the trace: who wins, and what is refused."""

import copy
import functools
import json
import pickle
import sys
import threading
from math import inf, nan

import numpy as np
import pytest
import torch
from hub_server import READ_TOKEN
from test_generation import NoToken, decode_by_hand, left_padded
from test_hooks import small_batches
from tiny import prompts, tiny_head, tiny_model, tiny_tokenizer
from torch.nn import functional
from transformers import (
    CompileConfig,
    GenerationConfig,
    LlamaForCausalLM,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
    pipeline,
)

from hf_recontrol import (
    ControlConfig,
    ControlDefaults,
    Controller,
    HeadError,
    HeadMismatch,
    HeadUnavailable,
    RewardScale,
    SteeringNotApplied,
    ValueHead,
    enable_recontrol,
    register_value_heads,
    registry,
)
from hf_recontrol.forwards import generate_with_hidden_states
from hf_recontrol.keywords import RecontrolKeywords
from hf_recontrol.steering import steered_generate_batch

pytestmark = pytest.mark.versions
GREEDY = {"do_sample": False, "max_new_tokens": 8}
STEER = {"recontrol_step_size": 2.0, "recontrol_num_steps": 3}
STEERING = ControlConfig(2.0, 3)
TABLE = [[0.02, 1.0], [0.4, 8.0]]


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch):
    """No test sees the heads of another."""
    monkeypatch.setattr(registry, "_REGISTERED", {})
    monkeypatch.setattr(registry, "_HEADS", registry._HeadCache())


@pytest.fixture
def model():
    return enable_recontrol(tiny_model())


@pytest.fixture
def head():
    return tiny_head()


def tokens(model, **keywords):
    return model.generate(**prompts(), **(GREEDY | keywords)).tolist()


@functools.cache
def stock_tokens():
    """Of the stock model."""
    return tokens(tiny_model())


def calibrated(seed=0):
    head = tiny_head(seed)
    head.config.control = ControlDefaults(num_steps=3, calibration=TABLE)
    return head


def on_the_hub(hub, repo_id, head, folder):
    """Put the head there, and return its commit."""
    head.save_pretrained(folder)
    return hub.add(repo_id, {path.name: path.read_bytes() for path in folder.iterdir()})


# recontrol_config


@pytest.mark.parametrize(
    "keywords",
    [
        {"recontrol_config": STEERING},
        {"recontrol_config": {"step_size": 2.0, "num_steps": 3}},
        {"recontrol_config": {"step_size": 2}, "recontrol_num_steps": 3},
        {"recontrol_config": STEERING, **STEER},  # the same said twice
        {"recontrol_config": {}, **STEER},
        {"recontrol_config": ControlConfig(num_steps=None), **STEER},
    ],
    ids=str,
)
def test_a_config_is_its_keywords_at_once(model, head, keywords):
    expected = tokens(model, recontrol_value_head=head, **STEER)
    assert tokens(model, recontrol_value_head=head, **keywords) == expected
    assert tokens(model, recontrol_value_head=head) != expected  # the head's own control is another


@pytest.mark.parametrize(
    ("name", "said", "configured"),
    [
        ("step_size", 1.0, 2.0),
        ("step_size", 0, 2.0),
        ("num_steps", 0, 3),
        ("strength", 0.1, 0.2),
        ("max_kl", inf, 0.2),
        ("max_relative_norm", 0.1, 0.2),
        ("regularization", 0.0, 0.2),
        ("target_value", -1.0, 1.0),
    ],
)
def test_a_keyword_that_says_something_else_than_the_config_is_refused(model, name, said, configured):
    for config in ({name: configured}, ControlConfig(**{name: configured})):
        with pytest.raises(ValueError, match=rf"recontrol_{name} is {said}, but recontrol_config has {name} = "):
            model.generate(
                **prompts(),
                streamer=NoToken(),
                recontrol_value_head=calibrated(),
                recontrol_config=config,
                **{f"recontrol_{name}": said},
            )


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"recontrol_config": {"alpha": 1.0}}, ValueError, r"unknown fields \['alpha'\]"),
        ({"recontrol_config": {"step_size": "2"}}, ValueError, "step_size is '2'"),
        ({"recontrol_config": "config.json"}, TypeError, "is a str; pass a ControlConfig or a dict"),
        ({"recontrol_config": {"strength": 0.1}, "recontrol_step_size": 2.0}, ValueError, "Give one of the two"),
        ({"recontrol_strength": 0.1, "recontrol_step_size": 2.0}, ValueError, "Give one of the two"),
        ({"recontrol_strength": 0.5}, ValueError, r"calibrated up to 0\.4"),
        ({"recontrol_max_kl": 0}, ValueError, "max_kl is 0"),
        ({"recontrol_max_relative_norm": -1}, ValueError, "max_relative_norm is -1"),
        ({"recontrol_regularization": inf}, ValueError, "regularization is inf"),
        ({"recontrol_target_value": "high"}, ValueError, "target_value is 'high'"),
        ({"recontrol_trace": 1}, ValueError, "recontrol_trace is 1; it must be True or False"),
        ({"recontrol_strict": 0}, ValueError, "recontrol_strict is 0; it must be True or False"),
        ({"recontrol_token": "hf_x"}, ValueError, "a ValueHead was given"),
        ({"recontrol_maxkl": 0.1}, ValueError, "the nearest is 'recontrol_max_kl'"),
    ],
    ids=str,
)
def test_keywords_that_cannot_be_meant_are_refused_before_the_first_token(model, keywords, error, words):
    with pytest.raises(error, match=words):
        model.generate(**prompts(), streamer=NoToken(), recontrol_value_head=calibrated(), **keywords)


@pytest.mark.parametrize("keywords", [{"recontrol_config": {}}, {"recontrol_trace": True}, {"recontrol_strict": False}])
def test_keywords_without_a_head_are_refused(model, keywords):
    with pytest.raises(ValueError, match="no recontrol_value_head, so nothing would be steered"):
        model.generate(**prompts(), streamer=NoToken(), **keywords)
    with pytest.raises(ValueError, match="no recontrol_value_head, so nothing would be steered"):
        model.generate(**prompts(), streamer=NoToken(), generation_config=named(False), **keywords)


# Several heads


def test_several_heads_steer_by_their_weighted_sum(model, head):
    heads = {head: 1.0, tiny_head(1, num_hidden_layers=0): -0.5, tiny_head(2, hidden_act="gelu"): 2}
    expected = decode_by_hand(model, Controller(heads, STEERING), steps=8, **left_padded()).tolist()
    assert model.generate(**left_padded(), **GREEDY, recontrol_value_head=heads, **STEER).tolist() == expected
    for without in heads:
        fewer = {head: weight for head, weight in heads.items() if head is not without}
        assert model.generate(**left_padded(), **GREEDY, recontrol_value_head=fewer, **STEER).tolist() != expected


def test_heads_may_be_given_in_any_way_and_mixed(model, hub, tmp_path):
    heads = [tiny_head(i) for i in range(5)]
    heads[0].save_pretrained(tmp_path / "path")
    heads[1].save_pretrained(tmp_path / "text")
    on_the_hub(hub, "user/head", heads[2], tmp_path / "files")
    old = on_the_hub(hub, "user/changed", heads[3], tmp_path / "old")
    hub.repositories["user/changed"].commit({"config.json": b"{}"})
    given = [tmp_path / "path", str(tmp_path / "text"), "user/head", f"user/changed@{old}", heads[4]]
    weights = [1.0, -0.5, 2, 0.25, -1.5]
    expected = tokens(model, recontrol_value_head=dict(zip(heads, weights, strict=True)), **STEER)
    assert tokens(model, recontrol_value_head=dict(zip(given, weights, strict=True)), **STEER) == expected
    assert tokens(model, recontrol_value_head=dict(zip(given, weights[::-1], strict=True)), **STEER) != expected


def test_two_names_of_one_head_add_up(model, head, tmp_path):
    head.save_pretrained(tmp_path / "head")
    twice = {tmp_path / "head": 2.0, str(tmp_path / "head"): -0.75, f"{tmp_path}/./head": 0.25}
    expected = tokens(model, recontrol_value_head={head: 1.5}, **STEER)
    assert tokens(model, recontrol_value_head=twice, **STEER) == expected
    assert expected != tokens(model, recontrol_value_head={head: 0.25}, **STEER)  # the last alone
    with pytest.raises(ValueError, match=r"weight is 0\.0"):
        tokens(model, recontrol_value_head={tmp_path / "head": 1.0, str(tmp_path / "head"): -1.0}, **STEER)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({}, ValueError, "has 0 heads"),
        ({3: 1.0}, TypeError, "recontrol_value_head is a int"),
        ({None: 1.0}, TypeError, "recontrol_value_head is a NoneType"),
        ({tiny_head(): 0}, ValueError, r"weight is 0\.0; .* other than 0"),
        ({tiny_head(): "1"}, ValueError, "weight is '1'"),
        ({tiny_head(): nan}, ValueError, "weight is nan"),
        ({tiny_head(): 10**400}, ValueError, "weight is 1000"),
        ({tiny_head(): 1.0, tiny_head(hidden_size=8): 1.0}, HeadMismatch, r"8 wide .* 16 wide"),
        ([tiny_head(), None, tiny_head()], TypeError, "recontrol_value_head is a list"),  # one for each prompt: not yet
        ((tiny_head(),), TypeError, "recontrol_value_head is a tuple"),
    ],
)
def test_what_is_no_sum_of_heads_is_refused(model, given, error, words):
    with pytest.raises(error, match=words):
        model.generate(**prompts(), streamer=NoToken(), recontrol_value_head=given, **STEER)


def test_a_revision_is_of_one_head(model, head, hub, tmp_path):
    old = on_the_hub(hub, "user/head", head, tmp_path / "old")
    on_the_hub(hub, "user/other", tiny_head(1), tmp_path / "other")
    hub.repositories["user/head"].commit({"config.json": b"{}"})
    with pytest.raises(ValueError, match=r'has 2 heads.*write "id@revision"'):
        tokens(model, recontrol_value_head={"user/head": 1.0, "user/other": 1.0}, recontrol_revision=old)
    with pytest.raises(ValueError, match="revision"):
        tokens(model, recontrol_value_head=f"user/head@{old}", recontrol_revision=old)
    assert not hub.log
    with pytest.raises(HeadError, match="hidden_size"):
        tokens(model, recontrol_value_head="user/head")
    expected = tokens(model, recontrol_value_head=head, **STEER)
    assert tokens(model, recontrol_value_head="user/head", recontrol_revision=old, **STEER) == expected


def test_a_token_is_of_one_head(model, head):
    with pytest.raises(ValueError, match="recontrol_token are for one head without a weight"):
        model.generate(**prompts(), streamer=NoToken(), recontrol_value_head={head: 1.0}, recontrol_token="hf_x")


def test_heads_that_differ_in_an_option_need_it_in_the_call_or_a_config(model):
    heads = {"one": tiny_head(1), "other": tiny_head(2)}
    heads["other"].config.control.num_steps = 7
    given = dict.fromkeys(heads.values(), 1.0)
    with pytest.raises(ValueError, match=r"differ in their num_steps: 30, 7\. Pass recontrol_num_steps"):
        model.generate(**prompts(), streamer=NoToken(), recontrol_value_head=given)
    expected = tokens(model, recontrol_value_head=given, recontrol_num_steps=3)
    assert tokens(model, recontrol_value_head=given, generation_config=GenerationConfig(recontrol_num_steps=3)) == (
        expected
    )


def test_a_strength_steers_and_is_bounded_at_four_times_itself(model):
    head = calibrated()
    bounded = {"recontrol_step_size": (8.0 * 1.0) ** 0.5, "recontrol_max_kl": 4 * (0.4 * 0.02) ** 0.5}
    expected = tokens(model, recontrol_value_head=head, **bounded)
    assert tokens(model, recontrol_value_head=head, recontrol_strength=(0.4 * 0.02) ** 0.5) == expected
    assert expected != tokens(model)


# Heads that a config names


def named(head="polite", **scalars):
    """A generation config that names heads."""
    return GenerationConfig(recontrol_value_head=head, **{f"recontrol_{name}": x for name, x in scalars.items()})


@pytest.mark.parametrize("where", ["call", "positional", "model"])
def test_a_config_may_name_registered_heads_and_say_how_hard(model, where):
    heads = {"polite": calibrated(1), "brief": calibrated(2)}
    register_value_heads(heads)
    plain = tokens(model)
    for config, keywords in (
        (named(step_size=2.0, num_steps=3), {"recontrol_value_head": heads["polite"], **STEER}),
        (named(strength=0.3), {"recontrol_value_head": heads["polite"], "recontrol_strength": 0.3}),
        (
            named({"polite": 1.0, "brief": -0.5}, step_size=2.0),
            {"recontrol_value_head": {heads["polite"]: 1.0, heads["brief"]: -0.5}, "recontrol_step_size": 2.0},
        ),
    ):
        expected = tokens(model, **keywords)
        if where == "positional":
            actual = model.generate(None, config, **prompts(), **GREEDY).tolist()
        elif where == "call":
            actual = tokens(model, generation_config=config)
        else:
            other = enable_recontrol(tiny_model())
            other.generation_config = config
            actual = tokens(other, pad_token_id=0)
        assert actual == expected
        assert actual != plain


def test_two_names_in_a_config_of_one_head_add_up(model, head):
    register_value_heads({"polite": head, "kind": head})
    expected = tokens(model, recontrol_value_head={head: 1.25}, **STEER)
    config = named({"polite": 2.0, "kind": -0.75})
    assert tokens(model, generation_config=config, **STEER) == expected


@pytest.mark.parametrize("where", ["given", "model's"])
def test_a_head_that_is_not_registered_is_an_error_that_loads_nothing(model, head, hub, where, tmp_path, monkeypatch):
    """Neither a folder of that name nor a repository is looked at: data does not choose what is read."""
    on_the_hub(hub, "user/head", head, tmp_path / "files")
    head.save_pretrained(tmp_path / "user" / "head")
    head.save_pretrained(tmp_path / "folder")
    monkeypatch.chdir(tmp_path)
    register_value_heads({"polite": head})
    monkeypatch.setattr(ValueHead, "from_pretrained", lambda *args, **kwargs: pytest.fail("a config loaded a head"))
    touched = watch_files(monkeypatch)
    for name in ("user/head", f"user/head@{'0' * 40}", "folder", str(tmp_path / "folder"), "./folder", "nowhere/head"):
        for wanted in (name, {name: 1.0}, {"polite": 1.0, name: 1.0}):
            given = {"generation_config": named(wanted)} if where == "given" else {}
            if where == "model's":
                model.generation_config = named(wanted)
            with pytest.raises(ValueError, match=f"^The {where} generation config names the value head '") as caught:
                model.generate(**prompts(), streamer=NoToken(), **given)
            for words in ("not registered in this process (registered: 'polite')", "register_value_heads({"):
                assert words in str(caught.value)
            assert "model.set_recontrol_defaults(value_head=" in str(caught.value)
    assert not [path for path in touched if path.startswith((str(tmp_path), "user", "folder", "./folder", "nowhere"))]
    assert not hub.log
    assert tokens(model, recontrol_value_head=False, pad_token_id=0) == stock_tokens()  # plain text for the asking


def watch_files(monkeypatch):
    """A list that fills with the paths that are looked at from here on."""
    touched = []
    for name in ("builtins.open", "io.open", "os.stat", "os.listdir", "os.scandir"):
        module, function = name.split(".")
        stock = getattr(sys.modules[module], function)
        monkeypatch.setattr(
            name, lambda path=".", *a, stock=stock, **k: touched.append(str(path)) or stock(path, *a, **k)
        )
    return touched


HOSTILE = [
    {"recontrol_token": "hf_stolen"},
    {"recontrol_revision": "main"},
    {"recontrol_config": {"step_size": 1e6}},
    {"recontrol_path": "/etc"},
    {"recontrol_": 1},
    {"recontrol_value_head": True},
    {"recontrol_value_head": 3},
    {"recontrol_value_head": ["polite"]},
    {"recontrol_value_head": {}},
    {"recontrol_value_head": ""},
    {"recontrol_value_head": {"polite": 1.0, 3: 1.0}},
    {"recontrol_value_head": {"polite": "1"}},
    {"recontrol_value_head": {"polite": nan}},
    {"recontrol_value_head": {"polite": inf}},
    {"recontrol_value_head": {"polite": True}},
    {"recontrol_value_head": {"polite": {"polite": 1.0}}},
    {"recontrol_value_head": {"polite": 0}},
    {"recontrol_step_size": "1"},
    {"recontrol_step_size": -1},
    {"recontrol_step_size": nan},
    {"recontrol_num_steps": 10**9},
    {"recontrol_num_steps": 1.0},
    {"recontrol_strength": True},
    {"recontrol_strength": 0.1, "recontrol_step_size": 0.1},
    {"recontrol_max_kl": {}},
    {"recontrol_max_relative_norm": 0},
    {"recontrol_regularization": [0.1]},
    {"recontrol_target_value": "/etc/passwd"},
    {"recontrol_strict": "yes"},
    {"recontrol_trace": 1},
]


@pytest.mark.parametrize("said", HOSTILE, ids=str)
@pytest.mark.parametrize("where", ["given", "model's"])
def test_a_config_that_says_more_than_it_may_is_refused_and_false_still_gives_plain_text(model, head, said, where):
    register_value_heads({"polite": head})
    config = GenerationConfig(**({"recontrol_value_head": "polite"} | said))
    if where == "model's":
        model.generation_config = config
    given = {"generation_config": config} if where == "given" else {}
    with pytest.raises(ValueError, match=r"recontrol_|weight is|is .*; it must be|Give one of the two"):
        model.generate(**prompts(), streamer=NoToken(), **given)
    assert tokens(model, recontrol_value_head=False, pad_token_id=0, **given) == stock_tokens()


@pytest.mark.parametrize(
    "said",
    [
        *({f"recontrol_{name}": 10**400} for name in ("step_size", "strength", "max_relative_norm", "target_value")),
        {"recontrol_value_head": {"polite": 10**400}},
        {"recontrol_value_head": {"polite": "x", "kind": 1.0}},  # two names of one head: their sum is none
        {"recontrol_value_head": ["x" * 10**6]},
        {"recontrol_value_head": "x" * 10**6},
        {"recontrol_step_size": "x" * 10**6},
        {"recontrol_strict": "x" * 10**6},
        {"recontrol_" + "x" * 10**6: 1},
    ],
    ids=lambda said: f"{next(iter(said))[:30]}",
)
def test_what_a_hostile_config_says_is_no_crash_and_is_not_repeated_at_length(model, head, said):
    register_value_heads({"polite": head, "kind": head})
    config = GenerationConfig(**({"recontrol_value_head": "polite"} | said))
    with pytest.raises(ValueError, match=r"recontrol_|weight|must be") as caught:
        model.generate(**prompts(), streamer=NoToken(), generation_config=config)
    assert len(str(caught.value)) < 1000


# Who wins: the call, then the given config, then the model's defaults, then the head


def asked(model, given=None, **keywords):
    return RecontrolKeywords.pop(keywords).request(model, given)


LAYERS = {
    "step_size": (0.0, 0.2, 0.3),
    "num_steps": (0, 2, 3),
    "strength": (0.05, 0.1, 0.2),
    "max_kl": (inf, 0.2, 0.3),
    "max_relative_norm": (0.1, inf, 0.3),
    "regularization": (0.0, 0.2, 0.3),
    "target_value": (0.0, -1.0, 1.0),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_call_wins_over_the_given_config_and_that_over_the_models_own(model, name):
    head, keyword = calibrated(), f"recontrol_{name}"
    call, given, own = LAYERS[name]
    model.set_recontrol_defaults(head, **{name: own})
    config = GenerationConfig(**{keyword: given})

    def settled(*arguments, **keywords):
        return getattr(asked(model, *arguments, **keywords).controller.config, name)

    assert settled(config, **{keyword: call}) == call
    assert settled(None, **{keyword: call}) == call
    assert settled(None, recontrol_config={name: call}) == call
    assert settled(config) == given
    assert settled(GenerationConfig()) == own
    assert settled() == own
    assert settled(config, **{keyword: None}) == given  # None is no word
    assert settled(GenerationConfig(**{keyword: None}), **{keyword: None}) == own
    model.set_recontrol_defaults(head)
    in_the_head = {"step_size": 0.5, "num_steps": 3, "regularization": 0.0}.get(name)
    assert settled(**{keyword: None}) == in_the_head


def test_the_head_is_chosen_by_the_same_order(model):
    heads = {name: tiny_head(i) for i, name in enumerate(("call", "given", "own"))}
    register_value_heads(heads)
    model.set_recontrol_defaults(heads["own"])
    assert asked(model, named("given"), recontrol_value_head=heads["call"]).controller.heads == [heads["call"]]
    assert asked(model, named("given")).controller.heads == [heads["given"]]
    assert asked(model, GenerationConfig()).controller.heads == [heads["own"]]
    assert asked(model, named("given"), recontrol_value_head=None).controller.heads == [heads["given"]]
    assert asked(model, named(False)).controller is None
    assert asked(model, named(False), recontrol_value_head=heads["call"]).controller.heads == [heads["call"]]
    assert asked(model, named("given"), recontrol_value_head=False).controller is None
    assert asked(model).controller.heads == [heads["own"]]


def test_a_step_size_and_a_strength_hide_each_other_across_the_layers(model):
    model.set_recontrol_defaults(calibrated(), strength=0.1)
    control = asked(model, GenerationConfig(recontrol_step_size=0.3)).controller.config
    assert (control.step_size, control.strength, control.max_kl) == (0.3, None, None)
    control = asked(model, GenerationConfig(recontrol_step_size=0.3), recontrol_strength=0.2).controller.config
    assert (control.step_size, control.strength, control.max_kl) == (None, 0.2, 0.8)


@pytest.mark.parametrize(
    ("call", "given", "own", "expected"),
    [
        (None, None, True, True),
        (None, False, True, False),
        (None, True, False, True),
        (False, True, True, False),
        (True, False, None, True),
        (None, None, None, False),
    ],
)
def test_strict_and_trace_are_chosen_by_the_same_order(model, call, given, own, expected):
    head = tiny_head(base_model_name_or_path="user/base")
    model.config._name_or_path = "user/base"
    model.set_recontrol_defaults(head, strict=own, trace=own)
    config = GenerationConfig(recontrol_strict=given, recontrol_trace=given)
    keywords = {"recontrol_strict": call, "recontrol_trace": call}
    assert asked(model, config, **keywords).trace is expected
    model.config._name_or_path = None  # no name: no warning, but not the same id either
    if expected:
        with pytest.raises(HeadMismatch, match="recontrol_strict"):
            asked(model, config, **keywords)
    else:
        asked(model, config, **keywords)


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"recontrol_step_size": -1},
        {"recontrol_stepsize": 1},
        {"recontrol_config": 7},
        {"recontrol_strength": 0.1, "recontrol_step_size": 0.1},
        {"recontrol_trace": "yes"},
        {"recontrol_trace": True, "recontrol_strict": True},
        {"generation_config": named("nobody", token="x")},
    ],
    ids=str,
)
def test_false_turns_steering_off_whatever_else_is_said(model, head, keywords):
    model.set_recontrol_defaults(head, step_size=2.0)
    assert tokens(model, recontrol_value_head=False, **keywords) == stock_tokens()
    model.generation_config.recontrol_step_size = "hostile"
    assert tokens(model, recontrol_value_head=False, **keywords) == stock_tokens()


@pytest.mark.parametrize("off", [{"recontrol_num_steps": 0}, {"recontrol_step_size": 0.0}, {"recontrol_step_size": 0}])
def test_an_explicit_zero_overrides_the_defaults(model, head, off):
    model.set_recontrol_defaults(head, step_size=2.0, num_steps=3)
    assert tokens(model) != stock_tokens()
    assert tokens(model, **off) == stock_tokens()


# set_recontrol_defaults


def defaults_of(model):
    return {name: value for name, value in vars(model.generation_config).items() if name.startswith("recontrol_")}


def test_defaults_are_stored_replaced_and_cleared_and_the_rest_of_the_config_stays(model, head):
    model.generation_config.temperature = 0.5
    others, plain = vars(copy.deepcopy(model.generation_config)), tokens(model)
    steered = tokens(model, recontrol_value_head=head, **STEER)
    model.set_recontrol_defaults(head, step_size=2.0, num_steps=3)
    assert tokens(model) == steered != plain
    assert {name.removeprefix("recontrol_") for name in defaults_of(model)} == {"value_head", "step_size", "num_steps"}
    model.set_recontrol_defaults(tiny_head(1), step_size=4.0)
    assert {name.removeprefix("recontrol_") for name in defaults_of(model)} == {"value_head", "step_size"}
    assert tokens(model) == tokens(model, recontrol_value_head=tiny_head(1), recontrol_step_size=4.0)
    model.set_recontrol_defaults(None, num_steps=3)
    assert defaults_of(model) == {"recontrol_num_steps": 3}
    assert tokens(model, recontrol_value_head=head, recontrol_step_size=2.0) == steered
    model.set_recontrol_defaults()
    assert defaults_of(model) == {}
    assert tokens(model) == plain
    after = vars(model.generation_config)
    assert all(after[name] == value for name, value in others.items() if name != "_from_model_config")


@pytest.mark.parametrize(
    ("value_head", "defaults", "error"),
    [
        (tiny_head(), {"strength": 0.1}, "not calibrated"),
        (calibrated(), {"strength": 0.5}, r"up to 0\.4"),
        (calibrated(), {"strength": 0.1, "step_size": 0.1}, "Give one of the two"),
        (tiny_head(), {"step_size": -1}, "step_size is -1"),
        (tiny_head(), {"stepsize": 1.0}, r"no keyword 'stepsize'\. It has value_head, step_size"),
        (tiny_head(), {"config": STEERING}, "no keyword 'config'"),
        (tiny_head(), {"token": "hf_x"}, "no keyword 'token'"),
        (tiny_head(), {"strict": "yes"}, "recontrol_strict is 'yes'"),
        (tiny_head(), {"trace": 1}, "recontrol_trace is 1"),
        (tiny_head(), {"strict": True}, "asks for the same Hub id"),
        (tiny_head(hidden_size=8), {}, r"8 wide .* 16 wide"),
        ({tiny_head(): 0}, {}, "weight is 0"),
        ({}, {}, "has 0 heads"),
        ({tiny_head(1): 1.0, calibrated(2): 1.0}, {}, "differ in their num_steps"),
        (3, {}, "recontrol_value_head is a int"),
        ("./no/such/folder", {}, "no/such/folder"),
        (None, {"step_size": -1}, "step_size is -1"),
        (None, {"num_step": 1}, "no keyword 'num_step'"),
        (None, {"strict": "yes"}, "recontrol_strict is 'yes'"),
        (None, {"trace": 1}, "recontrol_trace is 1"),
    ],
    ids=str,
)
def test_bad_defaults_are_refused_and_the_old_ones_stay(model, head, value_head, defaults, error):
    model.set_recontrol_defaults(head, max_kl=0.5)
    before, registered = defaults_of(model), dict(registry._REGISTERED)
    with pytest.raises((TypeError, ValueError, HeadUnavailable), match=error):
        model.set_recontrol_defaults(value_head, **defaults)
    assert defaults_of(model) == before
    assert registered == registry._REGISTERED


def test_new_defaults_are_checked_without_the_old_ones(model, head):
    model.set_recontrol_defaults(calibrated(), strength=0.1)
    model.set_recontrol_defaults(head)  # not calibrated, and need not be
    model.set_recontrol_defaults(head, num_steps=3)
    heads = {tiny_head(1): 1.0, calibrated(2): 1.0}
    with pytest.raises(ValueError, match="differ in their num_steps"):  # the num_steps of before will be gone
        model.set_recontrol_defaults(heads)


def test_the_weights_of_one_head_add_up_in_defaults_too(model, head, tmp_path):
    expected = tokens(model, recontrol_value_head={head: 3.0}, **STEER)
    model.set_recontrol_defaults({head: 1.0, copy.deepcopy(head): 2.0}, step_size=2.0, num_steps=3)
    assert tokens(model) == expected
    head.save_pretrained(tmp_path / "head")
    with pytest.raises(ValueError, match=r"weight is 0\.0"):
        model.set_recontrol_defaults({tmp_path / "head": 1.0, f"{tmp_path}/./head": -1.0})
    assert tokens(model) == expected


def test_defaults_in_numpys_numbers_are_saved(model, head, tmp_path):
    model.set_recontrol_defaults({head: np.float32(0.5)}, num_steps=np.int64(3), step_size=np.float32(2.0))
    model.save_pretrained(tmp_path)
    loaded = enable_recontrol(LlamaForCausalLM.from_pretrained(tmp_path))
    assert tokens(loaded) == tokens(model, recontrol_value_head={head: 0.5}, **STEER) != stock_tokens()


def test_defaults_go_with_a_saved_model_and_their_heads_must_be_registered_again(model, head, tmp_path, monkeypatch):
    expected = tokens(model, recontrol_value_head={head: 0.5}, **STEER, recontrol_max_kl=inf)
    model.set_recontrol_defaults({head: 0.5}, step_size=2.0, num_steps=3, max_kl=inf)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(registry, "_REGISTERED", {})  # as in another process
    loaded = enable_recontrol(LlamaForCausalLM.from_pretrained(tmp_path))
    assert defaults_of(loaded) == defaults_of(model)
    (name,) = loaded.generation_config.recontrol_value_head
    with pytest.raises(ValueError, match=f"The model's generation config names the value head '{name}', .*registered"):
        loaded.generate(**prompts(), streamer=NoToken())
    register_value_heads({name: head})
    assert tokens(loaded) == expected
    loaded.set_recontrol_defaults()
    loaded.save_pretrained(tmp_path / "plain")
    assert "recontrol" not in (tmp_path / "plain" / "generation_config.json").read_text()


def test_defaults_of_a_stock_model_are_ignored_by_transformers_itself(model, head, tmp_path):
    model.set_recontrol_defaults(head, step_size=2.0)
    model.save_pretrained(tmp_path)
    assert tokens(LlamaForCausalLM.from_pretrained(tmp_path)) == stock_tokens()


def test_copies_keep_the_defaults(model, head):
    model.set_recontrol_defaults(head, step_size=2.0, num_steps=3)
    expected = tokens(model)
    assert expected != stock_tokens()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert tokens(twin) == expected
        twin.set_recontrol_defaults()
        assert tokens(model) == expected  # the copy's are its own


def test_a_pipeline_obeys_the_defaults(model, head):
    tokenizer = tiny_tokenizer()
    inputs = tokenizer("w5 w6 w7", return_tensors="pt")
    model.set_recontrol_defaults(head, step_size=2.0, num_steps=3)
    expected = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **GREEDY)
    text = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (answer,) = text("w5 w6 w7", **GREEDY)
    assert answer["generated_text"] == "w5 w6 w7" + tokenizer.decode(expected[0, inputs["input_ids"].shape[1] :])
    (plain,) = text("w5 w6 w7", **GREEDY, recontrol_value_head=False)
    assert plain["generated_text"] != answer["generated_text"]


def test_a_head_without_a_name_gets_one_from_its_reward_and_weights():
    names = []
    for head in (tiny_head(1), copy.deepcopy(tiny_head(1)), tiny_head(2), tiny_head(1, reward=RewardScale("brevity"))):
        model = enable_recontrol(tiny_model())
        model.set_recontrol_defaults(head)
        names.append(model.generation_config.recontrol_value_head)
    assert names[0] == names[1] != names[2]
    assert names[0].startswith("reward-")
    assert names[3].startswith("brevity-")


@pytest.mark.parametrize("difference", ["activation", "control", "reward"])
def test_heads_that_differ_in_their_config_only_have_names_of_their_own(head, difference):
    other = copy.deepcopy(head)
    if difference == "activation":
        other.config.hidden_act = "tanh"
    elif difference == "control":
        other.config.control.num_steps = 1
    else:
        other.config.reward.std = 9.0
    models = [enable_recontrol(tiny_model()) for _ in range(2)]
    for model, one in zip(models, (head, other), strict=True):
        model.set_recontrol_defaults(one)
    assert [asked(model).controller.heads for model in models] == [[head], [other]]


def test_several_heads_are_defaults_by_folder_id_and_object(model, head, hub, tmp_path):
    one, other = tiny_head(1), tiny_head(2)
    on_the_hub(hub, "user/head", one, tmp_path / "files")
    other.save_pretrained(tmp_path / "folder")
    expected = tokens(model, recontrol_value_head={head: 1.0, one: -0.5, other: 2}, **STEER)
    model.set_recontrol_defaults({head: 1.0, "user/head": -0.5, tmp_path / "folder": 2}, step_size=2.0, num_steps=3)
    assert tokens(model) == expected
    weights = json.loads(model.generation_config.to_json_string())["recontrol_value_head"]
    assert sorted(weights.values()) == [-0.5, 1.0, 2]
    assert {"user/head", str(tmp_path / "folder")} < set(weights)
    hub.reset()
    assert tokens(model) == expected
    assert not hub.log


def repetitive_prompt():
    inputs = prompts(rows=1, length=12)
    inputs["input_ids"][0, 6:] = inputs["input_ids"][0, :6]  # something to look up
    return inputs


@pytest.mark.parametrize("draft", ["stock", "enabled", "with defaults of its own"])
def test_drafts_under_defaults_are_plain_and_the_tokens_the_steered_models_own(model, head, draft):
    model.set_recontrol_defaults(head, step_size=2.0, num_steps=3)
    expected = model.generate(**repetitive_prompt(), **GREEDY)
    assistant = tiny_model(1, hidden_size=32)  # wider: the target's head would be an error here
    if draft != "stock":
        enable_recontrol(assistant)
    if draft == "with defaults of its own":
        assistant.set_recontrol_defaults(tiny_head(1, hidden_size=32), step_size=2.0)
    states, given = [], []
    assistant.model.register_forward_hook(lambda module, args, output: states.append(output.last_hidden_state))
    assistant.lm_head.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    actual = model.generate(**repetitive_prompt(), **GREEDY, assistant_model=assistant)
    assert actual.tolist() == expected.tolist()
    assert states
    for state, own in zip(given, states, strict=True):
        torch.testing.assert_close(state, own[:, -state.shape[1] :], rtol=0, atol=0)


def test_a_model_with_defaults_may_draft_for_itself_and_look_up(model, head):
    model.set_recontrol_defaults(head, step_size=2.0, num_steps=3)
    expected = model.generate(**repetitive_prompt(), **GREEDY).tolist()
    for draft in ({"assistant_model": model}, {"prompt_lookup_num_tokens": 3}):
        assert model.generate(**repetitive_prompt(), **GREEDY, **draft).tolist() == expected


def test_batches_obey_and_refuse_configs_as_generate_does(model, head):
    texts, settings = [[1, 5, 9], [1, 7, 8, 11]], {**GREEDY, "eos_token_id": 2, "pad_token_id": 0}
    register_value_heads({"polite": head})

    def singles(**keywords):
        outputs = [model.generate(torch.tensor([ids]), **settings, **keywords)[0] for ids in texts]
        return [output[len(ids) :].tolist() for output, ids in zip(outputs, texts, strict=True)]

    def batch(config, **keywords):
        config.update(**settings)
        outputs = model.generate_batch(texts, config, continuous_batching_config=small_batches(), **keywords)
        return [output.generated_tokens for output in outputs.values()]

    steered, plain = singles(recontrol_value_head=head, **STEER), singles()
    assert steered != plain
    model.set_attn_implementation("paged|eager")
    assert batch(named(step_size=2.0, num_steps=3)) == steered
    model.set_recontrol_defaults(head, step_size=2.0, num_steps=3)
    assert batch(GenerationConfig()) == steered  # the model's defaults stand behind a given config
    assert batch(named(False)) == plain
    assert batch(named(), recontrol_value_head=False) == plain
    for config, words in (
        (named("stranger"), "'stranger', which is not registered"),
        (named(step_size="1"), "In the given generation config: step_size is '1'"),
        (named(token="x"), "no keyword 'recontrol_token'"),
        (named(trace=True), "recontrol_trace is for greedy decoding"),
        (named(strict=True), "asks for the same Hub id"),
    ):
        with pytest.raises(ValueError, match=words):
            batch(config)
    with pytest.raises(ValueError, match="persistent_manager"):
        model.generate_batch(texts, persistent_manager=True)
    for given in ([], [GenerationConfig(**settings)], [named("polite")]):
        with pytest.raises(ValueError, match="not steered by its generation config"):
            model.init_continuous_batching(*given)


def test_batches_pass_on_what_is_given_by_position(model, head):
    batching, seen = small_batches(), []

    def stock(inputs, generation_config, *rest):
        seen.append((inputs, generation_config.max_new_tokens, *rest))

    steer = {"recontrol_value_head": head}
    steered_generate_batch(stock, model, ([[1, 5]], GenerationConfig(**GREEDY), batching, True), {})
    with pytest.raises(SteeringNotApplied, match="went by our hooks"):  # by this stock, which runs no forward
        steered_generate_batch(stock, model, ([[1, 5]], GenerationConfig(**GREEDY), batching, True), steer)
    assert seen == [([[1, 5]], 8, batching, True)] * 2


def test_a_config_may_ask_for_strictness(model):
    head = tiny_head(base_model_name_or_path="user/other")
    model.config._name_or_path = "user/other"
    model.set_recontrol_defaults(head, strict=True)
    tokens(model)
    model.config._name_or_path = "user/this"
    with pytest.raises(HeadMismatch, match=r"user/other.*user/this.*recontrol_strict"):
        model.generate(**prompts(), streamer=NoToken())
    with pytest.warns(UserWarning, match="user/this"):
        tokens(model, recontrol_strict=False)


# register_value_heads


def test_registering_is_all_or_nothing(head, tmp_path):
    register_value_heads({"polite": head})
    other = tiny_head(1)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    for bad, error in (
        (tmp_path / "broken", HeadError),
        (str(tmp_path / "nowhere"), HeadUnavailable),
        (3, TypeError),
        ([other], TypeError),
    ):
        for names in (("polite", "new", "bad"), ("bad", "polite", "new")):
            with pytest.raises(error):
                register_value_heads({name: bad if name == "bad" else other for name in names})
            assert list(registry._REGISTERED.items()) == [("polite", head)]
    with pytest.raises(TypeError, match="pass a dict from names to heads"):
        register_value_heads(["polite"])


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b[31m", "x" * 513, 3, None, ("polite",)])
def test_a_name_is_a_short_printable_text(head, name):
    with pytest.raises(ValueError, match=r"name is .* 1 to 512 printable characters") as caught:
        register_value_heads({"fine": head, name: head})
    assert str(caught.value).isprintable()
    assert not registry._REGISTERED


def test_a_name_is_replaced_and_taken_off(model, head):
    other = tiny_head(1)
    register_value_heads({"polite": head, "brief": other, "x" * 512: head})
    register_value_heads({"polite": other})
    assert asked(model, named()).controller.heads == [other]
    register_value_heads({"polite": None, "never there": None})
    with pytest.raises(ValueError, match=r"'polite', which is not registered .*\(registered: 'brief', "):
        asked(model, named())
    assert asked(model, named("brief")).controller.heads == [other]


def test_a_name_that_is_replaced_is_there_at_every_moment():
    """At every line of register_value_heads: another thread may generate just then."""
    register_value_heads({"polite": tiny_head(1)})
    there = []

    def watch(frame, event, argument):
        there.append("polite" in registry._REGISTERED)
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        register_value_heads({"polite": tiny_head(2)})
    finally:
        sys.settrace(before)
    assert len(there) > 10
    assert all(there)


def test_a_registered_head_stays_what_it_was_when_its_folder_changes(model, head, tmp_path):
    head.save_pretrained(tmp_path)
    register_value_heads({"polite": tmp_path})
    model.set_recontrol_defaults(tmp_path, step_size=2.0, num_steps=3)
    expected = tokens(model, recontrol_value_head=head, **STEER)
    tiny_head(1).save_pretrained(tmp_path)
    assert tokens(model) == expected
    assert tokens(model, generation_config=named(step_size=2.0, num_steps=3)) == expected
    assert tokens(model, recontrol_value_head=tmp_path, **STEER) != expected  # a call reads what is there now


def test_a_registered_head_of_the_hub_stays_at_its_commit_and_is_asked_for_once(model, head, hub, tmp_path):
    on_the_hub(hub, "user/head", head, tmp_path / "old")
    register_value_heads({"polite": "user/head"})
    tiny_head(1).save_pretrained(tmp_path / "new")
    hub.repositories["user/head"].commit({path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()})
    asked_before = len(hub.log)
    expected = tokens(model, recontrol_value_head=head, **STEER)
    assert tokens(model, generation_config=named(step_size=2.0, num_steps=3)) == expected
    assert len(hub.log) == asked_before > 0


def test_a_private_head_is_registered_with_its_token(model, head, hub, tmp_path):
    on_the_hub(hub, "user/private", head, tmp_path)
    hub.repositories["user/private"].private = True
    with pytest.raises(HeadUnavailable):
        register_value_heads({"polite": "user/private"})
    register_value_heads({"polite": "user/private"}, token=READ_TOKEN)
    expected = tokens(model, recontrol_value_head=head, **STEER)
    assert tokens(model, generation_config=named(step_size=2.0, num_steps=3)) == expected


def test_threads_may_register_and_generate_at_once(model):
    heads = {f"head {i}": tiny_head(i) for i in range(4)}
    expected = {name: tokens(model, recontrol_value_head=head, **STEER) for name, head in heads.items()}
    assert len({str(output) for output in expected.values()}) == 4
    wrong, done = [], []

    def work(name):
        for i in range(10):
            register_value_heads({name: heads[name], f"{name} {i}": heads[name]})
            if tokens(model, generation_config=named(name), **STEER) != expected[name]:
                wrong.append(name)
        done.append(name)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(name,)) for name in heads]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert (wrong, sorted(done)) == ([], sorted(heads))


# The trace


def traced(model, head, inputs=None, **keywords):
    """(sequences, trace) of a steered generate()."""
    keywords = {**GREEDY, **STEER, "return_dict_in_generate": True, "recontrol_trace": True, **keywords}
    output = model.generate(**(inputs or prompts()), recontrol_value_head=head, **keywords)
    return output.sequences, output.recontrol_trace


def kl(logits, base):
    """KL(softmax(logits) ‖ softmax(base)), by torch's own."""
    log_q, log_p = (functional.log_softmax(x.double(), -1) for x in (base, logits))
    return functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def share_within(base, edited, max_kl):
    """The largest s ≤ 1 for which softmax of base + s (edited − base) is within max_kl of the base; float64."""
    base, edited = base.double(), edited.double()
    low, high = torch.zeros_like(base[..., 0]), torch.ones_like(base[..., 0])
    for _ in range(50):
        middle = (low + high) / 2
        inside = kl(torch.lerp(base, edited, middle[..., None]), base) <= max_kl
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return torch.where(kl(edited, base) <= max_kl, 1.0, low)


SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 20}


@pytest.mark.parametrize(
    ("inputs", "mode"),
    [
        (prompts(), {}),
        (prompts(rows=1), {}),
        (left_padded(), {}),
        (prompts(), SAMPLING),
        (prompts(), {**SAMPLING, "num_return_sequences": 2}),
        (prompts(), {"use_cache": False}),
        (prompts(), {"repetition_penalty": 1.3}),
        (prompts(), {"cache_implementation": "static", "disable_compile": True}),
        (prompts(), {"max_new_tokens": 1}),
        (prompts(), {"recontrol_regularization": 0.1, "recontrol_max_relative_norm": 0.6}),
    ],
    ids=["greedy", "batch 1", "padding", "sampling", "several", "no cache", "processor", "static", "one", "options"],
)
@pytest.mark.parametrize("max_kl", [None, 0.05])
def test_a_trace_is_what_the_recorded_hidden_states_say(model, inputs, mode, max_kl):
    head = tiny_head(reward=RewardScale("r", 3.0, 2.5))
    steer = {"recontrol_value_head": head, "recontrol_max_kl": max_kl, **STEER, **GREEDY, **mode}
    torch.manual_seed(3)
    sequences, h = generate_with_hidden_states(model, **inputs, **steer)
    torch.manual_seed(3)
    again, trace = traced(model, head, inputs, recontrol_max_kl=max_kl, **mode)
    assert again.tolist() == sequences.tolist()  # watching changes nothing
    options = {name.removeprefix("recontrol_"): x for name, x in mode.items() if name.startswith("recontrol_")}
    edited = Controller(head, ControlConfig(2.0, 3, **options))(h)
    base, logits = model.lm_head(h), model.lm_head(edited)
    scale = share_within(base, logits, inf if max_kl is None else max_kl)
    expected = {
        "values": 2.5 * head(h) + 3.0,
        "steered_values": 2.5 * head(edited) + 3.0,
        "control_norms": (edited - h).norm(dim=-1),
        "kl": kl(torch.lerp(base.double(), logits.double(), scale[..., None]), base).float(),
    }
    for name, figures in expected.items():
        torch.testing.assert_close(getattr(trace, name), figures.detach(), rtol=0, atol=1e-4)
    torch.testing.assert_close(trace.scale, scale.float(), rtol=0, atol=3e-4)
    assert trace.token_ids.tolist() == sequences[:, -h.shape[1] :].tolist()
    assert trace.sound.all()
    assert trace.lengths.tolist() == [h.shape[1]] * len(h)
    assert len(trace) == len(h)
    assert trace.capped.tolist() == (scale < 1).tolist()
    assert trace.capped.any() == (max_kl is not None)
    if max_kl is not None:
        assert not trace.capped.all()  # both kinds are shown
        torch.testing.assert_close(
            trace.kl[trace.capped], torch.full_like(trace.kl, 0.05)[trace.capped], rtol=0.01, atol=0
        )
        assert (trace.kl <= 0.05 + 1e-4).all()


def test_a_trace_of_a_bfloat16_model_is_of_its_rounded_states():
    model, head = enable_recontrol(tiny_model().bfloat16()), tiny_head(reward=RewardScale("r", 3.0, 2.5))
    sequences, h = generate_with_hidden_states(model, **prompts(), **GREEDY, recontrol_value_head=head, **STEER)
    again, trace = traced(model, head)
    assert again.tolist() == sequences.tolist()
    edited = Controller(head, STEERING)(h)
    assert edited.dtype == torch.bfloat16
    torch.testing.assert_close(trace.values, 2.5 * head(h).detach() + 3.0, rtol=0, atol=1e-4)
    torch.testing.assert_close(trace.steered_values, 2.5 * head(edited).detach() + 3.0, rtol=0, atol=1e-4)
    torch.testing.assert_close(trace.control_norms, (edited.float() - h.float()).norm(dim=-1), rtol=0, atol=1e-4)
    expected = kl(model.lm_head(edited), model.lm_head(h)).detach().float()
    torch.testing.assert_close(trace.kl, expected, rtol=0.02, atol=0.02)


def test_a_trace_of_a_compiled_model_is_that_of_the_model(model, head):
    compile_config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compile_config._compile_all_devices = True  # else a CPU is never compiled for
    static = {"cache_implementation": "static", "compile_config": compile_config}
    expected_tokens, expected = traced(model, head, recontrol_max_kl=0.05)
    torch._dynamo.reset()
    for _ in range(2):
        sequences, trace = traced(model, head, recontrol_max_kl=0.05, **static)
        assert sequences.tolist() == expected_tokens.tolist()
        for name in FIGURES:
            torch.testing.assert_close(getattr(trace, name), getattr(expected, name), rtol=0, atol=1e-4)
    assert "_compiled_call" in vars(model)


FIGURES = ["values", "steered_values", "control_norms", "kl", "scale"]


@pytest.mark.parametrize("pad", ["another token", "the EOS", "no token"])
def test_after_a_rows_end_a_trace_has_no_figures(model, head, pad):
    endless, expected = traced(model, head)
    new = endless[:, -8:].tolist()
    eos = next(t for t in new[0][2:6] if len({[*row, t].index(t) for row in new}) > 1)
    model.generation_config.pad_token_id = {"another token": 0, "the EOS": eos, "no token": None}[pad]
    sequences, trace = traced(model, head, eos_token_id=eos)
    lengths = [min([*row, eos].index(eos) + 1, 8) for row in new]
    width = max(lengths)
    assert len(set(lengths)) > 1  # rows end at different steps
    assert trace.lengths.tolist() == lengths
    assert trace.token_ids.tolist() == sequences[:, -width:].tolist()
    assert trace.sound.all()
    ended = torch.arange(width) >= torch.tensor(lengths)[:, None]
    for name in FIGURES:
        figures = getattr(trace, name)
        assert figures.shape == trace.token_ids.shape == (3, width)
        assert figures.isnan().tolist() == ended.tolist()
        torch.testing.assert_close(figures[~ended], getattr(expected, name)[:, :width][~ended], rtol=0, atol=1e-4)
    assert not trace.capped.any()


@pytest.mark.parametrize("pad", ["the first EOS", "no token"])
def test_a_row_may_end_at_another_eos_than_the_padding(model, head, pad):
    """As chat models do: EOS is [<end of text>, <end of turn>], and the padding the first of them."""
    new = traced(model, head)[0][:, -8:].tolist()
    unused = next(token for token in range(64) if not any(token in row for row in new))
    model.generation_config.pad_token_id = unused if pad == "the first EOS" else None
    _, trace = traced(model, head, eos_token_id=[unused, new[0][3]])
    lengths = [min([*row, new[0][3]].index(new[0][3]) + 1, 8) for row in new]
    assert trace.lengths.tolist() == lengths
    assert len(set(lengths)) > 1


def test_a_row_may_end_before_any_eos(model, head):
    """As stop strings end it; generate() pads it then, if there is an EOS at all."""
    new = traced(model, head)[0][:, -8:].tolist()
    eos, pad = [token for token in range(64) if not any(token in row for row in new)][:2]
    last = next(token for token in new[0][2:6] if len({[*row, token].index(token) for row in new}) > 1)
    model.generation_config.pad_token_id = pad

    def stop(input_ids, scores, **kwargs):
        return (input_ids[:, 5:] == last).any(-1)

    _, trace = traced(model, head, eos_token_id=eos, stopping_criteria=StoppingCriteriaList([stop]))
    assert trace.lengths.tolist() == [min([*row, last].index(last) + 1, 8) for row in new]
    assert trace.token_ids[0, trace.lengths[0] - 1] == last


def test_without_an_eos_a_padding_token_is_a_token(model, head):
    endless, _ = traced(model, head)
    model.generation_config.pad_token_id = int(endless[0, -1])
    _, trace = traced(model, head)
    assert trace.lengths.tolist() == [8, 8, 8]
    assert not trace.kl.isnan().any()


def test_a_trace_marks_the_rows_that_are_left_unedited():
    """Half precision: V = one unit of ReLU, so a row's edit is nothing or, at this step size, an overflow."""
    model, head = enable_recontrol(tiny_model().half()), tiny_head(intermediate_size=1)
    inputs, steer = prompts(rows=6), {"recontrol_step_size": 1e9, "recontrol_num_steps": 1}
    with pytest.warns(UserWarning, match="were left unedited"):
        sequences, h = generate_with_hidden_states(model, **inputs, **GREEDY, recontrol_value_head=head, **steer)
    with pytest.warns(UserWarning, match="were left unedited"):
        again, trace = traced(model, head, inputs, **steer)
    assert again.tolist() == sequences.tolist()
    sound = (head.gradient(h) == 0).all(-1)
    assert 5 < sound.sum() < 43
    assert trace.sound.tolist() == sound.tolist()
    for name, expected in {"values": head(h).detach(), "steered_values": head(h).detach(), "kl": 0.0}.items():
        figures = getattr(trace, name)
        torch.testing.assert_close(figures, torch.as_tensor(expected).expand_as(figures), rtol=0, atol=1e-4)


def test_a_row_that_is_not_finite_is_marked_and_keeps_its_length(model, head):
    def poison(module, args, output):
        output.last_hidden_state[1] = nan

    model.generation_config.pad_token_id = 63  # the token of a row without logits is 0, which is not padding here
    _, expected = traced(model, head)
    model.model.register_forward_hook(poison)
    with pytest.warns(UserWarning, match="8 hidden states were not finite"):
        _, trace = traced(model, head)
    assert trace.lengths.tolist() == [8, 8, 8]
    assert trace.sound.tolist() == [[True] * 8, [False] * 8, [True] * 8]
    for name in FIGURES:
        torch.testing.assert_close(getattr(trace, name)[[0, 2]], getattr(expected, name)[[0, 2]], rtol=0, atol=1e-4)


def test_a_trace_marks_the_tokens_whose_logits_overflow():
    model, head = enable_recontrol(tiny_model().half()), tiny_head(num_hidden_layers=0)
    with torch.no_grad():
        model.lm_head.weight *= 30.0
    steer = {"recontrol_step_size": 2e4, "recontrol_num_steps": 1}  # h + u is within half precision, W(h + u) is not
    with pytest.warns(UserWarning, match="were left unedited"):
        sequences, trace = traced(model, head, recontrol_max_kl=0.1, **steer)
    assert not trace.sound.any()
    assert trace.scale.tolist() == torch.zeros(3, 8).tolist()
    assert trace.kl.tolist() == torch.zeros(3, 8).tolist()
    assert sequences.tolist() == tokens(model)


@pytest.mark.parametrize("off", [{"recontrol_num_steps": 0}, {"recontrol_step_size": 0.0}])
def test_without_control_a_trace_shows_the_values_and_nothing_spent(model, head, off):
    sequences, h = generate_with_hidden_states(model, **prompts(), **GREEDY)
    again, trace = traced(model, head, recontrol_max_kl=0.05, **off)
    assert again.tolist() == sequences.tolist()
    torch.testing.assert_close(trace.values, head(h).detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(trace.steered_values, trace.values, rtol=0, atol=0)
    for name, expected in {"control_norms": 0.0, "kl": 0.0, "scale": 1.0}.items():
        torch.testing.assert_close(getattr(trace, name), torch.full((3, 8), expected), rtol=0, atol=0)


def test_a_trace_of_several_heads_has_their_weighted_values(model):
    heads = {tiny_head(1, reward=RewardScale("a", 3.0, 2.0)): 1.5, tiny_head(2, reward=RewardScale("b", -1.0, 0.5)): -1}
    _, h = generate_with_hidden_states(model, **prompts(), **GREEDY, recontrol_value_head=heads, **STEER)
    _, trace = traced(model, heads)
    for states, figures in ((h, trace.values), (Controller(heads, STEERING)(h), trace.steered_values)):
        expected = sum(w * (x.config.reward.std * x(states) + x.config.reward.mean) for x, w in heads.items())
        torch.testing.assert_close(figures, expected.detach(), rtol=0, atol=1e-4)


def test_an_encoder_decoder_is_traced():
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, eos_token_id=None)).eval()
    with torch.no_grad():
        model.lm_head.weight.normal_()
    enable_recontrol(model)
    head, inputs, steer = tiny_head(), prompts(), {"recontrol_step_size": 20.0}
    inputs["input_ids"] %= 32
    sequences, h = generate_with_hidden_states(model, **inputs, **GREEDY, recontrol_value_head=head, **(STEER | steer))
    again, trace = traced(model, head, inputs, **steer)
    assert again.tolist() == sequences.tolist()
    assert trace.token_ids.tolist() == sequences[:, 1:].tolist()
    edited = Controller(head, ControlConfig(20.0, 3))(h)
    torch.testing.assert_close(trace.values, head(h).detach(), rtol=0, atol=1e-4)
    torch.testing.assert_close(trace.steered_values, head(edited).detach(), rtol=0, atol=1e-4)
    expected = kl(model.lm_head(edited), model.lm_head(h)).detach().float()
    torch.testing.assert_close(trace.kl, expected, rtol=0, atol=1e-4)
    assert expected.min() > 1e-3


@pytest.mark.parametrize(
    "mode",
    [
        {"num_beams": 2},
        {"num_beams": 2, "do_sample": True},
        {"prompt_lookup_num_tokens": 2},
        {"guidance_scale": 1.5},
        {"prefill_chunk_size": 2},
    ],
    ids=str,
)
def test_a_trace_is_refused_where_a_forward_is_not_a_token_wherever_that_is_said(model, head, mode):
    (name, value), *_ = mode.items()
    said = {"recontrol_trace": True, "recontrol_value_head": head, "return_dict_in_generate": True}
    words = f"recontrol_trace is for greedy decoding and sampling, not for {name}={value}"
    with pytest.raises(ValueError, match=words):
        model.generate(**prompts(rows=1), streamer=NoToken(), **said, **mode)
    with pytest.raises(ValueError, match=words):
        model.generate(**prompts(rows=1), generation_config=GenerationConfig(**mode), **said)
    model.generation_config = GenerationConfig(**mode, pad_token_id=0)
    with pytest.raises(ValueError, match=words):
        model.generate(**prompts(rows=1), **said)
    if name in ("num_beams", "guidance_scale"):  # the call wins here too
        traced(model, head, prompts(rows=1), **{name: 1})


def test_a_trace_with_an_assistant_is_refused(model, head):
    with pytest.raises(ValueError, match="greedy decoding and sampling, not for assistant_model="):
        traced(model, head, prompts(rows=1), assistant_model=tiny_model(1))


@pytest.mark.parametrize("where", ["call", "given", "model's"])
def test_a_trace_is_part_of_the_output_with_return_dict(model, head, where):
    register_value_heads({"polite": head})
    keywords = {"recontrol_value_head": head, "recontrol_trace": True} if where == "call" else {}
    if where == "given":
        keywords = {"generation_config": named(trace=True)}
    if where == "model's":
        model.set_recontrol_defaults(head, trace=True)
    with pytest.raises(ValueError, match="return_dict_in_generate=True; pass that too"):
        model.generate(**prompts(), streamer=NoToken(), **keywords)
    output = model.generate(**prompts(), **GREEDY, **keywords, return_dict_in_generate=True)
    assert output.recontrol_trace.values.shape == (3, 8)
    model.generation_config.return_dict_in_generate = True
    assert model.generate(**prompts(), **GREEDY, **keywords).recontrol_trace.kl.shape == (3, 8)


@pytest.mark.parametrize("trace", [None, False])
def test_there_is_no_trace_unless_it_is_asked_for_and_something_is_steered(model, head, trace):
    def output(**keywords):
        return model.generate(**prompts(), **GREEDY, return_dict_in_generate=True, **keywords)

    assert not hasattr(output(recontrol_value_head=head, recontrol_trace=trace), "recontrol_trace")
    assert not hasattr(output(recontrol_value_head=False, recontrol_trace=True), "recontrol_trace")


def test_hidden_states_and_a_trace_are_not_recorded_at_once(model, head):
    with pytest.raises(ValueError, match="not recorded at once"):
        generate_with_hidden_states(
            model, **prompts(), **GREEDY, recontrol_value_head=head, recontrol_trace=True, **STEER
        )
