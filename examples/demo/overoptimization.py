"""How far can one steer before the text falls apart? Judge, reward and fluency against KL, three runs of everything.

    python examples/demo/overoptimization.py --output examples/demo/overoptimization

Collects rollouts, trains heads and steers with them, three times over, each time from other seeds: about three quarters
of an hour on two CPU cores. Writes OUTPUT.json (the rows) and OUTPUT.png. Prompts are the demo's validation prompts.
"""

import argparse
import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from hf_recontrol import ControlConfig, Controller, ValueHead, calibrate, fit_linear_head, sample_states
from hf_recontrol.comparison_heads import ShuffledRewards, random_direction
from hf_recontrol.control_config import step_size_for
from hf_recontrol.demo.assets import Demo
from hf_recontrol.demo.comparison import sample_scored
from hf_recontrol.demo.training import collect, train_value_head, training_arguments
from hf_recontrol.evaluation import best_of_n, best_of_n_kl_bound, distinct_n, evaluate_answers
from hf_recontrol.intervals import crossed_bootstrap
from hf_recontrol.plots import overoptimization_figure

KL_PER_TOKEN = (0.005, 0.0125, 0.03, 0.07, 0.15, 0.3, 0.5)  # of 40 tokens: 0.2 to 20 nats an answer
CALIBRATED_TO = 0.4
SINGLE = ("strength 0.1, any n", "strength 0.2, any n", "MLP head, huge α held at max_kl 0.4")


def heads_of_run(demo: Demo, folder: Path, prompts: int, seed: int) -> dict[str, ValueHead]:
    """Rollouts, heads and placebos, from this seed."""
    rollouts = collect(demo, demo.prompts["train"][:prompts], folder / f"rollouts-{seed}", answers=4, seed=seed)
    train, held_out = rollouts.split(0.1, seed=seed)
    arguments = dataclasses.replace(training_arguments(folder), seed=seed, disable_tqdm=True)
    heads = {
        "MLP head": train_value_head(demo, train, held_out, arguments),
        "linear head": fit_linear_head(train),
        "shuffled-reward head": train_value_head(demo, ShuffledRewards(train, seed), held_out, arguments),
        "random direction": random_direction(rollouts.hidden_size, seed),
    }
    for name in ("linear head", "random direction"):
        calibrate(heads[name], demo.model, sample_states(held_out, seed=seed))
    return heads


def step_size(head: ValueHead, kl: float) -> float:
    """α for this KL per token, beyond the calibration by the law of small shifts."""
    control = head.config.control
    return step_size_for(min(kl, CALIBRATED_TO), control, control.num_steps) * math.sqrt(max(kl / CALIBRATED_TO, 1))


def settings(heads: dict[str, ValueHead]) -> list[tuple[str, float, ValueHead, ControlConfig]]:
    """(method, its setting, head, control): α alone, n alone, and the strength, whose seat belt is 4 × as much."""
    mlp, rows = heads["MLP head"], []
    for kl in (*KL_PER_TOKEN, 1.5, 5.0):
        for name, head in heads.items():
            if name == "MLP head" or kl <= KL_PER_TOKEN[-1]:
                alpha = step_size(head, kl)
                rows.append((f"{name}, α", alpha, head, ControlConfig(step_size=alpha, max_kl=math.inf)))
    for kl in KL_PER_TOKEN:
        alpha, n = step_size(mlp, 0.1), round(mlp.config.control.num_steps * step_size(mlp, kl) / step_size(mlp, 0.1))
        rows.append(("MLP head, n", n, mlp, ControlConfig(step_size=alpha, num_steps=n, max_kl=math.inf)))
    for strength in (*KL_PER_TOKEN[:-1], CALIBRATED_TO):
        rows.append(("MLP head, strength", strength, mlp, ControlConfig(strength=strength)))
    for n in (1, 5, 100, 300):
        for strength in (0.1, 0.2):
            rows.append((SINGLE[strength == 0.2], n, mlp, ControlConfig(strength=strength, num_steps=n)))
    for alpha in (1.0, 5.0):  # nats a token if it were not held
        config = ControlConfig(step_size=step_size(mlp, alpha), max_kl=0.4)
        rows.append((SINGLE[2], config.step_size, mlp, config))
    return rows


