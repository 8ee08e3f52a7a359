"""The bytes of config.json and model.safetensors, and whether they are a head: strict, and in a safe order.

Nothing is guessed or repaired. The config is checked before anything is allocated, the header of the weights against
the shapes that the config implies before safetensors sees the file, the values before anything is computed from them.
"""

import hashlib
import json
import math
from collections import Counter
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import Tensor

from .config_checks import shown
from .errors import HeadError
from .head_config import HeadConfig

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
MAX_CONFIG_BYTES = 64 * 1024
MAX_HEADER_BYTES = 64 * 1024
MAX_JSON_DEPTH = 32
MAX_WEIGHT = 1e4
MAX_STATISTIC = 1e12
"""Bound of STATISTICS; input_std and output_scale must also be at least its inverse."""
STATISTICS = ("input_mean", "input_std", "output_scale")
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


class WrongHash(HeadError):  # noqa: N818
    """The weights are not those that the config was written with."""


def parse_config(data: bytes, config_class: type[HeadConfig]) -> HeadConfig:
    """The config that config.json's bytes spell out.

    Raises:
        HeadError: not strict JSON, an unknown field, a wrong type, or a value out of bounds.
    """
    values = _parse_object(data, CONFIG_NAME)
    if "architectures" in values and "kind" not in values:
        raise HeadError(
            f"Its {CONFIG_NAME} is that of a model ({shown(values.get('model_type'))}), not of a head. Name the head's "
            "own folder or repository."
        )
    return config_class.from_dict(values)


def size_limit_of_weights(config: HeadConfig) -> int:
    """Bytes that model.safetensors can have at most."""
    return 8 + MAX_HEADER_BYTES + 4 * sum(math.prod(shape) for shape in config.tensor_shapes().values())


def check_hash(weights: bytes, config: HeadConfig) -> None:
    """Refuse weights that are not, bit for bit, those that the config was written with.

    Raises:
        HeadError: the config names no hash. WrongHash, if it names another.
    """
    if config.weights_sha256 is None:
        raise HeadError(f"Its {CONFIG_NAME} has no weights_sha256. Write a head's files with save_pretrained.")
    found = hashlib.sha256(weights).hexdigest()
    if found != config.weights_sha256:
        raise WrongHash(
            f"Its {WEIGHTS_NAME} has the SHA-256 {found}, but its {CONFIG_NAME} says {shown(config.weights_sha256)}: "
            "damaged, or the two files are of different heads. Download or save both again."
        )


def parse_weights(weights: bytes, config: HeadConfig) -> dict[str, Tensor]:
    """The tensors of model.safetensors in float32, each with memory of its own.

    Raises:
        HeadError: not exactly the tensors that the config implies, or values that no trained head has.
    """
    _check_header(weights, config.tensor_shapes())
    try:
        with torch.device("cpu"):  # where the caller's default device is another one
            loaded = safetensors_torch.load(weights)
            tensors = {name: tensor.to(torch.float32, copy=True) for name, tensor in loaded.items()}
    except SafetensorError as error:
        raise HeadError(f"Its {WEIGHTS_NAME} is refused by safetensors: {shown(str(error))}. Save it again.") from error
    check_values(tensors)
    return tensors


def check_values(tensors: dict[str, Tensor]) -> None:
    """Refuse NaN, infinities, and magnitudes that no trained head has.

    Raises:
        HeadError: names the tensor and the magnitude.
    """
    for name, tensor in tensors.items():
        bound = MAX_STATISTIC if name in STATISTICS else MAX_WEIGHT
        largest = tensor.abs().max().item()  # NaN if one is NaN
        if not largest <= bound:
            raise HeadError(
                f"The tensor {name} holds a value of magnitude {largest:g}; allowed are finite ones up to {bound:g}. "
                "Train the head again, with a smaller learning rate if it diverged."
            )
        magnitudes = tensor.abs()
        if ((magnitudes > 0) & (magnitudes < SMALLEST_NORMAL)).sum() > tensor.numel() / 2:
            raise HeadError(
                f"The tensor {name} holds mostly values below {SMALLEST_NORMAL:g}, which some CPUs compute with very "
                "slowly. No training gives them: save the head again with 0 in their place."
            )
    for name in tensors.keys() & {"input_std", "output_scale"}:
        smallest = tensors[name].min().item()
        if not smallest >= 1 / MAX_STATISTIC:
            raise HeadError(f"The tensor {name} holds {smallest:g}; at least {1 / MAX_STATISTIC:g} is needed.")


