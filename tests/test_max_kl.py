"""recontrol_max_kl: no token passes the bound in any mode of decoding or architecture, by an oracle with no hook."""

import functools

import pytest
import torch
from test_kl_bound import kl_by_hand, merged_by_hand
from tiny import prompts, tiny_head, tiny_model
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    CohereConfig,
    CohereForCausalLM,
    CompileConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LogitsProcessor,
    PhiConfig,
    PhiForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_recontrol import ControlConfig, Controller, SteeringNotApplied, enable_recontrol
from hf_recontrol.forwards import forward_steered, generate_with_hidden_states

MAX_KL = 0.05  # of tiny_model under STEER it binds at most tokens, not at all of them
STEER = {"recontrol_step_size": 2.0, "recontrol_num_steps": 3}
STEERING = ControlConfig(2.0, 3)
LOGITS = {"return_dict_in_generate": True, "output_logits": True}
GREEDY = {"do_sample": False, "max_new_tokens": 8, **LOGITS}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Merged(LlamaForCausalLM):
    """The oracle: a stock model whose forward merges lm_head(h) and lm_head(h + u) by hand. It has no hook."""

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **(kwargs | {"output_hidden_states": True}))
        h = outputs.hidden_states[-1][:, -outputs.logits.shape[1] :]
        outputs.logits = merged_by_hand(self.lm_head(h), self.lm_head(self.steer(h)), self.max_kl)[0].float()
        return outputs


def merging_twin(model, controller, max_kl=MAX_KL):
    twin = Merged(model.config).eval()
    twin.load_state_dict(model.state_dict())
    twin.steer, twin.max_kl = controller, max_kl
    return twin


@pytest.fixture
def model():
    return enable_recontrol(tiny_model())


@pytest.fixture
def head():
    return tiny_head()


def left_padded():
    inputs = prompts()
    inputs["input_ids"][1, :3], inputs["attention_mask"][1, :3] = 0, 0
    return inputs


def repeating():
    inputs = prompts(rows=1, length=12)
    inputs["input_ids"][0, 6:] = inputs["input_ids"][0, :6]  # something to look up
    return inputs


@torch.no_grad()
def measured_kl(model, inputs, outputs):
    """Each new token's KL, (rows, tokens): the logits that generate() returns against one plain forward."""
    new_tokens = len(outputs.logits)
    logits = torch.stack(outputs.logits, dim=1)
    if outputs.get("beam_indices") is not None:  # the running beam that each token of the answer was drawn from
        logits = logits[outputs.beam_indices[:, :new_tokens], torch.arange(new_tokens)]
    mask = inputs["attention_mask"].repeat_interleave(len(outputs.sequences) // len(inputs["attention_mask"]), dim=0)
    mask = torch.nn.functional.pad(mask, (0, new_tokens), value=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    base = model(outputs.sequences, attention_mask=mask, position_ids=positions).logits[:, -new_tokens - 1 : -1]
    return kl_by_hand(logits, base)[..., 0]


def assert_binds_at_some(kl, max_kl=MAX_KL):
    assert (kl <= max_kl + 1e-4).all()
    assert (kl >= 0.99 * max_kl).any()
    assert (kl < 0.95 * max_kl).any()  # else a cap on every token would pass


@pytest.mark.versions
@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 2},
        {"repetition_penalty": 1.5},
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 2},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("inputs", [prompts(), left_padded()], ids=["full rows", "left padding"])
def test_every_way_of_decoding_takes_the_merged_logits_of_two_forwards(model, head, inputs, mode):
    oracle = merging_twin(model, Controller(head, STEERING))
    torch.manual_seed(3)
    expected = oracle.generate(**inputs, **(GREEDY | mode))
    torch.manual_seed(3)
    steer = {"recontrol_value_head": head, "recontrol_max_kl": MAX_KL, **STEER}
    actual = model.generate(**inputs, **(GREEDY | mode), **steer)
    assert actual.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-3)
    assert_binds_at_some(measured_kl(model, inputs, actual))
    torch.manual_seed(3)
    assert actual.sequences.tolist() != model.generate(**inputs, **(GREEDY | mode)).sequences.tolist()


