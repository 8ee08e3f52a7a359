"""The value about one hidden state: what the control climbs, for landscape_figure to draw."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .control import Controller
from .control_config import ControlConfig
from .value_head import ValueHead


@dataclass(frozen=True, eq=False)
class Landscape:
    """V in the plane through h of the control u and a random direction at right angles to it. All on the CPU."""

    values: Tensor
    """float (resolution, resolution): V in raw units of the reward, where y is axis[i] and x is axis[j]."""
    axis: Tensor
    """float (resolution,): places along both directions, from −extent to extent, in units of ‖u‖; h is at 0."""
    directions: Tensor
    """float (2, hidden_size): the unit vectors of x, along u, and of y."""
    control_norm: float
    """‖u‖, in units of the hidden state."""
    path: Tensor
    """float (num_steps + 1, 2): x and y of u after 0, 1, … n steps, in units of ‖u‖; what leaves the plane is lost."""
    path_values: Tensor
    """float (num_steps + 1,): V(h + u) after each step, in raw units of the reward; of the state, not of its shadow."""


@torch.no_grad()
def value_landscape(
    head: ValueHead,
    hidden_state: Tensor,
    config: ControlConfig | None = None,
    *,
    extent: float = 2.0,
    resolution: int = 81,
    seed: int = 0,
) -> Landscape:
    """V(h + ‖u‖(x e₁ + y e₂)) on a grid, where e₁ = u/‖u‖ and e₂ is random, and the path of u on it.

    Costs resolution² values of the head, all held at once as hidden states, and n(n + 1)/2 steps of ascent. In many
    dimensions V changes little along a random direction: that is what it is there to show.

    Args:
        head: the value head V.
        hidden_state: float (hidden_size,), the LM head's input at one token.
        config: how hard; the head's own where None. A max_kl is not obeyed, as it takes the language model too.
        extent: how far the grid reaches from h to each side, in units of ‖u‖, > 0.
        resolution: points along a side, ≥ 2; with an odd number h is one of them.
        seed: of the random direction.

    Raises:
        HeadMismatch: the hidden state is of another width.
        ValueError: the hidden state is not one row or not finite, nothing is steered, or the grid has no points.
    """
    _check(hidden_state, extent, resolution)
    controller = Controller(head, config)
    head.check_width(hidden_state.shape[-1])
    h = hidden_state.to(head.dtype)
    path = torch.stack([_after(k, controller).control(h) for k in range(controller.num_steps + 1)])
    norm = path[-1].norm()
    if not 0 < float(norm) < torch.inf:
        raise ValueError(
            f"‖u‖ is {float(norm)} at this hidden state, but a landscape is drawn along u. Pass a config= whose "
            "step_size and num_steps are above 0, and not too large; or another hidden state."
        )
    along = path[-1] / norm
    directions = torch.stack([along, _at_right_angles(along, seed)])
    axis = torch.linspace(-extent, extent, resolution, dtype=h.dtype, device=h.device)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    values = controller.values(h + norm * torch.stack([x, y], -1) @ directions)
    shadow = path @ directions.T / norm
    return Landscape(
        values.cpu(), axis.cpu(), directions.cpu(), float(norm), shadow.cpu(), controller.values(h + path).cpu()
    )


def _after(num_steps: int, controller: Controller) -> Controller:
    """The control after so many of its steps: α stays, which a strength would make larger for fewer steps."""
    config = replace(controller.config, strength=None, step_size=controller.step_size, num_steps=num_steps)
    return Controller(controller.heads[0], config)


def _at_right_angles(unit: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same direction on every device
    random: Tensor = torch.randn(len(unit), generator=generator, dtype=torch.float64).to(unit)
    for _ in range(2):  # the second time takes off what the first's rounding left
        random = random - (random @ unit) * unit
    return torch.nn.functional.normalize(random, dim=0)


def _check(hidden_state: Tensor, extent: float, resolution: int) -> None:
    if hidden_state.dim() != 1:
        raise ValueError(
            f"The hidden state has shape {tuple(hidden_state.shape)}, but a landscape is of one, (hidden_size,). Pass "
            "hidden_states[row, token]."
        )
    if not bool(hidden_state.isfinite().all()):  # such a state is never edited
        raise ValueError("The hidden state is not finite, so it is not steered. Pass one whose numbers all are.")
    if not 0 < extent < torch.inf or resolution < 2:
        raise ValueError(
            f"extent is {extent} and resolution {resolution}, but the grid needs a finite extent > 0, in units of ‖u‖, "
            "and 2 points or more. Leave them out for 2.0 and 81."
        )
