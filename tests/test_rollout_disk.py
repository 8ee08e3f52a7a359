"""Disks that fill up, break and lose power: what was acknowledged stays, and a run can be resumed exactly."""

import errno
import itertools
import os
import random
import shutil
import subprocess

import pytest
from faulty_disk import Disk, PowerCut
from stored import FINGERPRINT, block, contents, write

from hf_recontrol import disk
from hf_recontrol.errors import CollectError
from hf_recontrol.rollout_dataset import RolloutDataset
from hf_recontrol.rollout_store import RolloutStore

BLOCKS, TWO = range(3), range(2)


def whole_folder(tmp_path_factory, blocks):
    folder = tmp_path_factory.mktemp("whole")
    write(folder, *blocks)
    return contents(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return whole_folder(tmp_path_factory, BLOCKS)


@pytest.fixture(scope="module")
def whole_two(tmp_path_factory):
    return whole_folder(tmp_path_factory, TWO)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A group was killed in it: blocks 0 and 1 are committed in two manifests, of block 2 there is a half."""
    folder = tmp_path_factory.mktemp("begun") / "rollouts"
    with RolloutStore(folder, FINGERPRINT) as first, RolloutStore(folder, FINGERPRINT, process=1) as second:
        first.commit(*block(0))
        second.commit(*block(1))
    (folder / "block-00002.jsonl.tmp").write_bytes(b"half")
    return folder


class Fault:
    """The n-th operation fails, or, being a write to a full disk, does half of its work, and the next one fails."""

    def __init__(self, at, number):
        self.at, self.number, self.seen = at, number, []

    def __call__(self, name, path, *arguments):
        self.seen.append(name)
        if len(self.seen) - 1 != self.at:
            return None
        if name == "write" and self.number == errno.ENOSPC and len(arguments[0]) > 1:
            self.at += 1
            return (arguments[0][: len(arguments[0]) // 2],)
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("start", ["new", "begun"])
def test_a_fault_at_any_file_operation_is_a_collect_error_and_costs_nothing(tmp_path, begun, whole, start, number):
    seen = set()
    for at in itertools.count():
        folder = tmp_path / str(at) / "rollouts"
        if start == "begun":
            shutil.copytree(begun, folder)
        errors = []

        def twice(function, *arguments, failures=errors):
            try:
                return function(*arguments)
            except CollectError as failure:
                failures.append(failure)
                return function(*arguments)

        with Disk(tmp_path, fault := Fault(at, number)):
            store = twice(RolloutStore, folder, FINGERPRINT)
            assert start == "new" or {0, 1} <= store.committed
            for missing in sorted(set(BLOCKS) - store.committed):
                twice(store.commit, *block(missing))
            twice(store.close)
        seen |= set(fault.seen)
        assert contents(folder) == whole
        shutil.rmtree(folder)
        if at >= len(fault.seen):
            break
        (error,) = errors
        assert isinstance(error.__cause__, OSError)
        assert error.__cause__.errno == number
        assert "Earlier blocks are kept: make room or mend the disk, and call again" in str(error)
    expected = {"close", "create", "flock", "fsync", "listdir", "open", "replace", "stat", "truncate", "write"}
    assert expected | ({"mkdir"} if start == "new" else {"unlink", "readinto"}) <= seen
    assert at > 50


def test_a_run_that_ends_at_the_fault_is_resumed_exactly(tmp_path, begun, whole):
    for at in itertools.count():
        folder = tmp_path / str(at)
        shutil.copytree(begun, folder)
        with Disk(tmp_path, fault := Fault(at, errno.EIO)):
            try:
                write(folder, 2)
            except CollectError:
                pass
            else:
                break
        with RolloutStore(folder, FINGERPRINT) as store:
            assert {0, 1} <= store.committed
            for missing in set(BLOCKS) - store.committed:
                store.commit(*block(missing))
        assert contents(folder) == whole
    assert at == len(fault.seen)


class Killed(BaseException):
    """As SIGKILL: nothing is done any more."""


def run(folder, before, told):
    """Commit what is missing, and tell what is acknowledged."""
    with Disk(folder.parents[1], before):
        store = RolloutStore(folder, FINGERPRINT)
        told(store.committed)
        for number in set(TWO) - store.committed:
            store.commit(*block(number))
            told({number})
        store.close()


def run_group(folder, before, told):
    """The same by two processes, each a block, until Killed."""
    with Disk(folder.parents[1], before):
        stores = [RolloutStore(folder, FINGERPRINT, process=process) for process in TWO]
        for number, store in enumerate(stores):
            store.commit(*block(number))
            told({number})
        stores[1].close()
        stores[0].take_over()
        stores[0].close()


def power_cuts(tmp_path, whole_two, seed=0):
    """Kill a group at every operation, cut the power there or in the run that resumes it; what was lost, counted."""
    chance, counts = random.Random(seed), {"cuts": 0, "lost": 0, "wrong": 0}

    def cut(model, root, acknowledged, modes):
        for mode in modes:
            counts["cuts"] += 1
            target = tmp_path / "after"
            model.lay_out(root, target, chance, mode)
            with Disk(tmp_path, lambda *operation: None):
                try:
                    with RolloutStore(target / "a" / "rollouts", FINGERPRINT) as store:
                        counts["lost"] += len(acknowledged - store.committed)
                        for number in set(TWO) - store.committed:
                            store.commit(*block(number))
                    counts["wrong"] += contents(target / "a" / "rollouts") != whole_two
                except (CollectError, UserWarning):
                    counts["lost"] += len(acknowledged)
            shutil.rmtree(target)

    for at in itertools.count():
        if counts["lost"]:
            return counts
        root = tmp_path / "before"
        model, steps, acknowledged = PowerCut(root), itertools.count(), set()
        root.mkdir()

        def before(name, path, *arguments, model=model, steps=steps, at=at):
            if next(steps) == at:
                raise Killed
            model(name, path, *arguments)

        try:
            run_group(root / "a" / "rollouts", before, acknowledged.update)
        except Killed:
            pass
        else:
            return counts
        cut(model, root, acknowledged, ("none", "all", "chance", "chance"))

        def told(numbers, model=model, root=root, acknowledged=acknowledged):
            acknowledged.update(numbers)
            cut(model, root, acknowledged, ("none", "chance"))

        run(root / "a" / "rollouts", model, told)
        shutil.rmtree(root)


def test_a_power_cut_at_any_moment_loses_nothing_acknowledged(tmp_path, whole_two):
    counts = power_cuts(tmp_path, whole_two)
    print(counts)  # pytest -rP shows it
    assert (counts["lost"], counts["wrong"]) == (0, 0)
    assert counts["cuts"] > 300


def test_without_the_syncs_a_power_cut_loses_what_was_acknowledged(tmp_path, whole_two, monkeypatch):
    def unsynced(path, data):
        unfinished = path.with_name(f"{path.name}.tmp")
        with open(unfinished, "wb", buffering=0) as file:
            file.write(data)
        os.replace(unfinished, path)

    harms = [
        ("hf_recontrol.rollout_store.sync_folder", lambda folder: None),
        ("hf_recontrol.disk.sync_folder", lambda folder: None),
        ("hf_recontrol.rollout_store.write_file", unsynced),
        ("hf_recontrol.rollout_store.RolloutStore._take_over", lambda store: None),  # where opening syncs the manifest
    ]
    for number, (place, harm) in enumerate(harms):
        folder = tmp_path / str(number)
        folder.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(place, harm)
            counts = power_cuts(folder, whole_two)
        assert counts["lost"] > 0, place


def test_one_write_may_take_a_part_only(tmp_path, whole):
    def pieces(name, path, *arguments):
        return (arguments[0][:100],) if name == "write" else None

    with Disk(tmp_path, pieces):
        write(tmp_path / "a", *BLOCKS)
    assert contents(tmp_path / "a") == whole


def test_a_file_that_takes_nothing_is_no_endless_loop(tmp_path):
    with (
        Disk(tmp_path, lambda name, path, *data: (b"",) if name == "write" else None),
        pytest.raises(CollectError, match="bytes were not written"),
    ):
        write(tmp_path / "a", 0)


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path):
    def before(name, path, *arguments):
        if name == "fsync" and os.path.isdir(path):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    with Disk(tmp_path, before):
        write(tmp_path / "a", 0)
    assert len(RolloutDataset(tmp_path / "a")) == 2
    with Disk(tmp_path, before), pytest.raises(OSError, match="No such file"):
        disk.sync_folder(tmp_path / "b")


def commit_all(store, numbers, lengths):
    for number in numbers:
        store.commit(*block(number, lengths=lengths))


@pytest.fixture
def small_disk(tmp_path):
    """A real one, of 256 KiB."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_on_a_disk_that_is_really_full_a_run_stops_and_goes_on_when_there_is_room(small_disk, tmp_path):
    lengths, numbers = (300, 0, 200), range(8)
    write(tmp_path / "whole", *numbers, lengths=lengths)
    (small_disk / "ballast").write_bytes(bytes(120_000))
    folder = small_disk / "rollouts"
    with RolloutStore(folder, FINGERPRINT) as store:
        with pytest.raises(CollectError, match=r"Writing block \d .* No space left on device.* make room"):
            commit_all(store, numbers, lengths)
        kept = store.committed
        assert 0 < len(kept) < 8
        (small_disk / "ballast").unlink()
        commit_all(store, sorted(set(numbers) - kept), lengths)
    assert contents(folder) == contents(tmp_path / "whole")