@pytest.mark.versions
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "max_new_tokens": 16}], ids=["greedy", "sampling"])
@pytest.mark.parametrize("draft", ["prompt lookup", "plain assistant", "enabled assistant", "the model itself"])
def test_assisted_decoding_takes_the_merged_logits_and_leaves_drafts_plain(model, head, draft, sampling):
    oracle, inputs = merging_twin(model, Controller(head, STEERING)), repeating()
    drafts = {
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "plain assistant": {"assistant_model": tiny_model(1)},
        "enabled assistant": {"assistant_model": enable_recontrol(tiny_model(1))},
        "the model itself": {"assistant_model": model},
    }[draft]
    torch.manual_seed(3)
    expected = oracle.generate(**inputs, **(GREEDY | sampling), **drafts)
    torch.manual_seed(3)
    steer = {"recontrol_value_head": head, "recontrol_max_kl": MAX_KL, **STEER}
    actual = model.generate(**inputs, **(GREEDY | sampling), **drafts, **steer)
    assert actual.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-3)
    assert_binds_at_some(measured_kl(model, inputs, actual))


@pytest.mark.versions
def test_the_lm_head_by_itself_is_plain_and_single_even_during_a_bounded_generate(model, head):
    states = torch.randn(1, 1, 16)
    expected = model.lm_head(states)

    class Borrowing(LogitsProcessor):
        def __call__(self, input_ids, scores):
            torch.testing.assert_close(model.lm_head(states), expected, rtol=0, atol=0)
            return scores

    steer = {"recontrol_value_head": head, "recontrol_max_kl": MAX_KL, **STEER}
    alone = model.generate(**prompts(), **GREEDY, **steer)
    actual = model.generate(**prompts(), **GREEDY, **steer, logits_processor=[Borrowing()])
    assert actual.sequences.tolist() == alone.sequences.tolist()


@pytest.mark.versions
def test_compiled_decoding_keeps_many_bounds_and_step_sizes_with_and_without_a_trace(head):
    """As one graph, which Dynamo refuses to compile more than eight times: a float must not make a new one each."""
    model = enable_recontrol(tiny_model(num_hidden_layers=1))
    compile_config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compile_config._compile_all_devices = True  # else a CPU is never compiled for
    static = {"cache_implementation": "static", "compile_config": compile_config}
    torch._dynamo.reset()
    for i in range(12):
        max_kl, step_size, trace = 0.02 + 0.005 * i, 1.5 + 0.1 * i, i % 2 == 1
        control = {"recontrol_step_size": step_size, "recontrol_num_steps": 3, "recontrol_max_kl": max_kl}
        oracle = merging_twin(model, Controller(head, ControlConfig(step_size, 3)), max_kl)
        expected = oracle.generate(**prompts(), **GREEDY)
        actual = model.generate(
            **prompts(), **GREEDY, **static, recontrol_value_head=head, **control, recontrol_trace=trace
        )
        assert actual.sequences.tolist() == expected.sequences.tolist()
        torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-3)
        kl = measured_kl(model, prompts(), actual)
        assert (kl <= max_kl + 1e-4).all()
        if trace:
            torch.testing.assert_close(actual.recontrol_trace.kl[:, 0].double(), kl[:, 0], rtol=0, atol=1e-4)
    assert "_compiled_call" in vars(model)


@pytest.mark.versions
def test_a_bfloat16_model_keeps_the_bound(model, head):
    model.bfloat16()
    controller = Controller(head, ControlConfig(2.0, 3, max_kl=MAX_KL))
    with torch.no_grad():
        h = model.model(**prompts()).last_hidden_state
        base, _ = model.lm_head(torch.cat([h, controller(h)])).chunk(2)  # six rows, as a product may depend on it
        logits = forward_steered(model, controller, **prompts()).logits
    assert logits.dtype == torch.float32
    assert_binds_at_some(kl_by_hand(logits, base))