def _parse_object(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object, without what JSON parsers disagree on or choke on: repeated keys, NaN, great depth, a BOM."""

    def refuse_constant(text: str) -> None:
        raise ValueError(f"{text} is not JSON")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_without_repeats, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise HeadError(f"{where} is not strict JSON: {shown(str(error))}. Expected one object, in UTF-8.") from error
    if not isinstance(value, dict):
        raise HeadError(f"{where} holds a {type(value).__name__}. Expected one JSON object.")
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [child for parent in level if (children := _children(parent)) for child in children]
    if level:
        raise HeadError(f"{where} is nested more than {MAX_JSON_DEPTH} deep. Flatten what stands under info.")
    return value


def _children(value: object) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        repeated = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise ValueError(f"repeated keys {shown(repeated)}")
    return values


def _check_header(weights: bytes, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse a file whose header does not list exactly these tensors, packed without gap or overlap up to its end."""
    length = int.from_bytes(weights[:8], "little")
    start = 8 + length
    if len(weights) < 8 or length > MAX_HEADER_BYTES or start > len(weights):
        raise HeadError(
            f"Its {WEIGHTS_NAME} is not a head's safetensors file: {len(weights)} bytes, of them {length} of header; "
            f"at most {MAX_HEADER_BYTES} are allowed. Save it again with save_pretrained."
        )
    header = _parse_object(weights[8:start], f"The header of {WEIGHTS_NAME}")
    header.pop("__metadata__", None)
    if header.keys() != shapes.keys():
        missing, unexpected = sorted(shapes.keys() - header.keys()), sorted(header.keys() - shapes.keys())
        raise HeadError(
            f"Its {WEIGHTS_NAME} does not hold the tensors of its {CONFIG_NAME}: missing {shown(missing)}, unexpected "
            f"{shown(unexpected)}. Save both together with save_pretrained."
        )
    spans = sorted(_check_entry(name, header[name], shape) for name, shape in shapes.items())
    ends = [0, *(end for _, end in spans)]
    if [begin for begin, _ in spans] != ends[:-1] or ends[-1] != len(weights) - start:
        raise HeadError(
            f"Its {WEIGHTS_NAME} has tensors at {shown(spans)} of {len(weights) - start} bytes. Expected them one "
            "after the other up to the end of the file. Save it again."
        )


def _check_entry(name: str, entry: object, shape: tuple[int, ...]) -> tuple[int, int]:
    """Where the tensor's bytes begin and end, if the header's entry has an allowed dtype and this shape."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise HeadError(f"The tensor {name} has the header {shown(entry)}. Expected dtype, shape and data_offsets.")
    if entry["dtype"] not in tuple(DTYPE_BYTES):
        raise HeadError(f"The tensor {name} has dtype {shown(entry['dtype'])}; allowed: {', '.join(DTYPE_BYTES)}.")
    if not _are_integers(entry["shape"]) or entry["shape"] != list(shape):
        raise HeadError(
            f"The tensor {name} has shape {shown(entry['shape'])}; its {CONFIG_NAME} implies {list(shape)}."
        )
    offsets = entry["data_offsets"]
    size = math.prod(shape) * DTYPE_BYTES[entry["dtype"]]
    if not _are_integers(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != size:
        raise HeadError(
            f"The tensor {name} has data_offsets {shown(offsets)}; its shape takes {size} bytes. Save it again."
        )
    return offsets[0], offsets[1]


def _are_integers(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)
