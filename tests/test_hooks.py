"""The seam: nothing leaks between threads, nothing is left after an interrupt, nothing goes by unsteered in silence."""

import copy
import sys
import threading
import types
import weakref

import pytest
import torch
from tiny import prompts, tiny_head, tiny_model
from torch.nn import functional
from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_recontrol import Controller, SteeringNotApplied, calls, disable_recontrol, enable_recontrol, hooks
from hf_recontrol.calls import Call, live_call, run_live
from hf_recontrol.forwards import forward_steered

pytestmark = pytest.mark.versions
GREEDY = {"do_sample": False, "max_new_tokens": 4}
STEER = {"recontrol_step_size": 2.0, "recontrol_num_steps": 3}
SWEPT = ("run_live", "live_call", "__init__", "finish", "check", "body")


@pytest.mark.slow
def test_threads_with_different_heads_on_one_model_never_mix():
    """2,000 generations, compared bit for bit. A hook set and removed by each call is wrong in thousands of them."""
    assert wrong_generations(enable_recontrol(tiny_model()), repeats=500) == 0


def test_the_thread_test_can_fail():
    """The positive control: the same harness, with the live call in a global instead of a threading.local."""
    shared = types.SimpleNamespace(live=None)
    thread_local, calls._THREAD = calls._THREAD, shared
    try:
        assert wrong_generations(enable_recontrol(tiny_model()), repeats=20) > 0
    finally:
        calls._THREAD = thread_local


def wrong_generations(model, repeats):
    """Four threads: head a, head b, none, and all in turn. How many generations differ from a single thread's."""
    heads = [tiny_head(1), tiny_head(2, num_hidden_layers=2), False]
    steered = [
        {"recontrol_value_head": head, "return_dict_in_generate": True, "output_logits": True, **GREEDY}
        for head in heads
    ]
    expected = [torch.stack(model.generate(**prompts(rows=2), **keywords, **STEER).logits) for keywords in steered]
    assert not torch.equal(expected[0], expected[1])
    assert not torch.equal(expected[0], expected[2])
    wrong = []

    def work(choices):
        for i in range(repeats):
            choice = choices[i % len(choices)]
            try:
                logits = torch.stack(model.generate(**prompts(rows=2), **steered[choice], **STEER).logits)
                if not torch.equal(logits, expected[choice]):
                    wrong.append(choice)
            except SteeringNotApplied as error:
                wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(choices,)) for choices in ([0], [1], [2], [0, 1, 2])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    return len(wrong)


def test_evaluating_and_enabling_in_one_thread_leave_the_generations_of_another_alone():
    model, head = enable_recontrol(tiny_model()), tiny_head()
    expected = model.generate(**prompts(), **GREEDY, recontrol_value_head=head, **STEER).tolist()
    outputs, done = [], threading.Event()

    def work():
        for _ in range(100):
            outputs.append(model.generate(**prompts(), **GREEDY, recontrol_value_head=head, **STEER).tolist())
        done.set()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        while not done.is_set() and thread.is_alive():
            forward_steered(model, Controller(tiny_head(1)), **prompts())
            enable_recontrol(model)
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(outputs) == 100
    assert all(output == expected for output in outputs)
    assert len(model.lm_head._forward_pre_hooks) == 1


def test_an_interrupt_at_any_opcode_leaves_no_control_live():
    """Raises once at every opcode of run_live and what it calls, and twice at pairs of them; the traceback is kept."""
    kept, points = [], 0
    for second in range(9):
        for first in range(1, 10_000):
            reached, error = interrupted_run(first, second)
            kept.append(error)
            if not reached:
                break
            points += 1
            assert live_call() is None, f"live after an interrupt at opcode {first}, {second}"
    assert points > 500


def test_the_sweep_can_fail(monkeypatch):
    """The positive control: a live call that a variable of the frame owns outlives the frame in the traceback."""

    def leaky(call, function):
        live = calls._Live(call)
        calls._THREAD.live = weakref.ref(live)
        result = function()
        calls._THREAD.live = None
        return result

    leaky.__code__ = leaky.__code__.replace(co_name="run_live")
    kept, leaks = [], 0
    for first in range(1, 100):
        kept.append(interrupted_run(first, 0, leaky)[1])
        leaks += live_call() is not None
        calls._THREAD.live = None
    assert leaks > 0


def interrupted_run(first, second, run=run_live):
    """run_live with a KeyboardInterrupt at its `first` opcode and, where not 0, again `second` opcodes later."""
    count, hits, due = 0, 0, first

    def trace(frame, event, argument):
        nonlocal count, hits, due
        if frame.f_code.co_name not in SWEPT:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            count += 1
            if count == due:
                hits += 1
                if second and hits == 1:
                    due += second
                else:
                    sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    def body():
        call = live_call()
        call.ever = True

    before = sys.gettrace()
    try:
        sys.settrace(trace)
        try:
            run(Call(), body)
        finally:
            sys.settrace(None)
    except KeyboardInterrupt as error:
        return hits > 0, error
    finally:
        sys.settrace(before)
    return hits > 0, None


