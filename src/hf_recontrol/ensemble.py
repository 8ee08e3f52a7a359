"""Value heads of several seeds, and one head that says what they agree on: V̄ − κ · std, at the cost of one."""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .control_config import as_float
from .fitting import check_answers, set_scales
from .head import Head
from .head_config import ValueHeadConfig
from .trainer import RecontrolTrainer
from .training_args import RecontrolTrainingArguments
from .value_fitting import ValueObjective
from .value_head import ValueHead

AnyHead = TypeVar("AnyHead", bound=Head)
REACH = 0.3  # of ‖h‖; a strength of 0.1 nats a token moves h by about a tenth


def pessimistic_values(heads: Sequence[ValueHead], hidden_states: Tensor, kappa: float) -> Tensor:
    """V̄ − κ · std_k V_k at each state: what the heads agree on, less κ times their disagreement.

    Args:
        heads: two or more, of one reward scale.
        hidden_states: float (..., hidden_size).
        kappa: κ ≥ 0; 0 is the mean.

    Returns:
        (...), in the heads' dtype. std is the sample's, with k − 1.
    """
    values = torch.stack([head(hidden_states) for head in heads])
    return values.mean(0) - kappa * values.std(0)


def fit_ensemble(
    train_dataset: Any,
    *,
    eval_dataset: Any = None,
    base_model: PreTrainedModel | None = None,
    head: ValueHead | None = None,
    args: RecontrolTrainingArguments | None = None,
    num_heads: int = 3,
    kappa: float = 1.0,
) -> ValueHead:
    """One value head that stands for several: its targets are V̄ − κ · std_k V_k of `num_heads` heads of other seeds.

    Heads that were fitted to the same answers agree where there are many, and part where there are none; an ascent that
    leaves the data climbs what only one of them believes. Subtracting the disagreement is the usual remedy for reward
    models (compare Coste et al. 2023, arXiv:2310.02743), and beyond the paper of RE-Control. Distilled, it is an
    ordinary head: same files, same exact ascent, and decoding costs one head.

    The last fit sees each stored state twice: as it is, and moved up the gradient of one of the heads, by up to 0.3 of
    its norm. There the ascent goes, and there they disagree. It trains num_heads + 1 heads.

    Args:
        train_dataset: as RecontrolTrainer takes it.
        eval_dataset: likewise.
        base_model: likewise; calibrates the result.
        head: its shape is that of all the heads; written in place. Where None, a ValueHead of the default shape.
        args: of each of the fits; member i has the seed args.seed + i. Their checkpoints go to member-1, … in its
            output_dir; only the result is pushed.
        num_heads: ≥ 2.
        kappa: κ ≥ 0, in standard deviations of the disagreement; 0 is the mean.

    Returns:
        The head, in eval mode. head.config.info["training"] has "heads" and "kappa", info["evaluation"] its metrics,
        with "distance", the mean over states of (V − target)².

    Raises:
        TypeError, ValueError: num_heads or kappa out of bounds, and as RecontrolTrainer.
    """
    if args is None:
        args = RecontrolTrainingArguments()
    check_ensemble(num_heads, kappa)
    check_answers(train_dataset, "train_dataset", None if head is None else head.config.hidden_size)
    if head is None:
        width = train_dataset[0]["hidden_states"].shape[-1]
        head = seeded_head(ValueHead, ValueHeadConfig(hidden_size=width), args.seed)
    set_scales(head, train_dataset, standardize_inputs=args.standardize_inputs)
    members = [_member(head, args, i, train_dataset, eval_dataset) for i in range(1, num_heads + 1)]
    distiller = Distiller(
        head,
        args,
        members=members,
        kappa=float(kappa),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        base_model=base_model,
    )
    distiller.train()
    return head.eval()


def check_ensemble(num_heads: int, kappa: float) -> None:
    """Raise ValueError unless there are two heads or more, and κ ≥ 0."""
    if type(num_heads) is not int or num_heads < 2:
        raise ValueError(f"num_heads is {num_heads!r}; an ensemble has an integer number of heads, 2 or more.")
    if not 0 <= as_float(kappa) < math.inf:
        raise ValueError(f"kappa is {kappa!r}; it must be a finite number ≥ 0 (0 is the mean of the heads).")


