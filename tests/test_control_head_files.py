"""A control head's config, files and card, on the Hub and at the command line; what is no such head is refused."""

import json
import re
from math import inf, nan

import pytest
import torch
from hub_server import TOKEN
from steered import GREEDY, TABLE
from test_head_files import NAMES, edit_config, write_weights
from test_model_card import split
from tiny import CONTROL_SHAPES, prompts, tiny_control_head, tiny_head, tiny_model

from hf_recontrol import (
    ControlDefaults,
    ControlHead,
    ControlHeadConfig,
    Head,
    HeadError,
    RewardScale,
    ScaleDefaults,
    ValueHead,
    ValueHeadConfig,
    enable_recontrol,
)
from hf_recontrol.demo.assets import FOLDER
from hf_recontrol.head_config import MAX_PARAMETERS, HeadConfig

HUGE = 10**400
MODEL = str(FOLDER / "language_model")


def refused(match, **fields):
    """By both classes: the kind's own, and the one that reads either kind."""
    for config_class in (ControlHeadConfig, HeadConfig):
        with pytest.raises(HeadError, match=match) as caught:
            config_class.from_dict({"hidden_size": 8, "kind": "control", **fields})
        assert str(caught.value).isprintable()


# config.json


@pytest.mark.parametrize("shape", CONTROL_SHAPES)
def test_a_config_says_the_same_after_a_round_trip_through_json(shape):
    config = ControlHeadConfig(
        hidden_size=8,
        intermediate_size=5,
        base_model_name_or_path="user/модель",
        reward=RewardScale("r", 3.0, 2.5),
        control=ScaleDefaults(scale=0.5, strength=0.1, max_kl=0.3, max_relative_norm=0.2, calibration=TABLE),
        info={"training": {"answers": 3, "note": "é"}},
        **CONTROL_SHAPES[shape],
    )
    text = config.to_json_string()
    assert json.loads(text)["kind"] == "control"
    for config_class in (ControlHeadConfig, HeadConfig):
        assert config_class.from_dict(json.loads(text)) == config
    with pytest.raises(HeadError, match=r"'value' here .*Head.from_pretrained either"):
        ValueHeadConfig.from_dict(json.loads(text))


def test_the_tensors_are_those_of_the_formula():
    of = {
        shape: {
            name: size
            for name, size in ControlHeadConfig(8, 5, **config).tensor_shapes().items()
            if name not in ("input_mean", "input_std", "output_scale", "bias")
        }
        for shape, config in CONTROL_SHAPES.items()
    }
    assert of == {
        "constant": {},
        "linear": {"layers.0.weight": (8, 8)},
        "low rank": {"layers.0.weight": (3, 8), "layers.1.weight": (8, 3)},
        "one hidden layer": {"layers.0.weight": (5, 8), "layers.0.bias": (5,), "layers.1.weight": (8, 5)},
        "two hidden layers": {
            "layers.0.weight": (5, 8),
            "layers.0.bias": (5,),
            "layers.1.weight": (5, 5),
            "layers.1.bias": (5,),
            "layers.2.weight": (8, 5),
        },
    }
    for config in CONTROL_SHAPES.values():
        shapes = ControlHeadConfig(8, 5, **config).tensor_shapes()
        assert [shapes[name] for name in ("input_mean", "input_std", "output_scale", "bias")] == [(8,)] * 4


def test_the_hidden_layers_are_as_wide_as_the_input_and_at_most_1024_unless_told_otherwise():
    for width, expected in ((8, 8), (1024, 1024), (2048, 1024)):
        assert ControlHeadConfig(width).tensor_shapes()["layers.0.weight"] == (expected, width)
    assert ControlHeadConfig(2048, 1500).tensor_shapes()["layers.0.weight"] == (1500, 2048)


@pytest.mark.parametrize("value", [-1, 9, 10**9, HUGE, True, 1.5, "3", nan, [3]])
def test_a_rank_that_is_no_integer_up_to_the_width_is_refused(value):
    refused("rank = .*an integer from 0 to 8", num_hidden_layers=0, rank=value)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("rank", [0, 3, 8])
def test_a_rank_is_of_a_head_without_a_hidden_layer(rank, layers):
    refused(f"rank = {rank}; allowed: None where there are hidden layers", num_hidden_layers=layers, rank=rank)
    ControlHeadConfig(8, num_hidden_layers=0, rank=rank)


