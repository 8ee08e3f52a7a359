"""Blocks of rollouts in which every number tells where it belongs, and a folder of them."""

import torch

from hf_recontrol.rollout_store import RolloutStore

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