@pytest.mark.versions
def test_recording_under_a_bound_gives_the_states_before_the_edit_and_not_the_doubled_rows(model, head):
    steer = {"recontrol_value_head": head, "recontrol_max_kl": MAX_KL, **STEER}
    mode = {"do_sample": False, "max_new_tokens": 8}
    sequences, hidden_states = generate_with_hidden_states(model, **prompts(), **mode, **steer)
    assert sequences.tolist() == model.generate(**prompts(), **mode, **steer).tolist()
    assert hidden_states.shape == (3, 8, 16)
    edited = Controller(head, STEERING)(hidden_states)
    merged, _ = merged_by_hand(model.lm_head(hidden_states), model.lm_head(edited), MAX_KL)
    assert merged.argmax(-1).tolist() == sequences[:, -8:].tolist()


SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


VISION = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}


def soft_capped():
    config = Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0)
    return Gemma2ForCausalLM(config), 1.5


def scaled_up():
    return CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)), 1.8


def scaled_down():
    return GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=3.0)), 1.5


def biased():
    return PhiForCausalLM(PhiConfig(**SMALL)), 1.0


def biased_too():
    tokens = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    return GPTJForCausalLM(
        GPTJConfig(vocab_size=64, n_positions=64, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, **tokens)
    ), 1.0


def encoder_decoder():
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, eos_token_id=None)), 0.6


def image_text():
    vision = {"model_type": "clip_vision_model", "num_hidden_layers": 2, "projection_dim": 16, **VISION}
    config = LlavaConfig(vision_config=vision, text_config={"model_type": "llama", **SMALL}, image_token_id=63)
    return LlavaForConditionalGeneration(config), 1.0


def language_model_inside():
    """Blip2: its generate() is that of the language model inside, which owns the LM head."""
    qformer = {"vocab_size": 16, "encoder_hidden_size": 16, "max_position_embeddings": 16, "num_hidden_layers": 1}
    text = {"model_type": "opt", "ffn_dim": 16, "word_embed_proj_dim": 16, **SMALL}
    config = Blip2Config(
        vision_config={"num_hidden_layers": 1, **VISION},
        qformer_config=qformer | {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16},
        text_config={name: value for name, value in text.items() if name != "intermediate_size"},
        num_query_tokens=2,
        image_token_index=63,
    )
    return Blip2ForConditionalGeneration(config), 3.0


def made(architecture):
    torch.manual_seed(0)
    model, step_size = architecture()
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.normal_()  # logits far from uniform, and a bias that is not 0
    return model.eval(), step_size


def inputs_of(model):
    inputs = prompts()
    inputs["input_ids"].clamp_(max=62)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(-1)
        inputs["decoder_input_ids"][:, 0] = model.config.decoder_start_token_id
    if hasattr(model.config, "vision_config"):
        image = torch.full((3, 2 if model.config.model_type == "blip-2" else 4), 63)
        inputs = {"input_ids": torch.cat([image, inputs["input_ids"]], dim=-1)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["pixel_values"] = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return inputs


class OfTheEdited(torch.nn.Module):
    """In place of the LM head: its output for h + u."""

    def __init__(self, lm_head, steer):
        super().__init__()
        self.lm_head, self.steer = lm_head, steer

    def forward(self, hidden_states):
        return self.lm_head(self.steer(hidden_states))


@torch.no_grad()
def two_forwards(model, steer, inputs):
    """The logits of a plain forward, and of one whose LM head sees h + u."""
    base, lm_head = model(**inputs).logits, model.get_output_embeddings()
    parent, _, name = next(name for name, module in model.named_modules() if module is lm_head).rpartition(".")
    setattr(model.get_submodule(parent), name, OfTheEdited(lm_head, steer))
    try:
        return base, model(**inputs).logits
    finally:
        setattr(model.get_submodule(parent), name, lm_head)


ARCHITECTURES = [
    soft_capped,
    scaled_up,
    scaled_down,
    biased,
    biased_too,
    encoder_decoder,
    image_text,
    language_model_inside,
]


@pytest.mark.versions
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda make: make.__name__)
def test_the_kl_is_that_of_the_logits_the_model_returns(head, architecture):
    model, step_size = made(architecture)
    inputs = inputs_of(model)
    base, edited = two_forwards(model, Controller(head, ControlConfig(step_size, 3)), inputs)
    expected, _ = merged_by_hand(base, edited, 0.05)
    controller = Controller(head, ControlConfig(step_size, 3, max_kl=0.05))
    actual = forward_steered(model, controller, **inputs).logits
    assert actual.shape == base.shape
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-3)
    assert_binds_at_some(kl_by_hand(actual, base), 0.05)


