"""From preference pairs to a table: language model, reward models, rollouts, heads, and what each gains.

    python examples/hh_pipeline.py PAIRS.jsonl.gz --output hh

PAIRS has rows {"chosen", "rejected"}, whole dialogues as in Anthropic/hh-rlhf. Their texts may offend; none is printed,
but OUTPUT holds answers like them. All is made from the pairs, in some twenty minutes of one core, so the language
model babbles: this checks the pipeline, and says nothing of large models.

Two reward models of different kinds learn from the training pairs: the mean over an answer's words, and the language
model itself. The better one on validation pairs is the reward, the other one the judge, which no head is trained on.
A reward that is right on less than 60 % of the held-out pairs is no reward: then there is no table.

What is in OUTPUT is not made again, so an interrupted run goes on where it was.
"""

import argparse
import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hh_models import TINY, TURN, Settings, margins_of, train_language_model, train_reward_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_recontrol import (
    ControlConfig,
    ControlHead,
    ControlHeadConfig,
    Controller,
    Head,
    RecontrolTrainer,
    RecontrolTrainingArguments,
    RolloutDataset,
    ValueHead,
    ValueHeadConfig,
    calibrate,
    collect_rollouts,
    enable_recontrol,
    fit_constant_control,
    fit_linear_head,
    load_prompts,
    sample_states,
)
from hf_recontrol.demo.training import random_direction
from hf_recontrol.evaluation import evaluate_answers
from hf_recontrol.intervals import paired_bootstrap
from hf_recontrol.rewards import Rewards

ENOUGH = 0.60  # accuracy on held-out pairs, for a reward to be worth steering to
CONTROL = ControlConfig(strength=0.1)
METHODS = ("linear value head", "MLP value head", "constant control", "MLP control", "random direction")
FIGURES = {"kl_per_answer": "nats", "perplexity": "perplexity", "distinct_3": "distinct-3", "length": "tokens"}
Row = dict[str, Any]


def split(rows: Any) -> dict[str, Any]:
    """Training, validation and held-out pairs, by the first turn: dialogues that begin alike are on one side."""
    first = [prompt.partition(TURN)[0] for prompt in rows["prompt"][:]]
    groups = sorted(set(first))
    random.Random(0).shuffle(groups)
    place = {group: i / len(groups) for i, group in enumerate(groups)}
    bounds = {"held_out": (0, 0.22), "validation": (0.22, 0.34), "train": (0.34, 1)}
    return {
        side: rows.select([i for i, group in enumerate(first) if low <= place[group] < high])
        for side, (low, high) in bounds.items()
    }


