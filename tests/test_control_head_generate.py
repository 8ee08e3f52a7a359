"""Control heads in generate(), calibrated, and in a trace: by loops and models with no hook, and f by its formula."""

from math import inf, nan

import pytest
import torch
from steered import GREEDY, asked, named, stock_tokens
from test_control_head import SHAPES, ascended, by_hand, calibrated_control_head, made
from test_generation import decode_by_hand, left_padded
from test_hooks import small_batches
from test_kl_bound import kl_by_hand, merged_by_hand
from test_max_kl import LOGITS, assert_binds_at_some, measured_kl, merging_twin, repeating
from test_plots import Page
from tiny import CONTROL_SHAPES, prompts, tiny_control_head, tiny_head, tiny_model, tiny_tokenizer
from transformers import CompileConfig, GenerationConfig

from hf_recontrol import (
    ControlConfig,
    ControlHead,
    ControlHeadConfig,
    Controller,
    RewardScale,
    calibrate,
    enable_recontrol,
    register_value_heads,
)
from hf_recontrol.calibration import STRENGTHS, mean_kl
from hf_recontrol.forwards import forward_steered, generate_with_hidden_states
from hf_recontrol.plots import show, trace_figure

pytestmark = pytest.mark.versions
SCALE = 0.7
MAX_KL = 0.05  # binds at some tokens of tiny_model with one hidden layer under SMALL_SCALE
SMALL_SCALE = 0.2


@pytest.fixture
def model():
    return enable_recontrol(tiny_model())


def steer_by_hand(shape, head, scale=SCALE):
    return lambda h: (h.float() + scale * by_hand(shape, head, h.float())).to(h.dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("inputs", [prompts(rows=1), left_padded()], ids=["one row", "left padding"])
def test_greedy_decoding_is_lm_head_of_h_plus_scale_times_f(model, shape, inputs):
    head = made(shape)
    expected = decode_by_hand(model, steer_by_hand(shape, head), steps=8, **inputs).tolist()
    for mode in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        actual = model.generate(**inputs, **GREEDY, **mode, recontrol_value_head=head, recontrol_scale=SCALE)
        assert actual.tolist() == expected
    for other in ({}, {"recontrol_value_head": head, "recontrol_scale": 5 * SCALE}):
        assert model.generate(**inputs, **GREEDY, **other).tolist() != expected


@pytest.mark.parametrize("max_kl", [inf, MAX_KL])
@pytest.mark.parametrize(
    "mode",
    [
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 2},
        {"repetition_penalty": 1.5},
    ],
    ids=str,
)
def test_every_way_of_decoding_takes_the_steered_logits_and_keeps_the_bound(model, mode, max_kl):
    head, inputs, mode = tiny_control_head(), left_padded(), GREEDY | LOGITS | mode
    oracle = merging_twin(model, steer_by_hand("one hidden layer", head, SMALL_SCALE), max_kl)
    torch.manual_seed(3)
    expected = oracle.generate(**inputs, **mode)
    steer = {"recontrol_value_head": head, "recontrol_scale": SMALL_SCALE, "recontrol_max_kl": max_kl}
    torch.manual_seed(3)
    actual = model.generate(**inputs, **mode, **steer)
    assert actual.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-3)
    kl = measured_kl(model, inputs, actual)
    if max_kl == MAX_KL:
        assert_binds_at_some(kl)
    assert (max_kl == MAX_KL) == bool((kl <= MAX_KL + 1e-4).all())


@pytest.mark.parametrize("max_kl", [None, MAX_KL])
def test_assisted_decoding_gives_the_steered_models_own_tokens(model, max_kl):
    head = tiny_control_head()
    steer = {"recontrol_value_head": head, "recontrol_scale": SCALE, "recontrol_max_kl": max_kl}
    expected = model.generate(**repeating(), **GREEDY, **steer).tolist()
    assert expected != model.generate(**repeating(), **GREEDY).tolist()
    for draft in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny_model(1)}, {"assistant_model": model}):
        assert model.generate(**repeating(), **GREEDY, **draft, **steer).tolist() == expected


