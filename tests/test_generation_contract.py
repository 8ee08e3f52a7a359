"""What transformers' own suite asks of every generate(), asked of enabled classes with a head in every call.

Its GenerationTesterMixin makes models of a class by every road (its config, from_pretrained, a copy), and lets models
call each other's generate(). So a class, or the whole process, is made to steer each generate() that runs, nested ones
too. What comes out is compared with the stock class, or is a law between two calls.
"""

import copy
import dataclasses
import inspect

import pytest
import torch
from test_generation import left_padded
from test_max_kl import repeating
from tiny import prompts, tiny_head, tiny_model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CompileConfig,
    GenerationMixin,
    LlamaForCausalLM,
    LogitsProcessor,
    MistralConfig,
    MistralForCausalLM,
    StoppingCriteria,
    WhisperForConditionalGeneration,
)

from hf_recontrol import RecontrolGenerationMixin, disable_recontrol, enable_recontrol
from hf_recontrol.calls import live_call

pytestmark = pytest.mark.versions
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
STEPS = {"recontrol_step_size": 2.0, "recontrol_num_steps": 2}
WAYS = {
    "no head": {},
    "zero steps": {"recontrol_value_head": tiny_head(), "recontrol_num_steps": 0},
    "two steps": {"recontrol_value_head": tiny_head(), **STEPS},
    "two steps and a bound": {"recontrol_value_head": tiny_head(), **STEPS, "recontrol_max_kl": 0.05},
}
PLAIN = ("no head", "zero steps")
GREEDY = {"do_sample": False, "max_new_tokens": 4}
SCORES = {"return_dict_in_generate": True, "output_scores": True}
EVERYTHING = {**SCORES, "output_logits": True, "output_hidden_states": True, "output_attentions": True}
SAMPLE = {"do_sample": True, "top_k": 10, "temperature": 0.7}


def llama():
    return LlamaForCausalLM, tiny_model().config


def mistral():
    """With a window that the prompts outgrow."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "sliding_window": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    return MistralForCausalLM, MistralConfig(**sizes, **heads, **tokens, initializer_range=0.3)


def bart():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 128}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 1}
    config = BartConfig(vocab_size=64, **sizes, **tokens, forced_eos_token_id=None, init_std=0.3)
    return BartForConditionalGeneration, config


ARCHITECTURES = [llama, mistral, bart]
DECODERS = [llama, mistral]


@dataclasses.dataclass
class Enabled:
    """How every generate() is made to steer: by a class of one's own, or process-wide under stock classes."""

    way: str
    process_wide: bool

    def of(self, stock):
        return stock if self.process_wide else asking_class(stock, WAYS[self.way])

    def model(self, architecture, seed=0):
        return made(architecture, self.of, seed)

    def stock(self, architecture, **asked):
        """What a stock model says, in whatever process."""
        plain = {"recontrol_value_head": False} if self.process_wide else {}
        return seeded(made(architecture), **asked, **plain)


def asking_class(stock, keywords):
    class Asking(RecontrolGenerationMixin, stock):
        def generate(self, *args, **kwargs):
            return super().generate(*args, **(keywords | kwargs))

    return Asking


def made(architecture, of=lambda stock: stock, seed=0):
    """A random model; with an attention that can be shown."""
    stock, config = architecture()
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    return of(stock)(config).eval()


def enabled_ways():
    for way in WAYS:
        yield pytest.param((way, False), id=way)
    yield pytest.param(("two steps", True), id="two steps, process-wide")


@pytest.fixture(params=enabled_ways())
def enabled(request, monkeypatch):
    way, process_wide = request.param
    if not process_wide:
        yield Enabled(way, process_wide)
        return
    enable_recontrol()
    try:
        with monkeypatch.context() as patch:
            generate = GenerationMixin.generate
            patch.setattr(
                GenerationMixin, "generate", lambda self, *args, **kwargs: generate(self, *args, **(WAYS[way] | kwargs))
            )
            yield Enabled(way, process_wide)
    finally:
        disable_recontrol()


def seeded(model, **asked):
    torch.manual_seed(3)
    outputs = model.generate(**asked)
    assert live_call() is None
    return outputs


