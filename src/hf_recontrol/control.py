"""The control: at each token, h ← h + u with u found by n steps of gradient ascent on V."""

import copy
from dataclasses import dataclass
from math import inf
from numbers import Integral, Real

import torch
from torch import Tensor

from .head_config import MAX_STEPS
from .value_head import ValueHead


@dataclass(frozen=True)
class ControlConfig:
    """How hard to steer. None means what the head's config says."""

    step_size: float | None = None
    """α, finite, ≥ 0, in hidden-state units per unit of ∇V. 0 is no control."""
    num_steps: int | None = None
    """n, 0 to 1024 steps at each token. 0 is no control."""

    def __post_init__(self) -> None:
        alpha, n = self.step_size, self.num_steps
        if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, Real) or not 0 <= alpha < inf):
            raise ValueError(f"step_size is {alpha!r}; it must be a finite number ≥ 0 (0 is no control).")
        if n is not None and (isinstance(n, bool) or not isinstance(n, Integral) or not 0 <= n <= MAX_STEPS):
            raise ValueError(f"num_steps is {n!r}; it must be an integer from 0 to {MAX_STEPS} (0 is no control).")


class Controller:
    """h ← h + u, where u ← u + α ∇V(h + u), n times, from u = 0.

    The test-time control of RE-Control (Kong et al. 2024, arXiv:2406.05954, section 4). A small α and few steps are its
    only regularisation. Each row is moved on its own: its neighbours in the batch do not matter.

    Args:
        head: V, never written. On the head's own device its weights are read at each call; for another device they
            are copied once.
        config: α and n; the head's own where None.

    Example:
        >>> from hf_recontrol import ValueHead, ValueHeadConfig
        >>> head = ValueHead(ValueHeadConfig(hidden_size=8))
        >>> steer = Controller(head, ControlConfig(step_size=0.1, num_steps=5))
        >>> hidden_states = torch.randn(1, 8)
        >>> bool(head(steer(hidden_states)) >= head(hidden_states))
        True
    """

    def __init__(self, head: ValueHead, config: ControlConfig | None = None):
        config = config or ControlConfig()
        own = head.config.control
        config = ControlConfig(  # checks the head's own numbers too: they may have been set in this process
            step_size=own.step_size if config.step_size is None else config.step_size,
            num_steps=own.num_steps if config.num_steps is None else config.num_steps,
        )
        if head.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"The value head is {head.dtype}, too coarse for an ascent in small steps; call head.float() first. "
                "The language model may be of any dtype."
            )
        self.head = head
        self.step_size = float(config.step_size)  # type: ignore[arg-type]  # set above
        self.num_steps = int(config.num_steps)  # type: ignore[arg-type]
        self._heads = {head.input_mean.device: head}

    @property
    def is_identity(self) -> bool:
        """Whether nothing is edited: α = 0 or n = 0."""
        return self.step_size == 0 or self.num_steps == 0

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Edit the LM head's input.

        Args:
            hidden_states: float (..., hidden_size), on any device.

        Returns:
            Same shape, dtype and device; rounded once. The very same tensor where nothing is edited.

        Raises:
            HeadMismatch: the hidden states are of another width.
        """
        return self.edit(hidden_states)[0]

    @torch.no_grad()
    def edit(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """The edited hidden states, and which rows are sound.

        A row that is not finite, before or after the edit, is returned as it came: it must not spoil its batch.

        Returns:
            As `__call__`; and bool (..., 1), False where a row was left as it came.
        """
        self.head.check_width(hidden_states.shape[-1])
        if self.is_identity:
            return hidden_states, torch.ones_like(hidden_states[..., :1], dtype=torch.bool)
        edited = (hidden_states.to(self.head.dtype) + self.control(hidden_states)).to(hidden_states.dtype)
        sound = torch.isfinite(edited).all(-1, keepdim=True)
        return torch.where(sound, edited, hidden_states), sound

    @torch.no_grad()
    def control(self, hidden_states: Tensor) -> Tensor:
        """u, the shift.

        Args:
            hidden_states: float (..., hidden_size).

        Returns:
            (..., hidden_size) in the head's dtype.
        """
        head = self._head_on(hidden_states.device)
        h = hidden_states.to(head.dtype)
        with torch.autocast(h.device.type, enabled=False):  # α = 1e-3 moves nothing in bfloat16
            if head.config.num_hidden_layers == 0:  # ∇V is one constant vector
                return self.num_steps * self.step_size * head.gradient(h)
            u = torch.zeros_like(h)
            for _ in range(self.num_steps):
                u = u + self.step_size * head.gradient(h + u)
            return u

    def _head_on(self, device: torch.device) -> ValueHead:
        # The LM head may be on any device, or on several in turn (accelerate's offload): one copy for each.
        if device not in self._heads:
            self._heads[device] = copy.deepcopy(self.head).to(device)
        return self._heads[device]


def control_by_autograd(head: ValueHead, hidden_states: Tensor, step_size: float, num_steps: int) -> Tensor:
    """u as the paper writes it, by automatic differentiation: the reference that every other path is tested against.

    Args:
        hidden_states: float (..., hidden_size).

    Returns:
        u, (..., hidden_size), in the head's dtype.
    """
    h = hidden_states.detach().to(head.dtype)
    u = torch.zeros_like(h)
    for _ in range(num_steps):
        with torch.enable_grad():
            u.requires_grad_(True)
            (gradient,) = torch.autograd.grad(head(h + u).sum(), u)
        u = (u + step_size * gradient).detach()
    return u
