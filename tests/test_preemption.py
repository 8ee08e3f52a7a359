"""SIGTERM and Ctrl-C while rollouts are collected: real processes, real signals, sent at a block in hand."""

import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch
from tiny import Length, tiny_model, tiny_tokenizer

from hf_recontrol import preemption
from hf_recontrol.preemption import Preemption
from hf_recontrol.rollout_dataset import RolloutDataset
from hf_recontrol.rollouts import collect_rollouts

PROMPTS = [f"w{i}" for i in range(10, 30)]


SMALL = {"block_size": 2, "max_new_tokens": 4, "progress": False}


def collect(folder, reward=None):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    return collect_rollouts(model, tokenizer, PROMPTS, reward or Length(), folder, **SMALL)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".tmp"}


def run(folder, entered, seconds, grace, call):
    """In a child: collect, with a reward that takes long at the fourth block."""
    torch.set_num_threads(1)
    preemption.GRACE = grace
    calls = iter(range(100))

    def wait():
        if next(calls) == 3:
            entered.set()
            time.sleep(seconds)

    call(lambda: collect(folder, Length(wait)))


def sent(folder, signals, seconds=1.0, grace=20.0, call=lambda work: work()):
    """The exit status after the signals, all sent at the fourth block, and the seconds that it took."""
    context = multiprocessing.get_context("fork")
    entered = context.Event()
    process = context.Process(target=run, args=(folder, entered, seconds, grace, call))
    process.start()
    assert entered.wait(60)
    begin = time.monotonic()
    for number in signals:
        os.kill(process.pid, number)
        time.sleep(0.1)
    process.join(60)
    return process.exitcode, time.monotonic() - begin


def blocks(folder):
    return (folder / "manifest.jsonl").read_bytes().count(b"\n") - 1


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    collect(folder)
    return contents(folder)


def resumed(folder, unbroken):
    collect(folder)
    return contents(folder) == unbroken


def test_sigterm_finishes_the_block_in_hand_and_exits_with_143(tmp_path, unbroken):
    status, seconds = sent(tmp_path, [signal.SIGTERM])
    assert status == 143
    assert blocks(tmp_path) == 4  # the one in hand too, and no more
    assert seconds < 15
    assert resumed(tmp_path, unbroken)


def test_a_block_that_takes_longer_than_the_grace_time_is_dropped(tmp_path, unbroken):
    status, seconds = sent(tmp_path, [signal.SIGTERM], seconds=60, grace=0.5)
    assert status == 143
    assert blocks(tmp_path) == 3
    assert seconds < 20
    assert resumed(tmp_path, unbroken)


def test_a_second_sigterm_drops_the_block_at_once(tmp_path, unbroken):
    status, seconds = sent(tmp_path, [signal.SIGTERM] * 2, seconds=60)
    assert status == 143
    assert blocks(tmp_path) == 3
    assert seconds < 20
    assert resumed(tmp_path, unbroken)


def test_ctrl_c_drops_the_block_in_hand_and_no_other(tmp_path, unbroken):
    def call(work):
        with pytest.raises(KeyboardInterrupt):
            work()
        raise SystemExit(5)

    status, _ = sent(tmp_path, [signal.SIGINT], seconds=60, call=call)
    assert status == 5
    assert blocks(tmp_path) == 3
    assert resumed(tmp_path, unbroken)


def test_in_a_thread_sigterm_is_as_the_caller_has_it(tmp_path, unbroken):
    def call(work):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    status, _ = sent(tmp_path, [signal.SIGTERM], seconds=60, call=call)
    assert status == -signal.SIGTERM
    assert blocks(tmp_path) == 3
    assert resumed(tmp_path, unbroken)


def test_the_callers_handler_is_put_back_also_after_an_error(tmp_path):
    def own(number, frame):
        pass

    def bad(completions, **kwargs):
        assert signal.getsignal(signal.SIGTERM) != own
        raise RuntimeError("stop")

    before, threads = signal.signal(signal.SIGTERM, own), threading.active_count()
    try:
        with pytest.raises(RuntimeError, match="stop"):
            collect(tmp_path, bad)
        collect(tmp_path / "other")
        assert signal.getsignal(signal.SIGTERM) == own
    finally:
        signal.signal(signal.SIGTERM, before)
    deadline = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == threads


def test_a_sigterm_that_is_ignored_stays_ignored(tmp_path):
    def call(work):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        work()

    status, _ = sent(tmp_path, [signal.SIGTERM], call=call)
    assert status == 0
    assert len(list(RolloutDataset(tmp_path).rows())) == 20


def test_outside_of_the_work_to_be_finished_sigterm_raises_at_once():
    with Preemption() as preempted:
        with preempted.finishing():
            pass
        with pytest.raises(SystemExit) as exited:
            signal.raise_signal(signal.SIGTERM)
        assert exited.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
