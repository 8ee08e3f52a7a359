"""Every mode of generate() gives the tokens and logits of a model that has no hook of ours; what heads say, by hand."""

import contextlib
import copy
import functools
import threading

import pytest
import torch
from test_control_head import ascended, by_hand
from test_generation import NoToken, left_padded
from test_kl_bound import merged_by_hand
from test_max_kl import repeating
from tiny import prompts, tiny_control_head, tiny_head, tiny_model, tiny_tokenizer
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CompileConfig,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TextIteratorStreamer,
)
from transformers.modeling_layers import MtpModel

from hf_recontrol import disable_recontrol, enable_recontrol
from hf_recontrol.calls import live_call
from hf_recontrol.forwards import generate_with_hidden_states

pytestmark = pytest.mark.versions
GREEDY = {"do_sample": False, "max_new_tokens": 6}
LOGITS = {"return_dict_in_generate": True, "output_logits": True}
SAMPLE = {"do_sample": True, "temperature": 0.7, "top_k": 20}
STATIC = {"cache_implementation": "static", "disable_compile": True}
MAX_KL = 0.05


def moved_by_value(head, h):
    """h + u by autograd, α = 2 and n = 3."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        states = h.clone().float()
        u = ascended(torch.zeros_like(states), head, states, 2.0, 3).detach()
    return (h.float() + u).to(h.dtype)


def moved_by_control(head, h):
    """h + 0.5 f(h) from the formula of f."""
    with torch.autocast("cpu", enabled=False):
        return (h.float() + 0.5 * by_hand("one hidden layer", head, h.float())).to(h.dtype)


@pytest.fixture(params=["value head", pytest.param("control head", marks=pytest.mark.slow)])
def steered(request):
    """Keywords of generate(), and the function from h to h + u that they stand for."""
    if request.param == "value head":
        head = tiny_head()
        control = {"recontrol_step_size": 2.0, "recontrol_num_steps": 3}
        return {"recontrol_value_head": head, **control}, functools.partial(moved_by_value, head)
    head = tiny_control_head()
    return {"recontrol_value_head": head, "recontrol_scale": 0.5}, functools.partial(moved_by_control, head)


@pytest.fixture
def model():
    return enable_recontrol(tiny_model())


class Moving(torch.nn.Module):
    """In place of the LM head: its output for h + u, behind that for h where `both`."""

    def __init__(self, lm_head, move, both):
        super().__init__()
        self.lm_head, self.move, self.both = lm_head, move, both

    @property
    def weight(self):
        return self.lm_head.weight

    def forward(self, h):
        logits = self.lm_head(self.move(h))
        return torch.cat([self.lm_head(h), logits]) if self.both else logits


def twin_of(model, move, max_kl=None):
    """A stock copy of the model that steers by itself: an LM head that is another module, and a forward that merges."""
    twin = disable_recontrol(copy.deepcopy(model))
    hooks = [h for m in twin.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    assert not any(hook.__module__.startswith("hf_recontrol") for hook in hooks)
    twin.set_output_embeddings(Moving(twin.get_output_embeddings(), move, both=max_kl is not None))
    if max_kl is not None:
        forward = twin.forward

        @functools.wraps(forward)
        def merging(*args, **kwargs):
            outputs = forward(*args, **kwargs)
            outputs.logits = merged_by_hand(*outputs.logits.chunk(2), max_kl)[0].float()
            return outputs

        twin.forward = merging
    return twin


def assert_like_the_twin(model, steered, mode, twins_mode=None, max_kl=None):
    """The same tokens and logits, which are not the plain ones; `twins_mode` where the twin is asked in other words."""
    keywords, move = steered
    bound = {} if max_kl is None else {"recontrol_max_kl": max_kl}
    asked = {**GREEDY, **LOGITS, **mode}
    torch.manual_seed(3)
    expected = twin_of(model, move, max_kl).generate(
        **{**GREEDY, **LOGITS, **(mode if twins_mode is None else twins_mode)}
    )
    torch.manual_seed(3)
    actual = model.generate(**asked, **keywords, **bound)
    assert live_call() is None
    assert actual.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-3)
    torch.manual_seed(3)
    plain = model.generate(**asked)
    assert (actual.logits[0] - plain.logits[0]).abs().max() > 0.01  # else nothing was shown


@torch.no_grad()
def decoded_by_hand(model, move, input_ids, attention_mask, temperature=None):
    """A loop with no cache and no generate(): ids and logits."""
    logits = []
    for _ in range(GREEDY["max_new_tokens"]):
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        inner = model.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False)
        logits.append(model.lm_head(move(inner.last_hidden_state[:, -1])))
        if temperature is None:
            chosen = logits[-1].argmax(-1, keepdim=True)
        else:
            chosen = torch.multinomial(torch.softmax(logits[-1] / temperature, dim=-1), num_samples=1)
        input_ids = torch.cat([input_ids, chosen], dim=-1)
        attention_mask = torch.cat([attention_mask, torch.ones_like(chosen)], dim=-1)
    return input_ids, tuple(logits)


@pytest.mark.parametrize("inputs", [prompts(rows=1), left_padded()], ids=["one row", "left padding"])
@pytest.mark.parametrize("temperature", [None, 0.7], ids=["greedy", "sampling"])
def test_decoding_is_a_loop_of_lm_head_of_h_plus_u(model, steered, inputs, temperature):
    keywords, move = steered
    sampling = {} if temperature is None else {"do_sample": True, "temperature": temperature, "top_k": 0}
    torch.manual_seed(3)
    sequences, logits = decoded_by_hand(model, move, temperature=temperature, **inputs)
    for mode in ({}, {"use_cache": False}, STATIC):
        torch.manual_seed(3)
        actual = model.generate(**inputs, **GREEDY | LOGITS | sampling | mode, **keywords)
        assert actual.sequences.tolist() == sequences.tolist()
        torch.testing.assert_close(actual.logits, logits, rtol=0, atol=1e-3)
    torch.manual_seed(3)
    assert model.generate(**inputs, **GREEDY | sampling).tolist() != sequences.tolist()


@pytest.mark.parametrize("max_kl", [None, MAX_KL])
@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"use_cache": False},
        STATIC,
        {"prefill_chunk_size": 2},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"guidance_scale": 1.5},
        {"output_hidden_states": True, "output_attentions": True, "output_scores": True},
        SAMPLE,
        {**SAMPLE, "num_return_sequences": 3},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"num_beams": 2, **STATIC},
        {"num_beams": 2, **SAMPLE},
    ],
    ids=str,
)
def test_every_mode_decodes_as_a_model_that_steers_by_itself(model, steered, mode, max_kl):
    assert_like_the_twin(model, steered, {**left_padded(), **mode}, max_kl=max_kl)


@pytest.mark.parametrize("max_kl", [None, MAX_KL])
@pytest.mark.parametrize("mode", [{}, SAMPLE, {"num_beams": 2}], ids=str)
def test_prompts_given_as_embeddings_are_steered(model, steered, mode, max_kl):
    inputs = left_padded()
    embeddings = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach()}
    del inputs["input_ids"]
    assert_like_the_twin(model, steered, {**inputs, **embeddings, **mode}, max_kl=max_kl)


DRAFTS = {  # how each is asked of the model, and of its twin
    "prompt lookup": lambda model: [{"prompt_lookup_num_tokens": 3}] * 2,
    "stock draft": lambda model: [{"assistant_model": tiny_model(1)}] * 2,
    "enabled draft": lambda model: [
        {"assistant_model": draft} for draft in (enable_recontrol(tiny_model(1)), tiny_model(1))
    ],
    "itself": lambda model: [{"assistant_model": model}, {"assistant_model": tiny_model()}],
    "another tokenizer": lambda model: [of_another_tokenizer()] * 2,
}


@pytest.mark.parametrize(("mode", "max_kl"), [({}, None), (SAMPLE, MAX_KL)], ids=["greedy", "sampling with a bound"])
@pytest.mark.parametrize("draft", DRAFTS)
def test_drafts_are_plain_and_what_is_kept_of_them_is_the_steered_models(model, steered, draft, mode, max_kl):
    ours, twins = DRAFTS[draft](model)
    mode = {**repeating(), **mode}
    if draft == "another tokenizer":  # its first use takes random numbers, for a layer that is made for it
        tiny_model().generate(**mode | ours, max_new_tokens=2)
    assert_like_the_twin(model, steered, mode | ours, mode | twins, max_kl)


def of_another_tokenizer():
    """A draft of 47 words of the model's 64, and one that the model does not know."""
    tokenizer, smaller = tiny_tokenizer(), tiny_tokenizer()
    words = {word: i for word, i in tokenizer.get_vocab().items() if i < 47} | {"other": 47}
    smaller._tokenizer.model = type(smaller._tokenizer.model)(words, unk_token="w3")
    tokenizers = {"tokenizer": tokenizer, "assistant_tokenizer": smaller}
    return {"assistant_model": tiny_model(1, vocab_size=48), **tokenizers}


