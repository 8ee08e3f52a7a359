"""Make the demo's heads: prompts, rollouts, two value heads, two control heads, a placebo, each calibrated.

    python examples/demo/heads.py FOLDER_OF_TEXTS --output src/hf_recontrol/demo

The output folder holds language_model/, reward/ and judge/ already. About a quarter of an hour on two CPU cores.
"""

import argparse
import json
import os
import random
from pathlib import Path

import torch
from texts import prompt, sentences

from hf_recontrol.demo.assets import Demo
from hf_recontrol.demo.training import make_heads

VALIDATION, TEST = 200, 400


def write_prompts(texts: Path, file: Path) -> None:
    """The first six words of training sentences, and of held-out ones, each prompt once."""
    train, held_out = ([prompt(text) for text, _ in rows] for rows in sentences(texts))
    train, held_out = (list(dict.fromkeys(filter(None, rows))) for rows in (train, held_out))
    held_out = [text for text in held_out if text not in set(train)]
    random.Random(0).shuffle(held_out)
    split = {"train": train, "validation": held_out[:VALIDATION], "test": held_out[VALIDATION : VALIDATION + TEST]}
    file.write_text(json.dumps(split, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--output", type=Path, default=Path("src/hf_recontrol/demo"))
    parser.add_argument("--rollouts", type=Path, help="kept there, and resumed; a temporary folder where not given")
    parser.add_argument("--prompts", type=int, default=6000)
    parser.add_argument("--answers", type=int, default=6)
    parser.add_argument("--iterations", type=int, default=1, help="of the control head")
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    write_prompts(args.texts, args.output / "prompts.json")
    heads = make_heads(
        Demo(args.output),
        args.output,
        prompts=args.prompts,
        answers=args.answers,
        rollouts_dir=args.rollouts,
        iterations=args.iterations,
    )
    for name, head in heads.items():
        print(name, json.dumps(head.config.info, indent=1))


if __name__ == "__main__":
    main()
