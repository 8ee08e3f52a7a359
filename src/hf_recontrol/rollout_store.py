"""RolloutStore writes a folder of rollouts block by block, RolloutDataset reads it. rollout_files.py has the format."""

import hashlib
import itertools
import json
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset

from .disk import faults, is_locked, make_folder, set_aside, sync_folder, write_all, write_file
from .errors import CollectError
from .head_hub import package_version
from .rollout_files import (
    FORMAT_VERSION,
    MANIFEST,
    TENSORS,
    Block,
    check_fingerprint,
    check_shapes,
    damaged_files,
    dump,
    file_names,
    foreign_files,
    manifest_name,
    open_shard,
    other_manifests,
    read_folder,
    read_manifest,
    read_table,
    unfinished_files,
)

logger = logging.getLogger(__name__)


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

    Opening takes the folder for this process, cuts a line torn by a crash, removes the unfinished files of one, and
    checks every committed block against its SHA-256 (it reads all shards). A damaged file is renamed to `<name>.bad`,
    with a warning, and its block can be committed again; other files are left alone, and logged if they are not ours.
    The same check is run again before the commit that follows one which failed.

    Several processes share a folder as a group: the first opens it, then each of the others a store with its rank. The
    caller sees to it that no block is committed by two: claim().

    Args:
        output_dir: made if it does not exist.
        fingerprint: plain JSON; all that decides what the rollouts are. Kept in the manifest.
        process: the rank in the group; 0 is the first, or the only one.

    Raises:
        CollectError: the folder holds rollouts with another fingerprint, is in use by another run, or its manifest is
            damaged; or the disk refused (the OSError is the cause).
    """

    def __init__(self, output_dir: str | os.PathLike[str], fingerprint: Mapping[str, Any], *, process: int = 0):
        self.output_dir = Path(output_dir)
        self.fingerprint = json.loads(dump(fingerprint, "The fingerprint"))
        self.process = process
        self._blocks: dict[int, Block] = {}
        self._size = 0  # of the part of the manifest that is known to be whole
        self._sound = False  # until the files are known to be what the manifest says
        with faults(f"Opening {self.output_dir} for rollouts"):
            if process == 0:
                make_folder(self.output_dir)
            path = self.output_dir / manifest_name(process)
            self._manifest = open(path, "a+b", buffering=0)  # noqa: SIM115 (closed by close())
            try:
                self._begin()
                self._mend()
            except BaseException:
                self.close()
                raise

    @property
    def committed(self) -> frozenset[int]:
        """Ids of the blocks that are safely on the disk, by this process or before."""
        return frozenset(self._blocks)

    @property
    def answers(self) -> tuple[int, int]:
        """How many there are in the committed blocks, and of how many the states were left out as not finite."""
        return sum(block.answers for block in self._blocks.values()), sum(b.not_finite for b in self._blocks.values())

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
            rows: the table's, one JSON object per answer. {"finite": False} says that its states were left out.

        Raises:
            CollectError: the block does not fit together, holds what is not finite, or is committed already; or the
                disk refused it (the OSError is the cause). Earlier blocks are kept, and the store can be used on.
        """
        if not self._sound:
            with faults(f"Checking {self.output_dir} after a commit that failed"):
                self._mend()
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
        not_finite = sum(row.get("finite") is False for row in rows)
        entry = Block(block, names[0], digests[0], names[1], digests[1], len(rows), len(token_ids), not_finite)
        self._sound = False
        with faults(f"Writing block {block} to {self.output_dir}"):
            write_file(self.output_dir / entry.shard, shard)
            write_file(self.output_dir / entry.table, table)
            sync_folder(self.output_dir)
            self._append(entry._asdict())
        self._blocks[block] = entry
        self._sound = True

    def claim(self, block: int) -> bool:
        """Whether this process is the first of its group that asks for the block, which is then its to commit."""
        with faults(f"Claiming block {block} in {self.output_dir}"):
            try:  # all file systems make one file for one of those that ask at a time
                open(self.output_dir / f"block-{block:05d}.claim.tmp", "xb").close()
            except FileExistsError:
                return False
        return True

    def take_over(self) -> None:
        """In the first process, when the others have closed their stores: their lines become its own."""
        with faults(f"Putting the manifests in {self.output_dir} together"):
            self._take_over()

    def close(self) -> None:
        """Let go of the folder."""
        with faults(f"Closing {self.output_dir}"):
            self._manifest.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _begin(self) -> None:
        """Lock the folder, and find what the manifest says."""
        self._lock(self._manifest)
        if self.process:
            self._join()
        path = self.output_dir / manifest_name(self.process)
        self._size = path.read_bytes().rfind(b"\n") + 1  # behind it: a line that a crash has torn
        if self._size:
            found, blocks = read_manifest(path)
            check_fingerprint(self.output_dir, found, self.fingerprint)
            self._blocks = {block.block: block for block in blocks}  # of two lines, after damage, the last counts
        else:
            header = {"format_version": FORMAT_VERSION, "hf_recontrol_version": package_version()}
            self._append(header | {"fingerprint": self.fingerprint})
        if self.process == 0:
            self._take_over()
            foreign = foreign_files(self.output_dir)
            if foreign:
                logger.warning("%s has files that are no rollouts, and stay as they are: %s", self.output_dir, foreign)

    def _lock(self, manifest: Any) -> None:
        if is_locked(manifest):
            raise CollectError(
                f"Another process is writing rollouts to {self.output_dir}. Wait for it, or give another output_dir."
            )

    def _join(self) -> None:
        with open(self.output_dir / MANIFEST, "a+b", buffering=0) as first:
            if not is_locked(first):
                raise CollectError(
                    f"Process {self.process} found no first process in {self.output_dir}: it has ended, or collects "
                    "elsewhere. Give all processes of a run the same output_dir, and call again."
                )
        check_fingerprint(self.output_dir, read_manifest(self.output_dir / MANIFEST)[0], self.fingerprint)

    def _take_over(self) -> None:
        others = other_manifests(self.output_dir)
        for path in others:
            with open(path, "a+b", buffering=0) as manifest:
                self._lock(manifest)
                fingerprint, blocks = read_manifest(path)
                if blocks:
                    check_fingerprint(self.output_dir, fingerprint, self.fingerprint)
                for block in blocks:
                    if self._blocks.get(block.block) != block:
                        self._append(block._asdict())
                        self._blocks[block.block] = block
        os.fsync(self._manifest.fileno())  # a process that was killed may have left lines that are in memory only
        for path in (*others, *unfinished_files(self.output_dir)):
            path.unlink()

    def _mend(self) -> None:
        """Cut the manifest to what is known to be whole, and set damaged files aside."""
        self._manifest.truncate(self._size)
        damaged = {b.block: names for b in self._blocks.values() if (names := damaged_files(self.output_dir, b))}
        there = [path for names in damaged.values() for name in names if (path := self.output_dir / name).is_file()]
        aside = [set_aside(path) for path in there]
        for block in damaged:
            del self._blocks[block]
        self._sound = True
        if damaged:
            warnings.warn(
                f"Files of the blocks {sorted(damaged)} in {self.output_dir} are missing or were changed after they "
                f"were committed; these blocks are made anew. What was changed is kept as {aside}.",
                stacklevel=2,
            )

    def _append(self, line: Mapping[str, Any]) -> None:
        data = dump(line, "A line of the manifest").encode() + b"\n"
        self._manifest.truncate(self._size)  # what is behind it is torn
        write_all(self._manifest, data)
        self._size += len(data)


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
        self.fingerprint, blocks = read_folder(self.output_dir)
        self._blocks = sorted(blocks)
        if not self._blocks:
            raise CollectError(
                f"{self.output_dir} has no committed block yet. Run collect_rollouts with it as output_dir."
            )
        damaged = [block.block for block in self._blocks if verify and damaged_files(self.output_dir, block)]
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