@pytest.mark.parametrize(
    "value",
    [0, -1, 10**9, HUGE, True, 1.5, nan, "8", None, [8], {}],
)
def test_a_width_that_is_no_sensible_integer_is_refused(value):
    refused("hidden_size", hidden_size=value)


def test_a_matrix_beyond_the_bound_is_refused_before_any_allocation():
    refused(f"≤ {MAX_PARAMETERS}", hidden_size=2**20, num_hidden_layers=0)
    ControlHeadConfig(2**20, num_hidden_layers=0, rank=0)


@pytest.mark.parametrize("value", [-1.0, 1e308, nan, inf, True, "0.5", None, [1.0], HUGE])
def test_a_scale_out_of_bounds_is_refused(value):
    refused(r"control\.scale", control={"scale": value})


@pytest.mark.parametrize("value", [0, 0.0, 1, 1e30])
def test_the_ends_of_the_scales_range_are_allowed(value):
    config = ControlHeadConfig.from_dict({"hidden_size": 8, "control": {"scale": value}})
    assert config.control.scale == value


@pytest.mark.parametrize("name", ["step_size", "num_steps", "regularization", "target_value", "calibration_num_steps"])
def test_what_only_an_ascent_has_is_refused_in_a_control_heads_config(name):
    refused(rf"config\.json's 'control' has unknown fields \['{name}'\]; allowed are .*scale", control={name: 1})


def test_a_scale_and_a_rank_are_refused_in_a_value_heads_config():
    with pytest.raises(HeadError, match=r"'control' has unknown fields \['scale'\]"):
        HeadConfig.from_dict({"hidden_size": 8, "control": {"scale": 1.0}})
    with pytest.raises(HeadError, match=r"unknown fields \['rank'\]"):
        HeadConfig.from_dict({"hidden_size": 8, "rank": None})
    with pytest.raises(HeadError, match=r"control = .*an object {strength, .*step_size"):
        ValueHeadConfig(8, control=ScaleDefaults())


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("strength", "max_kl", "max_relative_norm") for value in (0, -0.1, inf, nan, "1", True)]
    + [("calibration", value) for value in (None, "table", [[0.1]], [[0, 0.1]], [[0.1, 2], [0.2, 1]])],
)
def test_the_fields_that_both_kinds_have_are_checked_of_a_control_head_too(name, value):
    refused(rf"control\.{name}", control={"calibration": TABLE, name: value})


def test_a_control_heads_own_strength_needs_a_calibration():
    refused(r"control\.strength = 0\.1.*no calibration", control={"strength": 0.1})


@pytest.mark.parametrize("kind", ["", "Control", "head", "policy", None, 1, True, ["control"], {"control": 1}])
def test_a_head_is_of_one_of_two_kinds(kind):
    with pytest.raises(HeadError, match=r'kind = .*"value" or "control"'):
        HeadConfig.from_dict({"hidden_size": 8, "kind": kind})
    for config_class in (ValueHeadConfig, ControlHeadConfig):
        with pytest.raises(HeadError, match="kind = "):
            config_class.from_dict({"hidden_size": 8, "kind": kind})
        with pytest.raises(HeadError, match="kind = "):
            config_class(8, kind=kind)


def test_a_config_that_names_no_kind_is_a_value_heads():
    assert HeadConfig.from_dict({"hidden_size": 8}) == ValueHeadConfig(8)


# The files


