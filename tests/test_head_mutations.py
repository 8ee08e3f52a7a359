"""Twenty thousand damaged heads: each loads as exactly what its files say, or is a HeadError; no other exception ever.

With the hash of the weights, as save_pretrained writes it, what loads has the very weights that were saved.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

import mutations
import pytest
import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from tiny import CONTROL_SHAPES, tiny_control_head, tiny_head

from hf_recontrol.errors import HeadError
from hf_recontrol.head import Head

PER_KIND = 1440  # × 14 kinds is 20,160


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """Folders of small heads of both kinds and several shapes, with their two files' bytes."""
    folder, made = tmp_path_factory.mktemp("heads"), []
    shapes = [{}, {"num_hidden_layers": 0}, {"num_hidden_layers": 2, "hidden_act": "gelu"}]
    small = {"hidden_size": 8, "intermediate_size": 4, "info": {"training": {"answers": 300, "loss": 0.25}}}
    for i, head in enumerate(
        [tiny_head(**small | shape) for shape in shapes]
        + [tiny_control_head(**small | shape) for shape in CONTROL_SHAPES.values() if shape.get("rank") != 0]
    ):
        head.save_pretrained(folder / str(i))
        files = [(folder / str(i) / name).read_bytes() for name in ("config.json", "model.safetensors")]
        made.append((folder / str(i), *files))
    return made


def load(folder, config, weights):
    """The head of these bytes; None where they are refused."""
    for name, data in (("config.json", config), ("model.safetensors", weights)):
        (folder / name).unlink()  # to overwrite a file makes some file systems wait for the disk
        (folder / name).write_bytes(data)
    try:
        return Head.from_pretrained(folder)
    except HeadError as error:  # any other exception fails the test
        message = str(error)
    assert message.isprintable()
    return None


def differs(head, weights):
    """Whether the head's tensors are not those that safetensors reads there."""
    stored = safetensors_torch.load(weights)
    return any(not torch.equal(tensor, stored[name].float()) for name, tensor in head.state_dict().items())


def says(head, config):
    """Whether each field of config.json is the head's."""
    has = head.config.to_dict()
    return all(has[name] == value or isinstance(value, dict) for name, value in json.loads(config).items())


@pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.soak)], ids=["20000", "200000"])
@pytest.mark.parametrize("kind", mutations.KINDS, ids=lambda kind: kind.__name__)
def test_a_damaged_head_is_refused_or_is_what_its_files_say(heads, kind, times):
    rng = random.Random(f"{kind.__name__} {times}")
    loaded = 0
    for i in range(PER_KIND * times):
        folder, config, weights = heads[i % len(heads)]
        in_config = kind in mutations.OF_CONFIG or (kind in mutations.ANYWHERE and rng.random() < 0.3)
        damaged = kind(config if in_config else weights, rng)
        vouched = not in_config and rng.random() < 0.5  # half of the weights come from an author who means harm
        new_config = damaged if in_config else mutations.signed(config, damaged) if vouched else config
        new_weights = weights if in_config else damaged
        head = load(folder, new_config, new_weights)
        if head is None:
            continue
        loaded += 1
        assert not differs(head, new_weights if vouched else weights)
        assert says(head, new_config)
        assert all(tensor.isfinite().all() for tensor in head.state_dict().values())
    assert loaded < PER_KIND * times / 2  # most damage is seen


def test_safetensors_alone_loads_other_weights_without_an_error(heads):
    """The positive control: what the damage does where nobody checks."""
    rng, wrong = random.Random(0), 0
    for i in range(1000):
        _, _, weights = heads[i % len(heads)]
        damaged = rng.choice(mutations.ANYWHERE)(weights, rng)
        try:
            stored, sound = safetensors_torch.load(damaged), safetensors_torch.load(weights)
        except SafetensorError:
            continue
        wrong += any(not torch.equal(stored.get(name, torch.empty(0)), tensor) for name, tensor in sound.items())
    assert wrong > 100


@pytest.mark.soak
def test_a_fuzzer_that_follows_the_loaders_branches_finds_nothing(tmp_path):
    pytest.importorskip("atheris")
    script = Path(__file__).with_name("fuzz_heads.py")
    command = [sys.executable, script, "-max_total_time=120", "-max_len=8192", "-seed=1", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