def test_continuous_batching_is_steered():
    head, texts = tiny_control_head(), [[1, 5, 9], [1, 7, 8, 11], [1, 20]]
    steer = {"recontrol_value_head": head, "recontrol_scale": SCALE, "recontrol_max_kl": MAX_KL}
    model, batching = enable_recontrol(tiny_model(eos_token_id=2)), enable_recontrol(tiny_model(eos_token_id=2))
    batching.set_attn_implementation("paged|eager")
    config = GenerationConfig(**GREEDY, eos_token_id=2, pad_token_id=0)
    found = []
    for keywords in (steer, {}):
        expected = [model.generate(torch.tensor([ids]), config, **keywords)[0, len(ids) :].tolist() for ids in texts]
        outputs = batching.generate_batch(texts, config, continuous_batching_config=small_batches(), **keywords)
        assert [output.generated_tokens for output in outputs.values()] == expected
        found.append(expected)
    assert found[0] != found[1]


def test_compiled_decoding_is_steered_by_one_graph_for_every_scale():
    head, model = tiny_control_head(), enable_recontrol(tiny_model(num_hidden_layers=1))
    compile_config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compile_config._compile_all_devices = True  # else a CPU is never compiled for
    static = {"cache_implementation": "static", "compile_config": compile_config}
    torch._dynamo.reset()
    for i in range(10):  # Dynamo refuses the ninth graph
        scale = 0.5 + 0.1 * i
        expected = decode_by_hand(model, steer_by_hand("one hidden layer", head, scale), steps=8, **prompts())
        actual = model.generate(**prompts(), **GREEDY, **static, recontrol_value_head=head, recontrol_scale=scale)
        assert actual.tolist() == expected.tolist()
    assert "_compiled_call" in vars(model)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_gives_what_its_rows_give_alone(model, shape):
    steer, inputs = {"recontrol_value_head": made(shape), "recontrol_scale": SCALE}, left_padded()
    together = model.generate(**inputs, **GREEDY, **steer)
    for row, (ids, mask) in enumerate(zip(*inputs.values(), strict=True)):
        alone = model.generate(ids[mask.bool()][None], **GREEDY, **steer)
        assert together[row, -8:].tolist() == alone[0, -8:].tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_bfloat16_model_is_steered_by_a_float32_head(shape):
    model, head = enable_recontrol(tiny_model().bfloat16()), made(shape)
    expected = decode_by_hand(model, steer_by_hand(shape, head), steps=1, **prompts()).tolist()
    one = GREEDY | {"max_new_tokens": 1}
    assert model.generate(**prompts(), **one, recontrol_value_head=head, recontrol_scale=SCALE).tolist() == expected
    assert expected != model.generate(**prompts(), **one).tolist()


def test_a_constant_control_adds_lm_head_of_u_to_the_logits(model):
    head = made("constant")
    outputs = model.generate(**prompts(), **GREEDY, **LOGITS, recontrol_value_head=head, recontrol_scale=SCALE)
    with torch.no_grad():
        base = model(outputs.sequences).logits[:, 4:-1]
        bias = SCALE * model.lm_head.weight @ (head.output_scale * head.bias)
    torch.testing.assert_close(torch.stack(outputs.logits, 1), base + bias, rtol=0, atol=1e-4)
    assert bias.abs().max() > 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_a_scale_of_zero_gives_the_stock_models_logits_bit_for_bit_and_a_fresh_head_is_refused(model, shape):
    fresh = ControlHead(ControlHeadConfig(hidden_size=16, **CONTROL_SHAPES[shape]))
    for given in (fresh, {fresh: -2.0}):
        with pytest.raises(ValueError, match="0 everywhere, as one that was just made"):
            model.generate(**prompts(), **GREEDY, recontrol_value_head=given)
    stock = tiny_model().generate(**prompts(), **GREEDY, **LOGITS)
    for steer in (
        {"recontrol_value_head": made(shape), "recontrol_scale": 0},
        {"recontrol_value_head": made(shape), "recontrol_scale": 0.0, "recontrol_max_kl": 0.1},
    ):
        actual = model.generate(**prompts(), **GREEDY, **LOGITS, **steer)
        torch.testing.assert_close(actual.logits, stock.logits, rtol=0, atol=0)