@pytest.mark.versions
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda make: make.__name__)
def test_generate_begins_with_the_bounded_logits_of_a_forward(head, architecture):
    model, step_size = made(architecture)
    inputs = inputs_of(model)
    control = {"recontrol_step_size": step_size, "recontrol_num_steps": 3, "recontrol_max_kl": 0.01}
    steered = forward_steered(model, Controller(head, ControlConfig(step_size, 3, max_kl=0.01)), **inputs).logits
    base = model(**inputs).logits[:, -1]
    outputs = enable_recontrol(model).generate(**inputs, **GREEDY, recontrol_value_head=head, **control)
    torch.testing.assert_close(outputs.logits[0], steered[:, -1].detach(), rtol=0, atol=1e-3)
    assert (kl_by_hand(outputs.logits[0], base) > 0.0099).any()
    assert len(outputs.logits) == 8


@pytest.mark.versions
@pytest.mark.parametrize(
    ("control", "rows"),
    [
        (None, 3),
        ({}, 3),
        ({"max_kl": 0.05}, 6),
        ({"max_kl": float("inf")}, 3),
        ({"max_kl": 0.05, "num_steps": 0}, 3),
        ({"max_kl": 0.05, "step_size": 0.0}, 3),
    ],
    ids=str,
)
def test_rows_are_doubled_only_where_a_bound_can_bind(model, head, control, rows):
    seen, forward = [], model.lm_head.forward
    model.lm_head.forward = lambda hidden_states: seen.append(hidden_states.shape[0]) or forward(hidden_states)
    keywords = {} if control is None else {"recontrol_value_head": head, **STEER}
    keywords |= {f"recontrol_{name}": value for name, value in (control or {}).items()}
    outputs = model.generate(**prompts(), **GREEDY, **keywords)
    assert seen == [rows] * 8
    assert outputs.logits[0].shape == (3, 64)


def overflowing(model, controller):
    """A float16 model of which only row 2's token 63 overflows, and only after the edit; the constant u, and inputs.

    Its LM head's weight for that token is −60000 v, with v solving h·v = 0.1, 0.1, 0.9 and u·v = 0.5: of edited
    logits one is −84000, beyond float16, of the others none is beyond −54000.
    """
    model.half()
    with torch.no_grad():
        h = model.model(**prompts()).last_hidden_state[:, -1].float()
        u = controller.control(torch.zeros(16))
        v = torch.linalg.lstsq(torch.cat([h, u[None]]), torch.tensor([0.1, 0.1, 0.9, 0.5])).solution
        model.lm_head.weight[63] = (-60000 * v).half()


@pytest.mark.versions
def test_a_row_that_overflows_only_in_its_logits_stays_base_and_is_told(model):
    head = tiny_head(num_hidden_layers=0)  # so that u is one constant vector
    overflowing(model, Controller(head, STEERING))
    base, edited = two_forwards(model, Controller(head, STEERING), prompts())
    base, edited = base[:, -1].float(), edited[:, -1].float()
    assert base.isfinite().all()
    assert edited.isfinite().all(-1).tolist() == [True, True, False]
    expected, _ = merged_by_hand(base[:2], edited[:2], MAX_KL)
    mode = GREEDY | {"max_new_tokens": 1}
    steer = {"recontrol_value_head": head, "recontrol_max_kl": MAX_KL, **STEER}
    with pytest.warns(UserWarning, match="^1 hidden states .* left unedited"):
        (logits,) = model.generate(**prompts(), **mode, **steer).logits
    torch.testing.assert_close(logits[2], base[2], rtol=0, atol=0.02)
    torch.testing.assert_close(logits[:2, :63].double(), expected[:, :63], rtol=0, atol=0.02)
    assert (kl_by_hand(logits[:2], base[:2]) > 0.01).all()  # rows 0 and 1 are steered
    with pytest.warns(UserWarning, match="^1 hidden states .* left unedited"):
        trace = model.generate(**prompts(), **mode, **steer, recontrol_trace=True).recontrol_trace
    assert trace.sound[:, 0].tolist() == [True, True, False]
    assert trace.kl[2, 0] == 0


