"""What recipes for a value head gain: more answers, an MLP, λ, a pessimistic ensemble, answers under control.

    python examples/demo/training_recipes.py --output examples/demo/training_recipes

Everything three times over, with other seeds of the rollouts, the training and the sampling: some two hours of one
CPU core. Prints tables, writes OUTPUT.json (all rows) and OUTPUT.png. Each stage is kept in the work folder: killed,
call it again; several processes may share it, each with other --seeds. A strength is the KL asked for by the mean
length of answers to validation prompts; what is reported is of test prompts.
"""

import argparse
import copy
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from learned_control import figures, kept, summary
from matplotlib.figure import Figure
from overoptimization import column
from torch.utils.data import Subset

from hf_recontrol import (
    ControlConfig,
    ValueHead,
    ValueHeadConfig,
    calibrate,
    fit_linear_head,
    sample_states,
    train_value,
)
from hf_recontrol.comparison_heads import ShuffledRewards, random_direction
from hf_recontrol.demo.assets import Demo
from hf_recontrol.demo.comparison import sample
from hf_recontrol.demo.training import (
    collect,
    collecting,
    train_value_head,
    training_arguments,
)
from hf_recontrol.ensemble import Distiller, seeded_head
from hf_recontrol.evaluation import best_of_n, best_of_n_kl_bound
from hf_recontrol.fitting import batches
from hf_recontrol.intervals import crossed_bootstrap
from hf_recontrol.plots import LINES

KL_PER_ANSWER = (0.5, 1.0, 2.0, 4.0)
LAMBDAS = (0.0, 0.5, 0.9, 0.95)
KAPPAS = (0, 1, 2)
ITERATIONS = 3
PAPER = "recipe=paper, fewest answers"  # its 100 epochs on more would take longer than all else
ANSWERS = 5  # to each prompt
Cells = dict[float, list[dict[str, Any]]]  # of each KL, the runs


class First(Subset):
    """The first so many answers of some rollouts."""

    def __init__(self, rollouts: Any, answers: int):
        super().__init__(rollouts, range(min(answers, len(rollouts))))
        self.hidden_size, self.row, self.rewards = rollouts.hidden_size, rollouts.row, rollouts.rewards[: len(self)]


def compared_with(sizes: list[int]) -> dict[str, str | None]:
    """The recipes, and for each the one that its difference is taken to."""
    usual = f"MLP, {sizes[len(sizes) // 2]:,} answers"
    names: dict[str, str | None] = {f"linear, {size:,} answers": None for size in sizes}
    names |= {f"MLP, {size:,} answers": f"linear, {size:,} answers" for size in sizes}
    names |= {f"λ = {value:g}": usual for value in LAMBDAS}
    names |= {PAPER: f"MLP, {min(sizes):,} answers"}
    names |= {f"{i} iterations": usual for i in range(2, ITERATIONS + 1)}
    names |= {f"ensemble, κ = {kappa}": "ensemble, κ = 0" if kappa else usual for kappa in KAPPAS}
    return names | {"shuffled rewards": None, "random direction": None}


