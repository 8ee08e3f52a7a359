"""hf-recontrol evaluate: the methods of the paper's table on one model, one dataset and one reward."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .card_comparison import comparison_info
from .chat_judge import ChatJudge
from .cli_inputs import as_named, ends_at_sigterm, language_model, named_heads, reward_functions
from .cli_rollouts import Dtype
from .coherence import SIMCSE, Coherence
from .comparison import Comparison
from .comparison_plan import Plan, fitted_heads
from .comparison_report import write_report
from .comparison_run import Run
from .comparison_sweeps import close_up
from .figure_style import new_figure
from .figures import landscape_figure, trace_figure
from .head import Head
from .judging import warn_if_trained_by
from .prompts import load_prompts, stop_strings_of
from .rewards import Rewards, Text
from .sampling import Sampler
from .tuning import Strengths
from .value_head import ValueHead

OTHER = "other"
"""The folder, in that of the comparison, of what prompts of another kind gave."""


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
    prefix_scorer: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=HEAD", help="A value head for CD prefix, not the first value head. Repeat it."),
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
    chat_judge: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Win rates by a chat model that is sent all answers, not by the judge."),
    ] = None,
    chat_judge_url: Annotated[
        str | None, typer.Option(help="Its endpoint, such as http://127.0.0.1:8000/v1; OpenAI's where not given.")
    ] = None,
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
    other_prompts: Annotated[
        str | None,
        typer.Option(
            help="A dataset of another kind, so many prompts as of --limit: a second table, at the same strengths, "
            'and what heads do to its column "completion", or else to the base model\'s answers.'
        ),
    ] = None,
    other_split: Annotated[str, typer.Option(help="Of --other-prompts.")] = "train",
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
    cards: Annotated[
        bool, typer.Option("--cards", help="Write what each --head, then a folder, gained into its config and card.")
    ] = False,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw figures (extra: plots).")] = True,
) -> None:
    """Compare heads with the paper's baselines at equal KL: a table, figures, and all answers, in a folder."""
    if plots:
        new_figure(1, 1)  # without matplotlib it says how to get it, before anything is computed
    folders = _folders(head) if cards else {}
    (tuned_on, tested_on), ends = _prompts(dataset, split, limit, tuning_split, tuning_prompts, seed)
    others = None if other_prompts is None else load_prompts(other_prompts, split=other_split, limit=limit, seed=seed)
    language, tokenizer = language_model(model, dtype=dtype.value)
    rewards, *judging = (reward_functions([text], None, device=language.device) for text in (reward, *(judge or [])))
    judges = {"judge" if i == 1 else f"judge_{i}": one for i, one in enumerate(judging, 1)}
    plan = _plan(rewards, head, prefix_scorer, checkpoint, best_of, skip, dtype)
    for trained, one in itertools.product(plan.heads.values(), judges.values()):
        warn_if_trained_by(trained, one)
    better = ChatJudge(chat_judge, chat_judge_url) if chat_judge is not None else next(iter(judges.values()), rewards)
    coherence = None if encoder is None else Coherence(encoder, device=language.device)
    targets = sorted(set(nats or [1.0, 4.0]))
    plan = plan.with_fitted(fitted_heads(rollouts, language, seed))
    plan.check(targets)
    sampler = Sampler(language, tokenizer, max_new_tokens, batch_size, seed, stop_strings=ends)
    names = [*judges, "reward"]
    facts: dict[str, Any] = {"model": as_named(model), "dataset": f"{as_named(dataset)}, {split}"}
    facts["reward"] = rewards.names[0]
    facts |= {"judges": ", ".join(one.names[0] for one in judges.values()) or "none but the reward", "seed": seed}
    facts["win rate by"] = chat_judge or next(iter(judges.values()), rewards).names[0]
    with ends_at_sigterm():
        tuned = Comparison(sampler, tuned_on, output_dir / "tuning")
        strengths = Strengths(tuned, output_dir / "strengths.json", targets)
        run = Run(plan, strengths, {**judges, "reward": rewards}, better, coherence)
        rows = run.rows(Comparison(sampler, tested_on, output_dir, answers=answers))
        more = run.more(tuned, sweep=sweep, batch_sizes=batch_sizes or [])
        typer.echo(write_report(rows, output_dir, judges=names, facts=facts, more=more, figures=plots))
        noted = {name: comparison_info(name, rows, names, facts) for name in folders if name not in plan.skip}
        if others is not None:
            references = list(others["completion"]) if "completion" in others.column_names else None
            ended = replace(sampler, stop_strings=stop_strings_of(others))
            comparison = Comparison(ended, list(others["prompt"]), output_dir / OTHER, answers=answers)
            rows = run.rows_of_others(comparison, references)
            facts |= {
                "dataset": f"{as_named(str(other_prompts))}, {other_split}",
                "strengths chosen on": f"{as_named(dataset)}, {tuning_split or split}",
            }
            typer.echo(write_report(rows, output_dir / OTHER, judges=names, facts=facts, figures=plots))
            for name, info in noted.items():
                info["other"] = comparison_info(name, rows, names, facts)
    for name, info in noted.items():
        plan.heads[name].config.info["comparison"] = info
        plan.heads[name].save_pretrained(folders[name])
    if plots and sweep and plan.value_head is not None:
        landscape, trace = close_up(sampler, tuned_on[0], plan.value_head[1])
        landscape_figure(landscape).savefig(output_dir / "landscape.png", dpi=100)
        trace_figure(trace, 0, tokenizer).savefig(output_dir / "answer.png", dpi=100)


