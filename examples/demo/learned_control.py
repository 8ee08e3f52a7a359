"""Value heads and control heads at the same KL: judges, reward and fluency, three runs of everything.

    python examples/demo/learned_control.py --output examples/demo/learned_control

Collects rollouts, fits heads and placebos and steers with them, three times over, each time from other seeds: about an
hour on two CPU cores. Prints a table, writes OUTPUT.json (the rows), OUTPUT.png and OUTPUT_answers.md (twenty answers).
Prompts are the demo's test prompts. A second judge is made by second_judge.py. What is in the work folder is not made
again, so take another one for other settings.
"""

import argparse
import copy
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from overoptimization import column

from hf_recontrol import (
    ControlConfig,
    Controller,
    Head,
    calibrate,
    fit_constant_control,
    fit_linear_head,
    sample_states,
    train_control,
)
from hf_recontrol.comparison_heads import ShuffledRewards, random_direction
from hf_recontrol.demo.assets import Demo
from hf_recontrol.demo.comparison import sample_scored
from hf_recontrol.demo.training import (
    collect,
    collecting,
    train_control_head,
    train_value_head,
    training_arguments,
)
from hf_recontrol.evaluation import best_of_n, best_of_n_kl_bound, distinct_n, evaluate_answers
from hf_recontrol.intervals import crossed_bootstrap
from hf_recontrol.plots import overoptimization_figure
from hf_recontrol.rewards import Rewards

METHODS = (
    "constant control",
    "control head",
    "control head, 2 iterations",
    "value head, linear",
    "value head, MLP",
    "control of shuffled rewards",
    "random direction",
)
KL_PER_ANSWER = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
SHOWN_AT = 4.0
Answers = list[list[dict[str, Any]]]  # of each prompt


def heads_of_run(demo: Demo, folder: Path, prompts: int, seed: int) -> dict[str, Any]:
    """Rollouts, heads and placebos, from this seed."""
    saved = folder / f"heads-{seed}"
    if saved.is_dir():
        return {name: Head.from_pretrained(saved / name) for name in METHODS}
    texts = demo.prompts["train"][:prompts]
    rollouts = collect(demo, texts, folder / f"rollouts-{seed}", answers=4, seed=seed)
    train, held_out = rollouts.split(0.1, seed=seed)
    settings = {"seed": seed, "disable_tqdm": True}
    for_values, for_controls = (training_arguments(folder, recipe, **settings) for recipe in (None, "control"))
    control = train_control_head(demo, train, held_out, for_controls)
    heads = {
        "value head, MLP": train_value_head(demo, train, held_out, for_values),
        "value head, linear": fit_linear_head(train),
        "constant control": fit_constant_control(train, demo.model),
        "control head": copy.deepcopy(control),
        "control head, 2 iterations": train_control(
            demo.model,
            demo.tokenizer,
            texts,
            demo.reward,
            folder / f"under-control-{seed}",
            head=control,
            args=for_controls,
            seed=seed,
            progress=False,
            **collecting(4),
        ),
        "control of shuffled rewards": train_control_head(demo, ShuffledRewards(train, seed), held_out, for_controls),
        "random direction": random_direction(rollouts.hidden_size, seed),
    }
    for head in heads.values():
        if not head.config.control.calibration:
            calibrate(head, demo.model, sample_states(held_out, seed=seed))
    for name, head in heads.items():
        head.save_pretrained(folder / "unfinished" / name)
    (folder / "unfinished").rename(saved)
    return {name: heads[name] for name in METHODS}


def figures(demo: Demo, answers: Answers, controller: Controller | None) -> dict[str, float]:
    first = [rows[0] for rows in answers]
    measured = evaluate_answers(first, model=demo.model, tokenizer=demo.tokenizer, controller=controller)
    return measured | {"distinct_3": distinct_n([row["completion"] for row in first])}


def kept(
    file: Path, demo: Demo, prompts: list[str], run: int | None, head: Any = None, config: ControlConfig | None = None
) -> dict[str, Any]:
    """One answer to each prompt (of the base model sixteen), scored, and the figures; from the file where it is."""
    if not file.exists():
        answers, _ = sample_scored(demo, prompts, range(16) if run is None else [run], head, config)
        controller = None if head is None else Controller(head, config)
        unfinished = file.with_suffix(".tmp")
        unfinished.write_text(json.dumps({"answers": answers, "figures": figures(demo, answers, controller)}))
        unfinished.rename(file)
    cell: dict[str, Any] = json.loads(file.read_text())
    return cell


def summary(
    method: str, asked: float, runs: list[dict[str, Any]], base: Answers, plain: dict[str, float]
) -> dict[str, Any]:
    """A row: each scorer's gain in base standard deviations with its interval, and the means of the rest over runs."""
    row: dict[str, Any] = {"method": method, "setting": asked, "runs": len(runs)}
    for scorer in [name for name in ("judge", "second_judge", "reward") if name in base[0][0]]:
        before = column(base, scorer)
        gains = torch.stack([(column(run["answers"], scorer).mean(1) - before.mean(1)) / before.std() for run in runs])
        row[scorer] = dataclasses.asdict(crossed_bootstrap(gains))
    names = ("kl_per_answer", "kl_per_token", "distinct_3", "diversity_20", "length")
    row |= {name: sum(run["figures"][name] for run in runs) / len(runs) for name in names}
    row["perplexity_ratio"] = sum(run["figures"]["perplexity"] for run in runs) / len(runs) / plain["perplexity"]
    return row