def described(thing):
    """Its types, lengths, shapes and dtypes, all the way down."""
    if isinstance(thing, torch.Tensor):
        return tuple(thing.shape), thing.dtype
    if isinstance(thing, dict):
        return type(thing).__name__, {name: described(value) for name, value in thing.items()}
    if isinstance(thing, list | tuple):
        return type(thing).__name__, [described(value) for value in thing]
    if hasattr(thing, "self_attention_cache"):
        return type(thing).__name__, described([thing.self_attention_cache, thing.cross_attention_cache])
    if hasattr(thing, "layers"):
        return type(thing).__name__, described([tensors_of(layer) for layer in thing.layers])
    return type(thing).__name__


def tensors_of(layer):
    return {name: value for name, value in vars(layer).items() if isinstance(value, torch.Tensor)}


def assert_caches_equal(one, other):
    for mine, its in zip(one.layers, other.layers, strict=True):
        torch.testing.assert_close(mine.keys, its.keys)
        torch.testing.assert_close(mine.values, its.values)


def assert_same_text(one, other, tolerance=1e-4):
    assert one.sequences.tolist() == other.sequences.tolist()
    torch.testing.assert_close(one.scores, other.scores, rtol=tolerance, atol=tolerance)


def test_the_harness_steers_every_generate(enabled):
    """Else all that follows would say little."""
    asked = {**prompts(), **GREEDY, **SCORES}
    plain, outputs = enabled.stock(llama, **asked), seeded(enabled.model(llama), **asked)
    assert torch.equal(outputs.scores[0], plain.scores[0]) == (enabled.way in PLAIN)


