"""The ascent of a value head, fast: the same path for the price of three products with W₁, however many the steps.

V sees h only as z = Wh + b, with W = W₁ / input_std, and its gradient is Wᵀ ∂V/∂z. So u never leaves the row space of
W: u = Wᵀc, and with the Gram matrix G = WWᵀ, made once for a head, all steps run in z:

    s = α ∂V/∂z at z₀ + p        c ← c + s        p ← p + sG        and at the end u = Wᵀc

That is `in_z`. `in_h` goes the same path in h, where G would not pay: for one step, or a W₁ of very many rows. In a
ReLU head of one hidden layer s changes only where a gate flips, a few in a thousand at each step, and `FlippedColumns`
makes sG of those columns of G alone. Several heads act as one, with their z side by side.
"""

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .value_head import ValueHead

Weighted = Sequence[tuple[ValueHead, float | Tensor]]
"""Value heads, and what multiplies ∇V of each: its weight times its step size, or (rows, 1) of them, one for a row."""

GRAM_BYTES = 2**30
"""No Gram matrix is larger: 16,384 rows of W₁ in float32."""
KEPT = 4
"""Gram matrices kept with a head, one for each set of heads that it came first in; the latest."""
FEW_ROWS = 512
"""Of W₁: up to there the whole of sG takes a CPU no longer than to look for the columns that matter."""


@dataclass(frozen=True)
class Steps:
    """How to climb. Each number may be a tensor (rows, 1) too, with one for each row."""

    num_steps: int
    """n; with `own_num_steps` the largest of them."""
    shrinking: float | Tensor | None = None
    """ρ = 1 − 2αλ: what a step leaves of the u before it. None is all."""
    limit: Tensor | None = None
    """Of ‖u‖ after each step, (..., 1)."""
    target: float | Tensor | None = None
    """The value to stop at, in the head's units. Of one head alone."""
    own_num_steps: Tensor | None = None
    """int64 (rows, 1): n of each row, where they differ."""

    def towards(self, value: Tensor, gain: Tensor) -> Tensor:
        """Newton's step on to the target, at most the whole one, up or down: the share of the step to make, (..., 1).

        Args:
            value: V, (..., 1).
            gain: what the whole step adds to V, to first order, (..., 1).
        """
        share: Tensor = ((self.target - value) / gain).nan_to_num(0.0).clamp(-1.0, 1.0)  # type: ignore[operator]
        return share  # 0 where 0/0: V is flat, and at its target

    def advance(self, total: Tensor, step: Tensor, k: int, share: Tensor | None) -> Tensor:
        """ρ · total + share · step in place, in the rows that make step k."""
        step = step if share is None else share * step
        if self.own_num_steps is None:
            return (total if self.shrinking is None else total.mul_(self.shrinking)).add_(step)
        live = k < self.own_num_steps
        if self.shrinking is not None:
            total *= torch.where(live, self.shrinking, 1.0)
        return total.add_(torch.where(live, step, 0.0))


def ascend(heads: Weighted, h: Tensor, start: Tensor | None, steps: Steps, gram: Callable[[], Tensor | None]) -> Tensor:
    """u ← ρu + Σ αᵢ∇Vᵢ(h + u), n times from `start`, and each time cut to the limit; by the cheapest path.

    Args:
        heads: on h's device.
        h: float (..., hidden_size), in the heads' dtype.
        start: the same shape; None is u = 0.
        steps: how.
        gram: makes or finds the heads' Gram matrix, called where one is of use; None where there is none at hand.

    Returns:
        u, the same shape.
    """
    # From a start the path is one from h + start, unless the steps look at u as a whole.
    if start is not None and (steps.shrinking is not None or steps.limit is not None):
        return in_h(heads, h, start, steps)
    base = h if start is None else h + start
    if _is_constant(heads, steps):
        n = steps.num_steps if steps.own_num_steps is None else steps.own_num_steps
        push: Tensor = sum(factor * head.first_weight[0] / head.input_std for head, factor in heads)  # type: ignore[assignment]
        u = within((n * push).expand_as(h), steps.limit)
    elif (product := _product(heads, h, steps, gram)) is not None:
        u = within(in_z(heads, base, steps, product), steps.limit)
    else:
        u = in_h(heads, base, None, steps)
    return u if start is None else start + u


