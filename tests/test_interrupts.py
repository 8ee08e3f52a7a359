"""Nothing is left behind: not by an exception anywhere in generate(), nor by whoever runs generate() how and where."""

import asyncio
import contextlib
import functools
import gc
import os
import threading
import traceback
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import prompts, tiny_control_head, tiny_head, tiny_model
from transformers import GenerationMixin, LogitsProcessor, StoppingCriteria

from hf_recontrol import Controller, calls, enable_recontrol
from hf_recontrol.calls import Call, live_call

pytestmark = pytest.mark.versions
LOGITS = {"return_dict_in_generate": True, "output_logits": True}
STEER = {"recontrol_step_size": 2.0, "recontrol_num_steps": 3}
MODES = {
    "greedy": {},
    "sample": {"do_sample": True},
    "beams": {"num_beams": 2},
    "assisted": {"assistant_model": tiny_model(1, num_hidden_layers=1)},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
}
ERRORS = [Exception, KeyboardInterrupt, torch.OutOfMemoryError, SystemExit, GeneratorExit, StopIteration]


@pytest.fixture(scope="module")
def model():
    return enable_recontrol(tiny_model(num_hidden_layers=1))


@pytest.fixture(scope="module")
def head():
    return tiny_head()


@pytest.fixture(scope="module", autouse=True)
def _quick_collections():
    """What was there before these tests is not looked at by gc.collect(), which is called 300 times."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def answered(model, mode="greedy", generate=None, **keywords):
    """Tokens and logits."""
    torch.manual_seed(3)
    rows = {"rows": 1, "length": 8} if mode == "assisted" else {"rows": 2}
    asked = {"do_sample": False, "max_new_tokens": 5, **LOGITS, **MODES[mode], **keywords}
    outputs = (generate or model.generate)(**prompts(**rows), **asked)
    return outputs.sequences, torch.stack(outputs.logits)


def same(one, other):
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


# An exception anywhere


class Raising:
    """Raises `error` at its call number `at`. It is all that generate() may be given to call, at once."""

    def __init__(self, error, at):
        self.error, self.due = error, at

    def count(self):
        self.due -= 1
        if self.due == 0:
            raise self.error


class Streamer(Raising):
    def put(self, value):
        self.count()

    def end(self):
        pass


class EndOfStream(Raising):
    def put(self, value):
        pass

    def end(self):
        self.count()


class Criterion(Raising, StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        self.count()
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Processor(Raising, LogitsProcessor):
    def __call__(self, input_ids, scores):
        self.count()
        return scores


class Prefix(Raising):
    def __call__(self, row, input_ids):
        self.count()
        return list(range(64))


class Path(Raising):
    def __fspath__(self):
        self.count()


PLACES = {
    "streamer at the prompt": lambda error: {"streamer": Streamer(error, 1)},
    "streamer at a step": lambda error: {"streamer": Streamer(error, 3)},
    "streamer at the end": lambda error: {"streamer": EndOfStream(error, 1)},
    "criterion at step 1": lambda error: {"stopping_criteria": [Criterion(error, 1)]},
    "criterion at step 4": lambda error: {"stopping_criteria": [Criterion(error, 4)]},
    "logits processor": lambda error: {"logits_processor": [Processor(error, 2)]},
    "head at the prefill": lambda error: {"edit": Raising(error, 1)},
    "head at step 3": lambda error: {"edit": Raising(error, 3)},
    "bad keyword": lambda error: {"recontrol_value_head": Path(error, 1)},
}
BEAM_PLACES = {  # transformers has no streamer for beams; the function is asked for each of two rows' two beams
    "streamer at the prompt": lambda error: {"prefix_allowed_tokens_fn": Prefix(error, 1)},
    "streamer at a step": lambda error: {"prefix_allowed_tokens_fn": Prefix(error, 7)},
    "streamer at the end": lambda error: {"prefix_allowed_tokens_fn": Prefix(error, 20)},
}


@contextlib.contextmanager
def raising_at(place, mode, error):
    """Keywords of generate() under which `error` is raised there; and weak references to what is made meanwhile."""
    keywords = (PLACES | BEAM_PLACES if mode == "beams" else PLACES)[place](error)
    made, edit = [], keywords.pop("edit", None)
    with pytest.MonkeyPatch.context() as patch:
        for kind in (Call, Controller):
            patch.setattr(kind, "__init__", noting(kind.__init__, made))
        if edit is not None:
            patch.setattr(Controller, "edit", counting(Controller.edit, edit))
        yield keywords, made


def noting(begin, made):
    @functools.wraps(begin)
    def noted(self, *args, **kwargs):
        made.append(weakref.ref(self))
        begin(self, *args, **kwargs)

    return noted


def counting(function, raising):
    @functools.wraps(function)
    def counted(*args, **kwargs):
        raising.count()
        return function(*args, **kwargs)

    return counted


OWN = {"_previous_max_cache_length"}  # what transformers itself leaves on a model


def insides(model):
    """What could be written on a model."""
    modules = [
        (type(module), list(module._forward_pre_hooks), list(module._forward_hooks), sorted(vars(module).keys() - OWN))
        for module in model.modules()
    ]
    return modules, model.config.to_dict(), model.generation_config.to_dict()


@functools.cache
def plain_answers():
    """Of a stock model."""
    return {mode: answered(tiny_model(num_hidden_layers=1), mode) for mode in MODES}


def left_over(model, generate, place, mode, error):
    """What that exception leaves behind, in words."""
    expected, before, caught, found = plain_answers()[mode], insides(model), None, []
    with raising_at(place, mode, error) as (keywords, made):
        try:
            answered(model, mode, generate, **keywords)
        except BaseException as raised:
            caught = raised  # with its traceback, as a notebook keeps it
    if caught is not error:
        return [f"instead of the exception: {caught!r}"]
    if live_call() is not None or calls._THREAD.live is not None:
        found.append("a live control")
    if insides(model) != before:
        found.append("something on the model")
    if not same(answered(model, mode), expected):
        found.append("other text than before")
    if not made and place != "bad keyword":
        found.append("no control to look for")
    caught.__traceback__ = caught.__context__ = caught.__cause__ = None
    gc.collect()
    if any(reference() is not None for reference in made):
        found.append("a control in memory")
    return found


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
@pytest.mark.parametrize(
    "mode", [*list(MODES)[:2], *(pytest.param(mode, marks=pytest.mark.slow) for mode in list(MODES)[2:])]
)
@pytest.mark.parametrize("place", PLACES)
def test_an_exception_comes_out_as_it_is_and_leaves_nothing(model, head, place, mode, error):
    steered = functools.partial(model.generate, **({"recontrol_value_head": head} | STEER))
    assert left_over(model, steered, place, mode, error("mine")) == []


@pytest.mark.parametrize("place", [place for place in PLACES if place != "bad keyword"])
def test_the_same_search_finds_what_a_hook_that_is_added_and_removed_leaves(head, place):
    """The positive control."""
    model = tiny_model(num_hidden_layers=1)

    def naive(**keywords):
        controller = Controller(head)
        handle = model.lm_head.register_forward_pre_hook(lambda module, args: (controller(args[0]),))
        outputs = model.generate(**keywords)
        handle.remove()
        return outputs

    for mode in MODES:
        found = left_over(model, naive, place, mode, KeyboardInterrupt())
        assert "something on the model" in found
        assert "other text than before" in found
        assert "a control in memory" in found
        model.lm_head._forward_pre_hooks.clear()


def test_steering_goes_on_after_exceptions_as_before_them(model, head):
    steer = {"recontrol_value_head": head, **STEER}
    for mode in MODES:
        expected = answered(model, mode, **steer)
        for place in ("streamer at a step", "head at the prefill"):
            left_over(model, functools.partial(model.generate, **steer), place, mode, RuntimeError())
            assert same(answered(model, mode, **steer), expected)
        assert not same(plain_answers()[mode], expected)


# Calls within calls


CALLBACKS = {"streamer": Streamer, "stopping_criteria": Criterion, "logits_processor": Processor}


def calling(function, where):
    """A keyword of generate(), which calls `function` each time that generate() calls what it has there."""
    callback = type("Calling", (CALLBACKS[where],), {"count": lambda self: function()})(None, 0)
    return {where: callback if where == "streamer" else [callback]}


def by_stock_generate(model):
    """GenerationMixin's, whatever the model's class has."""
    return functools.partial(answered, model, generate=functools.partial(GenerationMixin.generate, model))


@pytest.mark.parametrize("where", CALLBACKS)
@pytest.mark.parametrize(
    "inner",
    [
        "another head",
        "no head",
        "an error",
        "a stock model",
        "stock generate() of a stock model",
        "stock generate() of an enabled model",
    ],
)
def test_a_generate_inside_another_is_its_own_and_leaves_the_outer_as_it_was(model, head, where, inner):
    stock, other = tiny_model(2), enable_recontrol(tiny_model(3))
    another = {"recontrol_value_head": tiny_control_head(), "recontrol_scale": 0.5}

    def stumbling():
        with pytest.raises(RuntimeError, match="mine"):
            answered(model, **another, stopping_criteria=[Criterion(RuntimeError("mine"), 2)])

    function = {
        "another head": functools.partial(answered, model, **another),
        "no head": functools.partial(answered, model),
        "an error": stumbling,
        "a stock model": functools.partial(answered, stock),
        "stock generate() of a stock model": by_stock_generate(stock),
        "stock generate() of an enabled model": by_stock_generate(other),
    }[inner]
    alone, results = function(), []
    steer = {"recontrol_value_head": head, "max_new_tokens": 3, "do_sample": False, **LOGITS, **STEER}
    rows = prompts(rows=1)  # as streamers ask for
    expected = model.generate(**rows, **steer)
    actual = model.generate(**rows, **steer, **calling(lambda: results.append(function()), where))
    assert len(results) >= 3
    assert alone is None or all(same(result, alone) for result in results)
    assert torch.equal(actual.sequences, expected.sequences)
    assert same(actual.logits, expected.logits)


# Callers of all kinds


@pytest.fixture(scope="module")
def choices(model, head):
    """Three ways to ask, and their answers."""
    ways = [
        {"recontrol_value_head": head, **STEER},
        {"recontrol_value_head": tiny_control_head(), "recontrol_scale": 0.5, "recontrol_max_kl": 0.05},
        {},
    ]
    expected = [answered(model, **way) for way in ways]
    assert not any(same(expected[i], expected[i - 1]) for i in range(3))
    return list(zip(ways, expected, strict=True))


def asking(model, choice):
    """Whether the answer is the right one."""
    way, expected = choice
    return same(answered(model, **way), expected)


def endless(model, choice):
    while True:
        yield asking(model, choice)


def test_generators_that_are_interleaved_dropped_and_closed_elsewhere_leave_plain_calls_plain(model, choices):
    generators = [endless(model, choice) for choice in choices]
    for _ in range(3):
        for generator in generators:
            assert next(generator)
            assert live_call() is None
            assert asking(model, choices[2])
    dropped = generators.pop(0)
    del dropped, generator
    gc.collect()
    closing = threading.Thread(target=generators[0].close)
    closing.start()
    closing.join()
    assert next(generators[1])
    assert asking(model, choices[2])


def test_a_pooled_thread_takes_nothing_from_one_request_to_the_next(model, head, choices):
    def failing():
        answered(model, recontrol_value_head=head, stopping_criteria=[Criterion(RuntimeError("mine"), 2)], **STEER)

    with ThreadPoolExecutor(1) as pool:
        for choice in (*choices, *reversed(choices)):
            assert pool.submit(asking, model, choice).result()
            with pytest.raises(RuntimeError, match="mine"):
                pool.submit(failing).result()
            assert pool.submit(live_call).result() is None
            assert pool.submit(asking, model, choices[2]).result()


@pytest.mark.parametrize("way", ["tasks of one thread", "to_thread", "run_in_executor"])
def test_asyncio_mixes_no_two_requests(model, choices, way):
    async def request(pool, choice):
        right = []
        for _ in range(4):
            if way == "tasks of one thread":
                right.append(asking(model, choice))
                await asyncio.sleep(0)
            elif way == "to_thread":
                right.append(await asyncio.to_thread(asking, model, choice))
            else:
                right.append(await asyncio.get_running_loop().run_in_executor(pool, asking, model, choice))
            right.append(live_call() is None)
        return right

    async def requests():
        with ThreadPoolExecutor(2) as pool:
            return await asyncio.gather(*(request(pool, choice) for choice in choices * 2))

    found = asyncio.run(requests())
    assert [len(right) for right in found] == [8] * 6
    assert all(all(right) for right in found)


def in_a_fork(function):
    """What the child makes of it: its exit status, 0 where `function` returned true."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12, for the threads of the tests' Hub
        child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        status = 0 if function() else 2
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_generates_as_its_parent_did_also_from_inside_a_generate(model, head, choices):
    def as_here():
        return live_call() is None and all(asking(model, choice) for choice in choices)

    assert in_a_fork(as_here) == 0
    assert in_a_fork(lambda: False) == 2  # else it could not be seen

    statuses, (way, expected) = [], choices[0]

    class Forking(LogitsProcessor):
        def __call__(self, input_ids, scores):
            statuses.append(in_a_fork(lambda: live_call() is not None and all(asking(model, it) for it in choices)))
            return scores

    assert same(answered(model, **way, logits_processor=[Forking()]), expected)
    assert statuses == [0] * 5