def _folders(head: list[str] | None) -> dict[str, Path]:
    """Where the named heads are."""
    folders = {name: Path(ref) for name, ref in named_heads(head or [], "--head").items()}
    if not folders:
        raise ValueError("--cards is for the cards of heads, and none is given. Pass --head NAME=FOLDER too.")
    if elsewhere := [str(folder) for folder in folders.values() if not folder.is_dir()]:
        raise ValueError(f"--cards writes into folders of heads, and {elsewhere} are none. Save them, or leave it out.")
    return folders


def _plan(
    rewards: Rewards,
    head: list[str] | None,
    prefix_scorer: list[str] | None,
    checkpoint: list[str] | None,
    best_of: list[int] | None,
    skip: list[str] | None,
    dtype: Dtype,
) -> Plan:
    """What the options name, loaded."""
    heads, scorers = named_heads(head or [], "--head"), named_heads(prefix_scorer or [], "--prefix-scorer")
    models = named_heads(checkpoint or [], "--checkpoint")
    return Plan(
        rewards,
        {name: Head.from_pretrained(ref) for name, ref in heads.items()},
        {name: language_model(ref, dtype=dtype.value)[0] for name, ref in models.items()},
        best_of or [4, 16],
        {name: ValueHead.from_pretrained(ref) for name, ref in scorers.items()},
        frozenset(skip or []),
    )


def _prompts(
    dataset: str, split: str, limit: int, tuning_split: str | None, tuning_prompts: int, seed: int
) -> tuple[tuple[list[Text], list[Text]], tuple[str, ...]]:
    """Those that strengths are chosen on, and those that are tested; and what ends answers to them."""
    if tuning_split is not None and tuning_split != split:
        tuned_on = load_prompts(dataset, split=tuning_split, limit=tuning_prompts, seed=seed)
        tested_on = load_prompts(dataset, split=split, limit=limit, seed=seed)
        return (list(tuned_on["prompt"]), list(tested_on["prompt"])), stop_strings_of(tested_on)
    loaded = load_prompts(dataset, split=split, limit=limit + tuning_prompts, seed=seed)
    prompts = list(loaded["prompt"])
    if len(prompts) < tuning_prompts + 2:
        raise ValueError(
            f"{dataset} has {len(prompts)} prompts in {split!r}; expected are {tuning_prompts} to choose strengths on "
            "and two or more to test on. Lower --tuning-prompts, or name another --split or --tuning-split."
        )
    return (prompts[:tuning_prompts], prompts[tuning_prompts:]), stop_strings_of(loaded)
