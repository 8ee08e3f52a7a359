"""generate() with a head: every decoding mode against a decode loop written out here, and every refusal."""

import copy
import pickle
import threading
import warnings

import pytest
import torch
from tiny import prompts, tiny_head, tiny_model, tiny_tokenizer
from transformers import GenerationMixin, LlamaForCausalLM, TextIteratorStreamer, pipeline
from transformers.utils import logging

from hf_recontrol import (
    ControlConfig,
    Controller,
    HeadMismatch,
    RecontrolGenerationMixin,
    disable_recontrol,
    enable_recontrol,
)
from hf_recontrol.forwards import forward_steered, generate_with_hidden_states

pytestmark = pytest.mark.versions
GREEDY = {"do_sample": False, "max_new_tokens": 8}
STEER = {"recontrol_step_size": 2.0, "recontrol_num_steps": 3}
STEERING = ControlConfig(2.0, 3)


@pytest.fixture
def model():
    return enable_recontrol(tiny_model())


@pytest.fixture
def head():
    return tiny_head()


def decode_by_hand(model, controller, input_ids, attention_mask, steps):
    """Greedy decoding with no cache and no hook: lm_head(h + u) from the model's own last hidden states."""
    for _ in range(steps):
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        inner = model.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False)
        logits = model.lm_head(controller(inner.last_hidden_state[:, -1]))
        input_ids = torch.cat([input_ids, logits.argmax(-1, keepdim=True)], dim=-1)
        attention_mask = torch.cat([attention_mask, torch.ones_like(attention_mask[:, :1])], dim=-1)
    return input_ids


def left_padded(by=3):
    inputs = prompts()
    inputs["input_ids"][1, :by], inputs["attention_mask"][1, :by] = 0, 0
    return inputs


@pytest.mark.parametrize(
    "inputs", [prompts(rows=1), prompts(), left_padded()], ids=["batch 1", "batch 3", "left padding"]
)
@pytest.mark.parametrize(
    "mode", [{}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}], ids=str
)
def test_greedy_decoding_is_lm_head_of_h_plus_u(model, head, inputs, mode):
    expected = decode_by_hand(model, Controller(head, STEERING), steps=8, **inputs)
    actual = model.generate(**inputs, **GREEDY, **mode, recontrol_value_head=head, **STEER)
    assert actual.tolist() == expected.tolist()
    assert actual.tolist() != model.generate(**inputs, **GREEDY).tolist()  # else nothing was shown


def test_a_batch_gives_what_its_rows_give_alone(model, head):
    inputs = left_padded()
    together = model.generate(**inputs, **GREEDY, recontrol_value_head=head, **STEER)
    for row, (ids, mask) in enumerate(zip(*inputs.values(), strict=True)):
        alone = model.generate(ids[mask.bool()][None], **GREEDY, recontrol_value_head=head, **STEER)
        assert together[row, -8:].tolist() == alone[0, -8:].tolist()


def test_left_padding_changes_nothing(model, head):
    inputs = prompts()
    padded = {name: torch.nn.functional.pad(tensor, (4, 0)) for name, tensor in inputs.items()}
    one = model.generate(**inputs, **GREEDY, recontrol_value_head=head, **STEER)
    other = model.generate(**padded, **GREEDY, recontrol_value_head=head, **STEER)
    assert one[:, -8:].tolist() == other[:, -8:].tolist()


def test_a_linear_head_is_a_bias_on_the_logits_in_every_mode(model):
    """u is one constant vector, so the steered model is a stock one with the bias W·u: an oracle with no hook."""
    head = tiny_head(num_hidden_layers=0)
    oracle = biased_model(model, Controller(head, STEERING).control(torch.zeros(16)))
    for mode in (
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 0.8, "num_return_sequences": 3},
        {"do_sample": True, "num_beams": 2},
        {"repetition_penalty": 1.5},
        {"inputs_embeds": model.get_input_embeddings()(prompts()["input_ids"]).detach()},
        {"prefill_chunk_size": 2},
    ):
        torch.manual_seed(5)
        expected = oracle.generate(**prompts(), **(GREEDY | mode))
        torch.manual_seed(5)
        actual = model.generate(**prompts(), **(GREEDY | mode), recontrol_value_head=head, **STEER)
        assert actual.tolist() == expected.tolist(), mode


