"""What fitting a head needs besides an optimiser: packed batches, checks, scales, the linear head in closed form."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from .card_text import one_line
from .errors import HeadMismatch
from .head import Head
from .head_config import HeadConfig, RewardScale, ValueHeadConfig
from .objectives import lambda_returns
from .value_head import ValueHead


def pack_answers(answers: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """One batch, without padding: the states of all answers one after the other.

    Args:
        answers: items of a RolloutDataset: "hidden_states" float (length, hidden_size), "reward" a number, "token_ids"
            long (length,).

    Returns:
        "hidden_states" (tokens, hidden_size) in their own dtype; "rewards" float32 (answers,), as the reward function
        gave them; "offsets" long (answers + 1,): the states of answer i are offsets[i]:offsets[i + 1]; and where the
        answers have them "token_ids" long (tokens,): the token that each state predicted.
    """
    lengths = torch.tensor([0] + [len(answer["hidden_states"]) for answer in answers])
    packed = {
        "hidden_states": torch.cat([answer["hidden_states"] for answer in answers]),
        "rewards": torch.tensor([float(answer["reward"]) for answer in answers]),
        "offsets": lengths.cumsum(0),
    }
    if all("token_ids" in answer for answer in answers):
        packed["token_ids"] = torch.cat([torch.as_tensor(answer["token_ids"]) for answer in answers])
    return packed


def batches(answers: Any, size: int = 32) -> Iterator[dict[str, Tensor]]:
    """The answers, packed, `size` at a time and in order."""
    # By hand: a DataLoader would draw from torch's random state, and a resumed run would differ from a whole one.
    for start in range(0, len(answers), size):
        yield pack_answers([answers[i] for i in range(start, min(start + size, len(answers)))])


def parts_of(dataset: Any) -> list[Any]:
    """The stores that a dataset is made of."""
    if isinstance(dataset, ConcatDataset):
        return [part for whole in dataset.datasets for part in parts_of(whole)]
    return parts_of(dataset.dataset) if isinstance(dataset, Subset) else [dataset]


def rewards_of(dataset: Any) -> Tensor:
    """Every answer's reward, float64 (answers,), without reading hidden states where the store keeps them apart."""
    if isinstance(dataset, ConcatDataset):
        return torch.cat([rewards_of(part) for part in dataset.datasets])
    if isinstance(dataset, Subset):
        return rewards_of(dataset.dataset)[torch.as_tensor(dataset.indices, dtype=torch.long)]
    rewards = getattr(dataset, "rewards", None)
    if rewards is None:
        rewards = [float(dataset[i]["reward"]) for i in range(len(dataset))]
    return torch.as_tensor(rewards, dtype=torch.float64)


def check_answers(dataset: Any, name: str, hidden_size: int | None = None) -> None:
    """Refuse a dataset that V cannot be fitted to, before anything is computed.

    Args:
        hidden_size: what the head reads; where None, all of the dataset must be of one width.

    Raises:
        HeadMismatch: hidden states of another width.
        ValueError: there are no answers, or some have a reward that is not a finite number.
    """
    rewards = rewards_of(dataset)
    bad = int((~rewards.isfinite()).sum())
    if bad or not len(rewards):
        raise ValueError(
            f"{name} has {len(rewards)} answers, {bad} of them without a finite reward; expected one or more, each "
            "with a reward. Collect rollouts with collect_rollouts: RolloutDataset leaves answers without a reward out."
        )
    widths = sorted({part[0]["hidden_states"].shape[-1] for part in parts_of(dataset) if len(part)})
    if widths != [hidden_size or widths[0]]:
        raise HeadMismatch(
            f"The head reads hidden states {hidden_size or widths[0]} wide, but those of {name} are "
            f"{' and '.join(map(str, widths))} wide. Make its config with hidden_size=… for the model that wrote "
            "the rollouts, and train on the rollouts of one model."
        )


