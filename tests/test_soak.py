"""Random interrupts by the thousand, and a minute of four threads: nothing of ours stays, grows or mixes. Slow."""

import collections
import functools
import gc
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from test_interrupts import LOGITS, MODES, STEER, answered, insides, same
from tiny import prompts, tiny_head, tiny_model

from hf_recontrol import Controller, calls, enable_recontrol
from hf_recontrol.calls import live_call

pytestmark = pytest.mark.soak
KEPT = 50  # exceptions with their tracebacks, as a notebook keeps them
MIB = 2**20


# Interrupts


@pytest.fixture
def alarms(monkeypatch):
    """SIGALRM is Ctrl-C. One that comes inside a __del__ is lost in Python itself, and then generate() goes on."""

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    before = signal.signal(signal.SIGALRM, interrupt)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def interrupted(function, seconds):
    """The interrupt that came so many seconds after the call began; None where it was over before."""
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            function()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt as error:
        return error


def timed(function):
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def left_behind(model, generate, interrupts):
    """What so many interrupts at random moments leave, in words, each as often as it was found."""
    moments, found, kept = random.Random(0), collections.Counter(), collections.deque(maxlen=KEPT)
    plain = {mode: answered(model, mode) for mode in MODES}
    runs = {mode: functools.partial(answered, model, mode, generate) for mode in MODES}
    seconds = {mode: min(timed(run) for _ in range(3)) for mode, run in runs.items()}
    before, came = insides(model), 0
    while came < interrupts:
        mode = moments.choice(list(MODES))
        error = interrupted(runs[mode], moments.uniform(1e-6, seconds[mode]))
        came += error is not None
        kept.append(error if moments.random() < 0.5 else None)
        found["a live control"] += live_call() is not None or calls._THREAD.live is not None
        torch.set_grad_enabled(True)  # torch's own no_grad() may have been interrupted on its way out
        found["something on the model"] += insides(model) != before
        found["other text than before"] += not same(answered(model, mode), plain[mode])
    return +found


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers")
def test_five_thousand_interrupts_at_random_moments_leave_nothing(alarms):
    model = enable_recontrol(tiny_model(num_hidden_layers=1))
    steered = functools.partial(model.generate, recontrol_value_head=tiny_head(), **STEER)
    assert left_behind(model, steered, 5_000) == {}


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers")
def test_the_same_search_finds_what_a_hook_that_is_added_and_removed_leaves(alarms):
    """The positive control."""
    model, controller = tiny_model(num_hidden_layers=1), Controller(tiny_head())

    def naive(**keywords):
        handle = model.lm_head.register_forward_pre_hook(lambda module, args: (controller(args[0]),))
        outputs = model.generate(**keywords)
        handle.remove()
        return outputs

    found = left_behind(model, naive, 20)
    assert found["something on the model"] > 10
    assert found["other text than before"] > 10


# A long run


def used():
    """Memory in bytes, threads and open files of this process."""
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident, len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def served(model, ways, expected, seconds):
    """How many generations four threads made in that time, and which were wrong."""
    made, wrong, end = [0] * 4, [], time.monotonic() + seconds

    def work(thread):
        while time.monotonic() < end:
            way = made[thread] % len(ways) if thread == 3 else thread  # one each, and all in turn
            logits = torch.stack(model.generate(**prompts(rows=2), **ways[way]).logits)
            if not torch.equal(logits, expected[way]):
                wrong.append(way)
            made[thread] += 1

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(made), wrong


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read where Linux tells it")
def test_a_minute_of_four_threads_grows_nothing_and_mixes_nothing():
    model, (a, b) = enable_recontrol(tiny_model()), (tiny_head(1), tiny_head(2, num_hidden_layers=2))
    asked = {"do_sample": False, "max_new_tokens": 5, **LOGITS}
    ways = [asked | STEER | {"recontrol_value_head": head} for head in (a, b, [a, None])] + [asked]
    expected = [torch.stack(model.generate(**prompts(rows=2), **way).logits) for way in ways]
    assert not any(torch.equal(expected[i], expected[i - 1]) for i in range(4))
    served(model, ways, expected, seconds=20)  # caches and allocators fill
    modules, (memory, *others) = insides(model), used()
    made, wrong = served(model, ways, expected, seconds=60)
    grown = used()[0] - memory
    assert wrong == []
    assert made > 1_000
    assert insides(model) == modules
    assert list(used()[1:]) == others
    assert live_call() is None
    assert grown <= max(0.01 * memory, 20 * MIB), f"{grown / MIB:.1f} MiB more after {made} generations"