@pytest.mark.parametrize("shape", CONTROL_SHAPES)
@pytest.mark.parametrize("loader", [Head, ControlHead])
def test_save_load_save_gives_the_same_bytes_and_the_right_class(tmp_path, shape, loader):
    control = ScaleDefaults(scale=0.5, strength=0.1, calibration=TABLE)
    head = tiny_control_head(**CONTROL_SHAPES[shape], control=control, info={"note": "é"})
    head.save_pretrained(tmp_path / "first")
    state = torch.random.get_rng_state()
    with torch.inference_mode():
        loaded = loader.from_pretrained(tmp_path / "first")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert type(loaded) is ControlHead
    assert not loaded.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in loaded.parameters())
    loaded.save_pretrained(tmp_path / "second")
    for name in (*NAMES, "README.md"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    hidden_states = torch.randn(3, 16)
    torch.testing.assert_close(loaded(hidden_states), head(hidden_states), rtol=0, atol=0)
    loaded(hidden_states).sum().backward()


def test_each_kind_is_read_by_head_and_by_its_own_class_and_refused_by_the_other_which_names_it(tmp_path):
    tiny_head().save_pretrained(tmp_path / "value")
    tiny_control_head().save_pretrained(tmp_path / "control")
    assert type(Head.from_pretrained(tmp_path / "value")) is ValueHead
    assert type(Head.from_pretrained(tmp_path / "control")) is ControlHead
    with pytest.raises(HeadError, match=r"cannot be loaded.*kind = 'control'"):
        ValueHead.from_pretrained(tmp_path / "control")
    with pytest.raises(HeadError, match=r"cannot be loaded.*kind = 'value'"):
        ControlHead.from_pretrained(tmp_path / "value")


def test_one_kind_saved_over_the_other_is_of_the_new_kind(tmp_path):
    tiny_head().save_pretrained(tmp_path)
    tiny_control_head(1).save_pretrained(tmp_path, replace_model_card=True)
    assert type(Head.from_pretrained(tmp_path)) is ControlHead
    assert "A control head" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_config_that_calls_its_weights_another_kind_or_shape_is_refused(tmp_path):
    tiny_control_head().save_pretrained(tmp_path)
    for fields, words in (
        ({"kind": "value"}, "unknown fields"),
        ({"num_hidden_layers": 2}, r"missing \['layers.1.bias', 'layers.2.weight'\]"),
        ({"num_hidden_layers": 0}, r"missing \[\], unexpected \['layers.0.bias', 'layers.1.weight'\]"),
        ({"num_hidden_layers": 0, "rank": 0}, "unexpected .*layers.0.weight"),
        ({"intermediate_size": 23}, r"layers.0.weight has shape \[24, 16\]; its config.json implies \[23, 16\]"),
    ):
        before = (tmp_path / "config.json").read_bytes()
        edit_config(tmp_path, **fields)
        with pytest.raises(HeadError, match=words):
            Head.from_pretrained(tmp_path)
        (tmp_path / "config.json").write_bytes(before)
    Head.from_pretrained(tmp_path)


@pytest.mark.parametrize("shape", CONTROL_SHAPES)
def test_a_missing_an_unexpected_and_a_misshapen_tensor_are_named(tmp_path, shape):
    head = tiny_control_head(**CONTROL_SHAPES[shape])
    head.save_pretrained(tmp_path)
    tensors = dict(head.state_dict())

    def refused_with(changed, match):
        write_weights(tmp_path, changed)
        with pytest.raises(HeadError, match=match):
            Head.from_pretrained(tmp_path)

    for name, tensor in tensors.items():
        rest = {other: tensors[other] for other in tensors if other != name}
        refused_with(rest, rf"missing \['{name}'\], unexpected \[\]")
        refused_with({**tensors, name: torch.cat([tensor, tensor])}, "bytes; this head's can have|has shape")
        refused_with({**tensors, name: tensor.flatten()[:-1].clone()}, f"{name} has shape")
    last = f"layers.{len(head.layers) - 1}.bias"  # u's constant part is `bias`, and there are no two of it
    refused_with({**tensors, last: torch.zeros(16)}, rf"missing \[\], unexpected \['{re.escape(last)}'\]")


@pytest.mark.parametrize("value", [nan, -inf, 2e4])
@pytest.mark.parametrize("shape", CONTROL_SHAPES)
def test_a_weight_that_is_not_finite_or_absurd_is_neither_loaded_nor_saved(tmp_path, shape, value):
    head = tiny_control_head(**CONTROL_SHAPES[shape])
    head.save_pretrained(tmp_path)
    for name, parameter in head.named_parameters():
        tensors = {key: tensor.clone() for key, tensor in head.state_dict().items()}
        tensors[name].view(-1)[-1] = value
        write_weights(tmp_path, tensors)
        with pytest.raises(HeadError, match=f"{name} holds a value of magnitude"):
            Head.from_pretrained(tmp_path)
        good = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[0] = value
        with pytest.raises(HeadError, match=f"{name} holds .* smaller learning rate"):
            head.save_pretrained(tmp_path / "new")
        with torch.no_grad():
            parameter.copy_(good)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-13, 1e13, nan, inf])