PROCESSED = {"repetition_penalty": 1.3, "bad_words_ids": [[5, 6]], "remove_invalid_values": True}
MODES = {
    "greedy": PROCESSED,
    "sampling": {**PROCESSED, **SAMPLE, "num_return_sequences": 2},
    "beams": {**PROCESSED, "num_beams": 2},
    "beams that sample": {**PROCESSED, "num_beams": 2, **SAMPLE},
}


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_optional_output_has_the_type_and_shapes_of_the_stock_models(enabled, architecture, mode, use_cache):
    asked = {**prompts(rows=2), **GREEDY, **EVERYTHING, **MODES[mode], "use_cache": use_cache}
    actual, expected = seeded(enabled.model(architecture), **asked), enabled.stock(architecture, **asked)
    assert described(actual) == described(expected)
    assert (actual.get(CACHE) is not None) == use_cache
    if enabled.way in PLAIN:
        torch.testing.assert_close(actual.sequences, expected.sequences, rtol=0, atol=0)
        torch.testing.assert_close(actual.scores, expected.scores, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["greedy", "beams"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_cache_changes_no_text(enabled, architecture, mode):
    model, asked = enabled.model(architecture), {**left_padded(), **GREEDY, **SCORES, **MODES[mode]}
    assert_same_text(seeded(model, **asked, use_cache=True), seeded(model, **asked, use_cache=False))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_three_tokens_and_one_from_their_cache_are_four(enabled, architecture):
    model, asked = enabled.model(architecture), left_padded() | {"do_sample": False, **SCORES}
    whole, begun = seeded(model, **asked, max_new_tokens=4), seeded(model, **asked, max_new_tokens=3)
    if model.config.is_encoder_decoder:
        asked |= {"decoder_input_ids": begun.sequences, "decoder_attention_mask": torch.ones_like(begun.sequences)}
    else:
        asked["input_ids"] = begun.sequences
        asked["attention_mask"] = torch.nn.functional.pad(asked["attention_mask"], (0, 3), value=1)
    ended = seeded(model, **asked, max_new_tokens=1, **{CACHE: begun[CACHE]})
    assert ended.sequences.tolist() == whole.sequences.tolist()
    torch.testing.assert_close(begun.scores + ended.scores, whole.scores)
    if not model.config.is_encoder_decoder:
        assert_caches_equal(ended[CACHE], whole[CACHE])


@pytest.mark.parametrize("architecture", DECODERS)
def test_three_tokens_and_one_from_their_cache_are_four_also_by_embeddings(enabled, architecture):
    model = enabled.model(architecture)
    embeddings, asked = model.get_input_embeddings(), {"do_sample": False, **SCORES}
    prompt = embeddings(prompts()["input_ids"])
    whole, begun = (seeded(model, inputs_embeds=prompt, **asked, max_new_tokens=tokens) for tokens in (4, 3))
    longer = torch.cat([prompt, embeddings(begun.sequences)], dim=1)
    ended = seeded(model, inputs_embeds=longer, **asked, max_new_tokens=1, **{CACHE: begun[CACHE]})
    assert torch.cat([begun.sequences, ended.sequences], dim=1).tolist() == whole.sequences.tolist()
    assert_caches_equal(ended[CACHE], whole[CACHE])


@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("architecture", DECODERS)
def test_embeddings_say_what_their_ids_say_with_the_ids_or_without(enabled, architecture, mode):
    model, inputs = enabled.model(architecture), left_padded()
    asked = {**GREEDY, **SCORES, **mode, "attention_mask": inputs["attention_mask"]}
    ids, embeddings = inputs["input_ids"], model.get_input_embeddings()(inputs["input_ids"])
    expected = seeded(model, input_ids=ids, **asked)
    assert_same_text(seeded(model, input_ids=ids, inputs_embeds=embeddings, **asked), expected)
    without = seeded(model, inputs_embeds=embeddings, **asked)
    assert described(without[CACHE]) == described(expected[CACHE])
    assert without.sequences.tolist() == expected.sequences[:, 5:].tolist()
    torch.testing.assert_close(without.scores, expected.scores, rtol=1e-4, atol=1e-4)
    others = seeded(model, input_ids=ids, inputs_embeds=torch.rand_like(embeddings), **asked)
    assert not any(torch.allclose(*scores) for scores in zip(others.scores, expected.scores, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 2e-2)], ids=str)
@pytest.mark.parametrize("architecture", DECODERS)
def test_a_static_cache_says_what_a_dynamic_one_says(enabled, architecture, dtype, tolerance):
    model = enabled.model(architecture).to(dtype)
    asked = {**left_padded(), **SCORES, "do_sample": False, "max_new_tokens": 10}
    dynamic, static = (seeded(model, **asked, **mode) for mode in ({}, {"cache_implementation": "static"}))
    assert_same_text(static, dynamic, tolerance)
    assert type(static[CACHE]).__name__ == "StaticCache"
    assert {tuple(layer.keys.shape[:2]) for layer in static[CACHE].layers} == {(3, model.config.num_key_value_heads)}
    assert architecture is mistral or static[CACHE].layers[0].keys.shape[2] == 5 + 10 - 1  # the last has no entry


@pytest.mark.parametrize("draft", ["the model itself", "another", "prompt lookup"])
@pytest.mark.parametrize("architecture", [llama, bart])
def test_drafts_that_are_asked_to_steer_too_change_neither_text_nor_outputs(enabled, architecture, draft):
    model, inputs = enabled.model(architecture), repeating()
    asked = {**GREEDY, **EVERYTHING, "repetition_penalty": 1.3}
    greedy = seeded(model, **inputs, **asked)
    mode = {"prompt_lookup_num_tokens": 2}
    if draft != "prompt lookup":
        assistant = model if draft == "the model itself" else enabled.model(architecture, seed=1)
        assistant.generation_config.num_assistant_tokens = 2
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        mode = {"assistant_model": assistant}
    drafted = seeded(model, **inputs, **asked, **mode)
    assert_same_text(drafted, greedy)
    assert described(drafted) == described(greedy)
    sampled = seeded(model, **inputs, **asked | SAMPLE, **mode)
    assert described(sampled) == described(greedy)


@pytest.mark.parametrize("architecture", DECODERS)
def test_logits_of_the_whole_prompt_change_no_text(enabled, architecture):
    model = enabled.model(architecture)
    asked = {**left_padded(), **GREEDY, **SCORES}
    assert_same_text(seeded(model, **asked, logits_to_keep=0), seeded(model, **asked))


@pytest.mark.parametrize("architecture", DECODERS)
def test_positions_may_be_given(enabled, architecture):
    model, inputs = enabled.model(architecture), left_padded()
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    expected = seeded(model, **inputs, **GREEDY, **SCORES)
    assert_same_text(seeded(model, **inputs, **GREEDY, **SCORES, position_ids=positions), expected)


@pytest.mark.parametrize("architecture", DECODERS)
def test_without_a_prompt_the_text_begins_with_bos(enabled, architecture):
    model = enabled.model(architecture)
    expected = seeded(model, input_ids=torch.tensor([[1]]), **GREEDY)
    assert seeded(model, **GREEDY).tolist() == expected.tolist()
    assert expected.shape == (1, 5)


def test_processors_and_criteria_of_ones_own_see_what_is_generated(enabled):
    seen = []

    class Seeing(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append((input_ids.clone(), scores.clone()))
            return scores

    class AfterTwo(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] == 5 + 2)

    model = enabled.model(llama)
    own = {"logits_processor": [Seeing()], "stopping_criteria": [AfterTwo()]}
    outputs, whole = (seeded(model, **prompts(), **GREEDY, **SCORES, **mode) for mode in (own, {}))
    assert outputs.sequences.tolist() == whole.sequences[:, :7].tolist()
    assert [ids.tolist() for ids, _ in seen] == [whole.sequences[:, :columns].tolist() for columns in (5, 6)]
    torch.testing.assert_close(tuple(scores for _, scores in seen), whole.scores[:2], rtol=0, atol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_saved_model_is_read_by_the_class_with_any_attention(enabled, tmp_path, attention):
    model = enabled.model(llama).half()
    expected = seeded(model, **left_padded(), **GREEDY, **SCORES)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float16, attn_implementation=attention)
    assert again.dtype == torch.float16
    assert_same_text(seeded(again, **left_padded(), **GREEDY, **SCORES), expected, tolerance=2e-2)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "its class of its config": lambda model: type(model)(model.config),
    "_from_config": lambda model: type(model)._from_config(model.config, attn_implementation="eager"),
}


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_made_of_a_model_are_steered_beside_it(enabled, architecture, way, used):
    model = enabled.model(architecture)
    asked = {**left_padded(), **GREEDY, **SCORES}
    if used:
        seeded(model, **asked)
    twin = COPIES[way](model).eval()
    assert type(twin) is type(model)
    twin.load_state_dict(model.state_dict())
    for _ in range(2):
        assert_same_text(seeded(twin, **asked), seeded(model, **asked), tolerance=0)
    assert set(twin.state_dict()) == set(made(architecture).state_dict())


