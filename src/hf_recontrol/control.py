"""The control: at each token h ← h + u, with u what the control heads say, and then n steps of ascent on V."""

import copy
import math
from collections.abc import Hashable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import Tensor

from .ascent import Steps, ascend, gram_matrix, state_of, within
from .config_checks import shown
from .control_config import ControlConfig, as_float, multiplier_for, step_size_for
from .control_head import ControlHead
from .cuda_graph import CudaGraphs
from .head import Head
from .value_head import ValueHead

H = TypeVar("H", bound=Head)


class Controller:
    """h ← h + u, where u ← u + α(∇V(h + u) − 2λu), n times, from u = Σ wⱼ cⱼ fⱼ(h), and each time cut to ‖u‖ ≤ r‖h‖.

    The test-time control of RE-Control (Kong et al. 2024, arXiv:2406.05954, section 4) is that of a value head V: from
    u = 0, and a small α and few steps are its only regularisation: λ = 0, r is infinite. Several value heads act as
    one, V = Σ wᵢ Vᵢ, each Vᵢ in standard deviations of its own reward. Control heads fⱼ, beyond the paper, say where u
    starts; alone, they make no ascent. Each row is moved on its own: its neighbours in the batch do not matter.

    With a strength, α of a value head and the scale c of a control head are what the head's calibration has for it. Of
    several heads each then has its own, so that a head of weight 1 pushes as hard as it would alone.

    With a target value v, a step goes up V below v and down above it, and is shortened to |v − V| / ‖∇V‖², Newton's
    step on to v, so that it stops there.

    Args:
        head: a ValueHead or ControlHead, never written; or several, {head: weight}, where a negative weight steers
            away. On a head's own device its weights are read at each call (a change through `weight.data`, which leaves
            no sign, by the next Controller); for another device they are copied once.
        config: how hard; the heads' own where None. Its max_kl takes the language model too, so generate() and
            forward_steered obey it, and a Controller alone does not.

    Raises:
        TypeError, ValueError: a head or weight that is none, an option that none of the heads has, heads that differ in
            one that is not given, a strength without a calibration, a target value for several value heads, or a head
            in less than float32.

    Examples:
        >>> from hf_recontrol import ValueHead, ValueHeadConfig
        >>> head = ValueHead(ValueHeadConfig(hidden_size=8))
        >>> steer = Controller(head, ControlConfig(step_size=0.1, num_steps=5))
        >>> hidden_states = torch.randn(1, 8)
        >>> bool(head(steer(hidden_states)) >= head(hidden_states))
        True
    """

    def __init__(self, head: Head | Mapping[Head, float], config: ControlConfig | None = None):
        heads = _weighted(head)
        own = [one.config.control for one in heads]
        config = config or ControlConfig()
        values = {one: weight for one, weight in heads.items() if isinstance(one, ValueHead)}
        _check_target(config, values)
        config = config.over_heads(own)  # checks the heads' own numbers too: they may have been set in this process
        self.config = config
        self.heads = list(heads)
        self.weights = list(heads.values())
        self.num_steps = int(config.num_steps or 0)
        alphas = [self._step_size(one) for one in values]
        self.step_size = sum(alphas) / len(alphas) if alphas else 0.0
        """α; with a strength, the mean over the value heads."""
        self._values = [(one, weight * alpha) for (one, weight), alpha in zip(values.items(), alphas, strict=True)]
        self._climbs = len(values) > 0 and self.num_steps > 0
        controls = {one: weight for one, weight in heads.items() if isinstance(one, ControlHead)}
        self._controls = [(one, weight * self._scale(one)) for one, weight in controls.items()]
        pull = 2 * self.step_size * float(config.regularization or 0.0)
        self._shrinking = 1 - pull if pull else None
        self._on_device: dict[tuple[Head, torch.device], Head] = {}
        self._gram_matrices: dict[torch.device, Tensor] = {}
        self._graphs = CudaGraphs()

    def _step_size(self, head: ValueHead) -> float:
        if self.config.strength is None:
            return float(self.config.step_size or 0.0)
        return step_size_for(self.config.strength, head.config.control, self.num_steps)

    def _scale(self, head: ControlHead) -> float:
        if self.config.strength is not None:
            return multiplier_for(self.config.strength, head.config.control.calibration)
        return float(self.config.scale or 0.0)

    @property
    def is_identity(self) -> bool:
        """Whether nothing is edited: α = 0 or n = 0, and the scale is 0."""
        return (self.step_size == 0 or self.num_steps == 0) and not any(scale for _, scale in self._controls)

    @property
    def multipliers(self) -> dict[Head, float]:
        """α of each value head, and the scale of each control head, before its weight."""
        return {
            head: self._step_size(head) if isinstance(head, ValueHead) else self._scale(head)  # type: ignore[arg-type]
            for head in self.heads
        }

    def facts(self) -> dict[str, Any]:
        """What decides the control, as plain JSON: two controllers whose facts are equal steer alike."""
        heads = [[head.digest(), float(factor)] for head, factor in [*self._controls, *self._values]]
        said = {name: float(value) for name, value in asdict(self.config).items() if value not in (None, math.inf)}
        if self.config.target_value is not None:
            scale = self._values[0][0].config.reward
            said |= {"reward_mean": scale.mean, "reward_std": scale.std}
        return {"heads": heads, "config": said}

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
        if self._climbs and CudaGraphs.can_take(hidden_states):
            (u,) = self._graphs(lambda h: (self._control(h),), (hidden_states,), self._state(hidden_states.device))
            return u
        return self._control(hidden_states)

    def _control(self, hidden_states: Tensor) -> Tensor:
        values, controls = self._on(hidden_states.device, self._values), self._on(hidden_states.device, self._controls)
        h = hidden_states.to(self.heads[0].dtype)
        with torch.autocast(h.device.type, enabled=False):  # α = 1e-3 moves nothing in bfloat16
            cap = self.config.max_relative_norm
            limit = None if cap in (None, math.inf) else cap * h.norm(dim=-1, keepdim=True)
            start = None
            if controls:
                start = within(sum(factor * head(h) for head, factor in controls), limit)
            if not self._climbs:
                return torch.zeros_like(h) if start is None else start
            steps = Steps(self.num_steps, self._shrinking, limit, self._target())
            return ascend(values, h, start, steps, lambda: self._gram(values))

    def _state(self, device: torch.device) -> Hashable:
        """Changes when a tensor that the control reads has been replaced or written."""
        heads = [head for head, _ in (*self._on(device, self._values), *self._on(device, self._controls))]
        return tuple(state_of(tensor) for head in heads for tensor in (*head.parameters(), *head.buffers()))

    @torch.no_grad()
    def prepare(self, device: torch.device) -> None:
        """Make beforehand what the control keeps on a device, where a traced graph finds it."""
        if self._climbs and device not in self._gram_matrices:
            self._control(torch.zeros(1, self.heads[0].config.hidden_size, device=device))

    def _gram(self, heads: list[tuple[ValueHead, float]]) -> Tensor | None:
        device = heads[0][0].input_std.device
        if not torch.compiler.is_compiling():
            first_use = device not in self._gram_matrices
            self._gram_matrices[device] = gram_matrix([head for head, _ in heads], closely=first_use)
        return self._gram_matrices.get(device)

    def _target(self) -> float | None:
        """The target value in standard deviations of the reward, as the head returns it."""
        if self.config.target_value is None or not self._values:
            return None
        scale = self._values[0][0].config.reward
        return (self.config.target_value - scale.mean) / scale.std

    @torch.no_grad()
    def values(self, hidden_states: Tensor) -> Tensor:
        """V(h) in raw units of the reward, (...); of several heads, Σ wᵢ times each one's; NaN without a value head."""
        weights = [weight for head, weight in zip(self.heads, self.weights, strict=True) if isinstance(head, ValueHead)]
        if not weights:
            return torch.full_like(hidden_states[..., 0], torch.nan, dtype=self.heads[0].dtype)
        heads = [head for head, _ in self._on(hidden_states.device, self._values)]
        scales = [head.config.reward for head in heads]
        values: Tensor = sum(
            weight * (scale.std * head(hidden_states) + scale.mean)
            for weight, scale, head in zip(weights, scales, heads, strict=True)
        )
        return values

    def _on(self, device: torch.device, heads: list[tuple[H, float]]) -> list[tuple[H, float]]:
        """The heads, on that device."""
        # The LM head may be on any device, or on several in turn (accelerate's offload): one copy for each.
        found = []
        for head, factor in heads:
            if head.input_mean.device != device:
                if (head, device) not in self._on_device:
                    self._on_device[head, device] = on_device(head, device)
                head = self._on_device[head, device]  # type: ignore[assignment]
            found.append((head, factor))
        return found


