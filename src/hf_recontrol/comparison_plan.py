"""Which methods a comparison has: the paper's, as far as heads, checkpoints and rollouts are given, and placebos."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .baselines import ARGS, Base, BestOfN, Blockwise, Checkpoint, Method, PrefixScorer, Prompted
from .calibration import calibrate, sample_states
from .comparison import Entry, slug
from .comparison_heads import ShuffledRewards, fit_static_head, random_direction
from .fitting import fit_linear_head
from .head import Head
from .hooks import hidden_width
from .rewards import Rewards
from .rollout_dataset import RolloutDataset
from .tuning import Family, Strengths, steered_by
from .value_head import ValueHead

CANDIDATES = 10
PLACEBOS = frozenset({"random direction", "linear head, shuffled rewards"})


@dataclass
class Plan:
    """What is compared."""

    rewards: Rewards
    """What best-of-n chooses by and CD is guided by."""
    heads: dict[str, Head]
    """By name. The first is also combined with prompting, the first value head is also the scorer of CD prefix."""
    checkpoints: dict[str, Any]
    best_of: list[int]
    scorers: dict[str, ValueHead] = field(default_factory=dict)
    """By name: what CD prefix scores with, in place of the first value head."""
    skip: frozenset[str] = frozenset()
    """Names of rows to leave out."""
    fitted: dict[str, Head] = field(default_factory=dict)
    """Further heads, which the comparison makes by itself; see fitted_heads."""

    def with_fitted(self, heads: dict[str, Head]) -> "Plan":
        """With the heads that the comparison makes by itself.

        Raises:
            ValueError: one of the plan's heads has the name of one of them.
        """
        if taken := sorted(heads.keys() & self.heads.keys()):
            raise ValueError(f"--head names {taken}, which the comparison makes by itself. Give yours other names.")
        return replace(self, fitted=heads)

    def check(self, targets: Sequence[float]) -> None:
        """Refuse, before anything is generated, names that two rows would share and numbers that are none of a KL.

        Raises:
            ValueError: says which.
        """
        if not all(0 < target < math.inf for target in targets):
            raise ValueError(f"--nats are {list(targets)}; expected are KLs per answer, each > 0.")
        names = ["base", *(method.name for method in self.fixed()), *(name for name, *_ in self.families())]
        files = [slug(name) for name in names]
        if twice := sorted({name for name, file in zip(names, files, strict=True) if files.count(file) > 1}):
            raise ValueError(
                f"{twice} are names of several rows, or would share a file. Give each --head, --checkpoint and "
                "--prefix-scorer a name of its own, and each --best-of once."
            )
        if unknown := sorted(self.skip - set(names)):
            raise ValueError(f"--skip names {unknown}, but the rows are {names}.")

    def entries(self, strengths: Strengths) -> Iterator[Entry]:
        """All but the base model; strengths are found as they are needed."""
        for method in self.fixed():
            if method.name not in self.skip:
                yield Entry(method)
        for name, family, start in self.families():
            if name not in self.skip:
                for target, (multiplier, _) in zip(strengths.targets, strengths.of(family, start), strict=True):
                    yield Entry(family(multiplier), target, name in PLACEBOS)

    @property
    def published(self) -> frozenset[str]:
        """Names of the rows whose time the paper draws: base, the head that is compared, CD and CD prefix."""
        return frozenset({"base", *list(self.heads)[:1], "CD (ARGS)", *self.prefix_scorers})

    @property
    def prefix_scorers(self) -> dict[str, ValueHead]:
        """By the name of their rows."""
        if self.scorers:
            return {f"CD prefix, {name}": head for name, head in self.scorers.items()}
        return {} if self.value_head is None else {"CD prefix": self.value_head[1]}

    @property
    def value_head(self) -> tuple[str, ValueHead] | None:
        """The first, with its name."""
        found = ((name, head) for name, head in self.heads.items() if isinstance(head, ValueHead))
        return next(found, None)

    def fixed(self) -> Iterator[Method]:
        """Methods without a strength."""
        yield Prompted(Base())
        for n in self.best_of:
            yield BestOfN(self.rewards, n)
        yield ARGS(self.rewards, top_k=CANDIDATES, name=f"CD (ARGS), top {CANDIDATES} only")
        for name, scorer in self.prefix_scorers.items():
            yield Blockwise(scorer, name=f"{name}, block-wise")
        for name, model in self.checkpoints.items():
            yield Checkpoint(name, model)

    def families(self) -> Iterator[tuple[str, Family, float]]:
        """Name, methods by strength, and a first guess of it."""
        for name, head in (self.heads | self.fitted).items():
            start = float(getattr(head.config.control, head.config.control.multiplier)) or 1.0  # 0: tuned not to steer
            yield name, steered_by(head, name), start
        first = next(iter(self.heads.items()), None)
        if first is not None:
            yield f"{first[0]} + prompting", _prompted(steered_by(first[1], first[0])), 1.0
        kept: dict[str, Any] = {"top_k": CANDIDATES, "keep_others": True}
        yield "CD (ARGS)", lambda weight: ARGS(self.rewards, weight, **kept), 1.0
        for name, scorer in self.prefix_scorers.items():
            scored = _scored(scorer, name, kept)
            yield name, scored, 1.0
            yield f"{name} + prompting", _prompted(scored), 1.0


def _scored(scorer: ValueHead, name: str, kept: dict[str, Any]) -> Family:
    return lambda weight: PrefixScorer(scorer, weight, name=name, **kept)


def _prompted(family: Family) -> Family:
    return lambda strength: Prompted(family(strength))


def fitted_heads(rollouts: Path | None, model: Any, seed: int) -> dict[str, Head]:
    """Heads that need no training: a random direction, and of rollouts Static RE, a linear head and its placebo."""
    found: dict[str, Head] = {"random direction": random_direction(hidden_width(model), seed)}
    if rollouts is None:
        return found
    train, held_out = RolloutDataset(rollouts).split(0.1, seed=seed)
    found |= {
        "Static RE": fit_static_head(train),
        "linear head": fit_linear_head(train),
        "linear head, shuffled rewards": fit_linear_head(ShuffledRewards(train, seed)),
    }
    for one in found.values():
        calibrate(one, model, sample_states(held_out, seed=seed))
    return found
