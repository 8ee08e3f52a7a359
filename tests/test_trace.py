"""The trace: what happened to each token."""

from math import inf, nan
from unittest.mock import Mock

import pytest
import torch
from steered import GREEDY, STEER, STEERING, named, tokens
from test_generation import NoToken, left_padded
from tiny import prompts, tiny_head, tiny_model
from torch.nn import functional
from transformers import (
    CompileConfig,
    GenerationConfig,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation import utils

from hf_recontrol import (
    ControlConfig,
    Controller,
    RewardScale,
    enable_recontrol,
    register_value_heads,
)
from hf_recontrol.forwards import generate_with_hidden_states

pytestmark = pytest.mark.versions


@pytest.fixture
def model():
    return enable_recontrol(tiny_model())


@pytest.fixture
def head():
    return tiny_head()


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
    assert trace.base_token_ids.tolist() == base.argmax(-1).tolist()
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
    assert (trace.base_token_ids == -1).tolist() == ended.tolist()
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
    assert trace.base_token_ids.tolist() == trace.token_ids.tolist()  # greedy decoding takes the likeliest


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


@pytest.mark.skipif(not hasattr(utils, "DeferredStopCheck"), reason="transformers before 5.24 has no such loop")
def test_a_step_that_generate_takes_back_leaves_no_trace(monkeypatch, head):
    model = enable_recontrol(tiny_model(eos_token_id=list(range(2, 16))))  # all answers end early
    steer = {"recontrol_value_head": head, **STEER, "recontrol_trace": True, "return_dict_in_generate": True}
    sampling = {**prompts(), "do_sample": True, "max_new_tokens": 60, "pad_token_id": 0}

    def outputs():
        torch.manual_seed(1)
        steered = model.generate(**sampling, **steer)
        torch.manual_seed(1)
        return steered, generate_with_hidden_states(model, **sampling)

    expected, recorded = outputs()
    assert expected.sequences.shape[1] < 65
    monkeypatch.setattr(utils.DeferredStopCheck, "is_supported", staticmethod(lambda *args, **kwargs: True))
    monkeypatch.setattr(torch, "Event", Mock())  # a CPU has none, and nothing to wait for
    actual, again = outputs()
    for name in vars(expected.recontrol_trace):
        wanted, found = getattr(expected.recontrol_trace, name), getattr(actual.recontrol_trace, name)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(again, recorded, rtol=0, atol=0)
