"""Where rollouts lie on the disk: packed shards, a table of texts, and a manifest whose lines alone commit.

    output_dir/
      manifest.jsonl            {"format_version": 1, "hf_recontrol_version": "…", "fingerprint": {…}}, then a line for
                                each committed block: {"block", "shard", "sha256", "table", "table_sha256", "answers",
                                "tokens", "not_finite"}
      block-00000.safetensors   hidden_states (tokens, hidden_size) in the model's dtype, offsets int64 (answers + 1,),
                                rewards float32 (answers,), NaN where there is none, token_ids int64 (tokens,)
      block-00000.jsonl         one row per answer: texts, token ids, rewards, finish reason
      manifest-00001.jsonl      while several processes collect: the lines of the second one, until the first has them
      block-00000.jsonl.bad     a file that was changed after it was committed, set aside for whoever wants to look

A shard and its table are written beside their place, synced and renamed before the manifest gets their line. A process
that dies leaves at most files without a line, which the next one writes again.

Each process has a manifest of its own, for then nothing is ever written by two. To append to one by turns would need
locks that hold between machines, which network file systems have in some set-ups only.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config_checks import shown
from .errors import CollectError

FORMAT_VERSION = 1
MANIFEST = "manifest.jsonl"
TENSORS = ("hidden_states", "offsets", "rewards", "token_ids")  # of a shard
_UNFINISHED = re.compile(r"block-\d{5,}\.(safetensors|jsonl|claim)\.tmp")
_OTHER_MANIFEST = re.compile(r"manifest-\d{5,}\.jsonl")
_OURS = re.compile(r"manifest(-\d{5,})?\.jsonl|block-\d{5,}\.(safetensors|jsonl|claim)(\.tmp|\.bad\d*)?")


class Block(NamedTuple):
    """A line of the manifest."""

    block: int
    shard: str
    sha256: str
    table: str
    table_sha256: str
    answers: int
    tokens: int
    not_finite: int = 0
    """Answers whose states were left out because one of them was not finite."""


def manifest_name(process: int) -> str:
    """Of the process with this rank."""
    return f"manifest-{process:05d}.jsonl" if process else MANIFEST


def other_manifests(folder: Path) -> list[Path]:
    """Those of all processes but the first."""
    return sorted(path for path in folder.iterdir() if _OTHER_MANIFEST.fullmatch(path.name))


def unfinished_files(folder: Path) -> list[Path]:
    """What processes that were killed in the middle of a block have left."""
    return [path for path in folder.iterdir() if _UNFINISHED.fullmatch(path.name)]


def foreign_files(folder: Path) -> list[str]:
    """Names that no release of this package gives; hidden files are nobody's business."""
    return sorted(path.name for path in folder.iterdir() if not _OURS.fullmatch(path.name) and path.name[0] != ".")


def read_folder(folder: Path) -> tuple[dict[str, Any], list[Block]]:
    """The fingerprint, and the blocks that any process has committed; of two lines for a block the last counts."""
    others: list[Block] = []
    for path in other_manifests(folder) if folder.is_dir() else []:
        with suppress(FileNotFoundError):  # then the first process has taken its lines over; its manifest comes after
            others += read_manifest(path)[1]
    try:
        fingerprint, blocks = read_manifest(folder / MANIFEST)
    except FileNotFoundError as error:
        raise CollectError(
            f"{folder / MANIFEST} does not exist, so this is no folder of rollouts. Make it with collect_rollouts, or "
            "`hf-recontrol rollouts`."
        ) from error
    return fingerprint, list({block.block: block for block in (*blocks, *others)}.values())


