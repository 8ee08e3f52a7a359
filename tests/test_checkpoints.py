"""Runs that are ended by signals, in real processes, and what comes of them: bit for bit what an unbroken run gives."""

import hashlib
import os
import random
import shutil
import signal
import threading
import time

import pytest
import torch
from test_train_control import little_garbage  # noqa: F401
from test_trainer import arguments, new_head, random_walk
from transformers import TrainerCallback

from hf_recontrol import HeadError, RecontrolTrainer, ValueHead, head_files
from hf_recontrol.checkpoints import newest_complete_checkpoint

pytestmark = [
    pytest.mark.versions,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
]
STEPS = 20
EVERY = {"max_steps": STEPS, "save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 5, "logging_steps": 1}


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    return random_walk(tmp_path_factory.mktemp("rollouts")).split(0.25)


def trainer_of(folder, rollouts, callbacks=None, **settings):
    args = arguments(folder, **EVERY | {"save_steps": 1} | settings)
    return RecontrolTrainer(new_head(), args, train_dataset=rollouts[0], eval_dataset=rollouts[1], callbacks=callbacks)


def in_a_child(trainer):
    """The id of a forked process that trains, from the newest complete checkpoint where there is one."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        trainer.train(resume_from_checkpoint=newest_or_none(trainer.args.output_dir))
        status = 0
    except SystemExit as error:
        status = error.code
    finally:
        os._exit(status)


def newest_or_none(folder):
    try:
        return newest_complete_checkpoint(folder)
    except ValueError:
        return None


def exit_status(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def state_of(folder, step=STEPS):
    """A checkpoint's weights, by hash, and the states of its optimiser and schedule."""
    checkpoint = folder / f"checkpoint-{step}"
    weights = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    return weights, *(torch.load(checkpoint / f"{name}.pt", weights_only=True) for name in ("optimizer", "scheduler"))


def assert_same_state(actual, expected):
    assert actual[0] == expected[0]
    torch.testing.assert_close(actual[1]["state"], expected[1]["state"], rtol=0, atol=0)
    assert actual[1]["param_groups"] == expected[1]["param_groups"]
    assert actual[2] == expected[2]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, rollouts):
    """The folder of a run that nothing interrupted, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("unbroken")
    trainer, start = trainer_of(folder, rollouts), time.monotonic()
    assert exit_status(in_a_child(trainer)) == 0
    return folder, time.monotonic() - start


def test_ten_steps_and_ten_more_are_twenty(tmp_path, unbroken, rollouts):
    shutil.copytree(unbroken[0] / "checkpoint-10", tmp_path / "checkpoint-10")
    trainer_of(tmp_path, rollouts).train(resume_from_checkpoint=True)
    assert_same_state(state_of(tmp_path), state_of(unbroken[0]))
    other = state_of(unbroken[0], 19)
    assert other[0] != state_of(tmp_path)[0], "the comparison cannot fail"


def test_a_finished_run_that_is_resumed_makes_no_further_step(tmp_path, unbroken, rollouts):
    shutil.copytree(unbroken[0] / f"checkpoint-{STEPS}", tmp_path / f"checkpoint-{STEPS}")
    trainer = trainer_of(tmp_path, rollouts, lr_scheduler_type="constant")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == STEPS
    saved = ValueHead.from_pretrained(unbroken[0] / f"checkpoint-{STEPS}")
    assert trainer.model.digest() == saved.digest()
    assert trainer.model.config.info["evaluation"]


class SignalAt(TrainerCallback):
    """Sends this process SIGTERM in the middle of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("step", [3, 9, STEPS], ids=["in an epoch", "at its end", "at the run's end"])
@pytest.mark.parametrize(("strategy", "evaluation"), [("steps", "steps"), ("epoch", "epoch"), ("steps", "epoch")])
def test_sigterm_ends_a_run_with_a_checkpoint_from_which_it_goes_on_as_if_unbroken(
    tmp_path, unbroken, rollouts, step, strategy, evaluation
):
    settings = {"save_strategy": strategy, "save_steps": 1000, "eval_strategy": evaluation, "eval_steps": 5}
    told = trainer_of(tmp_path, rollouts, [SignalAt(step)], **settings)
    assert exit_status(in_a_child(told)) == 143
    assert newest_complete_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{step}")
    trainer = trainer_of(tmp_path, rollouts, **settings | {"save_strategy": "steps"})
    trainer.train(resume_from_checkpoint=True)
    assert_same_state(state_of(tmp_path), state_of(unbroken[0]))
    evaluated = [line["step"] for line in trainer.state.log_history if "eval_loss" in line]
    assert evaluated[:-1] == sorted(set(evaluated[:-1])), "nothing but the final head was evaluated twice"
    if evaluation == "epoch":  # of 9 steps
        assert sorted(set(evaluated)) == [9, 18, 20]


def test_sigterm_from_outside_is_answered_within_the_step(tmp_path, unbroken, rollouts):
    child = in_a_child(trainer_of(tmp_path, rollouts, max_steps=10**6, save_steps=10**6))
    time.sleep(unbroken[1] / 2)
    told = time.monotonic()
    os.kill(child, signal.SIGTERM)
    assert exit_status(child) == 143
    assert time.monotonic() - told < 5
    assert newest_complete_checkpoint(tmp_path)