def warn_of_empty(dataset: Any, name: str) -> None:
    """Say how many answers have no states. A store's dataset has left them out; others are read through.

    Raises:
        ValueError: none of them has any.
    """
    parts = [part for part in parts_of(dataset) if not hasattr(part, "rewards")]
    empty = sum(len(part[i]["hidden_states"]) == 0 for part in parts for i in range(len(part)))
    if empty == len(dataset):
        raise ValueError(f"None of the {empty} answers of {name} has a hidden state. Collect answers with tokens.")
    if empty:
        warnings.warn(
            f"{empty} of {len(dataset)} answers of {name} have no hidden states: they are passed over. To silence "
            "this, leave them out.",
            stacklevel=3,
        )


def check_one_model(datasets: Mapping[str, Any]) -> None:
    """Raise HeadMismatch where the rollouts, of all the datasets together, name several models that wrote them."""
    found: dict[str, dict[Any, str]] = {}
    for name, dataset in datasets.items():
        for part in parts_of(dataset):
            facts = getattr(part, "fingerprint", None) or {}
            model, dtype = facts.get("base_model_name_or_path"), facts.get("dtype")
            for fact, value in (("name", model), (f"weights in {dtype}", facts.get("weights_sample_sha256"))):
                if value is not None:
                    found.setdefault(fact, {}).setdefault(value, f"{name}: {model}")
    for fact, values in found.items():
        if len(values) > 1:
            raise HeadMismatch(
                f"The rollouts are of {len(values)} models, by their {fact} ({', '.join(values.values())}), but a head "
                "reads the hidden states of one. Train on the rollouts of one model."
            )


def reward_scale(answers: Any, name: str = "reward") -> RewardScale:
    """Mean and (population) std of the reward over answers. If all rewards are equal: std = 1, and a warning."""
    rewards = rewards_of(answers)
    if rewards.min() == rewards.max():
        warnings.warn(
            f"All {len(rewards)} rewards are {rewards[0].item():g}: nothing can be learned. Their std is taken as 1. "
            "To silence this, collect rollouts that differ in reward.",
            stacklevel=3,
        )
        return RewardScale(name=name, mean=rewards[0].item(), std=1.0)
    return RewardScale(name=name, mean=rewards.mean().item(), std=rewards.std(unbiased=False).item())


class Moments:
    """Sums over states, streamed in float64: mean and std, and with `products` the normal equations of a linear V."""

    def __init__(
        self,
        answers: Any,
        reward: RewardScale,
        *,
        gamma: float = 1.0,
        products: bool = False,
        device: str | torch.device = "cpu",
    ):
        width = answers[0]["hidden_states"].shape[-1]
        total, squares, with_return = torch.zeros(3, width, dtype=torch.float64, device=device)
        square = torch.zeros(width, width if products else 0, dtype=torch.float64, device=device)
        self.tokens, returns_total = 0, 0.0
        for batch in batches(answers):
            states = batch["hidden_states"].to(device, torch.float64)
            rewards = (batch["rewards"].double() - reward.mean) / reward.std
            unread = torch.zeros(len(states), dtype=torch.float64)  # V, at λ = 1
            returns = lambda_returns(unread, rewards, batch["offsets"], 1.0, gamma).to(device)
            self.tokens += len(states)
            total += states.sum(0)
            squares += states.square().sum(0)
            with_return += returns @ states
            returns_total += float(returns.sum())
            if products:
                square += states.T @ states
        self.mean = total / self.tokens
        self.std = (squares / self.tokens - self.mean.square()).clamp(min=0).sqrt()
        if not self.std.isfinite().all():
            raise ValueError("The rollouts hold hidden states that are not finite numbers. Collect them again.")
        # A dimension that never moves carries nothing; below 1e-7 of its mean, its spread is rounding.
        self.std = torch.where(self.std > (1e-7 * self.mean.abs()).clamp(min=1e-10), self.std, 1.0)
        self.mean_return = returns_total / self.tokens
        self.covariance = with_return / self.tokens - self.mean * self.mean_return
        self.covariances = square / self.tokens - self.mean[:, None] * self.mean if products else square