def biased_model(model, u):
    oracle = copy.deepcopy(disable_recontrol(copy.deepcopy(model)))
    oracle.lm_head = torch.nn.Linear(16, oracle.config.vocab_size)
    oracle.lm_head.weight.data, oracle.lm_head.bias.data = model.lm_head.weight.data, model.lm_head.weight.data @ u
    return oracle


@pytest.mark.parametrize("draft", ["prompt lookup", "assistant"])
def test_assisted_decoding_gives_the_steered_models_own_tokens(model, head, draft):
    inputs = prompts(rows=1, length=12)
    inputs["input_ids"][0, 6:] = inputs["input_ids"][0, :6]  # something to look up
    expected = model.generate(**inputs, **GREEDY, recontrol_value_head=head, **STEER)
    for assistant in [None] if draft == "prompt lookup" else [tiny_model(1), enable_recontrol(tiny_model(1)), model]:
        extra = {"prompt_lookup_num_tokens": 3} if assistant is None else {"assistant_model": assistant}
        actual = model.generate(**inputs, **GREEDY, **extra, recontrol_value_head=head, **STEER)
        assert actual.tolist() == expected.tolist()


def test_a_streamer_sees_the_steered_tokens(model, head):
    tokenizer, inputs = tiny_tokenizer(), prompts(rows=1)
    expected = model.generate(**inputs, **GREEDY, recontrol_value_head=head, **STEER)
    streamer = TextIteratorStreamer(tokenizer, timeout=60)
    thread = threading.Thread(
        target=model.generate, kwargs={**inputs, **GREEDY, "streamer": streamer, "recontrol_value_head": head, **STEER}
    )
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(expected[0])


