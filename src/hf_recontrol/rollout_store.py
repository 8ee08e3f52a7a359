"""RolloutStore writes a folder of rollouts block by block, RolloutDataset reads it. rollout_files.py has the format."""

import hashlib
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset

from .errors import CollectError
from .rollout_files import (
    FORMAT_VERSION,
    MANIFEST,
    TENSORS,
    Block,
    check_shapes,
    differences,
    dump,
    file_names,
    is_whole,
    open_shard,
    read_manifest,
    read_table,
    sync_folder,
)

if sys.platform != "win32":
    import fcntl


class _Facts(NamedTuple):
    """What is kept in memory of an answer."""

    shard: int
    row: int
    prompt_id: int
    prompt_hash: str
    finish_reason: str
    length: int
    reward: float


class RolloutStore:
    """Writes rollouts into a folder, one block after the other; use it in a `with`.

    Opening takes the folder for this process, cuts a line torn by a crash, removes the unfinished files of one, checks
    every committed block against its SHA-256 (it reads all shards), and forgets damaged ones, to be committed again.

    Args:
        output_dir: made if it does not exist.
        fingerprint: plain JSON; all that decides what the rollouts are. Kept in the manifest.

    Raises:
        CollectError: the folder holds rollouts with another fingerprint, is in use by another process, or its manifest
            is damaged.
    """

    def __init__(self, output_dir: str | os.PathLike[str], fingerprint: Mapping[str, Any]):
        self.output_dir = Path(output_dir)
        self.fingerprint = json.loads(dump(fingerprint, "The fingerprint"))
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self._manifest = open(self.output_dir / MANIFEST, "a+b", buffering=0)  # noqa: SIM115 (closed by close())
        try:
            self._lock()
            self._size = 0  # of the part of the manifest that is known to be whole
            self._blocks = self._recover()
        except BaseException:
            self.close()
            raise

    @property
    def committed(self) -> frozenset[int]:
        """Ids of the blocks that are safely on the disk."""
        return frozenset(self._blocks)

    def commit(
        self,
        block: int,
        hidden_states: Tensor,
        offsets: Tensor,
        rewards: Tensor,
        token_ids: Tensor,
        rows: Sequence[Mapping[str, Any]],
    ) -> None:
        """Store a block; when this returns, it survives a crash.

        Args:
            block: its id, ≥ 0, not committed yet.
            hidden_states: float (tokens, hidden_size).
            offsets: int64 (answers + 1,): answer i has the tokens offsets[i] to offsets[i + 1] − 1.
            rewards: float (answers,); NaN where an answer has none.
            token_ids: int64 (tokens,): the token that each state predicted.
            rows: the table's, one JSON object per answer.

        Raises:
            CollectError: the block does not fit together, holds what is not finite, or is committed already; or the
                disk refused it (the OSError is the cause). Earlier blocks are kept, and the store can be used on.
        """
        if block in self._blocks:
            raise CollectError(
                f"Block {block} is in {self.output_dir} already. Commit blocks that are not in `committed`."
            )
        rewards = rewards.float()
        check_shapes(block, len(rows), hidden_states, offsets, rewards, token_ids)
        if not bool(hidden_states.isfinite().all()) or bool(rewards.isinf().any()):
            raise CollectError(
                f"Block {block} holds hidden states that are not finite, or rewards beyond float32; they would spoil "
                "the training. Load the model in bfloat16 or float32, and scale the rewards down."
            )
        tensors = dict(zip(TENSORS, (hidden_states, offsets, rewards, token_ids), strict=True))
        shard = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        table = "".join(dump(row, f"Row {i} of block {block}") + "\n" for i, row in enumerate(rows)).encode()
        names, digests = file_names(block), [hashlib.sha256(data).hexdigest() for data in (shard, table)]
        entry = Block(block, names[0], digests[0], names[1], digests[1], len(rows), len(token_ids))
        try:
            self._write(entry.shard, shard)
            self._write(entry.table, table)
            sync_folder(self.output_dir)
            self._append(entry._asdict())
        except OSError as error:
            raise CollectError(
                f"Block {block} could not be written to {self.output_dir}: {error}. Earlier blocks are "
                "kept: make room or mend the disk, and call again with the same arguments."
            ) from error
        self._blocks[block] = entry

    def close(self) -> None:
        """Let go of the folder."""
        self._manifest.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _lock(self) -> None:
        if sys.platform == "win32":  # no flock there: two collectors in one folder are the caller's to avoid
            return
        try:
            fcntl.flock(self._manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it when the process dies
        except BlockingIOError as error:
            raise CollectError(
                f"Another process is writing rollouts to {self.output_dir}. Wait for it, or give another output_dir."
            ) from error

    def _recover(self) -> dict[int, Block]:
        manifest = self.output_dir / MANIFEST
        for unfinished in self.output_dir.glob("block-*.tmp"):
            unfinished.unlink()
        self._size = manifest.read_bytes().rfind(b"\n") + 1  # behind it: a line that a crash has torn
        if self._size == 0:
            self._append({"format_version": FORMAT_VERSION, "fingerprint": self.fingerprint})
            sync_folder(self.output_dir)
            return {}
        found, blocks = read_manifest(manifest)
        different = list(differences(found, self.fingerprint))
        if different:
            raise CollectError(
                f"{self.output_dir} holds rollouts made with other settings: {'; '.join(different)}. Call with the "
                "settings that it was begun with, or give another output_dir."
            )
        return {block.block: block for block in blocks if is_whole(self.output_dir, block)}

    def _append(self, line: Mapping[str, Any]) -> None:
        self._manifest.truncate(self._size)  # an append that failed may have left a part of its line
        data = dump(line, "A line of the manifest").encode() + b"\n"
        written = self._manifest.write(data)
        if written != len(data):
            raise OSError(f"{written} of {len(data)} bytes of the manifest's line were written")
        os.fsync(self._manifest.fileno())
        self._size += len(data)

    def _write(self, name: str, data: bytes) -> None:
        unfinished = self.output_dir / f"{name}.tmp"
        with open(unfinished, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, self.output_dir / name)


class RolloutDataset(Dataset[dict[str, Any]]):
    """The answers in a folder of rollouts, as a map-style dataset: those with at least one state and a reward.

    `dataset[i]` is {"hidden_states": (tokens, hidden_size) in the model's dtype, "reward": float32 (), "token_ids":
    int64 (tokens,), "finish_reason": str, "prompt_id": int}. Hidden states stay on the disk until they are asked for.
    torch's ConcatDataset puts several together.

    Args:
        output_dir: a folder that collect_rollouts has written. It may still be growing; what is committed now is seen.
        verify: read every file and compare its SHA-256 with the manifest's.

    Attributes:
        fingerprint: what the rollouts were made with.
        rewards: float32 (len(self),).
        lengths: int64 (len(self),): the tokens of each answer.
        hidden_size: width of the states.
        dtype: of the states.

    Raises:
        CollectError: the folder has no rollouts, or a file is missing or not what was committed.
    """

    def __init__(self, output_dir: str | os.PathLike[str], *, verify: bool = True):
        self.output_dir = Path(output_dir)
        self.fingerprint, blocks = read_manifest(self.output_dir / MANIFEST)
        self._blocks = sorted(blocks)
        if not self._blocks:
            raise CollectError(
                f"{self.output_dir} has no committed block yet. Run collect_rollouts with it as output_dir."
            )
        damaged = [block.block for block in self._blocks if verify and not is_whole(self.output_dir, block)]
        if damaged:
            raise CollectError(
                f"Files of the blocks {damaged} in {self.output_dir} are missing or were changed after they were "
                "committed. Call collect_rollouts again as before: it makes these anew and keeps the others."
            )
        self._shards = [open_shard(self.output_dir, block) for block in self._blocks]
        self._rows = list(self._read_facts())
        self._choose(range(len(self._rows)))

    def __len__(self) -> int:
        return len(self._usable)

    def __getitem__(self, index: int) -> dict[str, Any]:
        facts = self._rows[self._usable[index]]
        shard = self._shards[facts.shard]
        start, end = shard["offsets"][facts.row : facts.row + 2].tolist()
        return {
            # Cloned: a view would drag its whole shard along when a DataLoader worker sends it.
            "hidden_states": shard["hidden_states"][start:end].clone(),
            "reward": shard["rewards"][facts.row].clone(),
            "token_ids": shard["token_ids"][start:end].clone(),
            "finish_reason": facts.finish_reason,
            "prompt_id": facts.prompt_id,
        }

    @property
    def hidden_size(self) -> int:
        return int(self._shards[0]["hidden_states"].shape[1])

    @property
    def dtype(self) -> torch.dtype:
        return self._shards[0]["hidden_states"].dtype

    def rows(self) -> Iterator[dict[str, Any]]:
        """The table's rows, in order: one for each answer, those without states or reward too."""
        chosen = set(self._answers)
        for answer, row in enumerate(row for block in self._blocks for row in read_table(self.output_dir, block)):
            if answer in chosen:
                yield row

    def row(self, index: int) -> dict[str, Any]:
        """The table's row of dataset[index]."""
        facts = self._rows[self._usable[index]]
        rows = read_table(self.output_dir, self._blocks[facts.shard])
        return next(itertools.islice(rows, facts.row, None))

    def split(self, fraction: float = 0.1, seed: int = 0) -> tuple[Self, Self]:
        """(train, eval), by prompt: all answers to a prompt, and to others of the same text, are on one side.

        Args:
            fraction: the share of the prompts that go to eval, between 0 and 1; at least one prompt on each side.
            seed: another seed is another split; the order of the rollouts does not matter.

        Raises:
            ValueError: the fraction is not between 0 and 1, or there is only one prompt.
        """
        prompts = {self._rows[answer].prompt_hash for answer in self._answers}
        if not 0 < fraction < 1 or len(prompts) < 2:
            raise ValueError(
                f"Cannot hold out {fraction!r} of {len(prompts)} different prompts. Give a fraction between 0 and 1, "
                "and rollouts of two prompts or more."
            )
        shuffled = sorted(prompts, key=lambda prompt: hashlib.sha256(f"{seed}:{prompt}".encode()).digest())
        held_out = set(shuffled[: min(max(1, round(fraction * len(prompts))), len(prompts) - 1)])
        sides: tuple[list[int], list[int]] = [], []
        for answer in self._answers:
            sides[self._rows[answer].prompt_hash in held_out].append(answer)
        return self._with(sides[0]), self._with(sides[1])

    def _read_facts(self) -> Iterator["_Facts"]:
        for number, (block, shard) in enumerate(zip(self._blocks, self._shards, strict=True)):
            lengths, rewards = shard["offsets"].diff().tolist(), shard["rewards"].tolist()
            for i, row in enumerate(read_table(self.output_dir, block)):
                prompt_hash = hashlib.sha256(json.dumps(row["prompt"], sort_keys=True).encode()).hexdigest()[:16]
                yield _Facts(number, i, row["prompt_id"], prompt_hash, row["finish_reason"], lengths[i], rewards[i])

    def _with(self, answers: Sequence[int]) -> Self:
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__)  # shards and facts are shared
        view._choose(answers)
        return view

    def _choose(self, answers: Sequence[int]) -> None:
        self._answers = answers
        self._usable = [
            answer for answer in answers if self._rows[answer].length and not math.isnan(self._rows[answer].reward)
        ]
        facts = [self._rows[answer] for answer in self._usable]
        self.rewards = torch.tensor([f.reward for f in facts], dtype=torch.float32)
        self.lengths = torch.tensor([f.length for f in facts], dtype=torch.int64)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": None}  # a mapped tensor would be sent with all that it maps

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._shards = [open_shard(self.output_dir, block) for block in self._blocks]