def set_scales(head: Head, answers: Any, *, standardize_inputs: bool = True) -> None:
    """Write into a head the names, and the reward's and states' mean and std, of the answers it will be trained on.

    A head that has scales (it was trained before) keeps them: its weights were fitted to them.
    """
    set_names(head.config, answers)
    raw = RewardScale(name=head.config.reward.name)
    if head.config.reward != raw or bool(head.input_mean.any()) or bool((head.input_std != 1).any()):
        return
    head.config.reward = reward_scale(answers, raw.name)
    if standardize_inputs:
        moments = Moments(answers, head.config.reward)
        head.input_mean.copy_(moments.mean)
        head.input_std.copy_(moments.std)


def float64_device(device: torch.device) -> torch.device:
    """Where to compute in float64: some kinds of device have none."""
    return device if device.type == "cuda" else torch.device("cpu")


def fit_linear_head(
    train_dataset: Any,
    *,
    ridge: float = 0.01,
    gamma: float = 1.0,
    reward: RewardScale | None = None,
    device: str | torch.device = "cpu",
) -> ValueHead:
    """V(h) = wᵀx + b, the ridge regression of the final reward on every state: one pass, no optimiser, no randomness.

    (C + ridge · I) w = c, with C the correlation matrix of the states and c their covariance with the standardised
    reward, in float64. The control of such a head is one constant vector, so it costs nothing at decoding: the first
    thing to try, and the baseline that RecontrolTrainer's metrics compare with.

    Args:
        train_dataset: a RolloutDataset, or a Subset or ConcatDataset of them. Read once, in batches; needs
            hidden_size² · 8 bytes.
        ridge: ≥ 0, in units of one standardised dimension's variance: directions of the states whose variance is far
            below it are ignored.
        gamma: γ, the discount of the returns; see lambda_returns.
        reward: the scale of the rewards; that of the dataset where None.
        device: where the products are computed; it needs float64.

    Returns:
        A head with num_hidden_layers = 0, float32, on the CPU, in eval mode.

    Raises:
        ValueError: no answers, a reward or a state that is not finite, or a negative ridge.
        HeadMismatch: hidden states of several widths.
    """
    if not (math.isfinite(ridge) and ridge >= 0):
        raise ValueError(f"ridge is {ridge!r}; it must be a finite number ≥ 0.")
    check_answers(train_dataset, "train_dataset")
    scale = replace(reward) if reward else reward_scale(train_dataset)
    moments = Moments(train_dataset, scale, gamma=gamma, products=True, device=device)
    correlation = moments.covariances / (moments.std[:, None] * moments.std)
    system = correlation + max(ridge, 1e-12) * torch.eye(len(correlation), dtype=torch.float64, device=device)
    weight = torch.linalg.solve(system, moments.covariance / moments.std)
    head = ValueHead(ValueHeadConfig(hidden_size=len(weight), num_hidden_layers=0, reward=scale))
    tensors = {"input_mean": moments.mean, "input_std": moments.std, "layers.0.weight": weight[None]}
    head.load_state_dict(tensors | {"layers.0.bias": torch.tensor([moments.mean_return])})
    control = head.config.control  # the gradient is constant: one step goes where the default's thirty do
    control.num_steps, control.step_size = 1, control.num_steps * control.step_size
    set_names(head.config, train_dataset)
    head.config.info["training"] = {
        "recipe": "ridge regression in closed form",
        "ridge": float(ridge),
        "td_lambda": 1.0,
        "gamma": float(gamma),
        "answers": len(train_dataset),
        "tokens": moments.tokens,
    }
    return head.eval()


def set_names(config: HeadConfig, dataset: Any) -> None:
    """Take from the rollouts' fingerprint the names that a head's config leaves out: base model and reward."""
    for part in parts_of(dataset):
        fingerprint = getattr(part, "fingerprint", None) or {}
        for name in ("base_model_name_or_path", "base_model_revision", "base_model_type"):
            if getattr(config, name) is None and fingerprint.get(name) is not None:
                setattr(config, name, fingerprint[name])
        rewards = fingerprint.get("rewards") or {}
        if rewards and config.reward.name == RewardScale().name:
            terms = [name if weight == 1 else f"{weight:g} · {name}" for name, weight in rewards.items()]
            config.reward.name = one_line(" + ".join(terms))
