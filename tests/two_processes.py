"""Run by `torchrun` in test_distributed.py: trains heads, and writes what each process ended with."""

import json
import os
import sys
from pathlib import Path

import torch
from tiny import tiny_model, tiny_tokenizer
from transformers import TrainerCallback

from hf_recontrol import (
    ControlHead,
    ControlHeadConfig,
    RecontrolTrainer,
    RecontrolTrainingArguments,
    RolloutDataset,
    ValueHead,
    ValueHeadConfig,
    train_value,
)

HEADS = {
    "value": lambda: ValueHead(ValueHeadConfig(16, intermediate_size=8)),
    "bellman": lambda: ValueHead(ValueHeadConfig(16, intermediate_size=8)),
    "control": lambda: ControlHead(ControlHeadConfig(16, intermediate_size=8)),
}
MORE = {
    "value": {},
    "bellman": {"td_lambda": 0.5, "gamma": 0.9, "gradient_accumulation_steps": 2},
    "control": {"beta": 0.5},
}


class Killed(TrainerCallback):
    """Sends SIGTERM to one of the processes, when the batch of step 8 is drawn."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 7 and args.process_index == 1:
            os.kill(os.getpid(), 15)


def train(folder, kind, name=None, callbacks=None):
    """The trainer, after it."""
    train_set, held_out = RolloutDataset(folder / "rollouts").split(0.25)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = RecontrolTrainingArguments(
        str(folder / f"{name or kind}-{world}"),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=25,
        save_steps=25,
        max_steps=50,
        learning_rate=1e-2,
        per_device_train_batch_size=32 // world // MORE[kind].get("gradient_accumulation_steps", 1),
        per_device_eval_batch_size=14 // world,
        **MORE[kind],
    )
    torch.manual_seed(0)
    trainer = RecontrolTrainer(
        HEADS[kind](),
        arguments,
        train_dataset=train_set,
        eval_dataset=held_out,
        base_model=tiny_model(),
        callbacks=callbacks,
    )
    trainer.train()
    return trainer


def in_rounds(folder):
    """A value head after two rounds of answers, the second steered by it."""
    world, prompts = int(os.environ.get("WORLD_SIZE", "1")), [f"w{i} w{j}" for i in range(3, 13) for j in range(3, 8)]
    arguments = RecontrolTrainingArguments(
        str(folder / f"rounds-{world}" / "training"),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        per_device_train_batch_size=16 // world,
        max_steps=20,
    )
    collecting = {"max_new_tokens": 6, "block_size": 8, "num_return_sequences": 2, "progress": False}
    output_dir = folder / f"rounds-{world}"
    return train_value(
        tiny_model(), tiny_tokenizer(), prompts, sevens, output_dir, iterations=2, args=arguments, **collecting
    )


def sevens(completions, **kwargs):
    return [float(completion.count("w7")) + len(completion) / 50 for completion in completions]


def report(folder, kind, trainer):
    head, rank = trainer.model, trainer.args.process_index
    facts = {
        "weights": {name: tensor.tolist() for name, tensor in head.state_dict().items()},
        "control": head.config.to_dict()["control"],
        "info": head.config.info,
    }
    (folder / f"{kind}-{trainer.args.world_size}-{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    torch.set_num_threads(1)
    where = Path(sys.argv[1])
    for one in HEADS:
        report(where, one, train(where, one))
    in_rounds(where)
    train(where, "value", name="terminated", callbacks=[Killed()])
