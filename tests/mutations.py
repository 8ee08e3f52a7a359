"""Fourteen ways to damage the bytes of a head's two files, drawn from a seeded generator."""

import hashlib
import json
import re
import struct

DTYPES = [b"F32", b"F16", b"BF16", b"F64", b"I32", b"I64", b"U8", b"BOOL", b"F8_E4M3", b"C64", b"F4"]
NUMBERS = [0, 1, 7, 255, 2**16, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1]


def _somewhere(data, rng):
    return rng.randrange(len(data)) if data else 0


def bit_flip(data, rng):
    at = _somewhere(data, rng)
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def byte_set(data, rng):
    at = _somewhere(data, rng)
    return data[:at] + bytes([rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])]) + data[at + 1 :]


def byte_swap(data, rng):
    changed, one, other = bytearray(data), _somewhere(data, rng), _somewhere(data, rng)
    changed[one], changed[other] = changed[other], changed[one]
    return bytes(changed)


def truncate(data, rng):
    return data[: _somewhere(data, rng)]


def extend(data, rng):
    return data + rng.randbytes(rng.randrange(1, 65))


def insert(data, rng):
    at = _somewhere(data, rng)
    return data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:]


def delete(data, rng):
    at = _somewhere(data, rng)
    return data[:at] + data[at + rng.randrange(1, 9) :]


def duplicate_a_span(data, rng):
    at = _somewhere(data, rng)
    return data[:at] + data[at : at + rng.randrange(1, 65)] + data[at:]


def header_length(data, rng):
    length = struct.unpack("<Q", data[:8])[0]
    number = rng.choice([*NUMBERS, length - 1, length + 1, length + 8, len(data), len(data) - 8])
    return struct.pack("<Q", number % 2**64) + data[8:]


def header_byte(data, rng):
    at = rng.randrange(8, 8 + struct.unpack("<Q", data[:8])[0])
    return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]


def _replace_one(data, pattern, rng, replacement):
    """One match of the pattern replaced, and the header's length set right, so that the change is all that is wrong."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    match = rng.choice(list(re.finditer(pattern, data[8:end])))
    header = data[8 : 8 + match.start()] + replacement + data[8 + match.end() : end]
    return struct.pack("<Q", len(header)) + header + data[end:]


def header_number(data, rng):
    return _replace_one(data, rb"\d+", rng, b"%d" % rng.choice([*NUMBERS, rng.randrange(100)]))


def dtype_name(data, rng):
    return _replace_one(data, rb"(?<=\"dtype\":\")\w+", rng, rng.choice(DTYPES))


def shape_digit(data, rng):
    return _replace_one(data, rb"(?<=\"shape\":\[)[^\]]*", rng, rng.choice([b"", b"8", b"8,1", b"-8", b"8.0", b"1e1"]))


def config_digit_or_key(data, rng):
    """Of config.json: a number, or a letter of a key."""
    numbers = list(re.finditer(rb"(?<=: )-?\d+(\.\d+)?", data))
    letters = list(re.finditer(rb"(?<=\")\w(?=\w*\": )", data))
    match = rng.choice(numbers if rng.random() < 0.7 else letters)
    new = b"%d" % rng.choice([*NUMBERS, rng.randrange(-9, 10)]) if match in numbers else bytes([rng.randrange(97, 123)])
    return data[: match.start()] + new + data[match.end() :]


ANYWHERE = [bit_flip, byte_set, byte_swap, truncate, extend, insert, delete, duplicate_a_span]
OF_WEIGHTS = [header_length, header_byte, header_number, dtype_name, shape_digit]
OF_CONFIG = [config_digit_or_key]
KINDS = [*ANYWHERE, *OF_WEIGHTS, *OF_CONFIG]


def signed(config, weights):
    """config.json that vouches for these weights, as a hostile author's would; as it is where it is no such JSON."""
    digest = hashlib.sha256(weights).hexdigest()
    return json.dumps(json.loads(config) | {"weights_sha256": digest}).encode()
