"""V(h): predicts, from the hidden state before a token, the reward that the whole answer will end with.

Kong et al. 2024, "Aligning Large Language Models with Representation Editing: A Control Perspective",
arXiv:2406.05954, section 4: V is a small MLP on the language model's last hidden states.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from .errors import HeadMismatch
from .head_config import ValueHeadConfig
from .head_files import HeadFiles


def _relu_slope(z: Tensor) -> Tensor:
    slope: Tensor = (z > 0).to(z.dtype)  # 0 at the kink, as autograd has it
    return slope


def _silu_slope(z: Tensor) -> Tensor:
    gate = torch.sigmoid(z)
    slope: Tensor = gate * (1 + z * (1 - gate))
    return slope


def _gelu_slope(z: Tensor) -> Tensor:
    density = torch.exp(-z.square() / 2) / (2 * torch.pi) ** 0.5
    slope: Tensor = (1 + torch.erf(z / 2**0.5)) / 2 + z * density
    return slope


def _tanh_slope(z: Tensor) -> Tensor:
    return 1 - torch.tanh(z).square()


ACTIVATION_AND_SLOPE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "relu": (torch.relu, _relu_slope),
    "silu": (functional.silu, _silu_slope),
    "gelu": (functional.gelu, _gelu_slope),
    "tanh": (torch.tanh, _tanh_slope),
}


class ValueHead(HeadFiles, nn.Module):
    """V(h) = w · σ(W₂ σ(W₁ x + b₁) + b₂) + b with x = (h − input_mean) / input_std, and 0, 1 or 2 hidden layers.

    Trained on (reward − mean) / std, and returned so; `config.reward` holds mean and std. Weights are float32 when
    made or loaded; `.to(torch.float64)` computes in float64. Nothing computes in less than float32.

    Args:
        config: shape, activation, base model, reward scale and control defaults.

    Example:
        >>> from hf_recontrol import ValueHeadConfig
        >>> head = ValueHead(ValueHeadConfig(hidden_size=8))
        >>> head(torch.zeros(2, 5, 8)).shape
        torch.Size([2, 5])
    """

    config_class: ClassVar[type[ValueHeadConfig]] = ValueHeadConfig
    input_mean: Tensor
    input_std: Tensor

    def __init__(self, config: ValueHeadConfig):
        super().__init__()
        config.validate()
        self.config = config
        widths = [config.hidden_size, *[config.width] * config.num_hidden_layers, 1]
        self.layers = nn.ModuleList(
            nn.Linear(inputs, outputs, dtype=torch.float32) for inputs, outputs in pairwise(widths)
        )
        self.register_buffer("input_mean", torch.zeros(config.hidden_size, dtype=torch.float32))
        self.register_buffer("input_std", torch.ones(config.hidden_size, dtype=torch.float32))

    @property
    def dtype(self) -> torch.dtype:
        """What V computes in: float32, or float64 if the head was moved to it."""
        return self.input_mean.dtype

    def forward(self, hidden_states: Tensor) -> Tensor:
        """V(h) in standard deviations of the reward.

        Args:
            hidden_states: float (..., hidden_size), any float dtype, on the head's device.

        Returns:
            (...), in the head's dtype.

        Raises:
            HeadMismatch: the hidden states are of another width.
        """
        self.check_width(hidden_states.shape[-1])
        activation, _ = ACTIVATION_AND_SLOPE[self.config.hidden_act]
        x = (hidden_states.to(self.dtype) - self.input_mean) / self.input_std
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
        x = (hidden_states.to(self.dtype) - self.input_mean) / self.input_std
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

    def check_width(self, hidden_size: int, model_name: str = "this model") -> None:
        """Raise HeadMismatch unless hidden states are as wide as V reads."""
        if hidden_size != self.config.hidden_size:
            trained_on = self.config.base_model_name_or_path or "an unnamed model"
            raise HeadMismatch(
                f"The value head reads hidden states {self.config.hidden_size} wide (it was trained on "
                f"{trained_on!r}), but those of {model_name} are {hidden_size} wide. Use a head trained on this "
                "model, or train one with RecontrolTrainer."
            )
