"""A merged head is the sum; a constant control is a bias on the logits."""

import json
from math import inf

import pytest
import torch
from safetensors.torch import load_file
from tiny import CONTROL_SHAPES, prompts, tiny_control_head, tiny_head, tiny_model
from transformers import Gemma2Config, Gemma2ForCausalLM

from hf_recontrol import ControlConfig, Controller, Head, HeadMismatch, enable_recontrol
from hf_recontrol.forwards import logits_of
from hf_recontrol.logit_bias import logit_bias, save_logit_bias
from hf_recontrol.merging import merge_heads

CALIBRATIONS = ([[0.02, 0.1], [0.4, 0.8]], [[0.02, 0.3], [0.4, 2.0]])
VALUE_SHAPES = [
    {"num_hidden_layers": 0},
    {"num_hidden_layers": 1},
    {"num_hidden_layers": 1, "hidden_act": "silu"},
    {"num_hidden_layers": 2, "hidden_act": "gelu"},
]


def states(rows=64):
    return 3 * torch.randn(rows, 16, generator=torch.Generator().manual_seed(3))


def weighted(make, shape, **others):
    """Three heads of unequal widths, statistics and weights."""
    widths = {} if not shape.get("num_hidden_layers") else {"intermediate_size": 9}
    return {make(0, **shape): 1.0, make(1, **shape, **widths): -0.5, make(2, **shape): 0.25}


@pytest.mark.parametrize("shape", VALUE_SHAPES, ids=str)
def test_a_merged_value_head_is_the_weighted_sum(shape):
    heads = weighted(tiny_head, shape)
    merged = merge_heads(heads)
    expected = sum(weight * head.double()(states()) for head, weight in heads.items())
    torch.testing.assert_close(merged.double()(states()), expected, rtol=1e-5, atol=1e-5)
    assert merged.config.num_hidden_layers == shape["num_hidden_layers"]
    if shape["num_hidden_layers"]:
        assert merged.config.intermediate_size == 24 + 9 + 24


@pytest.mark.parametrize("shape", CONTROL_SHAPES.values(), ids=CONTROL_SHAPES)
def test_a_merged_control_head_is_the_weighted_sum(shape):
    heads = weighted(tiny_control_head, shape)
    merged = merge_heads(heads)
    expected = sum(weight * head.double()(states()) for head, weight in heads.items())
    torch.testing.assert_close(merged.double()(states()), expected, rtol=1e-5, atol=1e-5)
    if shape["num_hidden_layers"] == 0:
        rank = shape.get("rank")
        assert merged.config.rank == (None if rank is None else 3 * rank)


