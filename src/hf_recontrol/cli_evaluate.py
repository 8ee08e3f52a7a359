"""hf-recontrol evaluate: the methods of the paper's table on one model, one dataset and one reward."""

import itertools
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers.utils import logging

from .baselines import Base
from .cli_inputs import ends_at_sigterm, language_model, named_heads, reward_functions
from .cli_rollouts import Dtype
from .coherence import SIMCSE, Coherence
from .comparison import Comparison, Entry, figures
from .comparison_plan import Plan, fitted_heads
from .comparison_report import write_report
from .comparison_sweeps import close_up, sweep_rows, time_rows
from .figure_style import new_figure
from .figures import landscape_figure, trace_figure
from .head import Head
from .judging import warn_if_trained_by
from .prompts import load_prompts
from .rewards import Rewards, Text
from .sampling import Sampler
from .tuning import Strengths


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
    encoder: Annotated[
        str | None, typer.Option(help=f"Also measure coherence, by these sentence embeddings; the paper's: {SIMCSE}.")
    ] = None,
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
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep",
            help="Also what α and n do to the first value head, on the tuning prompts, and one answer from close up.",
        ),
    ] = False,
    batch_sizes: Annotated[
        list[int] | None, typer.Option(min=1, help="Also what a token costs in batches of so many. Repeat it.")
    ] = None,
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
    heads: dict[str, Head] = {
        name: Head.from_pretrained(ref) for name, ref in named_heads(head or [], "--head").items()
    }
    for trained, one in itertools.product(heads.values(), judges.values()):
        warn_if_trained_by(trained, one)
    models = named_heads(checkpoint or [], "--checkpoint")
    checkpoints = {name: language_model(ref, dtype=dtype.value)[0] for name, ref in models.items()}
    coherence = None if encoder is None else Coherence(encoder, device=language.device)
    fitted = fitted_heads(rollouts, language, seed)
    if taken := sorted(fitted.keys() & heads.keys()):
        raise ValueError(f"--head names {taken}, which the comparison makes by itself. Give yours other names.")
    plan = Plan(rewards, heads | fitted, checkpoints, best_of or [4, 16], frozenset(skip or []))
    with ends_at_sigterm():
        tuned = Comparison(sampler, tuned_on, output_dir / "tuning")
        comparison = Comparison(sampler, tested_on, output_dir, answers=answers)
        strengths = Strengths(tuned, output_dir / "strengths.json", targets)
        rows = _run(plan, comparison, strengths, judges, coherence)
        more = _more(plan, tuned, strengths, judges, sweep, batch_sizes or [])
    facts = {"model": model, "dataset": f"{dataset}, {split}", "reward": rewards.names[0], "seed": seed}
    facts |= {"judges": ", ".join(one.names[0] for one in judges.values()) or "none but the reward"}
    write_report(rows, output_dir, judges=[*judges, "reward"], facts=facts, more=more, figures=plots)
    if plots and sweep and plan.value_head is not None:
        landscape, trace = close_up(sampler, tuned_on[0], plan.value_head[1])
        landscape_figure(landscape).savefig(output_dir / "landscape.png", dpi=100)
        trace_figure(trace, 0, tokenizer).savefig(output_dir / "answer.png", dpi=100)
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


def _run(
    plan: Plan,
    comparison: Comparison,
    strengths: Strengths,
    judges: dict[str, Rewards],
    coherence: Coherence | None,
) -> list[dict[str, Any]]:
    scorers = {**judges, "reward": plan.rewards}
    base = comparison.answered(Entry(Base()))
    rows = [figures(base, base, scorers, coherence=coherence)]
    with logging.tqdm(desc="methods") as bar:
        for entry in plan.entries(strengths):
            rows.append(figures(comparison.answered(entry), base, scorers, coherence=coherence))
            bar.update()
    return rows


def _more(
    plan: Plan,
    tuned: Comparison,
    strengths: Strengths,
    judges: dict[str, Rewards],
    sweep: bool,
    batch_sizes: list[int],
) -> dict[str, list[dict[str, Any]]]:
    """Rows by the name of their figure."""
    more: dict[str, list[dict[str, Any]]] = {}
    if sweep and plan.value_head is not None:
        name, head = plan.value_head
        more["sweep"] = sweep_rows(tuned, head, name, {**judges, "reward": plan.rewards})
    if batch_sizes:
        strongest = max(strengths.targets)
        methods = [entry.method for entry in plan.entries(strengths) if entry.setting in (None, strongest)]
        prompts = [tuned.prompts[i % len(tuned.prompts)] for i in range(max(batch_sizes))]
        more["time"] = time_rows(tuned.sampler, prompts, [Base(), *methods], batch_sizes)
    return more
