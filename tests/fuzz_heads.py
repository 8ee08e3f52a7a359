"""Lets atheris look for a head that is neither loaded nor refused by a HeadError.

    pip install atheris
    python tests/fuzz_heads.py -max_total_time=120 -max_len=8192 [FOLDER_OF_CASES]

An input is a config.json, a NUL byte and a model.safetensors; half of them are given the hash that fits, so that the
fuzzer gets past it. The options are libFuzzer's. It exits with 0 if nothing was found.
"""

import sys
import tempfile
from pathlib import Path

import atheris
import mutations

LOADER = ["hf_recontrol.head_format", "hf_recontrol.head_config", "hf_recontrol.config_checks"]
with atheris.instrument_imports(include=LOADER):
    from tiny import tiny_control_head, tiny_head

    from hf_recontrol import HeadError
    from hf_recontrol.head_config import HeadConfig
    from hf_recontrol.head_format import check_hash, parse_config, parse_weights


def try_one(data):
    config, _, weights = data.partition(b"\0")
    try:
        if len(data) % 2:
            config = mutations.signed(config, weights)
    except (ValueError, TypeError, RecursionError):  # not JSON, or no object
        return
    try:
        parsed = parse_config(config, HeadConfig)
        check_hash(weights, parsed)
        tensors = parse_weights(weights, parsed)
    except HeadError as error:
        if not str(error).isprintable():
            raise RuntimeError("An error does not stay on its line.") from error
        return
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise RuntimeError("A head was loaded with values that are not finite.")


def main():
    with tempfile.TemporaryDirectory() as scratch:
        seeds = Path(scratch, "seeds")
        seeds.mkdir()
        for i, head in enumerate([tiny_head(hidden_size=2, intermediate_size=2), tiny_control_head(hidden_size=2)]):
            head.save_pretrained(Path(scratch, str(i)))
            parts = [Path(scratch, str(i), name).read_bytes() for name in ("config.json", "model.safetensors")]
            for end in (b"", b"\n"):  # one of either parity
                (seeds / f"{i}{len(end)}").write_bytes(parts[0] + end + b"\0" + parts[1])
        atheris.Setup([*sys.argv, str(seeds)], try_one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