# What a class says of itself


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_enabled_class_says_of_itself_what_the_stock_class_says(enabled, architecture):
    stock, mine = architecture()[0], enabled.of(architecture()[0])
    told = {type(enable_recontrol(made(architecture))), mine}
    for each in told:
        assert issubclass(each, stock)
        assert each.can_generate()
        assert enabled.process_wide or "GenerationMixin" in str(each.__bases__)  # as transformers' suite looks for it
        names = [name for name in dir(stock) if not name.startswith("__") and not callable(getattr(stock, name))]
        assert {"_can_compile_fullgraph", "_is_stateful", "_supports_sdpa", "main_input_name"} <= {*names}
        for name in set(names) - {"_abc_impl"}:
            assert isinstance(getattr(stock, name), property) or getattr(each, name) == getattr(stock, name), name
        for name in ("forward", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "heal_tokens"):
            assert inspect.signature(getattr(each, name)) == inspect.signature(getattr(stock, name)), name
    enabled_class = type(enable_recontrol(made(architecture)))
    assert inspect.signature(enabled_class.generate) == inspect.signature(stock.generate) or enabled.process_wide
    assert (enabled_class.__name__, enabled_class.__module__) == (stock.__name__, stock.__module__)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_unknown_keywords_go_through_the_preparation_of_inputs(enabled, architecture):
    model = enabled.model(architecture)
    keywords = {"output_attentions": True, "mine": "a word", "number": 3}
    ids = prompts()["input_ids"]
    prepared = model.prepare_inputs_for_generation(input_ids=ids, **keywords)
    assert prepared.items() >= keywords.items()
    assert prepared["decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"].tolist() == ids.tolist()


