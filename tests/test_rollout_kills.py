"""kill -9 at random moments of processes that commit blocks: none lost, none doubled, none wrong.

The processes are forked from the test, so that one is at work in milliseconds. What is promised is written down by
themselves, in a pipe: a number before each commit, and after it. Kills come at random within the time of some commits,
measured here, so that most fall inside of one.
"""

import json
import os
import random
import signal
import time
import traceback
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from stored import FINGERPRINT, block

from hf_recontrol.rollout_files import MANIFEST, read_folder
from hf_recontrol.rollout_store import RolloutStore


class Store(RolloutStore):
    """The real one."""

    def __init__(self, folder, process=0):
        super().__init__(folder, FINGERPRINT, process=process)

    @staticmethod
    def found(folder):
        """(number, bytes) of each block that the folder says it has; read by hand."""
        lines: list[bytes] = []
        for path in sorted(folder.glob("manifest*.jsonl"), key=lambda path: path.name != MANIFEST):
            own = [line for line in path.read_bytes().split(b"\n")[:-1] if b'"sha256"' in line]
            lines += [line for line in own if line not in lines or path.name == MANIFEST]  # some are being taken over
        for line in map(json.loads, lines):
            yield line["block"], (folder / line["shard"]).read_bytes() + (folder / line["table"]).read_bytes()


class Naive:
    """One file, written anew with each block."""

    def __init__(self, folder, process=0):
        folder.mkdir(exist_ok=True)
        self.path = folder / "rollouts.pt"
        self.blocks = torch.load(self.path)["blocks"] if self.path.exists() else {}

    @property
    def committed(self):
        return self.blocks.keys()

    def commit(self, number, states, offsets, rewards, token_ids, rows):
        self.blocks[number] = (states, offsets, rewards, token_ids)
        torch.save({"blocks": self.blocks, "as large as real ones": torch.zeros(2**20)}, self.path)

    def close(self):
        pass

    @staticmethod
    def found(folder):
        try:
            blocks = Naive(folder).blocks
        except Exception:  # whatever torch makes of half a file
            return
        for number, tensors in blocks.items():
            yield number, b"".join(tensor.numpy().tobytes() for tensor in tensors)


class Child:
    """A forked process that commits the blocks which no other of its group claims, when it may start."""

    def __init__(self, kind, folder, blocks, process, size):
        read, write = os.pipe()
        gate, self.gate = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads: they hold no lock that the child needs
            self.pid = os.fork()
        if self.pid == 0:
            self._work(kind, folder, blocks, process, size, gate, write)
        os.close(write)
        os.close(gate)
        self.pipe, self.told, self.status = read, b"", None

    @staticmethod
    def _work(kind, folder, blocks, process, size, gate, pipe):
        status = 1
        torch.set_num_threads(1)  # OpenMP's other threads were not forked: to wait for them would be for ever
        try:
            store = kind(folder, process)
            there = set(store.committed) if size == 1 else {line.block for line in read_folder(folder)[1]}
            os.write(pipe, b"open ")
            os.read(gate, 1)
            for number in blocks:
                if number not in there and (size == 1 or store.claim(number)):
                    arguments = block(number)
                    os.write(pipe, b"%d " % number)
                    store.commit(*arguments)
                    os.write(pipe, b"%d! " % number)
            store.close()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def wait_until(self, told):
        while told not in self.told and (more := os.read(self.pipe, 100)):
            self.told += more

    def start(self):
        with suppress(BrokenPipeError):  # it died while opening
            os.write(self.gate, b"x")

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        return self.end()

    def end(self):
        """What it has begun and acknowledged; whether it ended by itself, and how."""
        while more := os.read(self.pipe, 10_000):
            self.told += more
        os.close(self.pipe)
        os.close(self.gate)
        self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        words = self.told.split()
        acknowledged = {int(word[:-1]) for word in words if word.endswith(b"!")}
        return acknowledged, bool(words) and words[-1].isdigit()


def commit_time(kind, folder):
    """Seconds, of the middle one of nine."""
    store, times = kind(folder), []
    for number in range(9):
        begin = time.perf_counter()
        store.commit(*block(number))
        times.append(time.perf_counter() - begin)
    store.close()
    return sorted(times)[4]


