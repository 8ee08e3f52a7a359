"""What V is fitted to, the λ-returns, and how well it predicts the reward of held-out answers."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .fitting import fit_linear_head, float64_device
from .objectives import answer_sums, lambda_returns
from .value_head import ValueHead


def _explained(values: Tensor, returns: Tensor) -> float:
    variance = returns.var(unbiased=False)
    return float(1 - (values - returns).square().mean() / variance) if variance > 0 else 0.0


def _ranks(x: Tensor) -> Tensor:
    _, group, counts = x.unique(return_inverse=True, return_counts=True)
    ranks: Tensor = (counts.cumsum(0) - (counts - 1) / 2)[group]  # ties share their mean rank
    return ranks


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's rank correlation of two (n,) tensors, ties at their mean rank; 0 if either is constant."""
    a, b = (ranks - ranks.mean() for ranks in (_ranks(x).double(), _ranks(y).double()))
    norm = a.norm() * b.norm()
    return float(a @ b / norm) if norm > 0 else 0.0


def value_metrics(
    values: Tensor,
    rewards: Tensor,
    offsets: Tensor,
    td_lambda: float,
    linear_values: Tensor | None = None,
    *,
    gamma: float = 1.0,
) -> dict[str, float]:
    """How well V predicts the end of held-out answers. Never NaN: where nothing varies, 0. Answers without states are
    passed over.

    Args:
        values: V at each state, float (tokens,), packed as pack_answers has it; in standard deviations of the reward.
        rewards: standardised, (answers,).
        offsets: long (answers + 1,).
        td_lambda: of the returns that "loss" is measured against.
        linear_values: the linear head's values at the same states.
        gamma: γ, the discount of the returns.

    Returns:
        loss: mean over tokens of (V − λ-return)². explained_variance: 1 − mean (V − G)² / Var G over tokens, G the
        answer's final reward, discounted by γ: 0 is the best constant, 1 perfect; explained_variance_linear: the
        linear head's.
        rank_correlation_q1 … q4: Spearman's, over answers, of the final reward and V when a quarter, … , all of the
        answer is seen. calibration_slope: of the regression of G on V; 1 is calibrated, below 1 V exaggerates.
    """
    lengths = offsets.diff()
    values, rewards, lengths = values.double(), rewards[lengths > 0].double(), lengths[lengths > 0]
    offsets = torch.cat([offsets[:1], lengths.cumsum(0)])
    returns = lambda_returns(values, rewards, offsets, 1.0, gamma)
    targets = lambda_returns(values, rewards, offsets, td_lambda, gamma)
    centred = values - values.mean()
    spread = centred.square().sum()
    metrics = {
        "loss": float((values - targets).square().mean()),
        "explained_variance": _explained(values, returns),
        "calibration_slope": float(centred @ returns / spread) if spread > 0 else 0.0,
    }
    if linear_values is not None:
        metrics["explained_variance_linear"] = _explained(linear_values.double(), returns)
    for quarter in (1, 2, 3, 4):
        seen = offsets[:-1] + (lengths * quarter + 3) // 4 - 1
        metrics[f"rank_correlation_q{quarter}"] = rank_correlation(values[seen], rewards)
    return metrics


class ValueObjective:
    """Minimises the mean over tokens of (V(s_t) − v_t)², v_t the λ-return. See lambda_returns.

    Args:
        head: V; its config has the reward's scale.
        train_dataset: for the linear head that V is compared with; None compares with none.
    """

    def __init__(
        self, head: ValueHead, train_dataset: Any, *, td_lambda: float, gamma: float = 1.0, device: torch.device
    ):
        self.head, self.train_dataset, self.device = head, train_dataset, device
        self.td_lambda, self.gamma = td_lambda, gamma

    @cached_property
    def linear_head(self) -> ValueHead | None:
        """The ridge head of the training answers; fitted when it is first asked for."""
        if self.train_dataset is None:
            return None
        device = float64_device(self.device)
        scale = self.head.config.reward
        return fit_linear_head(self.train_dataset, gamma=self.gamma, reward=scale, device=device).to(self.device)

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Of each token, (tokens,)."""
        values: Tensor = model(batch["hidden_states"])
        rewards = self._standardized(batch["rewards"])
        returns = lambda_returns(values.detach(), rewards, batch["offsets"], self.td_lambda, self.gamma)
        return (values - returns).square()

    def observe(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """What `metrics` reads of each token: V, and the linear head's; float32 (tokens, 1 or 2)."""
        heads = [model] if self.linear_head is None else [model, self.linear_head]
        with torch.no_grad():
            return torch.stack([head(batch["hidden_states"]).float() for head in heads], dim=-1)

    def metrics(self, observed: Tensor, rewards: Tensor, offsets: Tensor) -> dict[str, float]:
        """See value_metrics."""
        linear = observed[:, 1] if observed.shape[1] > 1 else None
        rewards = self._standardized(rewards)
        return value_metrics(observed[:, 0], rewards, offsets, self.td_lambda, linear, gamma=self.gamma)

    def ratios(self, observed: Tensor, rewards: Tensor, offsets: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """The metrics that are a ratio of sums over answers: float64 (answers,) each. For their intervals."""
        values = observed[:, 0].double()
        rewards = self._standardized(rewards).double()
        returns = lambda_returns(values, rewards, offsets, 1.0, self.gamma)
        total = (returns - returns.mean()).square()
        explained = total - (returns - values).square()
        return {"explained_variance": (answer_sums(explained, offsets), answer_sums(total, offsets))}

    def _standardized(self, rewards: Tensor) -> Tensor:
        scale = self.head.config.reward
        return (rewards - scale.mean) / scale.std