def made(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, made if it is not there; an interrupted one is begun again."""
    if not folder.is_dir():
        start, unfinished = time.perf_counter(), folder.with_name(folder.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        make(unfinished)
        unfinished.rename(folder)
        print(f"{folder.name}: made in {time.perf_counter() - start:.0f} s", flush=True)
    return folder


def check_settings(output: Path, pairs: Path, settings: Settings) -> None:
    """Refuses to go on with what other pairs or settings made."""
    asked = {"pairs_sha256": hashlib.sha256(pairs.read_bytes()).hexdigest(), **asdict(settings)}
    file = output / "settings.json"
    output.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        file.write_text(json.dumps(asked, indent=1) + "\n")
    if (found := json.loads(file.read_text())) != asked:
        different = sorted(name for name in asked if found.get(name) != asked[name])
        raise SystemExit(f"{output} was made with other {', '.join(different)}. Give another --output.")


def report(name: str, margins: torch.Tensor) -> float:
    """Prints and returns the share of pairs told apart, with its 95 % interval (Wilson 1927). A tie is half of one."""
    share = float((margins.sign() + 1).mean() / 2)
    spread = 1.96**2 / len(margins)
    centre, half = share + spread / 2, (spread * (share * (1 - share) + spread / 4)) ** 0.5
    low, high = (centre - half) / (1 + spread), (centre + half) / (1 + spread)
    print(f"{name}: right on {share:.1%} of {len(margins)} pairs, 95 % interval {low:.1%} to {high:.1%}", flush=True)
    return share


def choose_reward(output: Path, sides: dict[str, Any], settings: Settings) -> tuple[float, list[Path]]:
    """The accuracy of the reward on held-out pairs, and the folders of reward and judge."""
    train, validation, held_out = (list(sides[name]) for name in ("train", "validation", "held_out"))
    shares = {}
    for kind in ("words", "transformer"):
        folder = made(output / kind, lambda folder, kind=kind: train_reward_model(folder, kind, train, settings))
        shares[folder] = report(f"{kind}, validation", margins_of(folder, validation))
    reward, judge = sorted(shares, key=lambda folder: -shares[folder])
    shorter = torch.tensor([float(len(pair["rejected"]) - len(pair["chosen"])) for pair in held_out])
    report("the shorter answer, held out", shorter)
    report(f"judge ({judge.name}), held out", margins_of(judge, held_out))
    return report(f"reward ({reward.name}), held out", margins_of(reward, held_out)), [reward, judge]


def train_heads(folder: Path, model: Any, rollouts: RolloutDataset) -> None:
    """Heads of every kind and a placebo, calibrated."""
    train, held_out = rollouts.split(0.1)
    torch.manual_seed(0)
    heads: dict[str, Any] = {
        "linear value head": fit_linear_head(train),
        "MLP value head": ValueHead(ValueHeadConfig(hidden_size=train.hidden_size)),
        "constant control": fit_constant_control(train, model),
        "MLP control": ControlHead(ControlHeadConfig(hidden_size=train.hidden_size)),
        "random direction": random_direction(train.hidden_size),
    }
    for name, recipe in (("MLP value head", None), ("MLP control", "control")):
        args = RecontrolTrainingArguments(
            str(folder), recipe=recipe, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True
        )
        trainer = RecontrolTrainer(heads[name], args, train_dataset=train, eval_dataset=held_out, base_model=model)
        trainer.train()
        figures = {key: round(value, 3) for key, value in trainer.evaluate().items()}
        print(f"{name}, on {len(held_out)} held-out answers: {figures}", flush=True)
    for name, head in heads.items():
        if not head.config.control.calibration:
            calibrate(head, model, sample_states(held_out))
        head.save_pretrained(folder / name)


def table(output: Path, prompts: Any, collect: Callable[..., RolloutDataset], model: Any, tokenizer: Any) -> list[Row]:
    """One row for each method: gains over the base model in standard deviations of its answers, and what they cost."""
    rows: list[Row] = []
    base: dict[str, torch.Tensor] = {}
    for method in ("base", *METHODS):
        head = None if method == "base" else Head.from_pretrained(output / "heads" / method)
        controller = None if head is None else Controller(head, CONTROL)
        answers = list(collect(prompts, output / "answers" / method, controller=controller).rows())
        prompt_count = len({answer["prompt_id"] for answer in answers})
        scores = {
            name: torch.tensor([answer["rewards"][name] for answer in answers]).view(prompt_count, -1)
            for name in answers[0]["rewards"]
        }
        base = base or scores
        gains = {name: paired_bootstrap(base[name], scores[name], in_baseline_sd=True) for name in scores}
        figures = evaluate_answers(answers, model=model, tokenizer=tokenizer, controller=controller)
        rows.append({"method": method, "gains": gains, **figures})
    return rows


def as_markdown(rows: list[Row]) -> str:
    """Gains with their 95 % intervals, by a bootstrap over prompts; nats and tokens are those of an answer."""
    reward, judge = rows[0]["gains"]
    names = ["method", f"reward ({reward})", f"judge ({judge})", *FIGURES.values()]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        gains = [f"{gain.mean:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}]" for gain in row["gains"].values()]
        lines.append("| " + " | ".join([row["method"], *gains, *(f"{row[name]:.3g}" for name in FIGURES)]) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> list[Row] | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--output", type=Path, default=Path("hh"))
    parser.add_argument("--tiny", action="store_true", help="seconds: for a test")
    args = parser.parse_args(arguments)
    settings, output, start = TINY if args.tiny else Settings(), args.output, time.perf_counter()
    check_settings(output, args.pairs, settings)
    sides = split(load_prompts(args.pairs, recipe="hh"))
    texts = [pair[side] for pair in sides["train"] for side in ("chosen", "rejected")]
    folder = made(output / "language_model", lambda folder: train_language_model(folder, texts, settings))
    share, scorers = choose_reward(output, sides, settings)
    if share < ENOUGH:
        print(f"The reward is right on {share:.1%} of the held-out pairs, less than {ENOUGH:.0%}: no table.")
        return None

    model = enable_recontrol(AutoModelForCausalLM.from_pretrained(folder).eval())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rewards = Rewards([str(scorer) for scorer in scorers], [1, 0])

    def collect(prompts: Any, folder: Path, answers: int = settings.test_answers, **control: Any) -> RolloutDataset:
        return collect_rollouts(
            model, tokenizer, prompts, rewards, folder, num_return_sequences=answers,
            max_prompt_tokens=settings.prompt_tokens, max_new_tokens=settings.new_tokens, **control,
        )  # fmt: skip

    rollouts = collect(sides["train"], output / "rollouts", settings.answers)
    made(output / "heads", lambda folder: train_heads(folder, model, rollouts))
    rows = table(output, sides["held_out"], collect, model, tokenizer)
    print(as_markdown(rows))
    print(f"{rows[0]['n']:.0f} answers by each method. {time.perf_counter() - start:.0f} s in all.")
    return rows


if __name__ == "__main__":
    main()