def killed(kind, folder, kills, sizes=(1,), seed=0):
    """Kill collectors of a run of many blocks, resume it each time, complete it; what came out, counted."""
    chance = random.Random(seed)
    typical = commit_time(kind, folder / "timed")
    expected = unbroken(
        kind, folder / "unbroken", (5 if max(sizes) == 1 else 12) * kills
    )  # more than are made before the last kill
    folder, acknowledged = folder / "killed", set()
    counts = {"kills": 0, "inside a commit": 0, "while opening": 0, "lost": 0, "duplicated": 0, "wrong": 0}

    def check():
        found = list(kind.found(folder))
        numbers = {number for number, _ in found}
        counts["lost"] += len(acknowledged - numbers)
        counts["duplicated"] += len(found) - len(numbers)
        counts["wrong"] += sum(expected[number] != data for number, data in found)
        return numbers

    while counts["kills"] < kills and not counts["lost"]:
        size = chance.choice(sizes)
        children = [Child(kind, folder, expected, 0, size)]
        opening = chance.random() < 0.2
        if not opening:
            children[0].wait_until(b"open ")
            children += [Child(kind, folder, expected, process, size) for process in range(1, size)]
            for child in children[1:]:
                child.wait_until(b"open ")
            for child in children:
                child.start()
        for child in chance.sample(children, len(children)):
            if size == 1 and not opening and chance.random() < 0.5:  # the others would meanwhile do all there is
                child.wait_until(b"!")  # a first commit can take many times as long as the ones that were timed
            time.sleep(chance.uniform(0, typical if opening else 2.5 * typical))
            promised, inside = child.kill()
            if child.status == 1:
                counts["lost"] += len(expected)  # it could not open what was left, and nobody ever will
                return counts
            acknowledged |= promised
            counts["kills"] += child.status == -signal.SIGKILL
            counts["inside a commit"] += inside
            counts["while opening"] += b"open" not in child.told
        if folder.exists():
            check()
    last = Child(kind, folder, expected, 0, 1)
    last.start()
    acknowledged |= last.end()[0]
    counts["lost"] += len(expected.keys() - check()) if last.status == 0 else len(expected)
    return counts


def unbroken(kind, folder, blocks):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)  # nobody cuts this one off
        store = kind(folder)
        for number in range(blocks):
            store.commit(*block(number))
        store.close()
    return dict(kind.found(folder))


def sound(counts, kills):
    print(counts)  # pytest -rP shows it
    assert (counts["lost"], counts["duplicated"], counts["wrong"]) == (0, 0, 0), counts
    assert counts["kills"] >= kills
    assert counts["inside a commit"] >= counts["kills"] / 4, f"the test says little: {counts}"


def test_50_kills_lose_nothing_double_nothing_and_spoil_nothing(tmp_path):
    sound(killed(Store, tmp_path, 50), 50)
    assert not list((tmp_path / "killed").glob("*.tmp"))
    assert not list((tmp_path / "killed").glob("*.bad"))


def test_30_kills_in_groups_of_changing_size_lose_nothing_double_nothing_and_spoil_nothing(tmp_path):
    sound(killed(Store, tmp_path, 30, sizes=(1, 2, 3)), 30)
    assert [path.name for path in (tmp_path / "killed").glob("manifest*")] == [MANIFEST]


@pytest.mark.soak
@pytest.mark.parametrize("sizes", [(1,), (1, 2, 3)])
def test_300_kills(tmp_path, sizes):
    sound(killed(Store, tmp_path, 300, sizes, seed=1), 300)


def test_the_naive_way_fails_here(tmp_path):
    assert killed(Naive, tmp_path, 50)["lost"] > 0


def test_a_commit_told_before_its_line_is_on_the_disk_fails_here(tmp_path):
    class Hasty(Store):
        """The line comes with the next commit, or at the end."""

        line = None

        def _append(self, line):
            held, self.line = self.line, line if "block" in line else None
            for now in (held, None if self.line else line):
                if now:
                    super()._append(now)

        def close(self):
            if self.line:
                super()._append(self.line)
            super().close()

    assert killed(Hasty, tmp_path, 80)["lost"] > 0


def test_two_lines_for_a_block_fail_here(tmp_path):
    class Twice(Store):
        def _append(self, line):
            super()._append(line)
            if line.get("block", 1) % 2 == 0:
                super()._append(line)

    assert killed(Twice, tmp_path, 10)["duplicated"] > 0


def test_the_folder_of_a_killed_run_is_that_of_an_unbroken_one(tmp_path: Path):
    killed(Store, tmp_path, 10)
    names = {folder: sorted(path.name for path in (tmp_path / folder).iterdir()) for folder in ("killed", "unbroken")}
    assert names["killed"] == names["unbroken"]
    one, other = ((tmp_path / folder / MANIFEST).read_bytes() for folder in ("killed", "unbroken"))
    assert one == other