def test_a_pipeline_passes_the_keywords_on(model, head):
    tokenizer = tiny_tokenizer()
    text = pipeline("text-generation", model=model, tokenizer=tokenizer)
    inputs = tokenizer("w5 w6 w7", return_tensors="pt")
    for steer in ({}, {"recontrol_value_head": head, **STEER}):
        expected = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **GREEDY, **steer)
        (answer,) = text("w5 w6 w7", **GREEDY, **steer)
        assert answer["generated_text"] == "w5 w6 w7" + tokenizer.decode(expected[0, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize("off", ["no keyword", "None", "False", "zero steps", "zero step size"])
@pytest.mark.parametrize(
    "mode", [GREEDY, {**GREEDY, "do_sample": True}, {**GREEDY, "num_beams": 2}], ids=["greedy", "sample", "beam"]
)
def test_without_control_every_logit_is_the_stock_models_bit_for_bit(head, off, mode):
    keywords = {
        "no keyword": {},
        "None": {"recontrol_value_head": None},
        "False": {"recontrol_value_head": False, "recontrol_step_size": 3.0},
        "zero steps": {"recontrol_value_head": head, "recontrol_num_steps": 0},
        "zero step size": {"recontrol_value_head": head, "recontrol_step_size": 0.0},
    }[off]
    outputs = []
    for model, extra in ((tiny_model(), {}), (enable_recontrol(tiny_model()), keywords)):
        torch.manual_seed(1)
        outputs.append(model.generate(**prompts(), **mode, **extra, return_dict_in_generate=True, output_logits=True))
    torch.testing.assert_close(outputs[1].sequences, outputs[0].sequences, rtol=0, atol=0)
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits, rtol=0, atol=0)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_grad_mode_does_not_matter_and_is_left_alone(model, head, context):
    expected = model.generate(**prompts(), **GREEDY, recontrol_value_head=head, **STEER)
    with context():
        mode = torch.is_grad_enabled()
        assert model.generate(**prompts(), **GREEDY, recontrol_value_head=head, **STEER).tolist() == expected.tolist()
        assert torch.is_grad_enabled() == mode


def test_a_bfloat16_model_is_steered_by_a_float32_head(head):
    model = enable_recontrol(tiny_model().bfloat16())
    expected = decode_by_hand(model, Controller(head, STEERING), steps=1, **prompts())
    assert (
        model.generate(**prompts(), **(GREEDY | {"max_new_tokens": 1}), recontrol_value_head=head, **STEER).tolist()
        == expected.tolist()
    )


def test_rows_end_at_their_eos(head):
    inputs = prompts()
    endless = enable_recontrol(tiny_model()).generate(**inputs, **GREEDY, recontrol_value_head=head, **STEER)
    eos = int(endless[0, 7])  # the third new token of row 0
    actual = enable_recontrol(tiny_model()).generate(
        **inputs, **GREEDY, eos_token_id=eos, recontrol_value_head=head, **STEER
    )
    assert actual[0, 5:8].tolist() == endless[0, 5:8].tolist()
    assert set(actual[0, 8:].tolist()) <= {0}


def test_a_folder_and_an_object_steer_alike(model, head, tmp_path):
    head.save_pretrained(tmp_path / "head")
    expected = model.generate(**prompts(), **GREEDY, recontrol_value_head=head, **STEER)
    for folder in (tmp_path / "head", str(tmp_path / "head")):
        assert model.generate(**prompts(), **GREEDY, recontrol_value_head=folder, **STEER).tolist() == expected.tolist()


def test_a_folder_that_was_written_anew_is_read_anew(model, tmp_path):
    for seed in (0, 1):
        head = tiny_head(seed)
        head.save_pretrained(tmp_path)
        expected = model.generate(**prompts(), **GREEDY, recontrol_value_head=head, **STEER)
        assert (
            model.generate(**prompts(), **GREEDY, recontrol_value_head=tmp_path, **STEER).tolist() == expected.tolist()
        )


def test_the_hidden_states_recorded_are_those_that_predict_each_token(model):
    inputs = left_padded()
    sequences, hidden_states = generate_with_hidden_states(model, **inputs, **GREEDY)
    assert hidden_states.shape == (3, 8, 16)
    torch.testing.assert_close(sequences, model.generate(**inputs, **GREEDY), rtol=0, atol=0)
    assert model.lm_head(hidden_states).argmax(-1).tolist() == sequences[:, -8:].tolist()
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 8), value=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    again = model.model(input_ids=sequences, attention_mask=mask, position_ids=positions).last_hidden_state[:, 4:-1]
    torch.testing.assert_close(hidden_states, again)


def test_recording_while_steering_gives_the_states_before_the_edit(model, head):
    steer = {"recontrol_value_head": head, **STEER}
    sequences, hidden_states = generate_with_hidden_states(model, **prompts(), **GREEDY, **steer)
    assert model.lm_head(Controller(head, STEERING)(hidden_states)).argmax(-1).tolist() == sequences[:, -8:].tolist()


def test_recording_leaves_a_stock_model_stock():
    model = tiny_model()
    sequences, _ = generate_with_hidden_states(model, **prompts(), **GREEDY)
    assert type(model) is LlamaForCausalLM
    assert sequences.tolist() == model.generate(**prompts(), **GREEDY).tolist()
    assert not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("mode", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}, {"prefill_chunk_size": 2}])
def test_hidden_states_of_a_mode_with_other_forwards_are_refused(model, mode):
    with pytest.raises(ValueError, match="recorded in greedy decoding and sampling"):
        generate_with_hidden_states(model, **prompts(rows=1), **GREEDY, **mode)


def test_a_steered_forward_edits_every_position(model, head):
    steer, inputs = Controller(head, STEERING), prompts()
    expected = model.lm_head(steer(model.model(**inputs).last_hidden_state))
    torch.testing.assert_close(forward_steered(model, steer, **inputs).logits, expected)
    torch.testing.assert_close(forward_steered(model, None, **inputs).logits, model(**inputs).logits, rtol=0, atol=0)


