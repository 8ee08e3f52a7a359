"""V(h): predicts, from the hidden state before a token, the reward that the whole answer will end with.

Kong et al. 2024, "Aligning Large Language Models with Representation Editing: A Control Perspective",
arXiv:2406.05954, section 4: V is a small MLP on the language model's last hidden states.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .activations import ACTIVATION_AND_SLOPE
from .head import Head
from .head_config import HeadConfig, ValueHeadConfig


class ValueHead(Head):
    """V(h) = w · σ(W₂ σ(W₁ x + b₁) + b₂) + b with x = (h − input_mean) / input_std, and 0, 1 or 2 hidden layers.

    Trained on (reward − mean) / std, and returned so; `config.reward` holds mean and std.

    Args:
        config: shape, activation, base model, reward scale and control defaults.

    Examples:
        >>> from hf_recontrol import ValueHeadConfig
        >>> head = ValueHead(ValueHeadConfig(hidden_size=8))
        >>> head(torch.zeros(2, 5, 8)).shape
        torch.Size([2, 5])
    """

    config_class: ClassVar[type[HeadConfig]] = ValueHeadConfig
    config: ValueHeadConfig

    def __init__(self, config: ValueHeadConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(
            nn.Linear(inputs, outputs, dtype=torch.float32) for inputs, outputs in pairwise(config.widths)
        )
        self.kept_gram_matrices: dict[Any, Any] = {}
        """See gram_matrix in ascent.py: it dies with the head, and is neither saved nor copied."""

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "kept_gram_matrices": {}}

    def forward(self, hidden_states: Tensor) -> Tensor:
        """V(h) in standard deviations of the reward.

        Args:
            hidden_states: float (..., hidden_size), any float dtype, on the head's device.

        Returns:
            (...), in the head's dtype.

        Raises:
            HeadMismatch: the hidden states are of another width.
        """
        return self.value_at(self.preactivation(hidden_states))

    def preactivation(self, hidden_states: Tensor) -> Tensor:
        """z = W₁ x + b₁, all that V sees of h: (..., rows of W₁). Without a hidden layer it is V itself, (..., 1)."""
        z: Tensor = self.layers[0](self.standardized(hidden_states))
        return z

    def value_at(self, z: Tensor) -> Tensor:
        """V, (...), where the first layer gives z, (..., rows of W₁)."""
        activation, _ = ACTIVATION_AND_SLOPE[self.config.hidden_act]
        for layer in list(self.layers)[1:]:
            z = layer(activation(z))
        return z.squeeze(-1)

    def slope(self, factor: float | Tensor = 1.0) -> Callable[[Tensor], Tensor]:
        """z ↦ factor · ∂V/∂z, by hand: σ'(z) ∘ W₂ᵀ(σ'(z₂) ∘ w), with w taken `factor` times beforehand.

        Args:
            factor: a number, or float (..., 1), which broadcasts over z's rows.

        Returns:
            From z, (..., rows of W₁), to the same shape.
        """
        activation, slope = ACTIVATION_AND_SLOPE[self.config.hidden_act]
        _, *layers = self.layers
        if not layers:
            return lambda z: factor * torch.ones_like(z)
        top = factor * layers[-1].weight[0]  # type: ignore[index]
        if len(layers) == 1:
            return lambda z: top * slope(z)
        second: Any = layers[0]
        return lambda z: (top * slope(second(activation(z)))) @ second.weight * slope(z)

    @torch.no_grad()
    def gradient(self, hidden_states: Tensor) -> Tensor:
        """∇V(h) = W₁ᵀ ∂V/∂z / input_std.

        Needs no autograd, so it works under inference_mode and inside a compiled graph.

        Args:
            hidden_states: float (..., hidden_size).

        Returns:
            (..., hidden_size), in the head's dtype.
        """
        return self.pulled_back(self.slope()(self.preactivation(hidden_states)))

    def pulled_back(self, slope: Tensor) -> Tensor:
        """W₁ᵀ s / input_std, (..., hidden_size): the gradient by h, of that by z, (..., rows of W₁)."""
        gradient: Tensor = slope @ self.first_weight / self.input_std
        return gradient

    @property
    def first_weight(self) -> Tensor:
        """W₁, (rows, hidden_size); of a head without hidden layers w, with one row."""
        weight: Tensor = self.layers[0].weight  # type: ignore[assignment]
        return weight