@pytest.mark.parametrize("name", ["input_std", "output_scale"])
def test_units_must_be_positive_and_usable(tmp_path, name, value):
    head = tiny_control_head()
    head.save_pretrained(tmp_path)
    tensors = {key: tensor.clone() for key, tensor in head.state_dict().items()}
    tensors[name][3] = value
    write_weights(tmp_path, tensors)
    with pytest.raises(HeadError, match=f"{name} holds"):
        Head.from_pretrained(tmp_path)
    getattr(head, name)[3] = value
    with pytest.raises(HeadError, match=f"{name} holds"):
        head.save_pretrained(tmp_path)
    tensors[name][3] = 1e6
    write_weights(tmp_path, tensors)
    assert Head.from_pretrained(tmp_path)(torch.zeros(16)).isfinite().all()


# On the Hub


@pytest.mark.versions
def test_a_pushed_control_head_comes_back_and_steers_by_its_id(hub):
    head, model = tiny_control_head(reward=RewardScale("politeness")), enable_recontrol(tiny_model())
    head.push_to_hub("user/polite", token=TOKEN)
    repository = hub.repositories["user/polite"]
    files = repository.commits[repository.branches["main"]]
    assert {"README.md", *NAMES} <= set(files)
    assert b"- control-head\n" in files["README.md"]
    expected = model.generate(**prompts(), **GREEDY, recontrol_value_head=head, recontrol_scale=2.0).tolist()
    for heads in ("user/polite", {"user/polite@main": 1.0}, Head.from_pretrained("user/polite")):
        assert (
            model.generate(**prompts(), **GREEDY, recontrol_value_head=heads, recontrol_scale=2.0).tolist() == expected
        )
    assert expected != model.generate(**prompts(), **GREEDY).tolist()
    with pytest.raises(HeadError, match=r"user/polite.*kind = 'control'"):
        ValueHead.from_pretrained("user/polite")


# The card


def test_the_card_of_a_control_head_says_its_kind_its_scale_and_its_calibration():
    control = ScaleDefaults(scale=2.0, strength=0.1, calibration=[[0.1, 2.0], [0.4, 5.4321]])
    info = {"calibration": {"states": 2048}, "training": {"answers": 6000, "beta": 0.1}}
    head = tiny_control_head(reward=RewardScale("politeness", 0.25, 1.5), control=control, info=info)
    data, body = split(head.model_card("user/polite"))
    assert data["tags"] == [
        "recontrol",
        "control-head",
        "test-time-alignment",
        "representation-editing",
        "reward:politeness",
    ]
    for words in (
        "A control head for the Python package",
        "u = f(h)",
        "steers with a strength of 0.1 nats a token (scale 2); `recontrol_strength=` changes that",
        "picks the scale from this calibration on 2048 states",
        "| nats a token | scale |\n|---|---|\n| 0.1 | 2 |\n| 0.4 | 5.432 |\n",
        "16 inputs, 1 hidden layer of 24, relu",
        "Objective: clipped probability ratio times advantage",
        "A large scale may raise the reward",
        'recontrol_value_head="user/polite"',
    ):
        assert words in body
    for words in ("α", "step size", "step_size", "many steps", "uphill", "None", "A value head"):
        assert words not in body


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ("constant", "Head: one constant vector of 16\n"),
        ("linear", "Head: 16 inputs, linear\n"),
        ("low rank", "Head: 16 inputs, linear of rank 3\n"),
        ("one hidden layer", "Head: 16 inputs, 1 hidden layer of 24, relu\n"),
        ("two hidden layers", "Head: 16 inputs, 2 hidden layers of 24, gelu\n"),
    ],
)
def test_the_card_says_the_shape_and_without_a_calibration_the_scale(shape, words):
    _, body = split(tiny_control_head(**CONTROL_SHAPES[shape]).model_card())
    assert words in body
    assert "Unless told otherwise it steers with scale 1; `recontrol_scale=` changes that" in body
    assert "nats a token" not in body
    assert body.startswith("\n# Control head\n")


def test_the_card_of_a_value_head_says_what_it_always_did():
    head = tiny_head()
    control = head.config.control
    control.strength, control.calibration, head.config.info = 0.1, [[0.1, 0.5]], {"training": {"answers": 3}}
    data, body = split(head.model_card())
    assert data["tags"] == ["recontrol", "value-head", "test-time-alignment", "representation-editing", "reward:reward"]
    for words in (
        "# Value head",
        "A value head for the Python package",
        "moved a little uphill on that prediction",
        "a strength of 0.1 nats a token (α = 0.5 and n = 30 steps at each token); `recontrol_strength=` changes that",
        "picks the step size from this calibration",
        "| nats a token | step size |\n|---|---|\n| 0.1 | 0.5 |\n",
        "Objective: squared error to the λ-return of the reward",
        "A large step size or many steps may raise the reward",
    ):
        assert words in body
    assert "scale" not in body
    assert "control head" not in body