def test_measuring_through_a_wrapper_leaves_the_model_enabled(model, head):
    model.set_recontrol_defaults(head, step_size=2.0, num_steps=3)
    expected = model.generate(**prompts(), **GREEDY)
    forward_steered(torch.compile(model, backend="eager"), Controller(head, STEERING), **prompts())
    assert model.generate(**prompts(), **GREEDY).tolist() == expected.tolist()
    assert isinstance(model, RecontrolGenerationMixin)


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_a_peft_model_is_enabled_by_the_model_inside(head):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"]))
    expected = decode_by_hand(wrapped.get_base_model(), Controller(head, STEERING), steps=8, **prompts())
    assert enable_recontrol(wrapped) is wrapped
    steered = wrapped.generate(**prompts(), **GREEDY, recontrol_value_head=head, **STEER)
    assert steered.tolist() == expected.tolist()


def test_enabling_keeps_what_others_rely_on(model, head, tmp_path):
    expected = model.generate(**prompts(), **GREEDY, recontrol_value_head=head, **STEER)
    assert isinstance(model, LlamaForCausalLM)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.can_generate()
    model.save_pretrained(tmp_path)
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert set(model.state_dict()) == set(tiny_model().state_dict())
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        enable_recontrol(LlamaForCausalLM.from_pretrained(tmp_path)),
    ):
        assert type(twin) is type(model)
        twin.generation_config = model.generation_config
        assert twin.generate(**prompts(), **GREEDY, recontrol_value_head=head, **STEER).tolist() == expected.tolist()


def test_disabling_gives_the_stock_model_back():
    model = tiny_model()
    assert disable_recontrol(enable_recontrol(enable_recontrol(model))) is model
    assert type(model) is LlamaForCausalLM
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match="recontrol_value_head"):  # stock generate() refuses what it does not know
        model.generate(**prompts(), **GREEDY, recontrol_value_head=tiny_head())


def test_a_class_can_take_the_mixin(head):
    class Steerable(RecontrolGenerationMixin, LlamaForCausalLM):
        pass

    model = Steerable(tiny_model().config).eval()
    model.load_state_dict(tiny_model().state_dict())
    expected = enable_recontrol(tiny_model()).generate(**prompts(), **GREEDY, recontrol_value_head=head, **STEER)
    assert model.generate(**prompts(), **GREEDY, recontrol_value_head=head, **STEER).tolist() == expected.tolist()


def test_every_model_of_the_process_can_be_enabled_and_disabled(head):
    stock = GenerationMixin.generate
    expected = enable_recontrol(tiny_model()).generate(**prompts(), **GREEDY, recontrol_value_head=head, **STEER)
    enable_recontrol()
    try:
        enable_recontrol()
        for model in (tiny_model(), enable_recontrol(tiny_model())):
            assert (
                model.generate(**prompts(), **GREEDY, recontrol_value_head=head, **STEER).tolist() == expected.tolist()
            )
    finally:
        disable_recontrol()
    assert GenerationMixin.generate is stock


def test_a_resized_lm_head_is_steered_too(model, head):
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    model.resize_token_embeddings(70)
    logging.set_verbosity(level)
    expected = decode_by_hand(model, Controller(head, STEERING), steps=8, **prompts())
    assert model.generate(**prompts(), **GREEDY, recontrol_value_head=head, **STEER).tolist() == expected.tolist()


def test_a_misspelt_keyword_is_refused_with_the_nearest_named(model):
    with pytest.raises(ValueError, match=r"'recontrol_stepsize'; the nearest is 'recontrol_step_size'"):
        model.generate(**prompts(), recontrol_stepsize=1.0)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"recontrol_step_size": 1.0}, "no recontrol_value_head"),
        ({"recontrol_value_head": tiny_head(), "recontrol_step_size": -1}, "step_size is -1"),
        ({"recontrol_value_head": tiny_head(), "recontrol_num_steps": 2.5}, "num_steps is 2.5"),
        ({"recontrol_value_head": tiny_head(), "recontrol_strict": "yes"}, "recontrol_strict is 'yes'"),
        ({"recontrol_value_head": tiny_head(), "recontrol_revision": "main"}, "a head itself was given"),
    ],
)
def test_keywords_that_cannot_be_meant_are_refused_before_the_first_token(model, keywords, words):
    with pytest.raises(ValueError, match=words):
        model.generate(**prompts(), streamer=NoToken(), **keywords)


