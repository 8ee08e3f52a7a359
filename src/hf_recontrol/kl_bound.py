"""The seat belt: of a steered distribution, as much as keeps each token's KL from the base model's below a bound."""

import math

import torch
from torch import Tensor

STEPS = 18  # of bisection in log s; leave s within 1.5e-4 of the largest that is allowed
TOLERANCE = 3e-4  # of log KL, which is 1.5e-4 of log s where KL grows with its square
ELEMENTS_AT_ONCE = 2**17  # logits that fit the cache of a CPU core: about 2 ms a row of 128k


def bounded(base: Tensor, edited: Tensor, max_kl: float | Tensor) -> tuple[Tensor, Tensor]:
    """Logits of p ∝ p_base^(1−s) · p_edited^s, with the largest s ≤ 1 for which KL(p ‖ p_base) ≤ max_kl at each row.

    KL(s) = ∫₀ˢ t Var_t(δ) dt, with δ = edited − base, grows with s. Var ≤ range(δ)²/4 gives KL(s) ≤ (s range)²/8: so
    s is found by bisection in log s between √(8 max_kl)/range and 1. (Newton's method fails on hard rows.) A row is all
    of `edited` where that is inside the bound, and all of `base` where the two forbid different tokens: then the edit
    has overflowed.

    Args:
        base: float (..., vocabulary). −inf forbids a token.
        edited: the same shape.
        max_kl: nats, > 0; or of each row its own, (..., 1). In float32 a row's KL is at most 1e-4 above it.

    Returns:
        The logits, (..., vocabulary), in float32 (float64 for float64): rounding them to bfloat16 would exceed the
        bound by up to a fifth. And s, float (..., 1).
    """
    wide = torch.promote_types(base.dtype, torch.float32)
    if torch.compiler.is_compiling():  # a few rows, and a loop would be unrolled
        return _bounded(base.to(wide), edited.to(wide), max_kl)
    rows, vocabulary = base.shape[:-1], base.shape[-1]
    at_once = max(1, (ELEMENTS_AT_ONCE if base.device.type == "cpu" else 2**24) // vocabulary)
    chunks = [logits.reshape(-1, vocabulary).split(at_once) for logits in (base, edited)]
    count = len(chunks[0])
    limits = max_kl.reshape(-1, 1).split(at_once) if isinstance(max_kl, Tensor) else [max_kl] * count
    parts = [_bounded(one.to(wide), other.to(wide), limit) for one, other, limit in zip(*chunks, limits, strict=True)]
    logits, scale = (torch.cat(part) for part in zip(*parts, strict=True))
    return logits.reshape(*rows, vocabulary), scale.reshape(*rows, 1)


def _bounded(base: Tensor, edited: Tensor, max_kl: float | Tensor) -> tuple[Tensor, Tensor]:
    # Asking for a number would wait for an accelerator, and cannot be traced.
    on_host = base.device.type == "cpu" and not torch.compiler.is_compiling()
    finite = None
    with torch.no_grad():
        delta = edited - base
        if on_host and math.isfinite(float(base.sum() + delta.sum())):  # so is every entry; asking each takes longer
            scale = _share(base, delta, max_kl, on_host=True)
        else:
            finite = torch.isfinite(base) & torch.isfinite(edited)
            delta = delta.where(finite, 0.0)
            sound = (torch.isfinite(base) == torch.isfinite(edited)) & torch.isfinite(delta)
            scale = _share(base.where(finite, -1e30), delta, max_kl, on_host=on_host)
            scale = torch.where(sound.all(-1, keepdim=True), scale, 0.0)
    merged = torch.lerp(base, edited, scale)
    return merged if finite is None else torch.where(finite & (scale > 0), merged, base), scale


def _share(base: Tensor, delta: Tensor, max_kl: float | Tensor, *, on_host: bool) -> Tensor:
    """s of each row, (..., 1), of finite logits and δ."""
    log_p = torch.log_softmax(base, -1)
    # a constant in δ changes nothing, and centred under p less is lost to rounding
    delta = delta - (log_p.exp() * delta).sum(-1, keepdim=True)
    most = _kl_at(log_p, delta, torch.ones_like(delta[..., :1]))
    whole = most <= max_kl
    if on_host and bool(whole.all()):
        return torch.ones_like(most)
    spread = delta.amax(-1, keepdim=True) - delta.amin(-1, keepdim=True)
    low = ((8 * max_kl) ** 0.5 / spread).nan_to_num(1.0).clamp(max=1.0).log()  # s = 1 where the spread is 0
    low = _largest(log_p, delta, max_kl, low, most, on_host=on_host)
    return torch.where(whole, 1.0, low.exp())


def _largest(
    log_p: Tensor, delta: Tensor, max_kl: float | Tensor, low: Tensor, most: Tensor, *, on_host: bool
) -> Tensor:
    """log s of the largest s between `low` and 0; `most` is the KL at s = 1, (..., 1).

    By bisection. On the host two steps of three go by false position (the Illinois rule) and it ends early: log KL is
    nearly a line in log s, of slope 2 at first, so five steps do where bisection takes 18.
    """
    high, over = torch.zeros_like(low), _miss(most, max_kl)
    under = (over + 2 * (low - high)).clamp(max=-TOLERANCE)  # a guess
    done, before = ~(most > max_kl), None
    for step in range(3 * STEPS if on_host else STEPS):
        share = under / (under - over) if on_host and step % 3 != 2 else 0.5
        middle = low + share * (high - low)
        kl = _kl_at(log_p, delta, middle.exp())
        inside = kl <= max_kl
        low, high = torch.where(inside & ~done, middle, low), torch.where(inside | done, high, middle)
        if not on_host:
            continue
        miss = _miss(kl, max_kl)
        done = done | (inside & (miss >= -TOLERANCE / 2))
        if bool(done.all()):
            break
        again = torch.zeros_like(done) if before is None else inside == before  # then pull the end that stays nearer
        under = torch.where(inside, miss, torch.where(again, under / 2, under))
        over = torch.where(inside, torch.where(again, over / 2, over), miss)
        before = inside
    return low


def _miss(kl: Tensor, max_kl: float | Tensor) -> Tensor:
    """log KL less where it should be, half the tolerance below the bound."""
    return (kl / max_kl).clamp_min(1e-30).log() + TOLERANCE / 2


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