def test_heads_of_both_kinds_steer_together_by_folder_by_name_and_as_objects(model, tmp_path):
    value, control = tiny_head(), tiny_control_head()
    control.save_pretrained(tmp_path)

    def steer(h):
        return h + ascended(SCALE * 0.5 * by_hand("one hidden layer", control, h), value, h, 2.0, 3)

    expected = decode_by_hand(model, steer, steps=8, **prompts()).tolist()
    keywords = {"recontrol_step_size": 2.0, "recontrol_num_steps": 3, "recontrol_scale": SCALE}
    found = []
    for heads in ({value: 1.0, control: 0.5}, {control: 0.5, value: 1}, {str(tmp_path): 0.5, value: 1.0}):
        found.append(model.generate(**prompts(), **GREEDY, **keywords, recontrol_value_head=heads).tolist())
    register_value_heads({"value": value, "control": tmp_path})
    both = named({"value": 1.0, "control": 0.5}, step_size=2.0, num_steps=3, scale=SCALE)
    both.update(**GREEDY)
    found.append(model.generate(**prompts(), generation_config=both).tolist())
    model.set_recontrol_defaults({value: 1.0, tmp_path: 0.5}, step_size=2.0, num_steps=3, scale=SCALE)
    found.append(model.generate(**prompts(), **GREEDY).tolist())
    assert found == [expected] * 5
    assert model.generate(**prompts(), **GREEDY, recontrol_scale=0).tolist() != expected


def test_the_scale_of_the_call_wins_over_the_given_config_that_over_the_models_and_that_over_the_heads(model):
    head = calibrated_control_head()
    head.config.control.scale = 5.0
    given = GenerationConfig(recontrol_scale=3.0)

    def settled(*arguments, **keywords):
        return asked(model, *arguments, **keywords).controller.config.scale

    assert settled(recontrol_value_head=head) == 5.0
    model.set_recontrol_defaults(head, scale=4.0)
    assert settled() == 4.0
    assert settled(given) == 3.0
    assert settled(given, recontrol_scale=0) == settled(given, recontrol_config={"scale": 0}) == 0
    assert asked(model, given, recontrol_strength=0.1).controller.config.scale is None
    with pytest.raises(ValueError, match=r"recontrol_scale is 2, but recontrol_config has scale = 1"):
        settled(recontrol_scale=2, recontrol_config={"scale": 1})
    assert model.generate(**prompts(), **GREEDY, recontrol_scale=0).tolist() == stock_tokens()
    assert model.generate(**prompts(), **GREEDY).tolist() != stock_tokens()


def test_a_steered_forward_edits_every_position(model):
    head, inputs = tiny_control_head(), prompts()
    expected = model.lm_head(steer_by_hand("one hidden layer", head)(model.model(**inputs).last_hidden_state))
    actual = forward_steered(model, Controller(head, ControlConfig(scale=SCALE)), **inputs).logits
    torch.testing.assert_close(actual, expected)


# The calibration


