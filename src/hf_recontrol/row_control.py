"""A control for each prompt of a batch: recontrol_value_head=["user/head", None, …]."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .control import Controller
from .errors import SteeringNotApplied


class RowController:
    """Each prompt's rows under its own Controller; beams and returned sequences stand beside each other, as one's.

    Args:
        controllers: one for each prompt of the batch; None leaves its rows plain. Equal ones are given as one object.
    """

    def __init__(self, controllers: Sequence[Controller | None]):
        self.prompts = len(controllers)
        self.of: dict[Controller, list[int]] = {}
        """Controllers, and the prompts that are theirs."""
        for prompt, controller in enumerate(controllers):
            if controller is not None and not controller.is_identity:
                self.of.setdefault(controller, []).append(prompt)
        self._indices: dict[tuple[int, int, torch.device], Tensor] = {}

    @property
    def is_identity(self) -> bool:
        """Whether nothing is edited."""
        return not self.of

    def prepare(self, device: torch.device) -> None:
        """See Controller.prepare."""
        for controller in self.of:
            controller.prepare(device)

    @torch.no_grad()
    def edit(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """As Controller.edit, with prompts or their beams in the first axis.

        Raises:
            SteeringNotApplied: the rows are no multiple of the prompts.
        """
        edited, sound = hidden_states.clone(), torch.ones_like(hidden_states[..., :1], dtype=torch.bool)
        for i, controller in enumerate(self.of):
            rows = self._rows(i, hidden_states)
            edited[rows], sound[rows] = controller.edit(hidden_states[rows])
        return edited, sound

    @property
    def max_kl(self) -> Callable[[Tensor], Tensor] | None:
        """From logits, (rows, ..., vocabulary), to each row's bound, (rows, ..., 1); None where no prompt has one."""
        return None if all(controller.max_kl is None for controller in self.of) else self._bounds

    def _bounds(self, logits: Tensor) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        bounds = torch.full_like(logits[..., :1], math.inf, dtype=wide)
        for i, controller in enumerate(self.of):
            bounds[self._rows(i, logits)] = math.inf if controller.max_kl is None else controller.max_kl
        return bounds

    def _rows(self, controller: int, batch: Tensor) -> Tensor:
        """Which rows of a batch are the i-th controller's, int64."""
        count, key = len(batch), (controller, len(batch), batch.device)
        if count % self.prompts:
            raise SteeringNotApplied(
                f"recontrol_value_head is a list for {self.prompts} prompts, but the model was given {count} rows, "
                "which are no multiple of them. Leave out the option of generate() that regroups the batch."
            )
        if key not in self._indices:
            each = count // self.prompts
            prompts = list(self.of.values())[controller]
            rows = [prompt * each + beam for prompt in prompts for beam in range(each)]
            self._indices[key] = torch.tensor(rows, device=batch.device)
        return self._indices[key]