@pytest.mark.versions
def test_a_row_that_overflows_at_the_lm_head_is_counted_once(model, head):
    model.half()
    steer = {"recontrol_value_head": head, "recontrol_step_size": 1e9, "recontrol_max_kl": MAX_KL}
    with pytest.warns(UserWarning, match="^24 hidden states .* left unedited"):  # 3 rows of 8 tokens
        actual = model.generate(**prompts(), **GREEDY, **steer)
    expected = model.generate(**prompts(), **GREEDY)
    assert actual.sequences.tolist() == expected.sequences.tolist()


@pytest.mark.versions
@pytest.mark.parametrize(
    ("extra", "bound"),
    [
        ({}, 0.4),
        ({"recontrol_max_kl": 0.05}, 0.05),
        ({"recontrol_max_kl": 1.0}, 1.0),
        ({"recontrol_max_kl": float("inf")}, float("inf")),
    ],
    ids=str,
)
def test_a_strength_brings_a_bound_of_four_times_itself_unless_one_is_given(model, head, extra, bound):
    head.config.control.num_steps = 3
    head.config.control.calibration = [[0.02, 2.0], [0.4, 8.0]]  # so steep that 0.4 binds at some tokens
    step_size = Controller(head, ControlConfig(strength=0.1)).step_size
    actual = model.generate(**prompts(), **GREEDY, recontrol_value_head=head, recontrol_strength=0.1, **extra)
    expected = merging_twin(model, Controller(head, ControlConfig(step_size, 3)), bound).generate(**prompts(), **GREEDY)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-3)
    kl = measured_kl(model, prompts(), actual)
    assert (kl <= bound + 1e-4).all()
    assert (kl >= 0.99 * min(bound, 0.45)).any()  # at it, or beyond the belt


@pytest.mark.versions
def test_a_step_size_brings_no_bound(model, head):
    steer = {"recontrol_value_head": head, "recontrol_step_size": 20.0, "recontrol_num_steps": 3}
    outputs = model.generate(**prompts(), **GREEDY, **steer)
    assert (measured_kl(model, prompts(), outputs) > 1).any()


@pytest.mark.versions
def test_a_step_size_far_too_large_is_held_back(model, head):
    steer = {"recontrol_value_head": head, "recontrol_step_size": 1e9, "recontrol_max_kl": MAX_KL}
    outputs = model.generate(**prompts(), **GREEDY, **steer)
    assert (measured_kl(model, prompts(), outputs) <= MAX_KL + 1e-4).all()


@pytest.mark.versions
@pytest.mark.parametrize("off", [{"recontrol_num_steps": 0}, {"recontrol_step_size": 0.0}], ids=str)
def test_a_trace_of_no_control_is_the_stock_model_bit_for_bit(model, head, off):
    expected = model.generate(**prompts(), **GREEDY)
    actual = model.generate(**prompts(), **GREEDY, recontrol_value_head=head, recontrol_trace=True, **off)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=0)
    assert (actual.recontrol_trace.kl == 0).all()


@pytest.mark.parametrize("keywords", [{"return_dict": False}, {"labels": prompts()["input_ids"]}], ids=str)
def test_a_forward_whose_loss_would_be_of_two_rows_is_refused(model, head, keywords):
    controller = Controller(head, ControlConfig(2.0, 3, max_kl=0.05))
    with pytest.raises(ValueError, match="Compute the loss from the logits"):
        forward_steered(model, controller, **prompts(), **keywords)
    assert forward_steered(model, None, **prompts(), labels=prompts()["input_ids"]).loss.isfinite()


def test_a_trace_of_text_that_a_model_inside_generates_is_refused_not_empty(head):
    model = enable_recontrol(made(language_model_inside)[0])
    trace = {"recontrol_trace": True, "return_dict_in_generate": True}
    with pytest.raises(SteeringNotApplied, match="generated by a model inside this one"):
        model.generate(**inputs_of(model), max_new_tokens=3, recontrol_value_head=head, **trace)
