"""Two processes, really: they train the head that one process would, and end together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_processes
from tiny import tiny_model, tiny_tokenizer

from hf_recontrol import ValueHead, collect_rollouts
from hf_recontrol.checkpoints import newest_complete_checkpoint

pytestmark = pytest.mark.versions
SCRIPT = Path(two_processes.__file__)
KINDS = list(two_processes.HEADS)


def in_two_processes(folder):
    """The finished run of two_processes.py."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run([*command, SCRIPT, folder], env=environment, capture_output=True, text=True, timeout=180)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rollouts of 94 prompts: neither 71 nor 23, nor two of each, is a multiple of a batch."""
    folder = tmp_path_factory.mktemp("distributed")
    prompts = [f"w{3 + i % 60} w{3 + i // 60}" for i in range(94)]

    options = {"max_new_tokens": 8, "progress": False, "num_return_sequences": 2}
    collect_rollouts(tiny_model(), tiny_tokenizer(), prompts, two_processes.sevens, folder / "rollouts", **options)
    return folder


@pytest.fixture(scope="module")
def ends(folder):
    """What the two processes, and one alone, ended with: {kind: [process 0, process 1, alone]}."""
    run = in_two_processes(folder)
    assert "exitcode  : 143" in run.stderr, run.stderr[-3000:]  # the last run was to end so
    for kind in KINDS:
        two_processes.report(folder, kind, two_processes.train(folder, kind))
    names = ("2-0", "2-1", "1-0")
    return {kind: [json.loads((folder / f"{kind}-{name}.json").read_text()) for name in names] for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_the_head_of_one(ends, kind):
    first, second, alone = ends[kind]
    assert first["weights"] == second["weights"]
    for name, weights in alone["weights"].items():
        torch.testing.assert_close(torch.tensor(first["weights"][name]), torch.tensor(weights), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_their_metrics_and_curves_are_those_of_one(ends, kind):
    first, second, alone = (end["info"] for end in ends[kind])
    assert first["evaluation"] == second["evaluation"]
    for name in [name for name, found in alone["evaluation"].items() if isinstance(found, list)]:
        assert first["evaluation"].pop(name) == pytest.approx(alone["evaluation"].pop(name), abs=1e-3)
    assert first["evaluation"] == pytest.approx(alone["evaluation"], rel=1e-3, abs=1e-4)
    assert first["training"] == alone["training"]
    assert [step for step, _ in first["curves"]["loss"]] == [10, 20, 30, 40, 50]
    losses = [[loss for _, loss in end["curves"]["loss"]] for end in (first, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_all_processes_end_with_the_same_calibration(ends, kind):
    first, second, alone = ends[kind]
    assert first["control"] == second["control"]
    assert first["control"]["strength"] == 0.1
    assert first["info"]["calibration"] == second["info"]["calibration"] == alone["info"]["calibration"]
    tables = [dict(end["control"]["calibration"]) for end in (first, alone)]
    assert tables[0] == pytest.approx(tables[1], rel=0.02)


def test_a_sigterm_to_one_process_ends_all_with_one_checkpoint(folder, ends):
    checkpoint = Path(newest_complete_checkpoint(folder / "terminated-2"))
    assert checkpoint.name == "checkpoint-9"  # told in step 8, when all had begun it
    ValueHead.from_pretrained(checkpoint)


def test_rounds_in_two_processes_are_those_of_one(ends, folder):
    alone = two_processes.in_rounds(folder)
    together = ValueHead.from_pretrained(folder / "rounds-2" / "head-2")
    for name, weights in alone.state_dict().items():
        torch.testing.assert_close(together.state_dict()[name], weights, rtol=0, atol=1e-5)
    curves = [(folder / f"rounds-{world}" / "iterations.jsonl").read_text().splitlines() for world in (1, 2)]
    rewards = [[json.loads(line)["reward"] for line in lines] for lines in curves]
    assert len(rewards[0]) == 2
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-6)
