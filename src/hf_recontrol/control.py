"""The control: at each token, h ← h + u with u found by n steps of gradient ascent on V."""

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .control_config import ControlConfig, as_float, step_size_for
from .head_config import shown
from .value_head import ValueHead


class Controller:
    """h ← h + u, where u ← u + α(∇V(h + u) − 2λu), n times, from u = 0, and each time cut to ‖u‖ ≤ r‖h‖.

    The test-time control of RE-Control (Kong et al. 2024, arXiv:2406.05954, section 4). There a small α and few steps
    are its only regularisation: λ = 0, r is infinite. Each row is moved on its own: its neighbours in the batch do not
    matter. Several heads act as one, V = Σ wᵢ Vᵢ, each Vᵢ in standard deviations of its own reward.

    With a strength, α is what the head's calibration has for it. Of several heads each then has an α of its own, so
    that a head of weight 1 pushes as hard as it would alone.

    With a target value v, a step goes up V below v and down above it, and is shortened to |v − V| / ‖∇V‖², Newton's
    step on to v, so that it stops there.

    Args:
        head: V, never written; or several, {head: weight}, where a negative weight steers away. On a head's own
            device its weights are read at each call; for another device they are copied once.
        config: how hard; the heads' own where None. Its max_kl takes the language model too, so generate() and
            forward_steered obey it, and a Controller alone does not.

    Raises:
        TypeError, ValueError: a head or weight that is none, heads that differ in an option that is not given, a
            strength without a calibration, a target value for several heads, or a head in less than float32.

    Example:
        >>> from hf_recontrol import ValueHead, ValueHeadConfig
        >>> head = ValueHead(ValueHeadConfig(hidden_size=8))
        >>> steer = Controller(head, ControlConfig(step_size=0.1, num_steps=5))
        >>> hidden_states = torch.randn(1, 8)
        >>> bool(head(steer(hidden_states)) >= head(hidden_states))
        True
    """

    def __init__(self, head: ValueHead | Mapping[ValueHead, float], config: ControlConfig | None = None):
        heads = _weighted(head)
        own = [one.config.control for one in heads]
        config = config or ControlConfig()
        targets = [one for one in (config.target_value, *(control.target_value for control in own)) if one is not None]
        if targets and list(heads.values()) != [1.0]:
            raise ValueError(
                f"target_value is {targets[0]}, in raw units of one reward, but the heads' weights are "
                f"{list(heads.values())}. Give one head of weight 1, or no target_value: also the heads' own, "
                "head.config.control.target_value."
            )
        config = config.over_heads(own)  # checks the heads' own numbers too: they may have been set in this process
        self.config = config
        self.num_steps = int(config.num_steps or 0)
        if config.strength is None:
            step_sizes = [float(config.step_size or 0.0)] * len(heads)
        else:
            step_sizes = [step_size_for(config.strength, control, self.num_steps) for control in own]
        self.heads = list(heads)
        self.weights = list(heads.values())
        self.step_size = sum(step_sizes) / len(step_sizes)
        """α; with a strength, the mean over the heads."""
        self._pushes = [weight * alpha for weight, alpha in zip(self.weights, step_sizes, strict=True)]
        self._shrinking = 1 - 2 * self.step_size * float(config.regularization or 0.0)
        self._on_device: dict[torch.device, list[ValueHead]] = {}

    @property
    def is_identity(self) -> bool:
        """Whether nothing is edited: α = 0 or n = 0."""
        return self.step_size == 0 or self.num_steps == 0

    @property
    def max_kl(self) -> float | None:
        """The bound of each token's KL, in nats; None where there is none."""
        return None if self.config.max_kl in (None, math.inf) else self.config.max_kl

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
        for head in self.heads:
            head.check_width(hidden_states.shape[-1])
        if self.is_identity:
            return hidden_states, torch.ones_like(hidden_states[..., :1], dtype=torch.bool)
        u = self.control(hidden_states)
        edited = (hidden_states.to(u.dtype) + u).to(hidden_states.dtype)
        sound = torch.isfinite(edited).all(-1, keepdim=True)
        return torch.where(sound, edited, hidden_states), sound

    @torch.no_grad()
    def control(self, hidden_states: Tensor) -> Tensor:
        """u, the shift.

        Args:
            hidden_states: float (..., hidden_size).

        Returns:
            (..., hidden_size) in the heads' dtype.
        """
        heads = self._heads_on(hidden_states.device)
        h = hidden_states.to(heads[0].dtype)
        with torch.autocast(h.device.type, enabled=False):  # α = 1e-3 moves nothing in bfloat16
            cap = self.config.max_relative_norm
            limit = None if cap in (None, math.inf) else cap * h.norm(dim=-1, keepdim=True)
            linear = all(head.config.num_hidden_layers == 0 for head in heads)
            if linear and self._shrinking == 1 and self.config.target_value is None:  # ∇V is one constant vector
                return _within(self.num_steps * self._push(heads, h), limit)
            u = torch.zeros_like(h)
            for _ in range(self.num_steps):
                u = _within(self._shrinking * u + self._push(heads, h + u), limit)
            return u

    @torch.no_grad()
    def values(self, hidden_states: Tensor) -> Tensor:
        """V(h) in raw units of the reward, (...); of several heads, Σ wᵢ times each one's."""
        heads = self._heads_on(hidden_states.device)
        scales = [head.config.reward for head in heads]
        values: Tensor = sum(
            weight * (scale.std * head(hidden_states) + scale.mean)
            for weight, scale, head in zip(self.weights, scales, heads, strict=True)
        )
        return values

    def _push(self, heads: list[ValueHead], h: Tensor) -> Tensor:
        """Σ wᵢ αᵢ ∇Vᵢ(h), and with a target value the share of it that leads there."""
        push: Tensor = sum(factor * head.gradient(h) for factor, head in zip(self._pushes, heads, strict=True))  # type: ignore[assignment]
        if self.config.target_value is None:
            return push
        scale = heads[0].config.reward
        gap = (self.config.target_value - scale.mean) / scale.std - heads[0](h).unsqueeze(-1)
        gain = push.square().sum(-1, keepdim=True) / self.step_size  # of V, by the whole step, to first order
        share: Tensor = (gap / gain).nan_to_num(0.0).clamp(-1.0, 1.0)  # 0/0: V is flat, and at its target
        return share * push

    def _heads_on(self, device: torch.device) -> list[ValueHead]:
        # The LM head may be on any device, or on several in turn (accelerate's offload): one copy for each.
        if device not in self._on_device:
            self._on_device[device] = [
                head if head.input_mean.device == device else copy.deepcopy(head).to(device) for head in self.heads
            ]
        return self._on_device[device]


