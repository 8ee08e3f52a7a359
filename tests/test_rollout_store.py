"""The folder of rollouts: what is committed stays, what is not is made again, and nothing is mixed up."""

import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import signal
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stored import FINGERPRINT, block, contents, write
from torch.utils.data import ConcatDataset

from hf_recontrol.errors import CollectError
from hf_recontrol.head_hub import package_version
from hf_recontrol.rollout_dataset import RolloutDataset
from hf_recontrol.rollout_files import MANIFEST
from hf_recontrol.rollout_store import RolloutStore


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_committed_is_read_back_in_its_dtype(tmp_path, dtype):
    write(tmp_path, 0, 1, dtype=dtype)
    dataset = RolloutDataset(tmp_path)
    assert (len(dataset), dataset.hidden_size, dataset.dtype) == (4, 4, dtype)  # the empty answers are not in it
    _, states, _, _, token_ids, _ = block(1, dtype=dtype)
    torch.testing.assert_close(dataset[3]["hidden_states"], states[3:], rtol=0, atol=0)
    torch.testing.assert_close(dataset[3]["token_ids"], token_ids[3:], rtol=0, atol=0)
    assert dataset[3]["reward"].dtype == torch.float32
    assert (dataset[3]["finish_reason"], dataset[3]["prompt_id"]) == ("eos", 1)
    assert dataset.rewards.tolist() == [float(dataset[i]["reward"]) for i in range(4)] == [0, 2, 10, 12]
    assert dataset.lengths.tolist() == [3, 2, 3, 2]
    assert dataset.fingerprint == FINGERPRINT
    assert [row["completion"] for row in dataset.rows()] == ["0", "1", "2"] * 2  # the empty ones are in the table


def test_the_files_are_as_documented(tmp_path):
    write(tmp_path, 0)
    assert sorted(contents(tmp_path)) == ["block-00000.jsonl", "block-00000.safetensors", "manifest.jsonl"]
    header, line = map(json.loads, (tmp_path / "manifest.jsonl").read_text().splitlines())
    assert header == {"format_version": 1, "hf_recontrol_version": package_version(), "fingerprint": FINGERPRINT}
    digest = hashlib.sha256((tmp_path / "block-00000.safetensors").read_bytes()).hexdigest()
    table = hashlib.sha256((tmp_path / "block-00000.jsonl").read_bytes()).hexdigest()
    assert line == {
        "block": 0,
        "shard": "block-00000.safetensors",
        "sha256": digest,
        "table": "block-00000.jsonl",
        "table_sha256": table,
        "answers": 3,
        "tokens": 5,
        "not_finite": 0,
    }


def test_the_order_of_commits_does_not_matter(tmp_path):
    write(tmp_path / "a", 0, 1, 2)
    write(tmp_path / "b", 2, 0, 1)
    for one, other in zip(RolloutDataset(tmp_path / "a"), RolloutDataset(tmp_path / "b"), strict=True):
        assert one["reward"] == other["reward"]
        torch.testing.assert_close(one["hidden_states"], other["hidden_states"], rtol=0, atol=0)


def test_a_store_opened_again_knows_what_is_committed_and_goes_on(tmp_path):
    write(tmp_path, 0, 2)
    with RolloutStore(tmp_path, FINGERPRINT) as store:
        assert store.committed == {0, 2}
        with pytest.raises(CollectError, match=r"Block 2 is in .* already"):
            store.commit(*block(2))
        store.commit(*block(1))
    assert len(RolloutDataset(tmp_path)) == 6


def test_a_folder_in_which_nothing_was_committed_may_be_begun_with_other_settings(tmp_path):
    RolloutStore(tmp_path, FINGERPRINT | {"seed": 99}).close()
    with RolloutStore(tmp_path, FINGERPRINT) as store:
        store.commit(*block(0))
    assert RolloutDataset(tmp_path).fingerprint == FINGERPRINT


def test_another_fingerprint_is_refused_and_the_fields_are_named(tmp_path):
    write(tmp_path, 0)
    before = contents(tmp_path)
    other = {"seed": 1, "hidden_size": 4, "generation": {"temperature": 0.7}, "extra": True}
    with pytest.raises(
        CollectError, match=r"generation\.temperature is 1.0 there and 0.7 here; seed is 0 there and 1 here"
    ):
        RolloutStore(tmp_path, other)
    with pytest.raises(CollectError, match="extra is None there and True here"):
        RolloutStore(tmp_path, other)
    assert contents(tmp_path) == before


