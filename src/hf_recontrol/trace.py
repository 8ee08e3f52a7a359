"""What happened to each token of a steered answer: its value, the control, and what the control cost in KL."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .control import Controller
from .errors import SteeringNotApplied
from .kl_bound import kl_divergence
from .recording import Recorder


@dataclass(frozen=True)
class Trace:
    """`generate(..., recontrol_trace=True, return_dict_in_generate=True).recontrol_trace`.

    Every tensor is (rows, tokens), on the CPU, for the new tokens only. After a row's end token_ids hold padding,
    base_token_ids −1, `sound` is True, and the rest NaN. A row ends at its EOS; where a stop string ended it, at its
    last token that is not padding (one padding token too many where the padding is an EOS: the ids do not tell).
    """

    token_ids: Tensor
    """int64: y_t, the tokens that were chosen."""
    values: Tensor
    """float32: V(h_t) before the control, in raw units of the reward (of several value heads: their weighted sum; NaN
    where there is none)."""
    steered_values: Tensor
    """float32: V(h_t + u_t), in the same units."""
    control_norms: Tensor
    """float32: ‖u_t‖, in units of the hidden state."""
    kl: Tensor
    """float32: KL(p ‖ p_base) of the token's distribution in nats, after max_kl, before temperature and the like."""
    scale: Tensor
    """float32: the share of the control that max_kl left, in logits: 1 is all, below 1 the token is at the cap."""
    sound: Tensor
    """bool: False where the hidden state or the edit was not finite, so that the token is unguided."""
    base_token_ids: Tensor
    """int64: after the same text, the likeliest token without the control."""

    @property
    def lengths(self) -> Tensor:
        """int64 (rows,): tokens of each row, its EOS among them."""
        return (~self.scale.isnan()).sum(-1)  # the values of an unguided token may be NaN

    @property
    def capped(self) -> Tensor:
        """bool (rows, tokens): whether max_kl held the token back."""
        return self.scale < 1

    def __len__(self) -> int:
        return len(self.token_ids)


class TraceRecorder(Recorder):
    """Collects a Trace: the hooks write one token's figures into a tensor made once, step() puts a copy aside."""

    wants_logits = True

    def __init__(self, controller: Controller):
        self._controller = controller
        self._token: Tensor | None = None  # (figures, rows): values, steered values, ‖u‖, KL, scale, sound
        self._tokens: list[Tensor] = []
        self._likeliest: Tensor | None = None  # (rows,), int64
        self._base_tokens: list[Tensor] = []

    @property
    def steps(self) -> int:
        """Forwards so far."""
        return len(self._tokens)

    def at_head(self, hidden_states: Tensor, edited: Tensor, sound: Tensor | None) -> None:
        before, after = hidden_states[..., -1, :].detach(), edited[..., -1, :].detach()
        if self._token is None:
            self._token = torch.ones(6, *before.shape[:-1], dtype=torch.float32, device=before.device)
            self._likeliest = torch.zeros(before.shape[:-1], dtype=torch.int64, device=before.device)
        self._token[0].copy_(self._controller.values(before))
        self._token[1].copy_(self._controller.values(after))
        self._token[2].copy_((after.float() - before.float()).norm(dim=-1))
        self._token[3].zero_()
        if sound is not None:
            self._token[5].copy_(sound[..., -1, 0])

    def after_forward(self, base: Tensor, logits: Tensor, scale: Tensor | None) -> None:
        assert self._token is not None  # at_head came first
        assert self._likeliest is not None
        self._likeliest.copy_(base[..., -1, :].argmax(-1))
        self._token[3].copy_(kl_divergence(logits[..., -1, :], base[..., -1, :]))
        if scale is not None:
            self._token[4].copy_(scale[..., -1, 0])

    def step(self) -> None:
        if self._token is not None and self._likeliest is not None:
            self._base_tokens.append(self._likeliest.clone())
            self._tokens.append(self._token.clone())

    def trace(self, token_ids: Tensor, lengths: Tensor) -> Trace:
        """What was collected.

        Args:
            token_ids: int64 (rows, tokens), the new tokens.
            lengths: int64 (rows,), tokens before each row's end.

        Raises:
            SteeringNotApplied: the forwards were not of these rows.
        """
        figures = torch.stack(self._tokens[: token_ids.shape[1]], dim=-1).cpu()
        if figures.shape[1:] != token_ids.shape:
            raise SteeringNotApplied(
                f"Forwards of {figures.shape[1]} rows were traced for {len(token_ids)} rows of tokens. Leave "
                "recontrol_trace out."
            )
        ended = torch.arange(token_ids.shape[1]) >= lengths.cpu()[:, None]
        sound = (figures[5] * figures[4] > 0) | ended  # a scale of 0: the edit overflowed in the logits
        values, steered, norms, kl, scale = figures[:5].masked_fill(ended, torch.nan)
        base = torch.stack(self._base_tokens[: token_ids.shape[1]], dim=-1).cpu().masked_fill(ended, -1)
        return Trace(token_ids.cpu(), values, steered, norms, kl, scale, sound, base)
