"""One batch at vLLM's LM head: each row under its request's control."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..control import Controller
from ..errors import SteeringNotApplied
from ..kl_bound import bounded
from ..row_control import RowController


class BatchControl:
    """Edits the LM head's input, and holds the logits at each row's max_kl.

    Args:
        controllers: one for each row of the batch; None leaves it plain.
    """

    def __init__(self, controllers: Sequence[Controller | None]):
        self.rows = RowController(controllers)
        bounds = [None if one is None or one.is_identity else one.max_kl for one in controllers]
        self.bounded_rows = [row for row, bound in enumerate(bounds) if bound is not None]
        self.bounds = [bound for bound in bounds if bound is not None]
        self._on_device: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def logits(
        self, hidden_states: Tensor, lm_head: Callable[[Tensor], Tensor | None], *, whole_batches: bool = False
    ) -> tuple[Tensor | None, Tensor]:
        """The steered logits, and how many rows were left plain because they or their edit were not finite.

        The base rows of a max_kl go through the LM head too, so that soft-caps and scales are in both.

        Args:
            hidden_states: float (rows, hidden_size); never written.
            lm_head: from hidden states to logits, (…, vocabulary), of the whole vocabulary; or to None, where another
                rank of a tensor-parallel group has them.
            whole_batches: whether the LM head takes the batch's rows and no others, as one with LoRA adapters does,
                which knows by its place which adapter a row has. Reads the LM head's weights twice.

        Returns:
            The logits, (rows, vocabulary), in float32 where a row has a max_kl; and int64 ().

        Raises:
            SteeringNotApplied: the batch has other rows than requests.
        """
        if len(hidden_states) != self.rows.prompts:
            raise SteeringNotApplied(
                f"vLLM gave its LM head {len(hidden_states)} rows for {self.rows.prompts} requests, so which row is "
                "whose is not known. Please report how the engine was started."
            )
        edited, sound = self.rows.edit(hidden_states)
        unsound = (~sound).sum()
        if not self.bounds:
            return lm_head(edited), unsound
        rows, bounds = self._tensors(hidden_states.device)
        if whole_batches:
            steered, base = lm_head(edited), lm_head(hidden_states)
        else:
            steered = base = lm_head(torch.cat([edited, hidden_states[rows]]))
        if steered is None or base is None:
            return None, unsound
        base = base[rows] if whole_batches else base[len(edited) :]
        logits = steered[: len(edited)].to(torch.promote_types(steered.dtype, torch.float32), copy=True)
        logits[rows], share = bounded(base, logits[rows], bounds)
        return logits, unsound + (share == 0).sum()

    def _tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Which rows have a bound, int64, and the bounds, (bounded rows, 1)."""
        if self._on_device is None:
            bounds = torch.tensor(self.bounds, dtype=torch.float32).unsqueeze(-1)
            self._on_device = torch.tensor(self.bounded_rows).to(device), bounds.to(device)
        return self._on_device