class Raises(LogitsProcessor):
    """Raises at the third token."""

    def __init__(self, error):
        self.error = error

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == 7:
            raise self.error
        return scores


@pytest.mark.parametrize(
    "error", [ValueError("mine"), KeyboardInterrupt(), SystemExit(3), StopIteration(), torch.OutOfMemoryError()]
)
def test_an_exception_inside_generate_comes_out_and_nothing_stays(error):
    model, head = enable_recontrol(tiny_model()), tiny_head()
    expected = model.generate(**prompts(), **GREEDY)
    with pytest.raises(type(error)) as caught:
        model.generate(**prompts(), **GREEDY, logits_processor=[Raises(error)], recontrol_value_head=head, **STEER)
    assert caught.value is error
    assert live_call() is None
    assert model.generate(**prompts(), **GREEDY).tolist() == expected.tolist()


def test_a_generate_inside_a_generate_is_its_own():
    model, other, head = enable_recontrol(tiny_model()), enable_recontrol(tiny_model(1)), tiny_head()
    plain = other.generate(**prompts(), **GREEDY)
    inner = []

    class Nested(LogitsProcessor):
        def __call__(self, input_ids, scores):
            inner.append(other.generate(**prompts(), **GREEDY).tolist())
            return scores

    expected = model.generate(**prompts(), **GREEDY, recontrol_value_head=head, **STEER)
    actual = model.generate(**prompts(), **GREEDY, logits_processor=[Nested()], recontrol_value_head=head, **STEER)
    assert actual.tolist() == expected.tolist()
    assert inner == [plain.tolist()] * 4


def test_another_models_forward_inside_a_generate_is_plain():
    model, other, head = enable_recontrol(tiny_model()), enable_recontrol(tiny_model(1, hidden_size=32)), tiny_head()
    expected = other(**prompts()).logits

    class Other(LogitsProcessor):
        def __call__(self, input_ids, scores):
            torch.testing.assert_close(other(**prompts()).logits, expected, rtol=0, atol=0)
            return scores

    steered = model.generate(**prompts(), **GREEDY, recontrol_value_head=head, **STEER)
    actual = model.generate(**prompts(), **GREEDY, logits_processor=[Other()], recontrol_value_head=head, **STEER)
    assert actual.tolist() == steered.tolist()


def no_head_call(self, *args, **kwargs):
    """A forward that uses the LM head's weight and not its module."""
    hidden_states = self.model(kwargs["input_ids"], attention_mask=kwargs.get("attention_mask"), use_cache=False)[0]
    return CausalLMOutputWithPast(logits=functional.linear(hidden_states, self.lm_head.weight))


class Tokens(list):
    """A streamer that keeps what it is given: the prompt first, then each token."""

    put = list.append

    def end(self):
        pass


def test_a_forward_that_goes_by_the_lm_head_module_is_an_error_before_its_token_is_chosen(monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "forward", no_head_call)
    model, streamer = enable_recontrol(tiny_model()), Tokens()
    steer = {"recontrol_value_head": tiny_head(), "streamer": streamer, **STEER}
    with pytest.raises(SteeringNotApplied, match="LlamaForCausalLM did not call its output embeddings"):
        model.generate(**prompts(rows=1), **GREEDY, **steer, use_cache=False)
    assert len(streamer) == 1


def test_a_forward_that_goes_by_the_hooks_is_an_error_before_its_token_is_chosen():
    model, streamer = enable_recontrol(tiny_model()), Tokens()
    model.__dict__["_call_impl"] = model.forward  # nn.Module.__call__ without hooks, as some wrappers do
    model.__class__ = type(
        model.__class__.__name__, (model.__class__,), {"__call__": lambda self, *a, **k: self.forward(*a, **k)}
    )
    with pytest.raises(SteeringNotApplied, match="went by our hooks"):
        model.generate(**prompts(rows=1), **GREEDY, streamer=streamer, recontrol_value_head=tiny_head())
    assert len(streamer) == 1


def test_hooks_that_were_removed_are_put_back():
    model, head = enable_recontrol(tiny_model()), tiny_head()
    expected = model.generate(**prompts(), **GREEDY, recontrol_value_head=head, **STEER)
    hooks.uninstall(model)
    assert model.generate(**prompts(), **GREEDY, recontrol_value_head=head, **STEER).tolist() == expected.tolist()
    enable_recontrol(model)
    assert model.generate(**prompts(), **GREEDY, recontrol_value_head=head, **STEER).tolist() == expected.tolist()


def small_batches():
    """The default sizing would take gigabytes."""
    name = "page_size" if "page_size" in ContinuousBatchingConfig.__dataclass_fields__ else "block_size"
    return ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32, **{name: 16})