def test_control_heads_without_a_hidden_layer_may_be_of_any_rank():
    for ranks, rank in (((0, 3, None), None), ((0, 3), 3), ((9, 9), None), ((0, 0), 0)):
        heads = {tiny_control_head(i, num_hidden_layers=0, rank=r): i + 1.0 for i, r in enumerate(ranks)}
        merged = merge_heads(heads)
        assert merged.config.rank == rank
        expected = sum(weight * head(states()) for head, weight in heads.items())
        torch.testing.assert_close(merged(states()), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("make", [tiny_head, tiny_control_head])
@pytest.mark.parametrize("how", ["own", "calibrated", "bounded"])
def test_a_merged_head_steers_as_the_heads_with_their_weights(make, how, tmp_path):
    heads = {make(0): 1.0, make(1): -0.5}
    for head, calibration in zip(heads, CALIBRATIONS, strict=True):
        if how == "calibrated":
            head.config.control.calibration, head.config.control.strength = calibration, 0.1
        if how == "bounded":
            head.config.control.max_kl, head.config.control.max_relative_norm = 0.3, 0.2
    together, merged = Controller(heads), merge_heads(heads)
    merged.save_pretrained(tmp_path / "merged")
    alone = Controller(Head.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(alone(states()), together(states()), rtol=1e-4, atol=1e-4)
    assert alone.max_kl == together.max_kl
    assert merged.config.control.strength is None
    assert merged.config.control.calibration == []


def test_a_merged_head_gives_the_tokens_of_the_heads_together():
    model, heads = enable_recontrol(tiny_model()), {tiny_control_head(0): 1.0, tiny_control_head(1): 0.5}
    steer = {**prompts(), "max_new_tokens": 12, "do_sample": False}
    together = model.generate(**steer, recontrol_value_head=heads)
    merged = model.generate(**steer, recontrol_value_head=merge_heads(heads))
    assert merged.tolist() == together.tolist()
    assert merged.tolist() != model.generate(**steer).tolist()


def test_the_mean_of_heads_of_one_reward_keeps_its_units_and_a_sum_of_others_has_none():
    heads = [tiny_head(i) for i in range(2)]
    for head in heads:
        head.config.reward.name, head.config.reward.mean, head.config.reward.std = "polite", 3.0, 2.0
    mean = merge_heads(dict.fromkeys(heads, 0.5))
    assert mean.config.reward == heads[0].config.reward
    heads[1].config.reward.name = "brief"
    scale = merge_heads({heads[0]: 1.0, heads[1]: -0.5}).config.reward
    assert (scale.mean, scale.std) == (0.0, 1.0)
    assert scale.name == "1 × polite + -0.5 × brief, each standardised"


@pytest.mark.parametrize(
    ("one", "other", "match"),
    [
        (tiny_head(), tiny_control_head(), "kind.*control.*value"),
        (tiny_head(), tiny_head(num_hidden_layers=2), "num_hidden_layers.*1.*2"),
        (tiny_head(), tiny_head(hidden_size=8), "hidden_size.*16.*8"),
        (tiny_head(), tiny_head(hidden_act="tanh"), "hidden_act.*relu.*tanh"),
        (tiny_head(base_model_name_or_path="a/b"), tiny_head(base_model_name_or_path="a/c"), "a/b.*a/c"),
    ],
)
def test_heads_that_do_not_fit_each_other_are_refused_with_both_sides_named(one, other, match):
    with pytest.raises(HeadMismatch, match=match):
        merge_heads({one: 1.0, other: 1.0})


def test_what_the_heads_disagree_on_is_asked_for():
    heads = {tiny_head(0): 1.0, tiny_head(1): 1.0}
    list(heads)[1].config.control.num_steps = 3
    with pytest.raises(ValueError, match=r"differ in their num_steps: 3, 30.*recontrol_num_steps"):
        merge_heads(heads)
    assert merge_heads(heads, ControlConfig(num_steps=5)).config.control.num_steps == 5
    one = tiny_head()
    one.config.control.target_value = 1.0
    with pytest.raises(ValueError, match="target_value"):
        merge_heads({one: 1.0})


def test_what_all_heads_say_is_kept():
    heads = [tiny_head(i, base_model_name_or_path="a/b", base_model_revision=f"r{i}") for i in range(2)]
    for head in heads:
        head.config.info["license"] = "mit"
    config = merge_heads(dict.fromkeys(heads, 1.0), names=["user/a", "user/b"]).config
    assert (config.base_model_name_or_path, config.base_model_revision) == ("a/b", None)
    assert config.info == {"merged": [["user/a", 1.0], ["user/b", 1.0]], "license": "mit"}
    card = merge_heads(dict.fromkeys(heads, 1.0), names=["user/a", "user/b"]).model_card()
    assert "- Merged of: 1 × `user/a`\n- Merged of: 1 × `user/b`\n" in card


# A bias on the logits


def constants():
    linear, constant = tiny_head(num_hidden_layers=0), tiny_control_head(num_hidden_layers=0, rank=0)
    linear.config.control.regularization = 0.1
    return {"linear value head": linear, "constant control": constant}


@pytest.mark.parametrize("head", constants().values(), ids=constants())
def test_the_bias_is_what_the_control_adds_to_the_logits(head):
    model = tiny_model()
    bias = logit_bias(head, model)
    expected = logits_of(model, Controller(head)(states())) - logits_of(model, states())
    torch.testing.assert_close(bias.expand_as(expected), expected, rtol=1e-3, atol=1e-4)
    assert bias.shape == (64,)
    assert bias.abs().max() > 0.1


@pytest.mark.parametrize("head", constants().values(), ids=constants())
@pytest.mark.parametrize(
    "mode",
    [{"do_sample": False}, {"do_sample": True, "temperature": 0.8}, {"num_beams": 3, "renormalize_logits": True}],
    ids=str,
)
def test_sequence_bias_gives_the_tokens_of_the_head(head, mode):
    model = enable_recontrol(tiny_model())
    biases = {(i,): value for i, value in enumerate(logit_bias(head, model).tolist())}
    steer = {**prompts(), "max_new_tokens": 10, **mode}
    torch.manual_seed(0)
    expected = model.generate(**steer, recontrol_value_head=head).tolist()
    torch.manual_seed(0)
    assert model.generate(**steer, sequence_bias=biases).tolist() == expected


def test_several_heads_make_one_bias_and_a_logit_scale_is_in_it():
    model, (linear, constant) = tiny_model(), constants().values()
    linear.config.control.regularization = 0.0
    both = logit_bias({linear: 1.0, constant: -0.5}, model)
    parts = logit_bias(linear, model) - 0.5 * logit_bias(constant, model)
    torch.testing.assert_close(both, parts, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        stock = model.forward
        model.forward = lambda *args, **kwargs: stock(*args, **kwargs)
        model.lm_head.weight.mul_(2)
    torch.testing.assert_close(logit_bias(constant, model), 2 * logit_bias(constant, tiny_model()))


def test_a_soft_cap_and_a_control_that_reads_the_hidden_state_are_refused():
    config = Gemma2Config(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config.num_key_value_heads, config.head_dim, config.vocab_size, config.final_logit_softcapping = 2, 8, 64, 30.0
    constant = constants()["constant control"]
    with pytest.raises(ValueError, match=r"soft-cap.*no constant bias"):
        logit_bias(constant, Gemma2ForCausalLM(config).eval())
    for head in (tiny_head(), tiny_control_head(num_hidden_layers=0), tiny_control_head()):
        with pytest.raises(ValueError, match=r"depends on the hidden state.*fit_constant_control"):
            logit_bias(head, tiny_model())
    with pytest.raises(ValueError, match=r"max_relative_norm is 0.1"):
        logit_bias(constant, tiny_model(), ControlConfig(max_relative_norm=0.1))


def test_a_bound_that_a_bias_cannot_hold_is_warned_of():
    head, model = constants()["constant control"], tiny_model()
    with pytest.warns(UserWarning, match="max_kl is 0.3 nats, which a bias cannot hold"):
        bounded = logit_bias(head, model, ControlConfig(max_kl=0.3))
    torch.testing.assert_close(bounded, logit_bias(head, model, ControlConfig(max_kl=inf)), rtol=0, atol=0)


def test_a_bias_is_written_for_engines_and_for_torch(tmp_path):
    bias = torch.tensor([0.5, -1.25, 0.0])
    save_logit_bias(bias, tmp_path / "bias.json")
    assert json.loads((tmp_path / "bias.json").read_text()) == {"0": 0.5, "1": -1.25, "2": 0.0}
    save_logit_bias(bias, tmp_path / "bias.safetensors")
    torch.testing.assert_close(load_file(tmp_path / "bias.safetensors")["bias"], bias, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"must end in .json or .safetensors"):
        save_logit_bias(bias, tmp_path / "bias.txt")


# The command


def test_merge_writes_a_head_and_says_what_to_do_next(command, tmp_path):
    for i in range(2):
        tiny_control_head(i).save_pretrained(tmp_path / f"head{i}")
    said = command("merge", tmp_path / "head0", f"{tmp_path / 'head1'}=-0.5", "--output", tmp_path / "merged")
    assert "-0.5 × head1" in said
    for name in ("config.json", "README.md"):  # they go to others
        assert str(tmp_path) not in (tmp_path / "merged" / name).read_text()
    assert "hf-recontrol tune" in said
    expected = tiny_control_head(0)(states()) - 0.5 * tiny_control_head(1)(states())
    torch.testing.assert_close(Head.from_pretrained(tmp_path / "merged")(states()), expected, rtol=1e-5, atol=1e-4)


def test_merge_writes_a_bias_for_a_model(command, tmp_path):
    from tiny import tiny_tokenizer

    head = constants()["constant control"]
    head.save_pretrained(tmp_path / "head")
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    bias = tmp_path / "bias.safetensors"
    said = command("merge", tmp_path / "head", "--logit-bias", bias, "--model", tmp_path / "model")
    assert "Saved 64 biases" in said
    torch.testing.assert_close(load_file(bias)["bias"], logit_bias(head, tiny_model()))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((), "Nothing is to be written"),
        (("--logit-bias", "bias.json"), "belong together"),
        (("--output", "merged", "--model", "model"), "belong together"),
    ],
)
def test_merge_says_what_is_missing(command, tmp_path, arguments, match):
    assert match in command("merge", tmp_path / "head", *arguments, status=2)
    assert "must be its weight" in command("merge", "user/head=much", "--output", tmp_path, status=2)