@pytest.mark.parametrize("max_kl", [None, MAX_KL])
def test_an_early_exit_of_the_model_as_its_own_draft(model, steered, max_kl):
    assert_like_the_twin(model, steered, {**repeating(), "assistant_early_exit": 1}, max_kl=max_kl)


def mixture_of_experts():
    """With one layer that predicts the token after the next."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 16, "head_dim": 8}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "num_mtp_layers": 1}
    experts = {"n_routed_experts": 2, "num_experts_per_tok": 1, "first_k_dense_replace": 1, "n_group": 1}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    model = Glm4MoeForCausalLM(Glm4MoeConfig(**sizes, **layers, **experts, **tokens, initializer_range=0.3))
    return model.eval()


@pytest.mark.parametrize("max_kl", [None, MAX_KL])
def test_drafts_by_layers_for_later_tokens_are_plain_too(monkeypatch, steered, max_kl):
    def random_layers(cls, main_model, **kwargs):  # transformers reads them from the model's own checkpoint
        before = copy.deepcopy(main_model.state_dict())
        torch.manual_seed(1)
        layers = cls(main_model, 1)
        main_model.load_state_dict(before)
        for parameter in layers.layers.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        layers.shared_head = getattr(main_model.lm_head, "lm_head", main_model.lm_head)  # of the twin, the one inside
        return layers.eval()

    monkeypatch.setattr(MtpModel, "from_pretrained", classmethod(random_layers))
    model = enable_recontrol(mixture_of_experts())
    for mode in ({}, SAMPLE):
        assert_like_the_twin(model, steered, {**repeating(), "use_mtp": True, **mode}, max_kl=max_kl)
    drafted, borrow = [], MtpModel._project_to_logits

    def noted(self, h):
        drafted.append(torch.equal(borrow(self, h), torch.nn.functional.linear(h, self.shared_head.weight)))
        return borrow(self, h)

    with monkeypatch.context() as patch:
        patch.setattr(MtpModel, "_project_to_logits", noted)
        bound = {} if max_kl is None else {"recontrol_max_kl": max_kl}
        model.generate(**repeating(), **GREEDY, use_mtp=True, **steered[0], **bound)
    assert drafted
    assert all(drafted)


def t5():
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, eos_token_id=None))


def bart():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 1}
    model = BartForConditionalGeneration(BartConfig(vocab_size=64, **sizes, **tokens, forced_eos_token_id=None))
    model.final_logits_bias.normal_()  # comes after the LM head
    return model


OF_ENCODER_DECODERS = [
    {},
    {"use_cache": False},
    STATIC,
    SAMPLE,
    {**SAMPLE, "num_return_sequences": 2},
    {"num_beams": 3, "num_return_sequences": 2},
    {"num_beams": 2, **SAMPLE},
    {"prompt_lookup_num_tokens": 2},
    {"assistant_model": "another"},
]


@pytest.mark.parametrize(
    ("architecture", "mode", "max_kl"),
    [
        *((t5, mode, max_kl) for mode in OF_ENCODER_DECODERS for max_kl in (None, MAX_KL)),
        *((bart, mode, None) for mode in OF_ENCODER_DECODERS),
        (bart, {}, MAX_KL),
    ],
    ids=lambda part: getattr(part, "__name__", str(part)),
)
def test_an_encoder_decoder_decodes_as_one_that_steers_by_itself(steered, architecture, mode, max_kl):
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        made.append(architecture().eval())
        with torch.no_grad():
            made[-1].lm_head.weight.normal_(std=0.3)
    model, draft = made
    inputs = left_padded()
    if "prompt_lookup_num_tokens" in mode or "assistant_model" in mode:
        inputs, mode = repeating(), mode | ({"assistant_model": draft} if "assistant_model" in mode else {})
    assert_like_the_twin(enable_recontrol(model), steered, {**inputs, **mode}, max_kl=max_kl)


@pytest.mark.parametrize("steered", ["control head"], indirect=True)  # greedy decoding, by each, is tested elsewhere
def test_sampling_with_a_forward_compiled_as_one_graph_is_steered(steered):
    model = enable_recontrol(tiny_model(num_hidden_layers=1))
    compile_config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compile_config._compile_all_devices = True  # else a CPU is never compiled for
    static = {"cache_implementation": "static", "compile_config": compile_config}
    torch._dynamo.reset()
    mode = {**left_padded(), **SAMPLE}
    assert_like_the_twin(model, steered, mode | static, mode, MAX_KL)
    assert "_compiled_call" in vars(model)


@pytest.mark.parametrize("steered", ["value head"], indirect=True)
@pytest.mark.parametrize("turns", ["010", pytest.param("01210330", marks=pytest.mark.slow)])
def test_a_model_whose_forward_method_was_compiled_is_steered(steered, turns):
    model, keywords = enable_recontrol(tiny_model(num_hidden_layers=1)), steered[0]
    mode = {**left_padded(), **LOGITS, **STATIC, "do_sample": False, "max_new_tokens": 3}
    other = {"recontrol_value_head": tiny_control_head(), "recontrol_scale": 0.5}
    choices = [{}, keywords, other, keywords | {"recontrol_max_kl": MAX_KL}]
    expected = [model.generate(**mode, **choice) for choice in choices]
    assert not torch.equal(expected[0].logits[0], expected[1].logits[0])
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="eager")
    for choice in map(int, turns):
        actual = model.generate(**mode, **choices[choice])
        assert actual.sequences.tolist() == expected[choice].sequences.tolist()
        torch.testing.assert_close(actual.logits, expected[choice].logits, rtol=0, atol=1e-3)


@pytest.mark.parametrize("turns", ["steered, steered", "plain, steered", "steered, plain"])
def test_a_second_turn_goes_on_from_the_cache_of_the_first(model, steered, turns):
    keywords, move = steered
    stock = disable_recontrol(copy.deepcopy(model))
    choices = {"steered": (keywords, twin_of(model, move)), "plain": ({}, stock)}
    (first, _), (second, oracle) = (choices[turn] for turn in turns.split(", "))
    inputs = left_padded()
    begun = model.generate(**inputs, **GREEDY, **LOGITS, **first)
    ids = torch.cat([begun.sequences, prompts(length=4, seed=1)["input_ids"]], dim=-1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, ids.shape[1] - 5), value=1)
    again = {"input_ids": ids, "attention_mask": mask, **GREEDY, **LOGITS}
    expected = oracle.generate(**again)
    cache = "cache" if "cache" in begun else "past_key_values"  # its name before transformers 5.24
    actual = model.generate(**again, **{cache: begun[cache]}, **second)
    assert actual.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-3)


@pytest.mark.parametrize("mode", [{}, SAMPLE, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_a_thread_streams_what_the_twin_says(model, steered, mode):
    tokenizer, (keywords, move) = tiny_tokenizer(), steered
    mode = {**repeating(), **GREEDY, **mode}
    torch.manual_seed(3)
    expected = twin_of(model, move).generate(**mode)
    streamer = TextIteratorStreamer(tokenizer, timeout=60)
    torch.manual_seed(3)
    thread = threading.Thread(target=model.generate, kwargs={**mode, "streamer": streamer, **keywords})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(expected[0])


@pytest.mark.parametrize(
    ("context", "max_kl"),
    [
        ("inference_mode", None),
        ("inference_mode", MAX_KL),
        ("no_grad", None),
        ("enable_grad", MAX_KL),
        ("autocast", None),
    ],
)
def test_a_context_of_torch_changes_no_text_and_is_left_as_it_was(model, steered, context, max_kl):
    around = torch.autocast("cpu", torch.bfloat16) if context == "autocast" else getattr(torch, context)()
    head = steered[0]["recontrol_value_head"]
    for entered in (around, contextlib.nullcontext()):  # and nothing of the context stays behind
        with entered:
            before = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
            assert_like_the_twin(model, steered, left_padded(), max_kl=max_kl)
            after = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
            assert after == before
    assert not head.training
    assert all(tensor.requires_grad and tensor.grad is None for tensor in head.parameters())
    head(torch.randn(2, 16)).sum().backward()


def test_a_healed_prompt_is_gone_on_from_steered(model, steered):
    keywords, move = steered
    tokenizer = tiny_tokenizer()
    inputs = tokenizer(["w5 w9 w6", "w7 w8 w4"], return_tensors="pt")
    healing = {"token_healing": True, "tokenizer": tokenizer}
    actual = model.generate(inputs["input_ids"], **GREEDY, **healing, **keywords)
    healed = actual[:, : inputs["input_ids"].shape[1]]
    assert (healed[:, -1] != inputs["input_ids"][:, -1]).any()
    # transformers keeps the mask of before, in which <s> counts, and puts <pad> in its place
    mask = torch.ones_like(healed)
    assert actual.tolist() == twin_of(model, move).generate(healed, attention_mask=mask, **GREEDY).tolist()


def test_a_prompt_is_healed_by_the_plain_model_whatever_the_defaults_are(model):
    tokenizer = tiny_tokenizer()
    inputs = tokenizer(["w5 w9 w6", "w7 w8 w4"], return_tensors="pt")["input_ids"]
    healing = {**GREEDY, "token_healing": True, "tokenizer": tokenizer}
    expected = tiny_model().generate(inputs, **healing).tolist()
    model.set_recontrol_defaults(tiny_head(), step_size=1e3, num_steps=3)
    assert model.generate(inputs, **healing, recontrol_value_head=False).tolist() == expected
    steered = model.generate(inputs, **healing).tolist()
    assert [row[:4] for row in steered] == [row[:4] for row in expected]
    assert steered != expected
    stock = tiny_model()
    enable_recontrol()
    try:
        assert stock.generate(inputs, **healing).tolist() == expected
        assert stock.generate(inputs, **healing, recontrol_value_head=tiny_head(), recontrol_step_size=1e3,
                              recontrol_num_steps=3).tolist() == steered  # fmt: skip
    finally:
        disable_recontrol()


def test_a_mixture_with_the_plain_draft_is_refused(model):
    mode = {"assistant_model": tiny_model(1), "assistant_ensemble_weight": 0.7}
    with pytest.raises(ValueError, match=r"assistant_ensemble_weight is 0\.7.*plain draft"):
        model.generate(**prompts(rows=1), **GREEDY, **mode, recontrol_value_head=tiny_head())
    model.generate(**prompts(rows=1), **GREEDY, **mode)


def own_loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    """A decoding method as `custom_generate` takes them: greedy, with no cache."""
    for _ in range(GREEDY["max_new_tokens"]):
        logits = model(input_ids, use_cache=False).logits[:, -1]
        input_ids = torch.cat([input_ids, logits.argmax(-1, keepdim=True)], dim=-1)
    return input_ids


FOLDER = """
from transformers import GenerationMixin

