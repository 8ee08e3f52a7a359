"""The activations that a head may have, and their slopes: an ascent needs no autograd."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def relu_slope(z: Tensor) -> Tensor:
    return torch.relu(z).sign()  # 0 at the kink, as autograd has it; a third of the time of (z > 0).to(z.dtype)


def silu_slope(z: Tensor) -> Tensor:
    gate = torch.sigmoid(z)
    slope: Tensor = gate * (1 + z * (1 - gate))
    return slope


def gelu_slope(z: Tensor) -> Tensor:
    density = torch.exp(-z.square() / 2) / (2 * torch.pi) ** 0.5
    slope: Tensor = (1 + torch.erf(z / 2**0.5)) / 2 + z * density
    return slope


def tanh_slope(z: Tensor) -> Tensor:
    return 1 - torch.tanh(z).square()


ACTIVATION_AND_SLOPE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "relu": (torch.relu, relu_slope),
    "silu": (functional.silu, silu_slope),
    "gelu": (functional.gelu, gelu_slope),
    "tanh": (torch.tanh, tanh_slope),
}