def seeded_head(kind: type[AnyHead], config: Any, seed: int) -> AnyHead:
    """A new head of that kind; torch's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return kind(config)


def _member(
    head: ValueHead, args: RecontrolTrainingArguments, number: int, train_dataset: Any, eval_dataset: Any
) -> ValueHead:
    """A new head of the same shape and scales, fitted with another seed."""
    args = copy.copy(args)
    args.seed, args.push_to_hub = args.seed + number, False
    args.output_dir = str(Path(args.output_dir) / f"member-{number}")
    member = seeded_head(ValueHead, copy.deepcopy(head.config), args.seed)
    member.input_mean.copy_(head.input_mean)
    member.input_std.copy_(head.input_std)
    measured = eval_dataset if args.eval_strategy != "no" else None
    RecontrolTrainer(member, args, train_dataset=train_dataset, eval_dataset=measured).train()
    return member.eval()


class DistillationObjective(ValueObjective):
    """Minimises the mean over tokens of (V − (V̄ − κ · std_k V_k))², at the states and where an ascent would take them.

    Args:
        head, train_dataset, options: as ValueObjective's.
        members: the heads V_k.
        kappa: κ.
    """

    def __init__(
        self, head: ValueHead, train_dataset: Any, *, members: Sequence[ValueHead], kappa: float, **options: Any
    ):
        super().__init__(head, train_dataset, **options)
        self.members, self.kappa = [copy.deepcopy(member).to(self.device) for member in members], kappa

    def targets(self, hidden_states: Tensor) -> Tensor:
        """See pessimistic_values; without gradient."""
        with torch.no_grad():
            return pessimistic_values(self.members, hidden_states, self.kappa)

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Of each token, (tokens,): half at its state, half where that was moved to."""
        states = batch["hidden_states"]
        both = torch.cat([states, self._moved(states)])
        errors: Tensor = (model(both) - self.targets(both)).square()
        return errors.view(2, -1).mean(0)

    def _moved(self, states: Tensor) -> Tensor:
        """h + r ‖h‖ ∇V_k/‖∇V_k‖, r uniform in 0 … REACH for each state, k drawn for all of them."""
        k = int(torch.randint(len(self.members), ()))
        gradient = nn.functional.normalize(self.members[k].gradient(states), dim=-1)
        length = REACH * torch.rand(len(states), 1).to(gradient) * states.to(gradient).norm(dim=-1, keepdim=True)
        moved: Tensor = states + length * gradient
        return moved.to(states.dtype)

    def observe(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """ValueObjective's columns, and the target."""
        targets = self.targets(batch["hidden_states"])
        return torch.cat([super().observe(model, batch), targets[:, None].float()], dim=-1)

    def metrics(self, observed: Tensor, rewards: Tensor, offsets: Tensor) -> dict[str, float]:
        """See value_metrics; and "distance", the mean over the states of (V − target)²."""
        distance = float((observed[:, 0] - observed[:, -1]).double().square().mean())
        return {**super().metrics(observed[:, :-1], rewards, offsets), "distance": distance}


class Distiller(RecontrolTrainer):
    """A RecontrolTrainer towards the values of an ensemble. See fit_ensemble."""

    def __init__(self, *args: Any, members: Sequence[ValueHead], kappa: float, **options: Any):
        self.members, self.kappa = members, kappa
        super().__init__(*args, **options)

    def _objective(self, critic: Any, behavior: Any) -> DistillationObjective:
        return DistillationObjective(
            self.model,  # type: ignore[arg-type]  # a ValueHead, as its members are
            self.train_dataset,
            members=self.members,
            kappa=self.kappa,
            td_lambda=self.args.td_lambda,
            gamma=self.args.gamma,
            device=self.args.device,
        )

    def describe_run(self) -> None:
        """As RecontrolTrainer's; and of what the head was distilled."""
        super().describe_run()
        self.model.config.info["training"] |= {"heads": len(self.members), "kappa": self.kappa}
