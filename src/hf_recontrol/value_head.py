"""V(h): predicts, from the hidden state before a token, the reward that the whole answer will end with.

Kong et al. 2024, "Aligning Large Language Models with Representation Editing: A Control Perspective",
arXiv:2406.05954, section 4: V is a small MLP on the language model's last hidden states.
"""

from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from .head import ACTIVATION_AND_SLOPE, Head
from .head_config import HeadConfig, ValueHeadConfig


class ValueHead(Head):
    """V(h) = w · σ(W₂ σ(W₁ x + b₁) + b₂) + b with x = (h − input_mean) / input_std, and 0, 1 or 2 hidden layers.

    Trained on (reward − mean) / std, and returned so; `config.reward` holds mean and std.

    Args:
        config: shape, activation, base model, reward scale and control defaults.

    Example:
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

    def forward(self, hidden_states: Tensor) -> Tensor:
        """V(h) in standard deviations of the reward.

        Args:
            hidden_states: float (..., hidden_size), any float dtype, on the head's device.

        Returns:
            (...), in the head's dtype.

        Raises:
            HeadMismatch: the hidden states are of another width.
        """
        activation, _ = ACTIVATION_AND_SLOPE[self.config.hidden_act]
        x = self.standardized(hidden_states)
        for layer in self.layers[:-1]:
            x = activation(layer(x))
        values: Tensor = self.layers[-1](x).squeeze(-1)
        return values

    @torch.no_grad()
    def gradient(self, hidden_states: Tensor) -> Tensor:
        """∇V(h) by hand: W₁ᵀ(σ'(z₁) ∘ W₂ᵀ(σ'(z₂) ∘ w)) / input_std.

        Needs no autograd, so it works under inference_mode and inside a compiled graph.

        Args:
            hidden_states: float (..., hidden_size).

        Returns:
            (..., hidden_size), in the head's dtype.
        """
        activation, slope = ACTIVATION_AND_SLOPE[self.config.hidden_act]
        x = self.standardized(hidden_states)
        slopes = []
        for layer in self.layers[:-1]:
            z = layer(x)
            slopes.append(slope(z))
            x = activation(z)
        weights: list[Tensor] = [layer.weight for layer in self.layers]  # type: ignore[misc]
        gradient = weights.pop()[0].expand(*hidden_states.shape[:-1], -1)
        while weights:
            gradient = (gradient * slopes.pop()) @ weights.pop()
        return gradient / self.input_std