@pytest.fixture(scope="module")
def own_states():
    """Of tiny_model's own answers."""
    torch.manual_seed(0)
    sampling = {"do_sample": True, "max_new_tokens": 8}
    return generate_with_hidden_states(tiny_model(), **prompts(rows=128), **sampling)[1].flatten(0, 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_each_scale_of_the_calibration_spends_its_nats_and_a_strength_of_them_steers_by_it(model, own_states, shape):
    head = made(shape)
    calibrate(head, model, own_states)
    control, h = head.config.control, own_states
    assert [kl for kl, _ in control.calibration] == list(STRENGTHS)
    assert (control.strength, control.scale) == (0.1, dict(control.calibration)[0.1])
    assert head.config.info["calibration"] == {"states": len(h)}
    for strength, scale in control.calibration:
        edited, base = model.lm_head(steer_by_hand(shape, head, scale)(h)).detach(), model.lm_head(h).detach()
        assert float(kl_by_hand(edited, base).clamp(max=4 * strength).mean()) == pytest.approx(strength, rel=0.02)
        controller = Controller(head, ControlConfig(scale=scale))
        assert mean_kl(controller, model, h, 4 * strength) == pytest.approx(strength, rel=0.02)
    oracle = merging_twin(model, steer_by_hand(shape, head, dict(control.calibration)[0.2]), 0.8)
    expected = oracle.generate(**prompts(), **GREEDY, **LOGITS)
    actual = model.generate(**prompts(), **GREEDY, **LOGITS, recontrol_value_head=head, recontrol_strength=0.2)
    assert actual.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-3)
    unasked = model.generate(**prompts(), **GREEDY, **LOGITS, recontrol_value_head=head)
    told = model.generate(**prompts(), **GREEDY, **LOGITS, recontrol_value_head=head, recontrol_strength=0.1)
    torch.testing.assert_close(unasked.logits, told.logits, rtol=0, atol=0)


def test_a_calibrated_strength_is_the_kl_of_generated_text(model, own_states):
    head = tiny_control_head()
    calibrate(head, model, own_states)
    torch.manual_seed(3)
    sampling = {"do_sample": True, "max_new_tokens": 8, **LOGITS}
    inputs = prompts(rows=256, seed=1)
    outputs = model.generate(**inputs, **sampling, recontrol_value_head=head, recontrol_strength=0.05)
    kl = measured_kl(model, inputs, outputs)
    assert float(kl.mean()) == pytest.approx(0.05, rel=0.2)
    assert float(kl.max()) <= 0.2 + 1e-4


@pytest.mark.parametrize(
    ("fresh", "options", "words"),
    [
        (True, {}, "control has norm 0.0 at these states, so it steers nowhere"),
        (False, {"max_relative_norm": 1e-4}, r"No scale of this head spends 0\.02 nats a token"),
    ],
)
def test_a_control_head_that_cannot_be_calibrated_is_refused_and_left_as_it_was(
    model, own_states, fresh, options, words
):
    head = ControlHead(ControlHeadConfig(hidden_size=16)) if fresh else tiny_control_head()
    for name, value in options.items():
        setattr(head.config.control, name, value)
    before = head.config.to_json_string()
    with pytest.raises(ValueError, match=words):
        calibrate(head, model, own_states)
    assert head.config.to_json_string() == before
    with pytest.raises(ValueError, match="There are 0 finite states"):
        calibrate(tiny_control_head(), model, torch.full((3, 16), nan))


# The trace


def traced(model, heads, **keywords):
    mode = {**GREEDY, "return_dict_in_generate": True, "recontrol_trace": True, "recontrol_scale": SCALE}
    output = model.generate(**prompts(), **(mode | keywords), recontrol_value_head=heads)
    return output.recontrol_trace


@pytest.mark.parametrize("max_kl", [None, 0.02])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_trace_of_a_control_head_has_its_kl_and_norms_and_no_values(model, shape, max_kl):
    head = made(shape)
    steer = {"recontrol_value_head": head, "recontrol_scale": SCALE, "recontrol_max_kl": max_kl}
    sequences, h = generate_with_hidden_states(model, **prompts(), **GREEDY, **steer)
    trace = traced(model, head, recontrol_max_kl=max_kl)
    u = SCALE * by_hand(shape, head, h)
    base = model.lm_head(h).detach()
    merged, share = merged_by_hand(base, model.lm_head(h + u).detach(), max_kl or inf)
    assert trace.token_ids.tolist() == sequences[:, 5:].tolist()
    assert trace.values.isnan().all()
    assert trace.steered_values.isnan().all()
    assert trace.sound.all()
    assert trace.lengths.tolist() == [8, 8, 8]
    torch.testing.assert_close(trace.control_norms, u.norm(dim=-1), rtol=0, atol=1e-4)
    torch.testing.assert_close(trace.kl.double(), kl_by_hand(merged, base)[..., 0], rtol=0, atol=1e-4)
    torch.testing.assert_close(trace.scale.double(), share[..., 0], rtol=0, atol=3e-4)
    assert trace.capped.any() == (max_kl is not None)