def judge_again(answers: Answers, judge: Rewards | None) -> None:
    """Put the second judge's score into the rows."""
    rows = [row for rows in answers for row in rows]
    if judge is not None:
        texts = [[row[name] for row in rows] for name in ("prompt", "completion", "token_ids")]
        for row, score in zip(rows, judge(*texts).total, strict=True):
            row["second_judge"] = score


def write_answers(file: Path, shown: dict[str, Answers]) -> None:
    """The first twenty prompts, answered by each method; not selected."""
    lines = [f"# Twenty prompts, answered at {SHOWN_AT:g} nats an answer; not selected", ""]
    for i in range(min(20, len(shown["base"]))):
        lines += [f"**{next(iter(shown.values()))[i][0]['prompt']} …**", ""]
        for method, answers in shown.items():
            row = answers[i][0]
            scores = ", ".join(f"{name.replace('_', ' ')} {row[name]:+.1f}" for name in ("judge", "reward"))
            lines.append(f"- {method} ({scores}): …{row['completion'].strip()}")
        lines.append("")
    file.write_text("\n".join(lines), encoding="utf-8")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: every method at 1 and 4 nats an answer, and best-of-n."""
    columns = ("judge", "second_judge", "reward")
    names = [
        "method",
        "nats an answer",
        *(name.replace("_", " ") for name in columns),
        "perplexity",
        "distinct-3",
        "length",
    ]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        best_of = row["method"].startswith("best-of")
        if best_of or row["setting"] in (1.0, SHOWN_AT):
            gains = [row.get(name) for name in columns]
            cells = [row["method"], "≤ " * best_of + f"{row['kl_per_answer']:.2f}"]
            cells += [
                "" if gain is None else f"{gain['mean']:+.2f} ± {(gain['high'] - gain['low']) / 2:.2f}"
                for gain in gains
            ]
            cells += [f"{row['perplexity_ratio']:.2f} ×", f"{row['distinct_3']:.3f}", f"{row['length']:.1f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("learned_control"), help="without .json and .png")
    parser.add_argument("--work", type=Path, default=Path("learned_control-work"), help="rollouts, kept and resumed")
    parser.add_argument("--second-judge", type=Path, help="the folder that second_judge.py made")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=4500, help="training prompts, 4 answers to each")
    parser.add_argument("--test-prompts", type=int, default=400)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    demo, judge = Demo(), Rewards(str(args.second_judge)) if args.second_judge else None
    prompts = demo.prompts["test"][: args.test_prompts]
    args.work.mkdir(parents=True, exist_ok=True)
    base = kept(args.work / "base.json", demo, prompts, None)["answers"]
    judge_again(base, judge)
    plain, spread = figures(demo, base, None), column(base, "judge").std()
    cells: dict[tuple[str, float], list[dict[str, Any]]] = {}
    curves, shown = [], {"base": base}
    for run in range(args.runs):
        heads = heads_of_run(demo, args.work, args.prompts, seed=run + 1)
        curves.append(heads["control head, 2 iterations"].config.info["iterations"])
        for asked in KL_PER_ANSWER:
            config = ControlConfig(strength=asked / plain["length"])
            for method, head in heads.items():
                cell = kept(args.work / f"{method} {asked} {run}.json", demo, prompts, run, head, config)
                judge_again(cell["answers"], judge)
                cells.setdefault((method, asked), []).append(cell)
                gain = (column(cell["answers"], "judge").mean() - column(base, "judge").mean()) / spread
                nats = cell["figures"]["kl_per_answer"]
                print(f"run {run + 1} {method:28} {asked:5g} asked {nats:7.2f} nats, judge {gain:+.2f}", flush=True)
                if asked == SHOWN_AT and run == 0:
                    shown[method] = cell["answers"]
    rows = [summary(method, asked, runs, base, plain) for (method, asked), runs in cells.items()]
    for n in (2, 4, 16):
        best = best_of_n([[row["reward"] for row in answers] for answers in base], n)
        chosen = [[answers[i]] for answers, i in zip(base, best, strict=True)]
        rows.append(
            summary(f"best-of-{n}", n, [{"answers": chosen, "figures": figures(demo, chosen, None)}], base, plain)
        )
        rows[-1]["kl_per_answer"] = best_of_n_kl_bound(n)
        shown[f"best-of-{n}"] = chosen
    result = {"base": plain, "rows": rows, "iterations": curves}
    args.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print(table(sorted(rows, key=lambda row: (row["method"].startswith("best-of"), row["setting"]))))
    overoptimization_figure(rows).savefig(args.output.with_suffix(".png"), dpi=100)
    write_answers(args.output.with_name(args.output.name + "_answers.md"), shown)


if __name__ == "__main__":
    main()