def _within(u: Tensor, limit: Tensor | None) -> Tensor:
    """u, cut to the norm `limit`, (..., 1)."""
    if limit is None:
        return u
    peak = u.abs().amax(-1, keepdim=True)
    unit = u / peak  # the square of a huge u would be infinite
    norm = unit.norm(dim=-1, keepdim=True)
    return torch.where(norm * peak > limit, unit * (limit / norm), u)  # u = 0 has no unit, and stays


def _weighted(head: ValueHead | Mapping[ValueHead, float]) -> dict[ValueHead, float]:
    """The heads and their weights, checked."""
    if not isinstance(head, ValueHead | Mapping):
        raise TypeError(f"A Controller takes a ValueHead or a dict {{ValueHead: weight}}, not a {type(head).__name__}.")
    heads: dict[ValueHead, float] = {head: 1.0} if isinstance(head, ValueHead) else dict(head)
    for one, weight in heads.items():
        if not isinstance(one, ValueHead):
            raise TypeError(f"A {type(one).__name__} was given for a head; a Controller takes ValueHeads.")
        if not math.isfinite(as_float(weight)) or weight == 0:
            raise ValueError(f"A head's weight is {shown(weight)}; it must be a finite number other than 0.")
        if one.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"The value head is {one.dtype}, too coarse for an ascent in small steps; call head.float() first. "
                "The language model may be of any dtype."
            )
    if not heads or len({one.dtype for one in heads}) > 1:
        dtypes = [str(one.dtype) for one in heads]
        raise ValueError(f"{len(heads)} heads of dtypes {dtypes} were given; give one or more, all of one dtype.")
    return {one: float(weight) for one, weight in heads.items()}


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