def read_manifest(path: Path) -> tuple[dict[str, Any], list[Block]]:
    """The fingerprint, and a line for each block; nothing where the process was killed before it had a line."""
    header, *lines = path.read_bytes().split(b"\n")[:-1] or [b""]  # what has no end of line is torn
    if not header and not lines:
        return {}, []
    try:
        begin, blocks = json.loads(header), [Block(**json.loads(line)) for line in lines]
        version, fingerprint = begin["format_version"], begin["fingerprint"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CollectError(
            f"{path} is damaged: {shown(str(error))}. Each line must be as it was written: restore the file, or "
            "collect into another folder."
        ) from error
    if version != FORMAT_VERSION:
        raise CollectError(
            f"{path} has format_version {shown(version)}; this release of hf_recontrol reads {FORMAT_VERSION}."
        )
    for block in blocks:
        if (block.shard, block.table) != file_names(block.block):  # a foreign manifest must not name files elsewhere
            raise CollectError(
                f"{path} says that block {shown(block.block)} is in {shown(block.shard)} and {shown(block.table)}; no "
                "block is ever written there. Restore the file, or collect into another folder."
            )
    return fingerprint, blocks


def file_names(block: object) -> tuple[str, str]:
    """Of a block's shard and table."""
    name = f"block-{block:05d}" if type(block) is int and block >= 0 else "?"
    return f"{name}.safetensors", f"{name}.jsonl"


def differences(there: object, here: object, name: str = "") -> Iterator[str]:
    """A phrase for each value in which two JSON objects differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted(there.keys() | here.keys()):
            yield from differences(there.get(key), here.get(key), f"{name}.{key}" if name else key)
    elif there != here:
        yield f"{name} is {shown(there)} there and {shown(here)} here"


def check_fingerprint(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise CollectError, with the fields named, unless they are equal."""
    different = list(differences(there, here))
    if different:
        raise CollectError(
            f"{folder} holds rollouts made with other settings: {'; '.join(different)}. Call with the settings that "
            "it was begun with, or give another output_dir."
        )


def damaged_files(folder: Path, block: Block) -> list[str]:
    """The names of the block's files that are missing, or not byte for byte as committed."""
    return [
        name
        for name, expected in ((block.shard, block.sha256), (block.table, block.table_sha256))
        if _sha256(folder / name) != expected
    ]


def _sha256(path: Path) -> str | None:
    try:
        with open(path, "rb", buffering=0) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def open_shard(folder: Path, block: Block) -> dict[str, Tensor]:
    """The shard's tensors, mapped: what is read of them is loaded when it is read."""
    try:
        with safe_open(folder / block.shard, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in TENSORS}
    except (SafetensorError, OSError) as error:
        raise CollectError(
            f"{folder / block.shard} is not a shard of rollouts: {shown(str(error))}. Collect it again."
        ) from error
    check_shapes(block.block, block.answers, *tensors.values())
    return tensors


def read_table(folder: Path, block: Block) -> Iterator[dict[str, Any]]:
    """The block's rows."""
    with open(folder / block.table, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def check_shapes(
    block: int, answers: int, hidden_states: Tensor, offsets: Tensor, rewards: Tensor, token_ids: Tensor
) -> None:
    """Raise CollectError unless the tensors fit together."""
    tokens = len(token_ids)
    fits = hidden_states.ndim == 2 and len(hidden_states) == tokens and hidden_states.is_floating_point()
    fits = fits and token_ids.dtype == offsets.dtype == torch.int64
    fits = fits and offsets.shape == (answers + 1,) and rewards.shape == (answers,)
    if not fits or offsets[0] != 0 or offsets[-1] != tokens or bool((offsets.diff() < 0).any()):
        raise CollectError(
            f"Block {block} has {answers} rows, hidden_states {tuple(hidden_states.shape)}, token_ids "
            f"{tuple(token_ids.shape)}, rewards {tuple(rewards.shape)}, offsets {tuple(offsets.shape)}; expected "
            "are float (tokens, hidden_size), int64 (tokens,), (answers,) and int64 (answers + 1,) from 0 to tokens."
        )


def dump(value: object, what: str) -> str:
    """The value as one line of ASCII JSON; a CollectError that says `what` where it is none."""
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CollectError(f"{what} must be plain JSON of finite numbers, but: {shown(str(error))}.") from error