@dataclass
class Run:
    """All that is made from one seed: the base model's answers, and the heads fitted to them."""

    demo: Demo
    folder: Path
    sizes: list[int]
    rollouts: Any
    held_out: Any
    seed: int

    @classmethod
    def collect(cls, demo: Demo, folder: Path, sizes: list[int], held_out: int, seed: int) -> "Run":
        """Answers to the first training prompts, and to prompts that no head is fitted to."""
        first = max(sizes) // ANSWERS
        prompts, others = demo.prompts["train"][:first], demo.prompts["train"][first : first + held_out]
        test = collect(demo, others, folder / f"held-out-{seed}", answers=ANSWERS, seed=seed + 100)
        rollouts = collect(demo, prompts, folder / f"rollouts-{seed}", answers=ANSWERS, seed=seed)
        return cls(demo, folder, sizes, rollouts, test, seed)

    def heads(self) -> Iterator[tuple[str, ValueHead]]:
        """Each recipe's name and head."""
        size, fewest = self.sizes[len(self.sizes) // 2], First(self.rollouts, min(self.sizes))
        usual = First(self.rollouts, size)
        for answers in self.sizes:
            train = First(self.rollouts, answers)
            yield self.kept(f"linear, {answers:,} answers", lambda train=train: fit_linear_head(train))
            name, head = self.kept(f"MLP, {answers:,} answers", lambda train=train: self.fit(train))
            yield name, head
            if answers == size:
                first = head
        for value in LAMBDAS:
            yield self.kept(f"λ = {value:g}", lambda value=value: self.fit(usual, td_lambda=value))
        yield self.kept(PAPER, lambda: self.fit(fewest, "paper"))
        yield self.kept("shuffled rewards", lambda: self.fit(ShuffledRewards(usual, self.seed)))
        yield self.kept("random direction", lambda: random_direction(self.rollouts.hidden_size, self.seed))
        yield from self.improved(first, size)
        members = [first, *(self.kept(f"member {i}", lambda i=i: self.fit(usual, member=i))[1] for i in (1, 2))]
        for kappa in KAPPAS:
            yield self.kept(f"ensemble, κ = {kappa}", lambda kappa=kappa: self.distilled(members, kappa, usual))

    def kept(self, name: str, make: Callable[[], ValueHead]) -> tuple[str, ValueHead]:
        """The head from its folder; made, calibrated and saved where it is not there yet."""
        saved, unfinished = self.folder / f"heads-{self.seed}" / name, self.folder / f"unfinished-{self.seed}"
        if not saved.is_dir():
            head = make()
            if not head.config.control.calibration:
                calibrate(head, self.demo.model, sample_states(self.held_out, seed=self.seed))
            head.save_pretrained(unfinished)
            saved.parent.mkdir(exist_ok=True)
            unfinished.rename(saved)
        return name, ValueHead.from_pretrained(saved)

    def fit(self, train: Any, recipe: str | None = None, member: int = 0, **settings: Any) -> ValueHead:
        """An MLP by RecontrolTrainer."""
        args = training_arguments(self.folder, recipe, seed=self.seed + 100 * member, disable_tqdm=True, **settings)
        return train_value_head(self.demo, train, self.held_out, args)

    def improved(self, head: ValueHead, answers: int) -> Iterator[tuple[str, ValueHead]]:
        """The head after each further iteration, on its own answers to the prompts that it was fitted to."""
        folder = self.folder / f"under-control-{self.seed}"
        if not (folder / f"head-{ITERATIONS - 1}" / "config.json").exists():
            train_value(
                self.demo.model,
                self.demo.tokenizer,
                self.demo.prompts["train"][: answers // ANSWERS],
                self.demo.reward,
                folder,
                iterations=ITERATIONS - 1,
                head=copy.deepcopy(head),  # it is written in place
                args=training_arguments(folder, seed=self.seed, disable_tqdm=True),
                seed=1000 * self.seed,
                **collecting(ANSWERS),
            )
        for i in range(1, ITERATIONS):  # the first iteration is the head itself
            yield f"{i + 1} iterations", ValueHead.from_pretrained(folder / f"head-{i}")

    def distilled(self, members: list[ValueHead], kappa: float, train: Any) -> ValueHead:
        """fit_ensemble's last step; its first, the members, is the same for each κ."""
        head = seeded_head(ValueHead, ValueHeadConfig(hidden_size=train.hidden_size), self.seed)
        args = training_arguments(self.folder, seed=self.seed, disable_tqdm=True)
        datasets = {"train_dataset": train, "eval_dataset": self.held_out}
        Distiller(head, args, members=members, kappa=kappa, base_model=self.demo.model, **datasets).train()
        return head.eval()


def explained_parts(head: ValueHead, answers: Any) -> torch.Tensor:
    """Float64 (prompts,), whose mean is the share of the final reward's variance over tokens that V explains."""
    scale, lengths = head.config.reward, answers.lengths
    rewards = answers.rewards.double()
    mean, gained = (rewards * lengths).sum() / lengths.sum(), []
    with torch.no_grad():
        for batch in batches(answers, 256):
            counts = batch["offsets"].diff()
            values = head(batch["hidden_states"]).double() * scale.std + scale.mean
            errors = (values - batch["rewards"].double().repeat_interleave(counts)).square()
            gained += [part.sum() for part in errors.split(counts.tolist())]
    spread = (rewards - mean).square() * lengths
    prompts = torch.tensor([answers[i]["prompt_id"] for i in range(len(answers))])
    parts = torch.zeros(int(prompts.max()) + 1, dtype=torch.float64).index_add(0, prompts, spread - torch.stack(gained))
    return parts * len(parts) / spread.sum()


def gains(runs: list[dict[str, Any]], base: Any, scorer: str) -> torch.Tensor:
    """In standard deviations of the base answers, (runs, prompts)."""
    before = column(base, scorer)
    return torch.stack([(column(run["answers"], scorer).mean(1) - before.mean(1)) / before.std() for run in runs])


def gains_at_equal_kl(of_kl: Cells, base: Any, scorer: str) -> dict[float, torch.Tensor]:
    """Gains at the very KLs that were asked for: of each run linear in √KL between what it came out at."""
    curves = torch.stack([gains(runs, base, scorer) for runs in of_kl.values()], dim=1)  # (runs, KLs, prompts)
    nats = torch.tensor([[cell["figures"]["kl_per_answer"] for cell in runs] for runs in of_kl.values()])
    found: dict[float, torch.Tensor] = {}
    for asked in of_kl:
        rows = []
        for curve, roots in zip(curves, nats.sqrt().T, strict=True):
            above = min(max(int((roots < asked**0.5).sum()), 1), len(roots) - 1)
            share = float((asked**0.5 - roots[above - 1]) / (roots[above] - roots[above - 1]))
            rows.append((1 - share) * curve[above - 1] + share * curve[above])
        found[asked] = torch.stack(rows)
    return found


def interval(parts: torch.Tensor) -> dict[str, float]:
    return asdict(crossed_bootstrap(parts))


def recipe_rows(
    cells: dict[str, Cells], parts: dict[str, torch.Tensor], references: dict[str, str | None], base: Any
) -> list[dict[str, Any]]:
    """Of each recipe: explained variance, gains on average over the KLs, and the differences to its reference."""
    rows = []
    for name, of_kl in cells.items():
        measured = {"explained_variance": parts[name]} if name in parts else {}
        for scorer in ("judge", "reward"):
            of_each = {f"{scorer} at {kl:g}": part for kl, part in gains_at_equal_kl(of_kl, base, scorer).items()}
            measured |= of_each | {scorer: torch.stack(list(of_each.values())).mean(0)}
        rows.append({"method": name, "against": references[name], "values": measured})
    found = {row["method"]: row["values"] for row in rows}
    for row in rows:
        values, reference = row.pop("values"), found.get(row["against"])
        row |= {name: interval(part) for name, part in values.items()}
        if reference:
            both = [name for name in values if name in reference]
            row["difference"] = {name: interval(values[name] - reference[name]) for name in both}
    return rows


def best_of(n: int, demo: Demo, base: Any, plain: dict[str, float]) -> dict[str, Any]:
    """The row of best-of-n by the reward."""
    best = best_of_n([[row["reward"] for row in answers] for answers in base], n)
    chosen = [[answers[i]] for answers, i in zip(base, best, strict=True)]
    row = summary(f"best-of-{n}", n, [{"answers": chosen, "figures": figures(demo, chosen, None)}], base, plain)
    return row | {"kl_per_answer": best_of_n_kl_bound(n)}


def shown(gain: dict[str, float] | None, digits: int = 2) -> str:
    return (
        "–" if gain is None else f"{gain['mean']:+.{digits}f} [{gain['low']:+.{digits}f}, {gain['high']:+.{digits}f}]"
    )


def tables(recipes: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    """Markdown: what each recipe gains, and how far that is from its reference."""
    names = ["recipe", "explained variance", *(f"judge, {kl:g} nats" for kl in KL_PER_ANSWER), "reward, 4 nats"]
    names += ["nats at 4", "perplexity at 4"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    last = {row["method"]: row for row in rows if row["setting"] == KL_PER_ANSWER[-1]}
    for recipe in recipes:
        row = last[recipe["method"]]
        cells = [recipe["method"], shown(recipe.get("explained_variance"), 3)]
        cells += [shown(recipe[f"judge at {kl:g}"]) for kl in KL_PER_ANSWER] + [shown(recipe["reward at 4"])]
        cells += [f"{row['kl_per_answer']:.2f}", f"{row['perplexity_ratio']:.2f} ×"]
        lines.append("| " + " | ".join(cells) + " |")
    names = ["recipe", "less", "explained variance", "judge, mean of the four KLs", "reward, mean of the four KLs"]
    lines += ["", "| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for recipe in recipes:
        if difference := recipe.get("difference"):
            cells = [recipe["method"], recipe["against"], shown(difference.get("explained_variance"), 3)]
            lines.append("| " + " | ".join([*cells, shown(difference["judge"]), shown(difference["reward"])]) + " |")
    return "\n".join(lines)


def draw(recipes: list[dict[str, Any]], best: dict[str, Any]) -> Figure:
    """A line for each recipe: explained variance, and the gains at each KL, with their intervals."""
    figure = Figure(figsize=(10, 0.42 * len(recipes) + 1.2), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for i, recipe in enumerate(recipes):
        if gain := recipe.get("explained_variance"):
            axes[0].plot([100 * gain["low"], 100 * gain["high"]], [i, i], color="black")
            axes[0].plot(100 * gain["mean"], i, "o", color="black", markersize=5)
        for axis, scorer in zip(axes[1:], ("judge", "reward"), strict=True):
            for k, (kl, colour) in enumerate(zip(KL_PER_ANSWER, LINES, strict=False)):
                gain, height = recipe[f"{scorer} at {kl:g}"], i + 0.2 * k - 0.3
                label = f"{kl:g} nats an answer" if i == 0 and scorer == "judge" else None
                axis.plot([gain["low"], gain["high"]], [height, height], color=colour)
                axis.plot(gain["mean"], height, "o", color=colour, markersize=4, label=label)
    for axis, scorer in zip(axes[1:], ("judge", "reward"), strict=True):
        label = "best-of-4 (≤ 0.64 nats)" if scorer == "judge" else None
        axis.axvline(best[scorer]["mean"], color="grey", linestyle="--", label=label)
        axis.set_xlabel(f"{scorer} gain\n(sd of base answers)")
    axes[0].set_xlabel("explained variance of the\nfinal reward, held-out answers (%)")
    axes[0].set_yticks(range(len(recipes)), [recipe["method"] for recipe in recipes])
    axes[0].set_ylim(len(recipes) - 0.5, -0.5)
    for axis in axes:
        axis.axvline(0, color="grey", linewidth=0.8)
        for i in range(1, len(recipes), 2):
            axis.axhspan(i - 0.5, i + 0.5, color="#f2f2f2", linewidth=0)
    figure.legend(loc="outside upper center", ncols=5, frameon=False, columnspacing=1.2, handletextpad=0.4)
    return figure


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("training_recipes"), help="without .json and .png")
    parser.add_argument("--work", type=Path, default=Path("training_recipes-work"), help="all stages, kept and resumed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="one run from each")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2000, 8000, 32000], help="answers, 5 to each prompt")
    parser.add_argument("--held-out-prompts", type=int, default=400, help="of the explained variance, 5 answers each")
    parser.add_argument("--test-prompts", type=int, default=100)
    args = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    demo, references = Demo(), compared_with(args.sizes)
    args.work.mkdir(parents=True, exist_ok=True)
    prompts = demo.prompts["test"][: args.test_prompts]
    validation = sample(demo.model, demo.tokenizer, demo.prompts["validation"])
    length = sum(len(row["token_ids"]) for row in validation) / len(validation)
    base = kept(args.work / "base.json", demo, prompts, None)["answers"]
    plain = figures(demo, base, None)
    cells: dict[str, Cells] = {name: {kl: [] for kl in KL_PER_ANSWER} for name in references}
    # V of answers under control, and a random direction, do not predict the base model's answers
    fitted = [name for name in references if not name.endswith("iterations") and name != "random direction"]
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in fitted}
    for seed in args.seeds:
        run = Run.collect(demo, args.work, args.sizes, args.held_out_prompts, seed)
        for method, head in run.heads():
            if method in parts:
                parts[method].append(explained_parts(head, run.held_out))
            for asked in KL_PER_ANSWER:
                config = ControlConfig(strength=asked / length)
                cell = kept(args.work / f"{method} {asked} {seed}.json", demo, prompts, seed, head, config)
                cells[method][asked].append(cell)
                judge, nats = float(gains([cell], base, "judge").mean()), cell["figures"]["kl_per_answer"]
                print(f"seed {seed} {method:28} {asked:4g} asked {nats:6.2f} nats, judge {judge:+.2f}", flush=True)
    rows = [summary(name, kl, runs, base, plain) for name, of_kl in cells.items() for kl, runs in of_kl.items()]
    rows.append(best_of(4, demo, base, plain))
    recipes = recipe_rows(cells, {name: torch.stack(of_runs) for name, of_runs in parts.items()}, references, base)
    result = {"settings": {**vars(args), "output": None, "work": None}, "base": plain, "recipes": recipes, "rows": rows}
    args.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    draw(recipes, rows[-1]).savefig(args.output.with_suffix(".png"), dpi=100)
    print(tables(recipes, rows))
    return result


if __name__ == "__main__":
    main()
