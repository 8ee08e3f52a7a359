"""hf-recontrol evaluate: the methods of the paper's table on one model, one dataset and one reward."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers.utils import logging

from .baselines import ARGS, Base, BestOfN, Checkpoint, Method, PrefixScorer, Prompted
from .calibration import calibrate, sample_states
from .cli_inputs import ends_at_sigterm, language_model, named_heads, reward_functions
from .cli_rollouts import Dtype
from .comparison import Answered, Comparison, Entry, figures
from .comparison_heads import ShuffledRewards, fit_static_head, random_direction
from .comparison_report import write_report
from .figure_style import new_figure
from .fitting import fit_linear_head
from .head import Head
from .prompts import load_prompts
from .rewards import Rewards, Text
from .rollout_dataset import RolloutDataset
from .sampling import Sampler
from .tuning import Family, Strengths, steered_by
from .value_head import ValueHead

CANDIDATES = 10


@dataclass
class Plan:
    """What is compared."""

    sampler: Sampler
    rewards: Rewards
    heads: dict[str, Head]
    checkpoints: dict[str, Any]
    placebos: frozenset[str]
    best_of: list[int]
    skip: frozenset[str]

    def fixed(self) -> Iterator[Method]:
        """Methods without a strength."""
        yield Prompted(Base())
        for n in self.best_of:
            yield BestOfN(self.rewards, n)
        yield ARGS(self.rewards, top_k=CANDIDATES, name=f"CD (ARGS), top {CANDIDATES} only")
        for name, model in self.checkpoints.items():
            yield Checkpoint(name, model)

    def families(self) -> Iterator[tuple[str, Family, float]]:
        """Name, methods by strength, and a first guess of it."""
        for name, head in self.heads.items():
            start = float(getattr(head.config.control, head.config.control.multiplier))
            yield name, steered_by(head, name), start
        first = next(iter(self.heads.items()), None)
        if first is not None:
            family = steered_by(first[1], first[0])
            yield f"{first[0]} + prompting", lambda x: Prompted(family(x)), 1.0
        kept: dict[str, Any] = {"top_k": CANDIDATES, "keep_others": True}
        yield "CD (ARGS)", lambda weight: ARGS(self.rewards, weight, **kept), 1.0
        scorer = next((head for head in self.heads.values() if isinstance(head, ValueHead)), None)
        if scorer is not None:
            yield "CD prefix", lambda weight: PrefixScorer(scorer, weight, **kept), 1.0


def evaluate(
    model: Annotated[str, typer.Option(help="A language model: an id on the Hub or a folder.")],
    dataset: Annotated[str, typer.Option(help="The prompts: an id on the Hub, a folder, or a JSONL or Parquet file.")],
    output_dir: Annotated[Path, typer.Option(help="Where answers and table go; begun before, it is gone on with.")],
    reward: Annotated[
        str,
        typer.Option(
            help="What heads were trained on, best-of-n chooses and CD is guided by: a sequence classifier with one "
            "label (an id on the Hub or a folder), or file.py:function."
        ),
    ],
    judge: Annotated[
        list[str] | None,
        typer.Option(help="What did not train the heads: a gain counts by it. As --reward. Repeat it for more."),
    ] = None,
    head: Annotated[
        list[str] | None, typer.Option(metavar="NAME=HEAD", help="A head: a folder or an id. Repeat it for more.")
    ] = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=MODEL", help="Another model with this tokenizer, such as one trained by DPO."),
    ] = None,
    rollouts: Annotated[
        Path | None,
        typer.Option(help="Rollouts: Static RE, a linear head and its shuffled placebo are fitted to them."),
    ] = None,
    nats: Annotated[
        list[float] | None, typer.Option(help="KL per answer that strengths are tuned to. Repeat it; 1 and 4.")
    ] = None,
    best_of: Annotated[list[int] | None, typer.Option(min=2, help="n of best-of-n. Repeat it; 4 and 16.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="A row to leave out, by its name. Repeat it.")] = None,
    split: Annotated[str, typer.Option(help="Of the dataset.")] = "test",
    limit: Annotated[int, typer.Option(min=2, help="Prompts to test on, at most.")] = 300,
    tuning_prompts: Annotated[int, typer.Option(min=2, help="Further prompts, to choose strengths on.")] = 100,
    tuning_split: Annotated[
        str | None, typer.Option(help="Where these are from; the same split where not given, but others than tested.")
    ] = None,
    answers: Annotated[int, typer.Option(min=1, help="To each prompt by each method.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where an answer is cut.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered together.")] = 16,
    dtype: Annotated[Dtype, typer.Option(help="Of the model's weights.")] = Dtype.auto,
    seed: Annotated[int, typer.Option(help="Of the prompts' choice and the sampling.")] = 0,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw figures (extra: plots).")] = True,
) -> None:
    """Compare heads with the paper's baselines at equal KL: a table, figures, and all answers, in a folder."""
    if plots:
        new_figure(1, 1)  # without matplotlib it says how to get it, before anything is computed
    targets = sorted(nats or [1.0, 4.0])
    tuned_on, tested_on = _prompts(dataset, split, limit, tuning_split, tuning_prompts, seed)
    language, tokenizer = language_model(model, dtype=dtype.value)
    rewards, *others = (reward_functions([text], None, device=language.device) for text in (reward, *(judge or [])))
    judges = {"judge" if i == 1 else f"judge_{i}": one for i, one in enumerate(others, 1)}
    sampler = Sampler(language, tokenizer, max_new_tokens, batch_size, seed)
    heads = {name: Head.from_pretrained(ref) for name, ref in named_heads(head or [], "--head").items()}
    models = named_heads(checkpoint or [], "--checkpoint")
    checkpoints = {name: language_model(ref, dtype=dtype.value)[0] for name, ref in models.items()}
    fitted, placebos = _fitted(rollouts, language, seed)
    plan = Plan(sampler, rewards, heads | fitted, checkpoints, placebos, best_of or [4, 16], frozenset(skip or []))
    with ends_at_sigterm():
        tuned = Comparison(sampler, tuned_on, output_dir / "tuning")
        comparison = Comparison(sampler, tested_on, output_dir, answers=answers)
        rows = _run(plan, comparison, Strengths(tuned, output_dir / "strengths.json", targets), judges)
    facts = {"model": model, "dataset": f"{dataset}, {split}", "reward": rewards.names[0], "seed": seed}
    facts |= {"judges": ", ".join(one.names[0] for one in judges.values()) or "none but the reward"}
    write_report(rows, output_dir, judges=[*judges, "reward"], facts=facts, figures=plots)
    typer.echo((output_dir / "table.md").read_text(encoding="utf-8"))


