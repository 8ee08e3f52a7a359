"""The recontrol_ keywords: a config at once, several heads, and who wins."""

from math import inf, nan

import pytest
from steered import GREEDY, STEER, STEERING, asked, calibrated, named, on_the_hub, stock_tokens, tokens
from test_generation import NoToken, decode_by_hand, left_padded
from tiny import prompts, tiny_head, tiny_model
from transformers import (
    GenerationConfig,
)

from hf_recontrol import (
    ControlConfig,
    Controller,
    HeadError,
    HeadMismatch,
    enable_recontrol,
    register_value_heads,
)

pytestmark = pytest.mark.versions


@pytest.fixture
def model():
    return enable_recontrol(tiny_model())


@pytest.fixture
def head():
    return tiny_head()


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
        ({"recontrol_token": "hf_x"}, ValueError, "a head itself was given"),
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
        ({3: 1.0}, TypeError, "recontrol_value_head is of type int"),
        ({None: 1.0}, TypeError, "recontrol_value_head is of type NoneType"),
        ({tiny_head(): 0}, ValueError, r"weight is 0\.0; .* other than 0"),
        ({tiny_head(): "1"}, ValueError, "weight is '1'"),
        ({tiny_head(): nan}, ValueError, "weight is nan"),
        ({tiny_head(): 10**400}, ValueError, "weight is 1000"),
        ({tiny_head(): 1.0, tiny_head(hidden_size=8): 1.0}, HeadMismatch, r"8 wide .* 16 wide"),
        ([3, None, None], TypeError, "recontrol_value_head is of type int"),
        (("user/never-fetched",), ValueError, "list of 1, but 3 prompts"),
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


# Who wins: the call, then the given config, then the model's defaults, then the head


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