class NoToken:
    def put(self, value):
        raise AssertionError("generate() began")

    end = put


@pytest.mark.parametrize("head", [3, True, {"a"}])
def test_what_is_no_head_is_refused(model, head):
    with pytest.raises(TypeError, match=f"recontrol_value_head is of type {type(head).__name__}"):
        model.generate(**prompts(), streamer=NoToken(), recontrol_value_head=head)


def test_a_head_of_another_width_is_refused_before_the_first_token(model):
    with pytest.raises(HeadMismatch, match=r"8 wide .*'LlamaForCausalLM' are 16 wide"):
        model.generate(**prompts(), streamer=NoToken(), recontrol_value_head=tiny_head(hidden_size=8))


def test_a_head_of_another_model_warns_once_and_is_an_error_when_strict(model):
    head = tiny_head(base_model_name_or_path="user/other", base_model_type="llama")
    model.config._name_or_path = "user/this"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            model.generate(**prompts(), **GREEDY, recontrol_value_head=head)
    assert ["user/other" in str(w.message) and "user/this" in str(w.message) for w in caught] == [True]
    with pytest.raises(HeadMismatch, match=r"user/other.*user/this"):
        model.generate(**prompts(), streamer=NoToken(), recontrol_value_head=head, recontrol_strict=True)
    model.config._name_or_path = "user/other"
    model.generate(**prompts(), **GREEDY, recontrol_value_head=head, recontrol_strict=True)


def test_strict_does_not_take_a_folders_name_for_the_model(model, tmp_path):
    (tmp_path / "checkpoint-500").mkdir()
    model.config._name_or_path = str(tmp_path / "checkpoint-500")
    head = tiny_head(base_model_name_or_path="./checkpoint-500", base_model_type="llama")
    model.generate(**prompts(), **GREEDY, recontrol_value_head=head)
    with pytest.raises(HeadMismatch, match="a folder's name says little"):
        model.generate(**prompts(), streamer=NoToken(), recontrol_value_head=head, recontrol_strict=True)


@pytest.mark.parametrize("where", ["call", "positional", "model"])
def test_a_config_cannot_choose_a_head(model, where):
    config = copy.deepcopy(model.generation_config)
    config.recontrol_value_head = "stranger/head"
    if where == "model":
        model.generation_config = config
    keywords = {"generation_config": config} if where == "call" else {}
    arguments = [None, config] if where == "positional" else []
    with pytest.raises(ValueError, match="not registered in this process"):
        model.generate(*arguments, **prompts(), streamer=NoToken(), **keywords)
    model.generate(*arguments, **prompts(), **GREEDY, **keywords, recontrol_value_head=False)


def test_a_config_of_an_assistant_does_not_turn_a_head_off(model, head):
    config = copy.deepcopy(model.generation_config)
    config.is_assistant, config.num_assistant_tokens_schedule, config.assistant_confidence_threshold = (
        True,
        "constant",
        0,
    )
    plain = model.generate(**prompts(), **GREEDY, generation_config=config)
    steered = model.generate(**prompts(), **GREEDY, generation_config=config, recontrol_value_head=head, **STEER)
    assert steered.tolist() == model.generate(**prompts(), **GREEDY, recontrol_value_head=head, **STEER).tolist()
    assert steered.tolist() != plain.tolist()


def test_rows_left_unedited_are_told(model, head):
    with pytest.warns(UserWarning, match="hidden states were not finite"):
        model.half().generate(**prompts(), **GREEDY, recontrol_value_head=head, recontrol_step_size=1e9)
