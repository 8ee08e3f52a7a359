"""The paper's table on the demo: every method at equal KL, three runs of everything from other seeds.

    python examples/demo/comparison.py --output examples/demo/comparison

Each run collects rollouts, fits heads to them, and hands them to `hf-recontrol evaluate`, which chooses every strength
on the demo's validation prompts and answers its test prompts and other_prompts.jsonl, sentences about anything but
films. Then the runs become one table, intervals over runs and prompts, and claims.md says who is above whom. An hour
and a half on two CPU cores, with OMP_NUM_THREADS=1 and two processes that do a run each (--run) before a last one that
does the rest. What is in the work folder is not made again. Models that were fine-tuned by dpo.py and the like become
rows by --checkpoint DPO=dpo-{run}.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from comparison_claims import claims
from comparison_rows import rows_of_runs

from hf_recontrol import ValueHead, ValueHeadConfig, calibrate, fit_constant_control, sample_states
from hf_recontrol.comparison_report import write_report
from hf_recontrol.demo.assets import FOLDER, MAX_NEW_TOKENS, Demo
from hf_recontrol.demo.training import collect, train_control_head, train_value_head, training_arguments
from hf_recontrol.trainer import RecontrolTrainer

NATS = (0.5, 1, 2, 4, 8)
BEST_OF = (2, 4, 16)
RUNS = (1, 2, 3)
BATCH_SIZES = (1, 8, 16, 32)
PICTURES = ("landscape", "answer")
OTHER_PROMPTS = Path(__file__).with_name("other_prompts.jsonl")


def make_heads(demo: Demo, work: Path, prompts: int, run: int) -> Path:
    """Rollouts and heads from this seed; the folder of the heads."""
    saved = work / f"heads-{run}"
    if saved.is_dir():
        return saved
    rollouts = collect(demo, demo.prompts["train"][:prompts], work / f"rollouts-{run}", answers=4, seed=run)
    train, held_out = rollouts.split(0.1, seed=run)
    settings = {"seed": run, "disable_tqdm": True}
    heads = {
        "RE-Control": train_value_head(demo, train, held_out, training_arguments(work, **settings)),
        "control head": train_control_head(demo, train, held_out, training_arguments(work, "control", **settings)),
        "constant control": fit_constant_control(train, demo.model),
        "Q": train_by_bellman(train, held_out, training_arguments(work, td_lambda=0.0, **settings)),
    }
    for name, head in heads.items():
        if not head.config.control.calibration:
            calibrate(head, demo.model, sample_states(held_out, seed=run))
        head.save_pretrained(work / f"unfinished-{run}" / name)
    (work / f"unfinished-{run}").rename(saved)
    return saved


def train_by_bellman(train: Any, held_out: Any, args: Any) -> ValueHead:
    """CD-Q's loss is the squared error to the next state's value (λ = 0), CD-FUDGE's that to the reward (λ = 1)."""
    torch.manual_seed(args.seed)
    head = ValueHead(ValueHeadConfig(hidden_size=train.hidden_size))
    RecontrolTrainer(head, args, train_dataset=train, eval_dataset=held_out).train()
    return head.eval()


def write_prompts(demo: Demo, folder: Path, limits: dict[str, int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, limit in limits.items():
        lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in demo.prompts[split][:limit]]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def evaluate(args: argparse.Namespace, run: int, heads: Path, prompts: Path, *more: str) -> Path:
    """The table of one run, by the command; its folder."""
    output = args.work / f"run-{run}"
    command = [sys.executable, "-m", "hf_recontrol", "evaluate", "--model", str(FOLDER / "language_model")]
    command += ["--dataset", str(prompts), "--split", "test", "--limit", str(args.test_prompts)]
    command += ["--tuning-split", "validation", "--tuning-prompts", str(args.tuning_prompts)]
    command += ["--reward", str(FOLDER / "reward"), "--judge", str(FOLDER / "judge")]
    for name in ("RE-Control", "control head", "constant control"):
        command += ["--head", f"{name}={heads / name}"]
    command += ["--prefix-scorer", f"FUDGE={heads / 'RE-Control'}", "--prefix-scorer", f"Q={heads / 'Q'}"]
    command += ["--rollouts", str(args.work / f"rollouts-{run}"), "--other-prompts", str(OTHER_PROMPTS)]
    command += [part for nats in args.nats for part in ("--nats", str(nats))]
    command += [part for n in BEST_OF for part in ("--best-of", str(n))]
    command += [part for one in args.checkpoint for part in ("--checkpoint", one.format(run=run))]
    command += ["--skip", "CD prefix, Q", "--skip", "CD prefix, Q + prompting"]  # its loss is seen block-wise
    command += ["--max-new-tokens", str(MAX_NEW_TOKENS), "--batch-size", "64", "--dtype", "float32"]
    subprocess.run([*command, "--seed", str(run), "--output-dir", str(output), *more], check=True)
    return output


def merge(demo: Demo, folders: list[Path], output: Path) -> None:
    """The runs' tables as one, and what it claims."""
    rows, gains = rows_of_runs(demo.scorers, folders)
    first = json.loads((folders[0] / "results.json").read_text())
    more = {name: first[name] for name in ("sweep", "time") if name in first}
    facts: dict[str, Any] = {name: first["facts"][name] for name in ("dataset", "judges", "reward")}
    facts |= {"dataset": Path(facts["dataset"]).name, "runs": len(folders)}
    largest = [row for row in more.get("time", []) if row["batch_size"] == max(BATCH_SIZES)]
    if largest:
        facts["ms per token"] = f"in batches of {max(BATCH_SIZES)}, the methods taking turns"
        seconds = {row["method"]: row["seconds_per_token"] for row in largest}
        rows = [row | {"seconds_per_token": seconds[row["method"]]} for row in rows]
    write_report(rows, output, judges=["judge", "reward"], facts=facts, more=more)
    (output / "claims.md").write_text(claims(rows, gains), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("comparison"), help="a folder")
    parser.add_argument("--work", type=Path, default=Path("comparison-work"), help="rollouts and answers, kept")
    parser.add_argument("--run", type=int, choices=RUNS, help="do this one alone, and no table")
    parser.add_argument("--checkpoint", action="append", default=[], metavar="NAME=MODEL", help="{run} is the run's")
    parser.add_argument("--prompts", type=int, default=4500, help="training prompts, 4 answers to each")
    parser.add_argument("--test-prompts", type=int, default=200)
    parser.add_argument("--tuning-prompts", type=int, default=96)
    parser.add_argument("--nats", type=float, nargs="+", default=NATS, help="per answer")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    demo, prompts = Demo(), args.work / "prompts"
    write_prompts(demo, prompts, {"test": args.test_prompts, "validation": args.tuning_prompts})
    folders = []
    for run in RUNS if args.run is None else (args.run,):
        heads = make_heads(demo, args.work, args.prompts, run)
        pictures = run == RUNS[0] and args.run is None
        times = [part for size in BATCH_SIZES for part in ("--batch-sizes", str(size))]
        folders.append(evaluate(args, run, heads, prompts, *(["--sweep", *times] if pictures else ["--no-plots"])))
    if args.run is not None:
        return
    for part in (Path(), Path("other")):
        merge(demo, [folder / part for folder in folders], args.output / part)
    for name in PICTURES:
        shutil.copy(folders[0] / f"{name}.png", args.output)


if __name__ == "__main__":
    main()