def test_every_cut_of_the_manifest_leaves_whole_blocks_only(tmp_path):
    write(tmp_path, 0, 1)
    manifest = tmp_path / "manifest.jsonl"
    whole = manifest.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(0, len(whole) + 1, 29):
        manifest.write_bytes(whole[:cut])
        with RolloutStore(tmp_path, FINGERPRINT) as store:
            assert store.committed == set(range(sum(end <= cut for end in ends[1:])))
            for number in {0, 1} - store.committed:
                store.commit(*block(number))
        assert manifest.read_bytes() == whole


def test_unfinished_files_are_removed_and_foreign_ones_kept_and_reported(tmp_path, caplog):
    write(tmp_path, 0)
    for unfinished in ("block-00001.safetensors.tmp", "block-00002.jsonl.tmp", "block-00003.claim.tmp"):
        (tmp_path / unfinished).write_bytes(b"half")
    foreign = ["block-notes.tmp", "manifest-old.jsonl", "notes.txt"]
    for name in (*foreign, ".DS_Store"):
        (tmp_path / name).write_text("mine")
    write(tmp_path, 1)
    assert not list(tmp_path.glob("block-0*.tmp"))
    assert all((tmp_path / name).read_text() == "mine" for name in (*foreign, ".DS_Store"))
    assert [record.getMessage() for record in caplog.records if record.name == "hf_recontrol.rollout_store"] == [
        f"{tmp_path} has files that are no rollouts, and stay as they are: {foreign}"
    ]
    assert len(RolloutDataset(tmp_path)) == 4


