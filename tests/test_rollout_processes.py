"""Several processes collect into one folder what one would have collected, bit for bit, whatever becomes of them."""

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from tiny import Length, tiny_model, tiny_tokenizer

from hf_recontrol import processes
from hf_recontrol.errors import CollectError
from hf_recontrol.processes import Processes, check_own
from hf_recontrol.rollout_dataset import RolloutDataset
from hf_recontrol.rollouts import collect_rollouts

PROMPTS = [f"w{i} w{i + 1}" for i in range(10, 30)]


def collect(folder, reward=None, **options):
    settings = {"block_size": 2, "max_new_tokens": 6, "num_return_sequences": 2, "progress": False} | options
    settings["generation_kwargs"] = {"eos_token_id": [2, 5, 9, 13]}
    return collect_rollouts(tiny_model(), tiny_tokenizer(), PROMPTS, reward or Length(), folder, **settings)


def contents(folder):
    """The manifest's lines in any order: who is first with a block is chance."""
    there = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    return there | {"manifest.jsonl": sorted(there["manifest.jsonl"].splitlines())}


class Run:
    """Forked processes, each told by the environment which of them it is, as by a launcher."""

    def __init__(self, folder, size, work=None, **options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folder = Path(folder)
        self.folder.parent.mkdir(exist_ok=True)
        context = multiprocessing.get_context("fork")
        self.children = [
            context.Process(target=self._child, args=(rank, size, port, work or collect, options))
            for rank in range(size)
        ]
        for child in self.children:
            child.start()

    def _child(self, rank, size, port, work, options):
        torch.set_num_threads(1)
        PartialState._reset_state()  # a Trainer of another test may have made it for one process
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with open(f"{self.folder}-{rank}.txt", "w") as told, contextlib.redirect_stderr(told):
            try:
                dataset = work(self.folder, **options)
                print(f"{len(dataset)} of {dataset.fingerprint['prompts']} prompts", file=told)
            except CollectError as error:
                print(f"CollectError: {error}", file=told, flush=True)
                os._exit(3)

    def end(self):
        """Exit statuses, and what each said."""
        for child in self.children:
            child.join(120)
            assert child.exitcode is not None, "it hangs"
        files = [Path(f"{self.folder}-{rank}.txt") for rank in range(len(self.children))]
        return [child.exitcode for child in self.children], [path.read_text() for path in files]

    def wait_for_a_block(self, number):
        deadline = time.monotonic() + 60
        while not (self.folder / f"block-{number:05d}.jsonl").exists():
            assert all(child.is_alive() for child in self.children), "it ended too early"
            assert time.monotonic() < deadline
            time.sleep(0.002)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    collect(folder)
    return folder


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_collect_what_one_collects(tmp_path, alone, size):
    statuses, told = Run(tmp_path / "run", size).end()
    assert statuses == [0] * size, told
    assert {text.splitlines()[-1] for text in told} == {f"{len(RolloutDataset(alone))} of 20 prompts"}  # in each
    assert contents(tmp_path / "run") == contents(alone)


def slow(log=None):
    """The same reward, some time later."""

    def wait():
        if log is not None:
            with open(log, "a") as file:
                file.write(f"{os.getpid()}\n")
        time.sleep(0.1)

    return Length(wait)


def test_each_takes_a_share_and_scores_it_itself(tmp_path):
    run = Run(tmp_path / "run", 2, reward=slow(tmp_path / "log"))
    assert run.end()[0] == [0, 0]
    calls = (tmp_path / "log").read_text().split()
    assert len(calls) == 10  # no block twice
    assert all(calls.count(str(child.pid)) >= 3 for child in run.children)


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_the_others_say_so_and_the_run_is_resumed_by_any_number(tmp_path, alone, victim):
    run = Run(tmp_path / "run", 2, reward=slow())
    run.wait_for_a_block(2)
    time.sleep(0.05)  # both are scoring
    begin = time.monotonic()
    os.kill(run.children[victim].pid, signal.SIGKILL)
    statuses, told = run.end()
    assert time.monotonic() - begin < 60  # for what it takes the other to finish, not for a time-out
    assert statuses[victim] == -signal.SIGKILL
    assert statuses[1 - victim] == 3
    assert "Another of the 2 processes of this run has ended" in told[1 - victim]
    kept = len(RolloutDataset(tmp_path / "run").rewards)
    assert 0 < kept <= len(RolloutDataset(alone))  # all but the block of the victim, if it had one in hand
    if victim:
        collect(tmp_path / "run")
    else:
        assert Run(tmp_path / "run", 3).end()[0] == [0, 0, 0]
    assert contents(tmp_path / "run") == contents(alone)


def test_a_run_that_one_process_has_begun_is_finished_by_two(tmp_path, alone):
    calls = iter(range(4))

    def interrupt():
        if next(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(tmp_path / "run", Length(interrupt))
    statuses, told = Run(tmp_path / "run", 2).end()
    assert statuses == [0, 0], told
    assert contents(tmp_path / "run") == contents(alone)


def test_a_second_run_is_refused_while_a_group_collects(tmp_path, alone):
    run = Run(tmp_path / "run", 2, reward=slow())
    run.wait_for_a_block(1)
    with pytest.raises(CollectError, match="Another process is writing"):
        collect(tmp_path / "run")
    assert run.end()[0] == [0, 0]
    assert contents(tmp_path / "run") == contents(alone)


def test_processes_that_call_with_other_arguments_are_refused(tmp_path):
    def work(folder):
        return collect(folder, seed=int(os.environ["RANK"]))

    statuses, told = Run(tmp_path / "run", 2, work).end()
    assert statuses == [3, 3]
    assert "seed is 0 there and 1 here" in told[1]
    assert "its own output says why" in told[0]


def test_an_error_in_one_process_ends_the_others_too(tmp_path):
    def bad(completions, **kwargs):
        return [1.0] if os.environ["RANK"] == "1" else Length()(completions)

    bad.__name__ = "length"
    statuses, told = Run(tmp_path / "run", 2, reward=bad).end()
    assert statuses == [3, 3]
    assert "returned 1 rewards for 4 completions" in told[1]
    assert "its own output says why" in told[0]


def test_one_that_never_comes_is_waited_for_no_longer_than_the_patience(tmp_path):
    def work(folder):
        processes.PATIENCE = timedelta(seconds=2)
        if os.environ["RANK"] == "1":
            with Processes("cpu"):
                time.sleep(4)
            raise CollectError("late")
        return collect(folder)

    statuses, told = Run(tmp_path / "run", 2, work).end()
    assert statuses == [3, 3]
    assert "did not come within 0:00:02" in told[0]


def test_sigterm_to_a_group_finishes_the_blocks_in_hand_and_leaves_with_143(tmp_path, alone):
    run = Run(tmp_path / "run", 2, reward=slow())
    run.wait_for_a_block(2)
    for child in run.children:
        os.kill(child.pid, signal.SIGTERM)
    assert run.end()[0] == [143, 143]
    assert not list((tmp_path / "run").glob("*.jsonl.tmp"))
    collect(tmp_path / "run")
    assert contents(tmp_path / "run") == contents(alone)


def test_a_model_that_is_split_over_the_processes_is_refused(tmp_path):
    def work(folder):
        from torch.distributed.tensor import distribute_tensor, init_device_mesh

        model = tiny_model()
        with Processes("cpu"):
            mesh = init_device_mesh("cpu", (2,))
        model.lm_head.weight = torch.nn.Parameter(distribute_tensor(model.lm_head.weight.data, mesh))
        with pytest.raises(ValueError, match="split over the processes"):
            check_own(model)
        check_own(tiny_model())
        return collect(folder)

    statuses, told = Run(tmp_path / "run", 2, work).end()
    assert statuses == [0, 0], told
    model = tiny_model()
    model.lm_head.weight.ds_id = 3  # so DeepSpeed marks them
    with pytest.raises(ValueError, match="Load a whole model in each"):
        check_own(model)


def test_a_process_alone_needs_no_accelerate(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    collect(tmp_path / "alone")
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ImportError, match=r'WORLD_SIZE is 2, .* pip install "hf-recontrol\[train\]"'):
        collect(tmp_path / "shared")


def test_accelerate_that_was_set_up_for_one_process_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.PartialState", lambda cpu: None)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CollectError, match="had been made for one process"):
        collect(tmp_path)


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_rollout_processes import collect
print(f"answers: {{len(collect({folder!r}, progress=True))}}\\n", end="")
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_a_script_under_a_real_launcher(tmp_path, alone, launcher):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "run")))
    module = "accelerate.commands.launch" if launcher == "accelerate" else "torch.distributed.run"
    options = ["--multi_gpu", "--num_processes", "2"] if launcher == "accelerate" else ["--nproc_per_node", "2"]
    ended = subprocess.run(
        [sys.executable, "-m", module, *options, str(script)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        | {"ACCELERATE_USE_CPU": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count(f"answers: {len(RolloutDataset(alone))}") == 2
    assert ended.stderr.count(" 0/40 [") == 1  # one bar
    assert contents(tmp_path / "run") == contents(alone)