# The command line, in this process


@pytest.fixture
def folder(tmp_path):
    """A control head for the demo's language model, in tmp_path / "head"."""
    head = tiny_control_head(hidden_size=256, base_model_name_or_path="./language_model", base_model_type="llama")
    head.save_pretrained(tmp_path / "head")
    return tmp_path / "head"


def test_info_is_a_control_heads_config(command, folder):
    config = json.loads(command("info", folder))
    assert (config["kind"], config["rank"], config["control"]["scale"]) == ("control", None, 1.0)
    assert "step_size" not in config["control"]
    assert config["parameters"] == 256 * 24 + 24 + 24 * 256 + 256


@pytest.mark.versions
def test_generate_is_steered_by_a_control_head_at_its_scale(command, folder):
    greedy = ("generate", MODEL, "the film is a", "--max-new-tokens", 12, "--temperature", 0)
    plain, none = command(*greedy), command(*greedy, "--value-head", folder, "--scale", 0)
    assert plain.startswith("the film is a ")
    assert none == plain
    some, more = (command(*greedy, "--value-head", folder, "--scale", scale) for scale in (0.5, 5))
    assert len({plain, some, more}) == 3
    shown = command(*greedy, "--value-head", folder, "--trace", "--max-kl", 0.2)
    assert "nats" in shown
    assert "nan" not in shown


@pytest.mark.versions
def test_a_control_head_is_calibrated_from_prompts_and_then_steers_by_a_strength(command, folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("the film is\n\na story of love\n", encoding="utf-8")
    source = ("--prompts", tmp_path / "prompts.txt", "--max-new-tokens", 20)
    printed = command("tune", folder, "--model", MODEL, "--calibrate", *source)
    control = json.loads((folder / "config.json").read_text(encoding="utf-8"))["control"]
    assert [kl for kl, _ in control["calibration"]] == [0.02, 0.05, 0.1, 0.2, 0.4]
    assert (control["strength"], control["scale"]) == (0.1, dict(control["calibration"])[0.1])
    assert re.match(r"On \d+ states:\n", printed)
    for kl, scale in control["calibration"]:
        assert f"{kl:8g} nats a token: scale {scale:.4g}\n" in printed
    assert "step" not in printed
    assert "| nats a token | scale |" in (folder / "README.md").read_text(encoding="utf-8")
    command("generate", MODEL, "the film", "--value-head", folder, "--strength", 0.3, "--max-new-tokens", 5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--scale", 1), "Pass --value-head"),
        (("--value-head", "HEAD", "--scale", -1), "scale is -1.0; it must be a finite number"),
        (("--value-head", "HEAD", "--step-size", 1), "step_size is 1.0, which is of a value head's ascent"),
        (("--value-head", "HEAD", "--num-steps", 0), "num_steps is 0, which is of a value head's ascent"),
        (("--value-head", "HEAD", "--scale", 1, "--strength", 0.1), "Give one of the two"),
        (("--value-head", "HEAD", "--strength", 0.1), "the head is not calibrated"),
        (("--value-head", str(FOLDER / "value_head"), "--scale", 1), "scale is 1.0, which multiplies a control head's"),
    ],
    ids=str,
)
def test_a_users_error_with_a_control_head_is_one_line_and_status_2(command, folder, options, words):
    options = [str(folder) if option == "HEAD" else option for option in options]
    error = command("generate", MODEL, "the film", *options, status=2)
    assert words in error
    assert error.count("\n") == 1


def test_a_config_of_the_other_kind_is_refused():
    with pytest.raises(TypeError, match="ControlHead takes a ControlHeadConfig, not a ValueHeadConfig"):
        ControlHead(ValueHeadConfig(hidden_size=8))
    with pytest.raises(TypeError, match="ValueHead takes a ValueHeadConfig, not a ControlHeadConfig"):
        ValueHead(ControlHeadConfig(hidden_size=8))
    with pytest.raises(HeadError, match="a ScaleDefaults, in JSON an object"):
        ControlHeadConfig(hidden_size=8, control=ControlDefaults())