def test_where_nothing_is_to_be_saved_sigterm_saves_nothing(tmp_path, rollouts):
    trainer = trainer_of(tmp_path, rollouts, [SignalAt(3)], save_strategy="no")
    with pytest.raises(SystemExit, match="143"):
        trainer.train()
    assert trainer.state.global_step == 3
    assert not list(tmp_path.glob("checkpoint-*"))


def test_the_callers_handler_of_sigterm_comes_back_whatever_happens(tmp_path, rollouts):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            assert signal.getsignal(signal.SIGTERM) is not mine
            raise RuntimeError("for the test")

    def mine(signum, frame):
        raise AssertionError("not sent here")

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with pytest.raises(RuntimeError, match="for the test"):
            trainer_of(tmp_path / "fails", rollouts, [Fails()]).train()
        assert signal.getsignal(signal.SIGTERM) is mine
        trainer_of(tmp_path / "ends", rollouts, max_steps=1).train()
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_thread_trains_without_a_handler(tmp_path, rollouts):
    trainer, errors = trainer_of(tmp_path, rollouts, max_steps=2), []

    def train():
        try:
            trainer.train()
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert (errors, trainer.state.global_step) == ([], 2)


def test_transformers_own_handler_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"enable_jit_checkpoint is True.*itself writes a checkpoint on SIGTERM"):
        arguments(tmp_path, enable_jit_checkpoint=True)


def kills(count, tmp_path, unbroken, rollouts):
    """Kill runs at random moments, go on from what is left, and compare; how many left an unfinished checkpoint."""
    moments, torn = random.Random(0), 0
    for i in range(count):
        folder = tmp_path / str(i)
        trainer = trainer_of(folder, rollouts)  # never trained in this process: the children begin from it alike
        child = in_a_child(trainer)
        time.sleep(moments.uniform(0.1, 1) * unbroken[1])
        os.kill(child, signal.SIGKILL)
        exit_status(child)
        begun = {int(path.name[11:]) for path in folder.glob("checkpoint-*")}
        newest = newest_or_none(folder)
        torn += bool(begun) and newest != str(folder / f"checkpoint-{max(begun)}")
        assert exit_status(in_a_child(trainer)) == 0
        assert_same_state(state_of(folder), state_of(unbroken[0]))
        shutil.rmtree(folder)
    return torn


def test_kill_9_at_random_costs_the_steps_since_the_newest_whole_checkpoint_and_no_more(tmp_path, unbroken, rollouts):
    kills(10, tmp_path, unbroken, rollouts)


@pytest.mark.soak
def test_kill_9_at_random_many_times(tmp_path, unbroken, rollouts):
    assert kills(200, tmp_path, unbroken, rollouts) > 10, "the kills did not hit the saves"


class KilledWhile(TrainerCallback):
    """Kills this process when a file of the third checkpoint is to be written."""

    def __init__(self, name):
        self.name = name

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            replace, opened = os.replace, torch.save

            def killed_replace(source, target):
                if str(target).endswith(self.name):
                    os.kill(os.getpid(), signal.SIGKILL)
                replace(source, target)

            def killed_save(content, target, *args, **kwargs):
                if str(target).endswith(self.name):
                    with open(target, "wb") as file:
                        file.write(b"half of it")
                    os.kill(os.getpid(), signal.SIGKILL)
                opened(content, target, *args, **kwargs)

            os.replace, torch.save = killed_replace, killed_save
            state.save_to_json = lambda path: os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "optimizer.pt", "scheduler.pt", "state.json"])
def test_a_kill_before_each_file_of_a_checkpoint_is_survived(tmp_path, unbroken, rollouts, name):
    assert exit_status(in_a_child(trainer_of(tmp_path, rollouts, [KilledWhile(name)]))) == -signal.SIGKILL
    assert (tmp_path / "checkpoint-3").exists()
    assert newest_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    trainer_of(tmp_path, rollouts).train(resume_from_checkpoint=True)
    assert_same_state(state_of(tmp_path), state_of(unbroken[0]))


def test_a_checkpoint_that_is_written_over_is_not_whole_until_it_is_done(tmp_path, rollouts):
    trainer_of(tmp_path, rollouts, max_steps=3).train()
    assert newest_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    shutil.rmtree(tmp_path / "checkpoint-1")
    shutil.rmtree(tmp_path / "checkpoint-2")
    child = in_a_child(trainer_of(tmp_path, rollouts, [KilledWhile("optimizer.pt")], max_steps=3, seed=1))
    assert exit_status(child) == 0  # resumed at its last step: there was nothing to write
    trainer = trainer_of(tmp_path, rollouts, [KilledWhile("optimizer.pt")], max_steps=3, seed=1)
    child = os.fork()
    if not child:
        trainer.train()  # from the start, in a used folder
        os._exit(0)
    assert exit_status(child) == -signal.SIGKILL
    assert newest_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_every_save_is_read_back_through_the_strict_loader(tmp_path, rollouts, monkeypatch):
    trainer, write = trainer_of(tmp_path, rollouts, max_steps=2), head_files._write_whole

    def faulty_disk(path, data):
        write(path, data[:-1] + bytes([data[-1] ^ 1]) if path.name == "model.safetensors" else data)

    monkeypatch.setattr(head_files, "_write_whole", faulty_disk)
    with pytest.raises(HeadError, match="SHA-256"):
        trainer.train()
    assert newest_or_none(tmp_path) is None
    monkeypatch.undo()
    trainer.save_model()
    ValueHead.from_pretrained(tmp_path)