def test_a_row_that_ends_at_once_is_a_trace_of_one_token(model):
    head = tiny_control_head()
    endless = traced(model, head)
    eos = int(endless.token_ids[0, 0])
    trace = traced(model, head, eos_token_id=eos)
    assert trace.token_ids[0].tolist() == [eos] + [0] * (trace.token_ids.shape[1] - 1)
    assert trace.lengths[0] == 1
    torch.testing.assert_close(trace.kl[0, :1], endless.kl[0, :1])
    assert trace.kl[0, 1:].isnan().all()
    assert "nan" not in str(show(trace, tiny_tokenizer()))
    alone = traced(model, head, eos_token_id=endless.token_ids[:, 0].tolist())
    assert alone.lengths.tolist() == [1, 1, 1]
    torch.testing.assert_close(alone.kl, endless.kl[:, :1])


def test_a_trace_of_a_control_head_is_shown_by_its_kl_and_never_says_nan(model):
    trace = traced(model, tiny_control_head(), recontrol_max_kl=MAX_KL)
    for tokenizer in (None, tiny_tokenizer()):
        shown = show(trace, tokenizer)
        assert shown._repr_html_() == show(trace, tokenizer, by="kl")._repr_html_()
        assert shown._repr_html_() != show(trace, tokenizer, by="control_norms")._repr_html_()
        assert shown.title == "KL from the unsteered model, in nats"
        for by in (None, "kl", "control_norms", "values", "steered_values"):
            text = str(show(trace, tokenizer, by=by)) + show(trace, tokenizer, by=by)._repr_html_()
            assert "nan" not in text.lower()
            assert "mean value" not in text
        tooltips = [tooltip.splitlines() for _, _, tooltip in Page(shown).tokens]
        assert len(tooltips) == 24
        for tooltip, norm, kl, capped in zip(
            tooltips, *(x.flatten().tolist() for x in (trace.control_norms, trace.kl, trace.capped)), strict=True
        ):
            *numbers, base = tooltip[:3]
            assert numbers == [f"‖u‖ {norm:.3g}", f"KL {kl:.3g} nats"]
            assert base.startswith("likeliest without control: ")
            assert tooltip[3:] == ["at the cap"] * capped
    assert f"mean KL {float(trace.kl[0].mean()):.3g} nats per token" in str(show(trace))


def test_with_a_value_head_the_trace_has_values_and_is_shown_by_them(model):
    pytest.importorskip("matplotlib")
    value, control = tiny_head(reward=RewardScale("r", 3.0, 2.5)), tiny_control_head()
    trace = traced(model, {value: 1.0, control: 1.0}, recontrol_step_size=2.0, recontrol_num_steps=3)
    assert trace.values.isfinite().all()
    assert show(trace).title == "value before the control, in units of the reward"
    assert len(trace_figure(trace).axes) == 3


def test_the_figure_of_a_control_head_has_the_norms_and_the_kl_and_no_values(model):
    pytest.importorskip("matplotlib")
    trace = traced(model, tiny_control_head(), recontrol_max_kl=MAX_KL)
    figure = trace_figure(trace, 1, tiny_tokenizer())
    figure.canvas.draw()
    norms, kl = figure.axes
    for axis, column in ((norms, trace.control_norms), (kl, trace.kl)):
        assert axis.lines[0].get_ydata().tolist() == column[1].tolist()
        assert axis.lines[1].get_xdata().tolist() == trace.capped[1].nonzero()[:, 0].tolist()
    assert (norms.get_ylabel(), kl.get_ylabel()) == ("‖u‖ (units of\nthe hidden state)", "KL of the token\n(nats)")
    assert "before the control" not in [text.get_text() for text in norms.get_legend().get_texts()]
