"""What dpo.py, rloo.py and ppo.py share: their options, the LoRA adapter, the checkpoint, and what training gained."""

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from hf_recontrol.baselines import Base, Checkpoint, rewards_of_answers
from hf_recontrol.comparison import Comparison, Entry, figures
from hf_recontrol.demo.assets import MAX_NEW_TOKENS, Demo
from hf_recontrol.rewards import Rewards
from hf_recontrol.sampling import Sampler

LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def options(description: str | None, output: str, learning_rate: float, beta: float) -> argparse.ArgumentParser:
    """The parser, with the options that all three have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(output), help="the checkpoint's folder")
    parser.add_argument("--learning-rate", type=float, default=learning_rate, help="of the adapter")
    parser.add_argument("--beta", type=float, default=beta, help="weight of the KL from the untrained model")
    parser.add_argument("--seed", type=int, default=0, help="of the adapter, the order of the prompts and the sampling")
    parser.add_argument("--tiny", action="store_true", help="two steps, to see that it runs")
    return parser


def checked(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, and torch's threads set."""
    args = parser.parse_args(argv)
    if (args.output / "config.json").exists():
        parser.error(f"{args.output} holds a model already; expected is a folder to make. Give another --output.")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    return args


def training_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the three configs of TRL are told alike: float32 on a CPU, nothing reported, only the end kept."""
    return {
        "output_dir": str(args.output),
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }


def load_model(folder: Path) -> Any:
    """A language model of its own: TRL changes the one that it trains."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def save_merged(model: Any, demo: Demo, folder: Path) -> None:
    """The adapter added to the weights: a folder like any model's, in float32, for bfloat16 would lose small steps."""
    model.merge_and_unload().save_pretrained(folder)
    demo.tokenizer.save_pretrained(folder)


def report(demo: Demo, name: str, folder: Path, prompts: list[str]) -> dict[str, Any]:
    """Print the reward before and after. The row of `figures` has the rest."""
    sampler = Sampler(demo.model, demo.tokenizer, MAX_NEW_TOKENS, batch_size=100)
    judge = Rewards(str(demo.folder / "judge"))
    with tempfile.TemporaryDirectory() as scratch:
        comparison = Comparison(sampler, prompts, scratch)
        before = comparison.answered(Entry(Base()))
        after = comparison.answered(Entry(Checkpoint(name, load_model(folder))))
    means = [torch.tensor(rewards_of_answers(demo.reward, part.answers)).mean() for part in (before, after)]
    row = figures(after, before, {"judge": judge, "reward": demo.reward})
    print(f"{len(prompts)} validation prompts: reward {means[0]:+.2f} before, {means[1]:+.2f} after")
    for scorer in ("reward", "judge"):
        gain = row[scorer]
        print(f"{scorer}: {gain['mean']:+.2f} base sd, 95 % interval {gain['low']:+.2f} to {gain['high']:+.2f}")
    print(f"KL {row['kl_per_answer']:.2f} nats an answer, perplexity × {row['perplexity_ratio']:.2f}")
    return row
