"""A head's config is a closed, typed, bounded set of fields."""

import json

import pytest

from hf_recontrol.config_checks import shown
from hf_recontrol.errors import HeadError
from hf_recontrol.head_config import MAX_PARAMETERS, ValueHeadConfig

HUGE = 10**400
HOSTILE = "\u202e../../etc/passwd\x00" + "a" * 600


def refused(match, **fields):
    with pytest.raises(HeadError, match=match):
        ValueHeadConfig.from_dict({"hidden_size": 8, **fields})


def test_a_config_says_the_same_after_a_round_trip_through_json():
    config = ValueHeadConfig(
        hidden_size=8,
        intermediate_size=5,
        num_hidden_layers=2,
        hidden_act="silu",
        base_model_name_or_path="user/модель",
        info={"training": {"answers": 3, "note": "é"}},
    )
    text = config.to_json_string()
    assert text.isascii()
    assert ValueHeadConfig.from_dict(json.loads(text)) == config


def test_the_hidden_layers_are_as_wide_as_the_input_unless_told_otherwise():
    assert ValueHeadConfig(hidden_size=8).tensor_shapes()["layers.0.weight"] == (8, 8)
    assert ValueHeadConfig(hidden_size=8, intermediate_size=3).tensor_shapes()["layers.1.weight"] == (1, 3)


@pytest.mark.parametrize("value", [0, -1, 10**9, HUGE, True, 1.5, "8", None, [8], float("nan")])
@pytest.mark.parametrize("name", ["hidden_size", "intermediate_size"])
def test_a_width_that_is_not_a_sensible_integer_is_refused(name, value):
    if (name, value) != ("intermediate_size", None):  # None is its default there
        refused(name, **{name: value})


@pytest.mark.parametrize("value", [3, -1, 10**9, True, 1.0, "1", None])
def test_a_head_has_at_most_two_hidden_layers(value):
    refused("num_hidden_layers.*from 0 to 2", num_hidden_layers=value)


@pytest.mark.parametrize("value", ["RELU", "torch.relu", "__import__('os')", HOSTILE, None, 1, ["relu"]])
def test_an_activation_outside_the_list_is_refused(value):
    refused("hidden_act.*relu, silu, gelu, tanh", hidden_act=value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("step_size", v) for v in (-1.0, 1e308, float("nan"), float("inf"), True, "0.5", None, HUGE)]
    + [("num_steps", v) for v in (-1, 1025, 10**9, True, 1.5, "3", None, HUGE)],
)
def test_control_defaults_out_of_bounds_are_refused(name, value):
    refused(f"control.{name}", control={name: value})


def test_no_control_is_a_legal_default():
    config = ValueHeadConfig.from_dict({"hidden_size": 8, "control": {"step_size": 0, "num_steps": 0}})
    assert (config.control.step_size, config.control.num_steps) == (0, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("std", v) for v in (0, -1.0, float("nan"), True, "1", HUGE)] + [("mean", v) for v in (float("inf"), None)],
)
def test_a_reward_scale_that_cannot_be_divided_by_is_refused(name, value):
    refused(f"reward.{name}", reward={name: value})


@pytest.mark.parametrize("version", [0, 2, "1", 1.0, True, None])
def test_another_format_version_asks_for_another_release(version):
    refused("another release of hf_recontrol", format_version=version)


def test_widths_within_bounds_with_a_product_beyond_them_are_refused_before_any_allocation():
    refused(f"≤ {MAX_PARAMETERS}", hidden_size=2**20, intermediate_size=2**20)


@pytest.mark.parametrize(
    "name", ["auto_map", "trust_remote_code", "_attn_implementation_internal", "__class__", "x" * 200]
)
def test_an_unknown_field_is_refused_and_the_version_that_wrote_it_named(name):
    refused("unknown fields.*written by hf_recontrol '99.0'", **{name: "evil", "hf_recontrol_version": "99.0"})


@pytest.mark.parametrize("part", ["reward", "control"])
def test_an_unknown_field_inside_a_part_is_refused(part):
    refused("unknown fields.*code", **{part: {"code": 1}})
    refused(f"{part}.*an object", **{part: "name"})


def test_a_missing_hidden_size_is_said():
    with pytest.raises(HeadError, match="no hidden_size"):
        ValueHeadConfig.from_dict({})


@pytest.mark.parametrize("value", [HOSTILE, "\ud800", "a\nb", "\x1b[31m", "a" * 513, 5, {"path": "x"}])
@pytest.mark.parametrize("name", ["base_model_name_or_path", "base_model_revision", "weights_sha256"])
def test_strings_are_short_and_printable_and_errors_stay_printable(name, value):
    with pytest.raises(HeadError, match=name) as caught:
        ValueHeadConfig.from_dict({"hidden_size": 8, name: value})
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 300


@pytest.mark.parametrize(
    "info", ["text", [1], {"a": float("nan")}, {"a": float("inf")}, {"a": {1, 2}}, {"a": "x" * 20_000}]
)
def test_info_is_small_plain_json_of_finite_numbers(info):
    refused("info", info=info)


def test_an_untrusted_value_is_shown_in_ascii_and_cut():
    assert shown("\u202eé\n") == "'\\u202e\\xe9\\n'"
    assert len(shown("x" * 1000)) == 80
    assert shown(10**5000) == "a int too long to print"