@pytest.mark.parametrize("max_kl", [None, 0.05])
def test_continuous_batching_is_steered(max_kl):
    head, texts = tiny_head(), [[1, 5, 9], [1, 7, 8, 11], [1, 20]]
    steer = {"recontrol_value_head": head, "recontrol_max_kl": max_kl, **STEER}
    model, batching = enable_recontrol(tiny_model(eos_token_id=2)), enable_recontrol(tiny_model(eos_token_id=2))
    batching.set_attn_implementation("paged|eager")
    config = GenerationConfig(**GREEDY, eos_token_id=2, pad_token_id=0)
    for keywords in (steer, {}, {"recontrol_value_head": False}):
        expected = [model.generate(torch.tensor([ids]), config, **keywords)[0, len(ids) :].tolist() for ids in texts]
        outputs = batching.generate_batch(texts, config, continuous_batching_config=small_batches(), **keywords)
        assert [output.generated_tokens for output in outputs.values()] == expected
    enable_recontrol()
    try:
        stock = tiny_model(eos_token_id=2, attn_implementation="paged|eager")
        outputs = stock.generate_batch(texts, config, continuous_batching_config=small_batches(), **steer)
    finally:
        disable_recontrol()
    steered = [model.generate(torch.tensor([ids]), config, **steer)[0, len(ids) :].tolist() for ids in texts]
    assert [output.generated_tokens for output in outputs.values()] == steered
    assert steered != expected


def test_continuous_batching_that_cannot_be_steered_is_refused_not_plain(monkeypatch):
    model = enable_recontrol(tiny_model())
    steer = {"recontrol_value_head": tiny_head(), **STEER}
    with pytest.raises(ValueError, match="persistent_manager"):
        model.generate_batch([[1, 5]], persistent_manager=True, **steer)
    with pytest.raises(ValueError, match="recontrol_trace"):
        model.generate_batch([[1, 5]], **steer, recontrol_trace=True)
    with pytest.raises(ValueError, match="paged"):
        model.generate(**prompts(), cache_implementation="paged", **steer)
    config = copy.deepcopy(model.generation_config)
    config.recontrol_value_head = "stranger/head"
    with pytest.raises(ValueError, match="not registered"):
        model.generate_batch([[1, 5]], config)
    with pytest.raises(ValueError, match="not steered by its generation config"):
        model.init_continuous_batching(config)
    assert model.generate_batch([], config, recontrol_value_head=False) == {}
    assert model.generate_batch([], **steer) == {}

    def by_its_weight(self, input_ids, logits_to_keep, **kwargs):
        hidden_states = self.model(input_ids, **kwargs)[0][:, logits_to_keep]
        return CausalLMOutputWithPast(logits=functional.linear(hidden_states, self.lm_head.weight))

    monkeypatch.setattr(LlamaForCausalLM, "forward", by_its_weight)
    model.set_attn_implementation("paged|eager")
    with pytest.raises(SteeringNotApplied, match="did not call its output embeddings"):
        model.generate_batch([[1, 5]], GenerationConfig(**GREEDY), continuous_batching_config=small_batches(), **steer)


def test_an_encoder_decoder_is_steered():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        eos_token_id=None,
    )
    model = enable_recontrol(T5ForConditionalGeneration(config).eval())
    with torch.no_grad():
        model.lm_head.weight.normal_()
    head, inputs = tiny_head(num_hidden_layers=0), prompts()
    inputs["input_ids"] %= 32
    steered = model.generate(**inputs, **GREEDY, recontrol_value_head=head, recontrol_step_size=50.0)
    assert steered.tolist() != model.generate(**inputs, **GREEDY).tolist()


@pytest.mark.parametrize("found", [None, torch.nn.Embedding(4, 4), torch.nn.ModuleList()])
def test_a_model_without_an_lm_head_is_refused_by_name(monkeypatch, found):
    model = tiny_model()
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: found)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM\.get_output_embeddings\(\) is "):
        enable_recontrol(model)


def test_a_model_with_a_generate_of_its_own_is_refused():
    model = tiny_model()
    model.generate = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="has a generate\\(\\) of its own"):
        enable_recontrol(model)
    with pytest.raises(TypeError, match="takes a transformers model, not a Linear"):
        enable_recontrol(torch.nn.Linear(2, 2))


def test_a_compiled_forward_with_a_static_cache_is_steered():
    """transformers' own compiled decoding, as one graph; Dynamo's tracing is what could go wrong, not a backend."""
    model, head = enable_recontrol(tiny_model()), tiny_head()
    expected = model.generate(**prompts(), **GREEDY, recontrol_value_head=head, **STEER)
    plain = model.generate(**prompts(), **GREEDY)
    compile_config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compile_config._compile_all_devices = True  # else a CPU is never compiled for
    static = {"cache_implementation": "static", "compile_config": compile_config, **GREEDY}
    torch._dynamo.reset()
    for _ in range(2):
        assert model.generate(**prompts(), **static).tolist() == plain.tolist()
        assert model.generate(**prompts(), **static, recontrol_value_head=head, **STEER).tolist() == expected.tolist()
    assert "_compiled_call" in vars(model)