def _prompts(
    dataset: str, split: str, limit: int, tuning_split: str | None, tuning_prompts: int, seed: int
) -> tuple[list[Text], list[Text]]:
    """Those that strengths are chosen on, and those that are tested."""
    if tuning_split is not None and tuning_split != split:
        tuned_on = load_prompts(dataset, split=tuning_split, limit=tuning_prompts, seed=seed)["prompt"]
        return list(tuned_on), list(load_prompts(dataset, split=split, limit=limit, seed=seed)["prompt"])
    prompts = list(load_prompts(dataset, split=split, limit=limit + tuning_prompts, seed=seed)["prompt"])
    if len(prompts) < tuning_prompts + 2:
        raise ValueError(
            f"{dataset} has {len(prompts)} prompts in {split!r}; expected are {tuning_prompts} to choose strengths on "
            "and two or more to test on. Lower --tuning-prompts, or name another --split or --tuning-split."
        )
    return prompts[:tuning_prompts], prompts[tuning_prompts:]


def _fitted(rollouts: Path | None, model: Any, seed: int) -> tuple[dict[str, Head], frozenset[str]]:
    """The heads that need no training, calibrated, and which of them are placebos."""
    width = model.get_output_embeddings().weight.shape[1]
    found: dict[str, Head] = {"random direction": random_direction(width, seed)}
    if rollouts is None:
        return found, frozenset(found)
    train, held_out = RolloutDataset(rollouts).split(0.1, seed=seed)
    found |= {
        "Static RE": fit_static_head(train),
        "linear head": fit_linear_head(train),
        "linear head, shuffled rewards": fit_linear_head(ShuffledRewards(train, seed)),
    }
    for one in found.values():
        calibrate(one, model, sample_states(held_out, seed=seed))
    return found, frozenset({"random direction", "linear head, shuffled rewards"})


def _run(plan: Plan, comparison: Comparison, strengths: Strengths, judges: dict[str, Rewards]) -> list[dict[str, Any]]:
    scorers = {**judges, "reward": plan.rewards}
    base = comparison.answered(Entry(Base()))
    rows = [figures(base, base, scorers)]
    with logging.tqdm(desc="methods") as bar:
        for entry in _entries(plan, strengths):
            answered: Answered = comparison.answered(entry)
            rows.append(figures(answered, base, scorers))
            bar.update()
    return rows


def _entries(plan: Plan, strengths: Strengths) -> Iterator[Entry]:
    for method in plan.fixed():
        if method.name not in plan.skip:
            yield Entry(method)
    for name, family, start in plan.families():
        if name not in plan.skip:
            found = zip(strengths.targets, strengths.of(family, start), strict=True)
            for target, (multiplier, _) in found:
                yield Entry(family(multiplier), target, name in plan.placebos)
