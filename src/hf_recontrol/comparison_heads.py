"""Heads that only a comparison needs: Static RE, and the placebos."""

from typing import Any

import torch
from torch.utils.data import Dataset

from .fitting import fit_linear_head, rewards_of
from .head_config import ValueHeadConfig
from .value_head import ValueHead


def fit_static_head(train_dataset: Any, *, ridge: float = 0.01, device: str | torch.device = "cpu") -> ValueHead:
    """Static RE: the ridge regression of the reward on the state at the end of the prompt, whose weight is the shift.

    The paper's baseline (Kong et al. 2024, arXiv:2406.05954): h ← h + c · w at every token, with a w that knows only
    where an answer begins. fit_linear_head is the same regression on every state. Arguments and errors are its.
    """
    head = fit_linear_head(FirstStates(train_dataset), ridge=ridge, device=device)
    head.config.info["training"]["recipe"] = "ridge regression in closed form, on the first state of each answer"
    return head


def random_direction(hidden_size: int, seed: int = 0) -> ValueHead:
    """A placebo: a linear head whose one direction is random, to be calibrated like the others."""
    head = ValueHead(ValueHeadConfig(hidden_size=hidden_size, num_hidden_layers=0))
    head.config.control.num_steps = 1
    direction = torch.randn(hidden_size, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        weight, bias = head.layers[0].parameters()
        weight.copy_(direction / direction.norm())
        bias.zero_()
    head.config.info["training"] = {"recipe": "none: a random direction, for comparison", "seed": seed}
    return head.eval()


class _View(Dataset[dict[str, Any]]):
    """Rollouts with something changed; what they were made with is still known."""

    def __init__(self, rollouts: Any):
        self.rollouts, self.rewards = rollouts, rewards_of(rollouts)
        for name in ("hidden_size", "fingerprint", "row"):
            if hasattr(rollouts, name):
                setattr(self, name, getattr(rollouts, name))

    def __len__(self) -> int:
        return len(self.rollouts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rollouts[index], "reward": self.rewards[index]}


class ShuffledRewards(_View):
    """A placebo: rollouts whose rewards have changed places, so that there is nothing to learn from them.

    Args:
        rollouts: a RolloutDataset or a part of one.
        seed: of the permutation.
    """

    def __init__(self, rollouts: Any, seed: int = 0):
        super().__init__(rollouts)
        self.rewards = self.rewards[torch.randperm(len(self.rewards), generator=torch.Generator().manual_seed(seed))]


class FirstStates(_View):
    """Rollouts of which only the first state of each answer is seen: the one at the end of the prompt."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        first = {name: item[name][:1] for name in ("hidden_states", "token_ids") if name in item}
        return item | first