def test_a_class_keeps_the_names_and_words_of_what_it_has_of_its_own():
    class Steerable(RecontrolGenerationMixin, WhisperForConditionalGeneration):
        pass

    for name in ("generate", "prepare_inputs_for_generation"):
        mine, its = getattr(Steerable, name), getattr(WhisperForConditionalGeneration, name)
        assert inspect.signature(mine) == inspect.signature(its)
        assert mine.__doc__ == its.__doc__
    assert inspect.signature(Steerable.generate) != inspect.signature(GenerationMixin.generate)


def test_prompts_that_a_class_calls_by_another_name_may_be_given_by_it():
    class Named(LlamaForCausalLM):
        def prepare_inputs_for_generation(self, decoder_input_ids, **kwargs):  # as Rag's
            return super().prepare_inputs_for_generation(decoder_input_ids, **kwargs)

    class Steerable(RecontrolGenerationMixin, Named):
        pass

    ids = prompts()["input_ids"]
    prepared = Steerable(tiny_model().config).prepare_inputs_for_generation(decoder_input_ids=ids)
    assert prepared["input_ids"].tolist() == ids.tolist()


# A forward by itself


def packed(masked):
    """The same tokens in one row, told apart by their positions."""
    mask = masked["attention_mask"].bool()
    positions = torch.cat([torch.arange(row.sum()) for row in mask])
    return {"input_ids": masked["input_ids"][mask][None], "position_ids": positions[None]}


def of_one_prefix():
    """Three rows that differ in their last token as one row, by a mask of four dimensions."""
    sees = torch.tril(torch.ones(7, 7))
    sees[4:, 4:] = torch.eye(3)
    mask = torch.zeros(1, 1, 7, 7).masked_fill(sees == 0, torch.finfo(torch.float32).min)
    ids, positions = torch.tensor([[5, 9, 6, 8, 10, 11, 12]]), torch.tensor([[0, 1, 2, 3, 4, 4, 4]])
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


FORWARDS = {
    "plain": prompts(),
    "left padding": left_padded(),
    "packed": packed(left_padded()) | {"use_cache": False},
    "a mask of four dimensions": of_one_prefix(),
    "all logits": prompts() | {"logits_to_keep": 0},
    "the last logits": prompts() | {"logits_to_keep": 1},
    "all outputs": prompts() | {"output_hidden_states": True, "output_attentions": True},
}


@pytest.mark.parametrize("inputs", FORWARDS)
@pytest.mark.parametrize("architecture", DECODERS)
def test_a_forward_outside_generate_is_the_stock_models_before_and_after(enabled, architecture, inputs):
    model, stock = enabled.model(architecture), made(architecture)
    expected = stock(**FORWARDS[inputs])
    for _ in range(2):
        actual = model(**FORWARDS[inputs])
        assert described(actual) == described(expected)
        torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=0)
        seeded(model, **prompts(), **GREEDY)


# Compiled


@pytest.mark.parametrize("architecture", [llama, pytest.param(bart, marks=pytest.mark.slow)])
def test_a_compiled_forward_is_one_graph_compiled_once(enabled, architecture):
    """Other prompts and fewer tokens compile nothing again; a graph break or a dynamic shape would be an error."""
    model, inputs = enabled.model(architecture), [prompts(rows=2), prompts(rows=2, seed=1)]
    compiled, asked = as_one_graph(), {**GREEDY, **SCORES}
    expected = [seeded(model, **each, **asked) for each in inputs]
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        actual = [seeded(model, **each, **asked, **compiled) for each in inputs]
        shorter = seeded(model, **inputs[0], **asked | {"max_new_tokens": 2}, **compiled)
    assert "_compiled_call" in vars(model)
    for one, other in zip(actual, expected, strict=True):
        assert_same_text(one, other)
    assert shorter.sequences.tolist() == expected[0].sequences[:, : shorter.sequences.shape[1]].tolist()
    asked = {**inputs[0], **GREEDY, **EVERYTHING}
    eager = enabled.stock(architecture, **asked, cache_implementation="static")
    assert described(seeded(model, **asked, **compiled)) == described(eager)


def as_one_graph():
    config = CompileConfig(fullgraph=True, dynamic=False, backend="eager", mode=None)
    config._compile_all_devices = True  # else a CPU is never compiled for
    return {"cache_implementation": "static", "compile_config": config}
