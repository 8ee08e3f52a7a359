"""The folder of rollouts: what is committed stays, what is not is made again, and nothing is mixed up."""

import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import signal
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset

from hf_recontrol.errors import CollectError
from hf_recontrol.rollout_store import RolloutDataset, RolloutStore

FINGERPRINT = {"seed": 0, "hidden_size": 4, "generation": {"temperature": 1.0}}


def block(number, lengths=(3, 0, 2), dtype=torch.float32):
    """A block's arguments for commit: every number in it tells where it belongs."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    tokens = int(offsets[-1])
    states = (torch.arange(tokens)[:, None] + 100.0 * number).expand(tokens, 4).to(dtype)
    rewards = torch.arange(len(lengths)) + 10.0 * number
    rows = [
        {
            "prompt_id": number,
            "prompt": f"prompt {number}",
            "completion": str(i),
            "finish_reason": "eos",
            "length": length,
        }
        for i, length in enumerate(lengths)
    ]
    return number, states, offsets, rewards, torch.arange(tokens), rows


def write(folder, *numbers, **kwargs):
    with RolloutStore(folder, FINGERPRINT) as store:
        for number in numbers:
            store.commit(*block(number, **kwargs))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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
    assert header == {"format_version": 1, "fingerprint": FINGERPRINT}
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


def test_unfinished_files_are_removed_and_foreign_ones_kept(tmp_path):
    write(tmp_path, 0)
    (tmp_path / "block-00001.safetensors.tmp").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    write(tmp_path, 1)
    assert not list(tmp_path.glob("*.tmp"))
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["block-00001.safetensors", "block-00001.jsonl"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_block_is_named_by_readers_and_made_again_by_writers(tmp_path, name, harm):
    write(tmp_path, 0, 1, 2)
    whole = contents(tmp_path)
    data = bytearray(whole[name])
    data[-3] ^= 1
    (tmp_path / name).unlink()
    if harm != "remove":
        (tmp_path / name).write_bytes(data if harm == "flip" else data[:-1])
    with pytest.raises(CollectError, match=r"blocks \[1\] .* collect_rollouts again"):
        RolloutDataset(tmp_path)
    with RolloutStore(tmp_path, FINGERPRINT) as store:
        assert store.committed == {0, 2}
        store.commit(*block(1))
    assert len(RolloutDataset(tmp_path)) == 6  # not 8: of two lines for a block the last counts
    assert contents(tmp_path)[name] == whole[name]


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


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_after_a_full_disk_at_any_step_the_store_can_be_used_on(tmp_path, monkeypatch, call):
    real = getattr(os, call)
    for step in range(10):
        folder = tmp_path / str(step)
        with RolloutStore(folder, FINGERPRINT) as store:
            store.commit(*block(0))
            calls = iter(range(100))

            def full(*args, calls=calls, step=step, **kwargs):
                if next(calls) == step:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return real(*args, **kwargs)

            monkeypatch.setattr(os, call, full)
            failed = _fails(store)
            monkeypatch.setattr(os, call, real)
            if failed:
                store.commit(*block(1))
        assert RolloutDataset(folder).rewards.tolist() == [0, 2, 10, 12]
        assert (folder / "manifest.jsonl").read_text().count("\n") == 3
        if not failed:
            assert step >= 2  # shard and table at least
            break


def _fails(store):
    try:
        store.commit(*block(1))
    except CollectError as error:
        return isinstance(error.__cause__, OSError) and "Earlier blocks are kept" in str(error)
    return False


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


def _write_many(folder):
    with RolloutStore(folder, FINGERPRINT) as store:
        for number in range(200):
            if number not in store.committed:
                store.commit(*block(number))


def test_kill_9_loses_no_committed_block_and_doubles_none(tmp_path):
    context = multiprocessing.get_context("fork")
    seen: set[int] = set()
    for attempt in range(6):
        process = context.Process(target=_write_many, args=(tmp_path,))
        process.start()
        time.sleep(0.05 + 0.03 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        with RolloutStore(tmp_path, FINGERPRINT) as store:
            assert seen <= store.committed
            seen = set(store.committed)
    assert seen, "killed before the first commit: the test says nothing"
    write(tmp_path, *(set(range(max(seen) + 1)) - seen))
    dataset = RolloutDataset(tmp_path)
    assert dataset.rewards.tolist() == [10.0 * n + i for n in range(max(seen) + 1) for i in (0, 2)]
    lines = (tmp_path / "manifest.jsonl").read_text().splitlines()[1:]
    assert len(lines) == len({json.loads(line)["block"] for line in lines})


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