def figures(demo: Demo, answers: list[dict[str, Any]], controller: Controller | None) -> dict[str, float]:
    measured = evaluate_answers(answers, model=demo.model, tokenizer=demo.tokenizer, controller=controller)
    return measured | {"distinct_3": distinct_n([row["completion"] for row in answers])}


def column(answers: list[list[dict[str, Any]]], scorer: str) -> torch.Tensor:
    return torch.tensor([[row[scorer] for row in rows] for rows in answers], dtype=torch.float64)


def summary(
    method: str, setting: float, runs: list[dict[str, Any]], base: list[list[dict[str, Any]]], perplexity: float
) -> dict[str, Any]:
    """A row: each scorer's gain in base standard deviations with its interval, and the means of the rest over runs."""
    row: dict[str, Any] = {"method": method, "setting": setting, "runs": len(runs)}
    for scorer in ("judge", "reward"):
        before = column(base, scorer)
        gains = torch.stack([(column(run["answers"], scorer).mean(1) - before.mean(1)) / before.std() for run in runs])
        row[scorer] = dataclasses.asdict(crossed_bootstrap(gains))
    names = ("kl_per_answer", "kl_per_token", "distinct_3", "diversity_20", "length")
    row |= {name: sum(run["figures"][name] for run in runs) / len(runs) for name in names}
    row["perplexity_ratio"] = sum(run["figures"]["perplexity"] for run in runs) / len(runs) / perplexity
    return row


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """The rows up to 25 nats an answer; what lies beyond, and the single settings, are in the table only."""
    curves = [row for row in rows if row["kl_per_answer"] < 25 and row["method"] not in SINGLE]
    overoptimization_figure(curves).savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("overoptimization"), help="without .json and .png")
    parser.add_argument("--work", type=Path, default=Path("overoptimization-work"), help="rollouts, kept and resumed")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=4500, help="training prompts, 4 answers to each")
    parser.add_argument("--test-prompts", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    demo = Demo()
    prompts = demo.prompts["validation"][: args.test_prompts]
    base, _ = sample_scored(demo, prompts, range(16))
    plain = figures(demo, [rows[0] for rows in base], None)
    cells: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for run in range(args.runs):
        heads = heads_of_run(demo, args.work, args.prompts, seed=run + 1)
        for place, (method, setting, head, config) in enumerate(settings(heads)):
            answers, _ = sample_scored(demo, prompts, [run], head, config)
            measured = figures(demo, [rows[0] for rows in answers], Controller(head, config))
            result = {"method": method, "setting": setting, "answers": answers, "figures": measured}
            cells.setdefault((method, place), []).append(result)
            print(f"run {run + 1} {method:36} {setting:8.4g} {measured['kl_per_answer']:8.2f} nats", flush=True)
    rows = [
        summary(method, sum(run["setting"] for run in runs) / len(runs), runs, base, plain["perplexity"])
        for (method, _), runs in cells.items()
    ]
    for n in (2, 4, 16):
        best = best_of_n([[row["reward"] for row in answers] for answers in base], n)
        chosen = [[answers[i]] for answers, i in zip(base, best, strict=True)]
        run = {"answers": chosen, "figures": figures(demo, [answers[0] for answers in chosen], None)}
        rows.append(summary(f"best-of-{n}", n, [run], base, plain["perplexity"]))
        rows[-1]["kl_per_answer"] = best_of_n_kl_bound(n)
    args.output.with_suffix(".json").write_text(json.dumps({"base": plain, "rows": rows}, indent=1) + "\n")
    draw(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