def _is_constant(heads: Weighted, steps: Steps) -> bool:
    """Whether each step is the same: ∇V of a linear head is one vector, and cut at the end or on the way is alike."""
    plain = steps.shrinking is None and steps.target is None
    return plain and all(head.config.num_hidden_layers == 0 for head, _ in heads)


def _product(
    heads: Weighted, h: Tensor, steps: Steps, gram: Callable[[], Tensor | None]
) -> Callable[[Tensor], Tensor] | None:
    """s ↦ sG in the cheapest way; None where the path in h is cheaper, or G too large."""
    rows = sum(len(head.first_weight) for head, _ in heads)
    # Which gates flipped must be known on the host: of an accelerator that would be a wait at each step.
    on_host = h.device.type == "cpu" and not torch.compiler.is_compiling()
    flips = on_host and rows >= FEW_ROWS and all(_is_gated(head) for head, _ in heads)
    pays = flips or rows <= max(2 * h.shape[-1], FEW_ROWS)  # sG reads rows² numbers, a step in h 2 · rows · hidden_size
    if steps.num_steps == 1 or not pays or rows**2 * h.element_size() > GRAM_BYTES:
        return None
    matrix = gram()
    if matrix is None:
        return None
    return FlippedColumns(matrix) if flips else lambda s: functional.linear(s, matrix)


def _is_gated(head: ValueHead) -> bool:
    return head.config.num_hidden_layers == 1 and head.config.hidden_act == "relu"


def in_h(heads: Weighted, h: Tensor, start: Tensor | None, steps: Steps) -> Tensor:
    """u ← ρu + Σ αᵢ∇Vᵢ(h + u), as it stands: each step costs two products with W₁."""
    u = torch.zeros_like(h) if start is None else start.clone()
    for k in range(steps.num_steps):
        push, share = _push(heads, h + u), None
        if steps.target is not None:
            head, factor = heads[0]
            share = steps.towards(head(h + u).unsqueeze(-1), push.square().sum(-1, keepdim=True) / factor)
        u = within(steps.advance(u, push, k, share), steps.limit)
    return u


def _push(heads: Weighted, h: Tensor) -> Tensor:
    """Σ αᵢ ∇Vᵢ(h)."""
    push: Tensor = sum(factor * head.gradient(h) for head, factor in heads)  # type: ignore[assignment]
    return push


def in_z(heads: Weighted, h: Tensor, steps: Steps, product: Callable[[Tensor], Tensor]) -> Tensor:
    """u of the same path, run in z; `product` is s ↦ sG. Before and after it there is one product with W₁ each."""
    z0, slope = _beside(heads, h)
    head, factor = heads[0]
    p, c = torch.zeros_like(z0), torch.zeros_like(z0)
    for k in range(steps.num_steps):
        z = z0 + p
        s, share = slope(z), None
        if k + 1 < steps.num_steps or steps.limit is not None or steps.target is not None:
            q = product(s)
            if steps.target is not None:
                share = steps.towards(head.value_at(z).unsqueeze(-1), (s * q).sum(-1, keepdim=True) / factor)
            steps.advance(p, q, k, share)
        steps.advance(c, s, k, share)
        if steps.limit is not None:
            kept = _kept(c, p, steps.limit)
            p, c = kept * p, kept * c
    parts = zip(heads, c.split([len(head.first_weight) for head, _ in heads], -1), strict=True)
    u: Tensor = sum(head.pulled_back(part) for (head, _), part in parts)  # type: ignore[assignment]
    return u


