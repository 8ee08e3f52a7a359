"""What heads are trained towards: λ-returns for V, the clipped gain for a control. Pure mathematics."""

import torch
from torch import Tensor


@torch.no_grad()
def lambda_returns(values: Tensor, rewards: Tensor, offsets: Tensor, td_lambda: float, gamma: float = 1.0) -> Tensor:
    """v_T = r, v_t = γ ((1 − λ) V(s_{t+1}) + λ v_{t+1}): each state's target in each answer. No gradient flows through.

    λ = 0 is the target of Kong et al. 2024 (arXiv:2406.05954: V(s_t) towards stop-grad V(s_{t+1}), and towards the
    reward at the end); λ between 0 and 1 gives Sutton's λ-returns (1988). γ = 1 is the paper, which has no discount.
    T is an answer's last token: s_T is the state that predicted it.

    Args:
        values: V(s_t), float (tokens,), in the units of `rewards`; the tokens of all answers one after the other.
        rewards: float (answers,). That of an empty answer is not read.
        offsets: int64 (answers + 1,), from 0 to tokens: answer i has the tokens offsets[i] to offsets[i + 1] − 1.
        td_lambda: λ, 0 to 1.
        gamma: γ, above 0 to 1: what a reward is worth one token earlier.

    Returns:
        (tokens,), in the dtype of `values`.

    Raises:
        ValueError: λ or γ is out of bounds, or the offsets do not cut the values into one run per reward.

    Examples:
        >>> lambda_returns(torch.tensor([0.5, 0.25, 0.0]), torch.tensor([1.0]), torch.tensor([0, 3]), 0.0)
        tensor([0.2500, 0.0000, 1.0000])
    """
    _check(values, rewards, offsets, td_lambda, gamma)
    rewards, lengths = rewards.to(values.dtype), offsets.diff()
    if td_lambda == 1:  # no recursion to do, and V is not read: it may be NaN
        returns = torch.repeat_interleave(rewards, lengths)
        return returns if gamma == 1 else returns * gamma ** tokens_left(offsets).to(values.dtype)
    last = offsets[1:][lengths > 0] - 1
    targets = gamma * torch.cat([values[1:], values[:1]])  # γ V(s_{t+1}); an answer's last token is replaced next
    targets[last] = rewards[lengths > 0]
    if td_lambda == 0:
        return targets
    remaining = lengths[lengths > 0]
    for back in range(1, int(remaining.max()) if len(remaining) else 0):  # one step back in all answers at once
        t = last[remaining > back] - back
        targets[t] = (1 - td_lambda) * targets[t] + td_lambda * gamma * targets[t + 1]
    return targets


def tokens_left(offsets: Tensor) -> Tensor:
    """T − t at each token, int64 (tokens,): how many of its answer come after it."""
    last = torch.repeat_interleave(offsets[1:], offsets.diff())
    return last - 1 - torch.arange(len(last), device=last.device)


def answer_sums(of_tokens: Tensor, offsets: Tensor) -> Tensor:
    """The sum over each answer's tokens, (answers,)."""
    return torch.stack([part.sum() for part in of_tokens.split(offsets.diff().tolist())])


def clipped_gain(log_ratios: Tensor, advantages: Tensor, clip_ratio: float) -> Tensor:
    """min(ρA, clip(ρ, 1/c, c)A) with ρ = p_u(y)/p_old(y): what a control gains at tokens that p_old chose.

    Its expectation under p_old is that of A under p_u, where no ratio is clipped; nothing is to be gained by moving one
    beyond the range. Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347, equation 7), with a range
    that is symmetric in log ρ.

    Args:
        log_ratios: log ρ, float (tokens,).
        advantages: A, the same shape.
        clip_ratio: c > 1.

    Examples:
        >>> clipped_gain(torch.tensor([0.0, 5.0, -5.0]), torch.tensor([1.0, 1.0, -1.0]), 2.0)
        tensor([ 1.0000,  2.0000, -0.5000])
    """
    ratios = log_ratios.exp()
    return torch.minimum(ratios * advantages, ratios.clamp(1 / clip_ratio, clip_ratio) * advantages)


def _check(values: Tensor, rewards: Tensor, offsets: Tensor, td_lambda: float, gamma: float) -> None:
    if not 0 <= td_lambda <= 1:
        raise ValueError(f"td_lambda is {td_lambda!r}; it must be from 0 (Bellman) to 1 (Monte Carlo).")
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma is {gamma!r}; it must be above 0, and 1 (no discount) or less.")
    if values.ndim != 1 or rewards.ndim != 1 or offsets.shape != (len(rewards) + 1,):
        raise ValueError(
            f"values, rewards and offsets have the shapes {tuple(values.shape)}, {tuple(rewards.shape)} and "
            f"{tuple(offsets.shape)}; expected are (tokens,), (answers,) and (answers + 1,)."
        )
    if offsets[0] != 0 or offsets[-1] != len(values) or bool((offsets.diff() < 0).any()):
        raise ValueError(
            f"The offsets go from {int(offsets[0])} to {int(offsets[-1])} over {len(values)} values; they must rise "
            f"from 0 to {len(values)}. Make them by cumsum over the answers' lengths, with a 0 in front."
        )
