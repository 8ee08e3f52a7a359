"""What is kept of a generate() at the LM head; trace.py has the recorder of recontrol_trace."""

import torch
from torch import Tensor

from .errors import SteeringNotApplied


class Recorder:
    """What is kept of a generate(). Traced code may write into tensors that exist; only step() may do more."""

    prompt_tokens: int | None = None
    """Columns of the ids before the first new token; None while no forward was prepared."""
    wants_logits = False
    """Whether after_forward is to be called: where there is an edit, costs a second row through the LM head."""

    def at_head(self, hidden_states: Tensor, edited: Tensor, sound: Tensor | None) -> None:
        """The LM head's input before and after the edit, (..., hidden_size), and which rows are sound, (..., 1)."""

    def after_forward(self, base: Tensor, logits: Tensor, scale: Tensor | None) -> None:
        """The logits without control and those returned, (..., vocabulary), and the share left by max_kl, (..., 1)."""

    def step(self) -> None:
        """After each forward of a generate(), outside what is compiled."""

    def new_tokens(self, forwards: int, columns: int) -> int:
        """How many tokens were generated, one with each of the first forwards.

        Where reading the stop flag would stall the device (Apple's, since transformers 5.24), generate() reads it a
        step late and takes the last step back: one forward more than tokens.

        Args:
            forwards: as many as were seen.
            columns: of the ids that generate() returned.

        Raises:
            SteeringNotApplied: the forwards were not one for each token.
        """
        new = forwards if self.prompt_tokens is None else columns - self.prompt_tokens
        if forwards not in (new, new + 1):
            raise SteeringNotApplied(
                f"{forwards} forwards were seen for {new} new tokens: this decoding mode does not make one token of "
                "each forward. Leave it out, or recontrol_trace."
            )
        return new


class HiddenStates(Recorder):
    """Keeps the last position of the LM head's input at each forward, in tensors made once: no list, no growth.

    Args:
        steps: how many forwards there can be.
    """

    def __init__(self, steps: int):
        self.steps = steps
        self.next: Tensor | None = None  # index of the next forward, int64 (1,): a tensor, so Dynamo does not count
        self.buffer: Tensor | None = None  # (steps, rows, hidden_size) in the model's dtype

    def at_head(self, hidden_states: Tensor, edited: Tensor, sound: Tensor | None) -> None:
        last = hidden_states[..., -1, :]
        if self.buffer is None or self.next is None:
            self.buffer = last.new_zeros((self.steps, *last.shape))
            self.next = torch.zeros(1, dtype=torch.int64, device=last.device)
        self.buffer.index_copy_(0, self.next, last.detach().unsqueeze(0))
        self.next += 1

    def recorded(self, columns: int) -> Tensor:
        """Of each new token, (rows, new tokens, hidden_size).

        Args:
            columns: of the ids that generate() returned.
        """
        if self.buffer is None or self.next is None:
            raise SteeringNotApplied("No forward pass was recorded. Call enable_recontrol() on the model that runs.")
        return self.buffer[: self.new_tokens(int(self.next), columns)].transpose(0, 1).contiguous()