def _beside(heads: Weighted, h: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """z of all heads, side by side, and z ↦ s."""
    slopes = [head.slope(factor) for head, factor in heads]
    if len(heads) == 1:
        return heads[0][0].preactivation(h), slopes[0]
    z = [head.preactivation(h) for head, _ in heads]
    widths = [part.shape[-1] for part in z]
    return torch.cat(z, -1), lambda z: torch.cat(
        [slope(part) for slope, part in zip(slopes, z.split(widths, -1), strict=True)], -1
    )


class FlippedColumns:
    """s ↦ sG for one s after another: of the columns of G whose entry of s changed since the last.

    Exact: sG = s′G + (s − s′)G. On the host; one gather-and-sum for all rows, each of its own columns.
    """

    def __init__(self, gram: Tensor):
        self.gram = gram
        self.s: Tensor | None = None
        self.q = gram  # sG of the last s, written in place

    def __call__(self, s: Tensor) -> Tensor:
        change = s if self.s is None else s - self.s
        entries = change.detach().view(-1)
        flipped = (entries.numpy() != 0).nonzero()[0]  # few among many: NumPy is up to six times as fast as torch
        if self.s is None or flipped.size > entries.numel() // 8:  # so many columns are dearer than the whole product
            self.q = functional.linear(s, self.gram)  # sGᵀ, which is sG
        elif flipped.size:
            places = torch.from_numpy(flipped)
            self.q += self._of_columns(places, entries.index_select(0, places))
        self.s = s
        return self.q

    def _of_columns(self, places: Tensor, amounts: Tensor) -> Tensor:
        """Σ amount · column of G over the entries that changed, whose places are those in the rows put end to end."""
        width = len(self.gram)
        if self.q.numel() == width:
            return amounts @ self.gram.index_select(0, places)  # one row: a third less than the fused sum
        first = torch.arange(0, self.q.numel(), width)  # of each row
        rows = torch.searchsorted(places, first)
        sums = functional.embedding_bag(places % width, self.gram, rows, mode="sum", per_sample_weights=amounts)
        return sums.view(self.q.shape)


@dataclass(frozen=True)
class _Gram:
    matrix: Tensor
    state: list[Hashable]
    probe: Tensor


def gram_matrix(heads: Sequence[ValueHead], *, closely: bool = False) -> Tensor:
    """G = WWᵀ, (rows of W, rows of W), of the heads together, which are on one device.

    Made once (of a head 4096 wide 140 GFLOP) and kept with the first head; made again when a weight was changed.

    Args:
        closely: look at the weights themselves, which costs a product with each W₁ and a wait for the device. Otherwise
            a change through `weight.data`, which leaves no sign, goes unseen.
    """
    first, *others = heads
    weights = [tensor for head in heads for tensor in (head.first_weight, head.input_std)]
    state = [state_of(weight) for weight in weights]
    key = tuple(weakref.ref(head) for head in others)
    kept: _Gram | None = first.kept_gram_matrices.get(key)
    if kept is not None and kept.state == state and not closely:
        return kept.matrix
    with torch.inference_mode(False), torch.no_grad():  # leaving inference mode turns gradients on
        probe = torch.stack([_probe(head) for head in heads])
        if kept is None or kept.state != state or not torch.equal(kept.probe, probe):
            rows = torch.cat([head.first_weight / head.input_std for head in heads])
            kept = _Gram(rows @ rows.T, state, probe)
            first.kept_gram_matrices.pop(key, None)
            gone = [old for old in list(first.kept_gram_matrices) if any(head() is None for head in old)]
            for old in [*gone, *list(first.kept_gram_matrices)[: 1 - KEPT]]:
                first.kept_gram_matrices.pop(old, None)
            first.kept_gram_matrices[key] = kept
    return kept.matrix


def state_of(tensor: Tensor) -> Hashable:
    """Changes when the tensor is replaced or written, but through `tensor.data`."""
    version = 0 if tensor.is_inference() else tensor._version  # an inference tensor does not count them
    return tensor.data_ptr(), tensor.device, tensor.dtype, version


def _probe(head: ValueHead) -> Tensor:
    """A number that changes with any entry of W, and with their order."""
    rows, columns = head.first_weight.shape
    ramps = (torch.linspace(1, 2, n, dtype=head.dtype, device=head.input_std.device) for n in (rows, columns))
    left, right = (ramp.sin() for ramp in ramps)
    return left @ (head.first_weight @ (right / head.input_std))


def _kept(c: Tensor, p: Tensor, limit: Tensor) -> Tensor:
    """What is to be kept of u = Wᵀc for ‖u‖ ≤ limit, (..., 1): ‖u‖² = c · cG = c · p."""
    peak = c.abs().amax(-1, keepdim=True)  # the square of a huge u would be infinite
    norm = ((c / peak) * (p / peak)).sum(-1, keepdim=True).clamp_min(0.0).sqrt()
    return torch.where(norm * peak > limit, limit / norm / peak, 1.0)


def within(u: Tensor, limit: Tensor | None) -> Tensor:
    """u, cut to the norm `limit`, (..., 1); None is none."""
    if limit is None:
        return u
    peak = u.abs().amax(-1, keepdim=True)
    unit = u / peak  # the square of a huge u would be infinite
    norm = unit.norm(dim=-1, keepdim=True)
    return torch.where(norm * peak > limit, unit * (limit / norm), u)  # u = 0 has no unit, and stays
