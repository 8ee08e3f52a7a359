"""RolloutDataset reads a folder of rollouts. rollout_files.py has the format, rollout_store.py writes it."""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch.utils.data import Dataset

from .errors import CollectError
from .rollout_files import damaged_files, open_shard, read_folder, read_table


class _Facts(NamedTuple):
    """What is kept in memory of an answer."""

    shard: int
    row: int
    prompt_id: int
    prompt_hash: str
    finish_reason: str
    length: int
    reward: float


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
    def prompt_hashes(self) -> list[str]:
        """What the prompt of each item is known by: prompts of the same text share it."""
        return [self._rows[answer].prompt_hash for answer in self._usable]

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
