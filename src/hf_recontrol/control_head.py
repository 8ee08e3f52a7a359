"""u = f(h): the control itself, fitted to the reward; one small network at each token in place of an ascent.

Beyond the paper. Adding ∇V(h) to a hidden state raises V(h + u); but a text changes only by the tokens that are chosen,
and those by the logits. control_fitting.py has the objective that asks for better tokens.
"""

from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .activations import ACTIVATION_AND_SLOPE
from .head import Head
from .head_config import ControlHeadConfig, HeadConfig


class ControlHead(Head):
    """f(h) = output_scale ∘ (bias + W₂ σ(W₁ x + b₁)) with x = (h − input_mean) / input_std; at first 0 everywhere.

    With no hidden layer f(h) = output_scale ∘ (bias + W x), with W of the config's `rank` where it has one, and at rank
    0 one constant vector. `output_scale` is the unit in which u is fitted, for each dimension of the hidden state.

    Args:
        config: shape, base model, reward and the multiple of u that is used unless told otherwise.

    Examples:
        >>> from hf_recontrol import ControlHeadConfig
        >>> head = ControlHead(ControlHeadConfig(hidden_size=8))
        >>> head(torch.ones(2, 5, 8)).shape
        torch.Size([2, 5, 8])
        >>> bool(head(torch.ones(8)).any())
        False
    """

    config_class: ClassVar[type[HeadConfig]] = ControlHeadConfig
    config: ControlHeadConfig
    output_scale: Tensor

    def __init__(self, config: ControlHeadConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(
            nn.Linear(inputs, outputs, bias=i < config.num_hidden_layers, dtype=torch.float32)
            for i, (inputs, outputs) in enumerate(pairwise(config.widths))
        )
        if len(self.layers):
            nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]
        self.bias = nn.Parameter(torch.zeros(config.hidden_size, dtype=torch.float32))
        self.register_buffer("output_scale", torch.ones(config.hidden_size, dtype=torch.float32))

    def is_zero(self) -> bool:
        """Whether u = 0 whatever h is, as of a head that was just made."""
        weights: list[Any] = [self.bias, *(layer.weight for layer in self.layers[-1:])]
        return not any(bool(weight.any()) for weight in weights)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """u = f(h), in units of the hidden state, at scale 1.

        Args:
            hidden_states: float (..., hidden_size), any float dtype, on the head's device.

        Returns:
            The same shape, in the head's dtype.

        Raises:
            HeadMismatch: the hidden states are of another width.
        """
        x = self.standardized(hidden_states)
        if not len(self.layers):
            return (self.output_scale * self.bias).expand_as(x)
        activation, _ = ACTIVATION_AND_SLOPE[self.config.hidden_act]
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i < self.config.num_hidden_layers:
                x = activation(x)
        u: Tensor = self.output_scale * (x + self.bias)
        return u
