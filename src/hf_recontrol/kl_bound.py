"""The seat belt: of a steered distribution, as much as keeps each token's KL from the base model's below a bound."""

import torch
from torch import Tensor

STEPS = 18  # of bisection in log s; leave s within 1.5e-4 of the largest that is allowed
ELEMENTS_AT_ONCE = 2**17  # logits that fit the cache of a CPU core: 3.8 ms a row of 128k, 3 times as much in one piece


def bounded(base: Tensor, edited: Tensor, max_kl: float) -> tuple[Tensor, Tensor]:
    """Logits of p ∝ p_base^(1−s) · p_edited^s, with the largest s ≤ 1 for which KL(p ‖ p_base) ≤ max_kl at each row.

    KL(s) = ∫₀ˢ t Var_t(δ) dt, with δ = edited − base, grows with s. Var ≤ range(δ)²/4 gives KL(s) ≤ (s range)²/8: so
    s is found by bisection in log s between √(8 max_kl)/range and 1. (Newton's method fails on hard rows.) A row is all
    of `edited` where that is inside the bound, and all of `base` where the two forbid different tokens: then the edit
    has overflowed.

    Args:
        base: float (..., vocabulary). −inf forbids a token.
        edited: the same shape.
        max_kl: nats, > 0. In float32 a row's KL is at most 1e-4 above it.

    Returns:
        The logits, (..., vocabulary), in float32 (float64 for float64): rounding them to bfloat16 would exceed the
        bound by up to a fifth. And s, float (..., 1).
    """
    wide = torch.promote_types(base.dtype, torch.float32)
    if torch.compiler.is_compiling():  # a few rows, and a loop would be unrolled
        return _bounded(base.to(wide), edited.to(wide), max_kl)
    rows, vocabulary = base.shape[:-1], base.shape[-1]
    at_once = max(1, (ELEMENTS_AT_ONCE if base.device.type == "cpu" else 2**24) // vocabulary)
    pairs = zip(base.reshape(-1, vocabulary).split(at_once), edited.reshape(-1, vocabulary).split(at_once), strict=True)
    parts = [_bounded(one.to(wide), other.to(wide), max_kl) for one, other in pairs]
    logits, scale = (torch.cat(part) for part in zip(*parts, strict=True))
    return logits.reshape(*rows, vocabulary), scale.reshape(*rows, 1)


def _bounded(base: Tensor, edited: Tensor, max_kl: float) -> tuple[Tensor, Tensor]:
    finite = torch.isfinite(base) & torch.isfinite(edited)
    with torch.no_grad():
        scale = _share(base, edited, finite, max_kl)
    return torch.where(finite & (scale > 0), torch.lerp(base, edited, scale), base), scale


def _share(base: Tensor, edited: Tensor, finite: Tensor, max_kl: float) -> Tensor:
    """s of each row, (..., 1)."""
    delta = torch.where(finite, edited - base, 0.0)
    sound = torch.isfinite(base) == torch.isfinite(edited)
    sound = (sound & torch.isfinite(delta)).all(-1, keepdim=True)
    log_p = torch.log_softmax(torch.where(finite, base, -1e30), -1)
    # a constant in δ changes nothing, and centred under p less is lost to rounding
    delta = torch.where(finite, delta - (log_p.exp() * delta).sum(-1, keepdim=True), 0.0)
    high = torch.ones_like(delta[..., :1])
    whole = _kl_at(log_p, delta, high) <= max_kl
    spread = delta.amax(-1, keepdim=True) - delta.amin(-1, keepdim=True)
    low = ((8 * max_kl) ** 0.5 / spread).nan_to_num(1.0).clamp(max=1.0)  # 1 where the spread is 0
    # looking at `whole` would wait for an accelerator, and cannot be traced
    if torch.compiler.is_compiling() or base.device.type != "cpu" or not bool(whole.all()):
        for _ in range(STEPS):
            middle = (low * high).sqrt()
            inside = _kl_at(log_p, delta, middle) <= max_kl
            low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return torch.where(sound, torch.where(whole, 1.0, low), 0.0).to(base.dtype)


def _kl_at(log_p: Tensor, delta: Tensor, scale: Tensor) -> Tensor:
    """KL(p_s ‖ p) = E_s[log p_s − log p], p_s ∝ p exp(s δ), (..., 1). One exponential for each logit."""
    x = torch.addcmul(log_p, delta, scale)
    x = x - x.amax(-1, keepdim=True)
    weights = x.exp()
    total = weights.sum(-1, keepdim=True)
    # s E_s[δ] − log E[exp(s δ)] is the same, but of a huge δ it is the difference of two huge numbers
    return (weights * (x - log_p)).sum(-1, keepdim=True) / total - total.log()


def kl_divergence(logits: Tensor, base: Tensor) -> Tensor:
    """KL(softmax(logits) ‖ softmax(base)) in nats, (...), of (..., vocabulary); in float32 at least, never < 0."""
    return kl_of_logs(log_softmax(logits), log_softmax(base))


def kl_of_logs(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) in nats, (...), of log-probabilities, (..., vocabulary); never < 0. Its gradient is finite."""
    # a token that p forbids adds 0, also where q forbids it; rounding must not give less than 0
    return (log_p.exp() * torch.where(log_p == -torch.inf, 0.0, log_p - log_q)).sum(-1).clamp_min(0.0)


def log_softmax(logits: Tensor) -> Tensor:
    """log p in float32 at least."""
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