def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    for _ in range(6):
        logits = model(input_ids, use_cache=False).logits[:, -1]
        input_ids = input_ids.new_tensor([[*row, int(i)] for row, i in zip(input_ids.tolist(), logits.argmax(-1))])
    return input_ids

def generate(model, **kwargs):
    return {call}custom_generate=loop, **kwargs)
"""


def test_a_decoding_method_of_ones_own_is_steered(model, steered):
    keywords, move = steered
    expected = twin_of(model, move).generate(**prompts(), **GREEDY).tolist()
    assert model.generate(**prompts(), **GREEDY, custom_generate=own_loop, **keywords).tolist() == expected
    assert model.generate(**prompts(), **GREEDY, custom_generate=own_loop).tolist() != expected


def written(folder, call):
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(FOLDER.format(call=call))
    return {"custom_generate": str(folder), "trust_remote_code": True}


@pytest.mark.parametrize("call", ["GenerationMixin.generate(model, ", "model.generate("])
def test_a_decoding_method_from_a_folder_is_steered_through_the_generate_that_it_calls(model, steered, tmp_path, call):
    keywords, move = steered
    custom = written(tmp_path, call)
    expected = twin_of(model, move).generate(**prompts(), **GREEDY).tolist()
    assert model.generate(**prompts(), **GREEDY, **custom, **keywords).tolist() == expected


def test_a_generate_inside_a_custom_one_says_what_it_is_steered_by(model, steered):
    keywords, move = steered
    plain, forwards = [], []

    def thrice(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        plain.append(model.generate(input_ids, **GREEDY, recontrol_value_head=False).tolist())
        model.model.register_forward_pre_hook(lambda *_: forwards.append(live_call() is not None))
        drafted = model.generate(input_ids, **GREEDY, assistant_early_exit=1)
        assert set(forwards) == {True, False}, "the drafts are plain, and only they"
        assert drafted.tolist() == model.generate(input_ids, **GREEDY).tolist()
        return drafted

    one = prompts(rows=1)
    stock, expected = (tokens.generate(**one, **GREEDY).tolist() for tokens in (model, twin_of(model, move)))
    assert model.generate(**one, **GREEDY, custom_generate=thrice, **keywords).tolist() == expected
    assert plain == [stock]


@pytest.mark.parametrize(
    "mode",
    [
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"num_beams": 2, "constraints": [object()]},
    ],
    ids=["contrastive", "dola", "group beam", "constrained beam"],
)
def test_modes_that_transformers_has_given_up_are_refused_with_a_head_too(model, steered, mode):
    asked = {**prompts(), "max_new_tokens": 4, "streamer": NoToken(), **mode}
    with pytest.raises(ValueError, match="requires `trust_remote_code=True`"):
        model.generate(**asked, **steered[0])


@pytest.mark.parametrize("name", ["assistant_model", "assistant_early_exit", "use_mtp"])
def test_a_trace_and_hidden_states_of_a_drafting_mode_are_refused_by_its_name(model, steered, name):
    mode = {name: {"assistant_model": tiny_model(1), "assistant_early_exit": 1, "use_mtp": True}[name]}
    asked = {**repeating(), **GREEDY, "return_dict_in_generate": True, "streamer": NoToken(), **mode, **steered[0]}
    with pytest.raises(ValueError, match=f"not for {name}="):
        model.generate(**asked, recontrol_trace=True)
    with pytest.raises(ValueError, match=f"not with {name}="):
        generate_with_hidden_states(model, **asked)