def on_device(head: H, device: torch.device) -> H:
    """A copy of the head there, kept with it, and with what the copy keeps; made again when a weight was changed."""
    tensors = [*head.parameters(), *head.buffers()]
    sums = torch.stack([tensor.detach().double().sum() for tensor in tensors]).tolist()  # sees weight.data too
    state = [*map(state_of, tensors), sums]
    kept = head.kept_copies.get(device)
    if kept is None or kept[0] != state:
        kept = head.kept_copies[device] = (state, copy.deepcopy(head).to(device))
    copied: H = kept[1]
    return copied


def _weighted(head: Head | Mapping[Head, float]) -> dict[Head, float]:
    """The heads and their weights, checked."""
    if not isinstance(head, Head | Mapping):
        raise TypeError(
            f"A Controller takes a ValueHead, a ControlHead or a dict {{head: weight}}, not a {type(head).__name__}."
        )
    heads: dict[Head, float] = {head: 1.0} if isinstance(head, Head) else dict(head)
    for one, weight in heads.items():
        if not isinstance(one, Head):
            raise TypeError(f"A {type(one).__name__} was given for a head; a Controller takes heads.")
        if not math.isfinite(as_float(weight)) or weight == 0:
            raise ValueError(f"A head's weight is {shown(weight)}; it must be a finite number other than 0.")
        if one.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"The {one.config.kind} head is {one.dtype}, too coarse for small edits; call head.float() first. "
                "The language model may be of any dtype."
            )
    if not heads or len({one.dtype for one in heads}) > 1:
        dtypes = [str(one.dtype) for one in heads]
        raise ValueError(f"{len(heads)} heads of dtypes {dtypes} were given; give one or more, all of one dtype.")
    return {one: float(weight) for one, weight in heads.items()}


def _check_target(config: ControlConfig, values: Mapping[ValueHead, float]) -> None:
    targets = [config.target_value, *(head.config.control.target_value for head in values)]
    targets = [target for target in targets if target is not None]
    if values and targets and list(values.values()) != [1.0]:
        raise ValueError(
            f"target_value is {targets[0]}, in raw units of one reward, but the value heads' weights are "
            f"{list(values.values())}. Give one head of weight 1, or no target_value: also the heads' own, "
            "head.config.control.target_value."
        )


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
