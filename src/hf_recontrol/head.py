"""What the two kinds of head share: they read standardised hidden states, and belong to one width."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from .errors import HeadMismatch
from .head_config import HeadConfig
from .head_files import HeadFiles


class Head(HeadFiles):
    """A ValueHead or a ControlHead. `Head.from_pretrained` reads a folder or Hub repository of either kind.

    Weights are float32 when made or loaded; `.to(torch.float64)` computes in float64. Nothing computes in less than
    float32.
    """

    input_mean: Tensor
    input_std: Tensor

    def __init__(self, config: HeadConfig):
        super().__init__()
        if type(config) is not self.config_class:
            raise TypeError(
                f"{type(self).__name__} takes a {self.config_class.__name__}, not a {type(config).__name__}."
            )
        config.validate()
        self.config = config
        self.kept_copies: dict[torch.device, Any] = {}
        """See on_device in control.py: they die with the head, and are neither saved nor copied."""
        self.register_buffer("input_mean", torch.zeros(config.hidden_size, dtype=torch.float32))
        self.register_buffer("input_std", torch.ones(config.hidden_size, dtype=torch.float32))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "kept_copies": {}}

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in: float32, or float64 if the head was moved to it."""
        return self.input_mean.dtype

    def standardized(self, hidden_states: Tensor) -> Tensor:
        """x = (h − input_mean) / input_std, in the head's dtype.

        Raises:
            HeadMismatch: the hidden states are of another width.
        """
        self.check_width(hidden_states.shape[-1])
        return (hidden_states.to(self.dtype) - self.input_mean) / self.input_std

    def digest(self) -> str:
        """A hash of what it computes: its shape and weights, whatever its names and defaults are."""
        config = self.config
        digest = hashlib.sha256(f"{config.kind} {config.hidden_act} {config.num_hidden_layers}".encode())
        for name, tensor in self.state_dict().items():
            digest.update(name.encode() + tensor.float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def check_width(self, hidden_size: int, model_name: str = "this model") -> None:
        """Raise HeadMismatch unless hidden states are as wide as the head reads."""
        if hidden_size != self.config.hidden_size:
            trained_on = self.config.base_model_name_or_path or "an unnamed model"
            raise HeadMismatch(
                f"The {self.config.kind} head reads hidden states {self.config.hidden_size} wide (it was trained on "
                f"{trained_on!r}), but those of {model_name} are {hidden_size} wide. Use a head trained on this "
                "model, or train one with RecontrolTrainer."
            )