@pytest.mark.parametrize("name", ["block-00001.safetensors", "block-00001.jsonl"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_file_is_named_by_readers_and_set_aside_by_writers_who_make_its_block_again(tmp_path, name, harm):
    write(tmp_path, 0, 1, 2)
    whole = contents(tmp_path)
    data = bytearray(whole[name])
    data[len(data) // 2] ^= 1
    data = bytes(data if harm == "flip" else data[:-1])
    (tmp_path / name).unlink()
    if harm != "remove":
        (tmp_path / name).write_bytes(data)
    with pytest.raises(CollectError, match=r"blocks \[1\] .* collect_rollouts again"):
        RolloutDataset(tmp_path)
    kept = [] if harm == "remove" else [f"{name}.bad"]
    with pytest.warns(UserWarning, match=rf"blocks \[1\] .* kept as {re.escape(str(kept))}"):
        store = RolloutStore(tmp_path, FINGERPRINT)
    with store:
        assert store.committed == {0, 2}
        store.commit(*block(1))
    assert len(RolloutDataset(tmp_path)) == 6  # not 8: of two lines for a block the last counts
    assert {n: b for n, b in contents(tmp_path).items() if n != MANIFEST} == {
        **{n: b for n, b in whole.items() if n != MANIFEST},
        **dict.fromkeys(kept, data),
    }


def test_files_set_aside_are_numbered_and_never_overwritten(tmp_path):
    write(tmp_path, 0)
    shard = tmp_path / "block-00000.safetensors"
    for harm in (b"one", b"two", b"three"):
        shard.write_bytes(harm)
        with pytest.warns(UserWarning, match="made anew"):
            write(tmp_path, 0)
    aside = {name: data for name, data in contents(tmp_path).items() if ".bad" in name}
    assert aside == {f"{shard.name}.bad": b"one", f"{shard.name}.bad2": b"two", f"{shard.name}.bad3": b"three"}


def test_a_file_damaged_under_an_open_store_is_found_after_a_commit_that_failed(tmp_path, monkeypatch):
    with RolloutStore(tmp_path, FINGERPRINT) as store:
        store.commit(*block(0))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", _broken)
            with pytest.raises(CollectError, match="Input/output error"):
                store.commit(*block(1))
        (tmp_path / "block-00000.jsonl").write_bytes(b"what a broken disk left")
        with pytest.warns(UserWarning, match=r"blocks \[0\]"):
            store.commit(*block(1))
        assert store.committed == {1}
        store.commit(*block(0))
    assert len(RolloutDataset(tmp_path)) == 4


def _broken(file):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("line", [b"", b"{}", b"[]", b"null", b'{"block": 0}', b"\xff", b"[" * 100_000])
def test_a_damaged_line_inside_the_manifest_is_an_error(tmp_path, line):
    write(tmp_path, 0, 1)
    lines = (tmp_path / "manifest.jsonl").read_bytes().split(b"\n")
    for place in (0, 1):
        (tmp_path / "manifest.jsonl").write_bytes(b"\n".join([*lines[:place], line, *lines[place + 1 :]]))
        for opening in (lambda: RolloutStore(tmp_path, FINGERPRINT), lambda: RolloutDataset(tmp_path)):
            with pytest.raises(CollectError, match=r"manifest\.jsonl is damaged"):
                opening()


def test_a_manifest_cannot_name_files_elsewhere(tmp_path):
    write(tmp_path, 0)
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace("block-00000.jsonl", "../../secrets"))
    with pytest.raises(CollectError, match="no block is ever written there"):
        RolloutDataset(tmp_path)


def test_another_format_version_is_refused(tmp_path):
    write(tmp_path, 0)
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(CollectError, match="format_version 2; this release of hf_recontrol reads 1"):
        RolloutDataset(tmp_path)


def test_a_folder_without_rollouts_is_refused(tmp_path):
    with pytest.raises(CollectError, match=r"manifest\.jsonl does not exist"):
        RolloutDataset(tmp_path)
    RolloutStore(tmp_path, FINGERPRINT).close()
    with pytest.raises(CollectError, match="no committed block yet"):
        RolloutDataset(tmp_path)


def test_blocks_that_do_not_fit_together_are_refused_and_nothing_is_written(tmp_path):
    number, states, offsets, rewards, token_ids, rows = block(0)
    with RolloutStore(tmp_path, FINGERPRINT) as store:
        before = contents(tmp_path)
        for wrong in (
            (number, states[:-1], offsets, rewards, token_ids, rows),
            (number, states, offsets[:-1], rewards, token_ids, rows),
            (number, states, offsets + 1, rewards, token_ids, rows),
            (number, states, offsets.int(), rewards, token_ids, rows),
            (number, states, offsets, rewards[:-1], token_ids, rows),
            (number, states, offsets, rewards, token_ids.float(), rows),
            (number, states.long(), offsets, rewards, token_ids, rows),
            (number, states, offsets, rewards, token_ids, rows[:-1]),
        ):
            with pytest.raises(CollectError, match=r"Block 0 has . rows, hidden_states .*; expected are float"):
                store.commit(*wrong)
        with pytest.raises(CollectError, match="not finite"):
            store.commit(
                number, states.clone().index_fill_(0, torch.tensor([2]), torch.inf), offsets, rewards, token_ids, rows
            )
        with pytest.raises(CollectError, match="beyond float32"):
            store.commit(number, states, offsets, rewards.double() + 1e300, token_ids, rows)
        with pytest.raises(CollectError, match="Row 0 of block 0 must be plain JSON"):
            store.commit(number, states, offsets, rewards, token_ids, [{**rows[0], "extra": float("nan")}, *rows[1:]])
        assert contents(tmp_path) == before


def test_an_answer_without_a_reward_is_in_the_table_only(tmp_path):
    number, states, offsets, _, token_ids, rows = block(0)
    with RolloutStore(tmp_path, FINGERPRINT) as store:
        store.commit(number, states, offsets, torch.tensor([torch.nan, 1.0, 2.0]), token_ids, rows)
    dataset = RolloutDataset(tmp_path)
    assert dataset.rewards.tolist() == [2.0]
    assert len(list(dataset.rows())) == 3


def test_a_half_written_line_does_not_spoil_the_next(tmp_path, monkeypatch):
    with RolloutStore(tmp_path, FINGERPRINT) as store:
        store._manifest.write(b'{"block": 0, "sha')  # as a disk that got full in the middle of it leaves it
        store.commit(*block(0))
    assert len(RolloutDataset(tmp_path)) == 2


def test_a_second_writer_of_a_folder_is_refused_until_the_first_lets_go(tmp_path):
    context = multiprocessing.get_context("fork")
    opened = context.Event()
    other = context.Process(target=_hold_open, args=(tmp_path, opened))
    other.start()
    assert opened.wait(20)
    with pytest.raises(CollectError, match="Another process is writing"):
        RolloutStore(tmp_path, FINGERPRINT)
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    RolloutStore(tmp_path, FINGERPRINT).close()


def _hold_open(folder, opened):
    with RolloutStore(folder, FINGERPRINT):
        opened.set()
        time.sleep(60)


@settings(max_examples=25, deadline=None)
@given(fraction=st.floats(0.01, 0.99), seed=st.integers(0, 5))
def test_a_split_puts_each_prompt_on_one_side(split_folder, fraction, seed):
    dataset = RolloutDataset(split_folder, verify=False)
    train, evaluation = dataset.split(fraction, seed)
    sides = [{row["prompt"] for row in side.rows()} for side in (train, evaluation)]
    assert not sides[0] & sides[1]
    assert all(sides)
    assert len(train) + len(evaluation) == len(dataset)
    assert sorted([*train.rewards.tolist(), *evaluation.rewards.tolist()]) == sorted(dataset.rewards.tolist())
    assert [float(train[i]["reward"]) for i in range(len(train))] == train.rewards.tolist()
    assert len(sides[1]) == min(max(1, round(fraction * 10)), 9)


@pytest.fixture(scope="module")
def split_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    write(folder, *range(10))
    return folder


def test_a_split_depends_on_the_seed_alone(split_folder):
    dataset = RolloutDataset(split_folder)
    assert dataset.split(0.3, 1)[1].rewards.tolist() == RolloutDataset(split_folder).split(0.3, 1)[1].rewards.tolist()
    assert any(
        dataset.split(0.3, 0)[1].rewards.tolist() != dataset.split(0.3, s)[1].rewards.tolist() for s in range(1, 5)
    )


def test_equal_texts_with_two_ids_stay_on_one_side(tmp_path):
    with RolloutStore(tmp_path, FINGERPRINT) as store:
        for number in range(8):
            arguments = block(number)
            for row in arguments[-1]:
                row["prompt"] = [{"role": "user", "content": f"text {number % 4}"}]
            store.commit(*arguments)
    for seed in range(5):
        train, evaluation = RolloutDataset(tmp_path).split(0.25, seed)
        texts = [{row["prompt"][0]["content"] for row in side.rows()} for side in (train, evaluation)]
        assert (len(texts[0]), len(texts[1])) == (3, 1)


def test_a_split_that_leaves_a_side_empty_is_refused(split_folder, tmp_path):
    for fraction in (0, 1, -0.5, 2):
        with pytest.raises(ValueError, match="Give a fraction between 0 and 1"):
            RolloutDataset(split_folder).split(fraction)
    write(tmp_path, 0)
    with pytest.raises(ValueError, match="of 1 different prompts"):
        RolloutDataset(tmp_path).split(0.5)


def test_an_item_owns_its_memory(tmp_path):
    write(tmp_path, 0, lengths=(3, 500))
    item = RolloutDataset(tmp_path)[0]
    assert item["hidden_states"].untyped_storage().nbytes() == 3 * 4 * 4  # not the shard's


def test_states_stay_on_the_disk_until_they_are_read(tmp_path):
    number, _, offsets, rewards, token_ids, rows = block(0, lengths=(40_000,))
    with RolloutStore(tmp_path, FINGERPRINT) as store:  # 80 MB
        store.commit(number, torch.zeros(40_000, 512), offsets, rewards, token_ids, rows)

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    before = resident()
    dataset = RolloutDataset(tmp_path)
    assert resident() - before < 20e6
    assert len(dataset[0]["hidden_states"]) == 40_000
    assert resident() - before > 60e6  # the measure can see it


def test_datasets_concatenate_and_travel_to_workers(tmp_path):
    write(tmp_path / "a", 0)
    write(tmp_path / "b", 1)
    both = ConcatDataset([RolloutDataset(tmp_path / "a"), RolloutDataset(tmp_path / "b")])
    expected = [0.0, 2.0, 10.0, 12.0]
    assert [float(item["reward"]) for item in both] == expected
    sent = pickle.dumps(both)  # as a DataLoader sends it to its workers
    assert [float(item["reward"]) for item in pickle.loads(sent)] == expected
    assert len(sent) < 4000  # no states in it


def test_the_processes_of_a_group_have_a_manifest_each_and_readers_see_all_of_them(tmp_path):
    with RolloutStore(tmp_path, FINGERPRINT) as first, RolloutStore(tmp_path, FINGERPRINT, process=1) as second:
        first.commit(*block(2))
        second.commit(*block(0))
        assert (first.committed, second.committed) == ({2}, {0})
        dataset = RolloutDataset(tmp_path)
        assert dataset.rewards.tolist() == [0, 2, 20, 22]
        second.close()
        first.take_over()
        assert first.committed == {0, 2}
    assert not (tmp_path / "manifest-00001.jsonl").exists()
    assert RolloutDataset(tmp_path).rewards.tolist() == dataset.rewards.tolist()


def test_what_a_killed_group_has_committed_is_taken_over_at_the_next_opening(tmp_path):
    with RolloutStore(tmp_path, FINGERPRINT) as first:
        for process in (1, 2):
            with RolloutStore(tmp_path, FINGERPRINT, process=process) as other:
                other.commit(*block(process))
        first.commit(*block(0))
    with open(tmp_path / "manifest-00002.jsonl", "ab") as manifest:
        manifest.write(b'{"block": 7, "sh')  # killed in the middle of a line
    (tmp_path / "manifest-00003.jsonl").write_bytes(b'{"format_ver')  # and of the first
    assert len(RolloutDataset(tmp_path)) == 6
    with RolloutStore(tmp_path, FINGERPRINT) as store:
        assert store.committed == {0, 1, 2}
    assert sorted(tmp_path.glob("manifest*")) == [tmp_path / MANIFEST]
    assert len(RolloutDataset(tmp_path)) == 6


def test_a_second_run_is_refused_while_any_process_of_a_group_lives(tmp_path):
    with RolloutStore(tmp_path, FINGERPRINT) as first:
        second = RolloutStore(tmp_path, FINGERPRINT, process=1)
        with pytest.raises(CollectError, match="Another process is writing"):
            RolloutStore(tmp_path, FINGERPRINT)
        with pytest.raises(CollectError, match="Another process is writing"):
            RolloutStore(tmp_path, FINGERPRINT, process=1)
        first.close()
        with pytest.raises(CollectError, match="Another process is writing"):
            RolloutStore(tmp_path, FINGERPRINT)
        with pytest.raises(CollectError, match="Process 2 found no first process"):
            RolloutStore(tmp_path, FINGERPRINT, process=2)
        second.close()
    RolloutStore(tmp_path, FINGERPRINT).close()


def test_another_process_with_another_fingerprint_is_refused(tmp_path):
    other = {**FINGERPRINT, "seed": 1}
    with RolloutStore(tmp_path, FINGERPRINT), pytest.raises(CollectError, match="seed is 0 there and 1 here"):
        RolloutStore(tmp_path, other, process=1)
    (tmp_path / MANIFEST).rename(tmp_path / "kept")
    write(tmp_path / "else", 0)
    with RolloutStore(tmp_path / "else", FINGERPRINT), RolloutStore(tmp_path / "else", FINGERPRINT, process=1) as store:
        store.commit(*block(1))
    RolloutStore(tmp_path, other).close()
    (tmp_path / "else" / "manifest-00001.jsonl").rename(tmp_path / "manifest-00001.jsonl")
    with pytest.raises(CollectError, match="seed is 0 there and 1 here"):
        RolloutStore(tmp_path, other)


def test_a_block_is_claimed_once(tmp_path):
    with RolloutStore(tmp_path, FINGERPRINT) as first, RolloutStore(tmp_path, FINGERPRINT, process=1) as second:
        assert (first.claim(0), second.claim(0), second.claim(1), first.claim(1)) == (True, False, True, False)
    with RolloutStore(tmp_path, FINGERPRINT) as store:  # the claims of a run end with it
        assert store.claim(0)


def test_a_folder_that_cannot_be_made_or_locked_is_an_error_that_says_so(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CollectError, match=r"Opening .*file.* failed: .*(File exists|Not a directory)"):
        RolloutStore(tmp_path / "file", FINGERPRINT)
    with pytest.raises(CollectError, match=r"Opening .* failed"):
        RolloutStore(tmp_path / "file" / "below", FINGERPRINT)

    def no_flock(file, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", no_flock)
    with pytest.raises(CollectError, match=r"cannot lock files .* Mount it with flock"):
        RolloutStore(tmp_path / "new", FINGERPRINT)
