"""From which new token on an answer is steered: not while a model thinks, say."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Start:
    """Which rows of a generate() are steered yet.

    Args:
        first: so many new tokens of each row stay plain.
        token_ids: each row stays plain until one of them is among its new tokens; () for no such wait. A prompt's
            tokens do not count.
    """

    def __init__(self, first: int = 0, token_ids: Sequence[int] = ()):
        self.first = first
        self.token_ids = list(token_ids)
        self.prompt: int | None = None  # tokens of a row before the first new one
        self.begun: Tensor | None = None  # bool (rows,), for the token that the next forward predicts
        self.noted = False  # since the last forward
        self.eos_token_ids: list[int] = []  # what ends an answer; the padding behind it is none of its tokens

    def note(self, ids: Tensor) -> None:
        """Before a forward: all tokens so far, int64 (rows, tokens); none of a prompt that was given as embeddings."""
        if self.prompt is None:
            self.prompt = ids.shape[1]
        new = ids[:, self.prompt :]
        own = torch.isin(new, new.new_tensor(self.eos_token_ids)).cumsum(-1) == 0
        begun = own.sum(-1) >= self.first
        if self.token_ids:
            begun &= (own & torch.isin(new, new.new_tensor(self.token_ids))).any(-1)
        if self.begun is None:
            self.begun = begun
        else:
            self.begun.copy_(begun)  # one tensor throughout: a compiled forward reads it
        self.noted = True

    def applied(self, edited: Tensor, hidden_states: Tensor) -> Tensor:
        """The edited hidden states in the rows that have begun, (rows, ..., hidden_size)."""
        if self.begun is None:  # nobody said what is being generated, and the caller is told so after the forward
            return hidden_states
        begun = self.begun.to(edited.device).view(-1, *[1] * (edited.ndim - 1))
        return torch.where(begun, edited, hidden_states)

    def waiting(self) -> int:
        """Rows that ended, or were left at the last forward, before they had begun; of beams, beams."""
        return 0 if self.begun is None else int((~self.begun).sum())
