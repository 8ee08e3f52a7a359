"""RolloutStore writes a folder of rollouts, block by block, as rollout_files.py has it; RolloutDataset reads it."""

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from safetensors.torch import save
from torch import Tensor

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
    other_manifests,
    read_manifest,
    unfinished_files,
)

logger = logging.getLogger(__name__)


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
            if blocks or self.process or other_manifests(self.output_dir):
                check_fingerprint(self.output_dir, found, self.fingerprint)
            elif found != self.fingerprint:  # begun with other settings, and nothing came of it
                self._size = 0
            self._blocks = {block.block: block for block in blocks}  # of two lines, after damage, the last counts
        if not self._size:
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
