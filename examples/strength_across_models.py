"""Does one strength mean the same for every model? Language models of several widths, a head for each, one table.

    python examples/strength_across_models.py

Trains tiny language models on texts that the demo's model writes, fits and calibrates a value head for each, and
measures the KL per token of the texts that each strength gives. Six minutes on two CPU cores.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_recontrol import ControlConfig, Controller, ValueHead, enable_recontrol, fit_linear_head
from hf_recontrol.calibration import STRENGTHS, calibrate, sample_states
from hf_recontrol.demo.assets import Demo
from hf_recontrol.demo.comparison import sample
from hf_recontrol.demo.training import collect, train_value_head, training_arguments
from hf_recontrol.evaluation import evaluate_answers


def small_model(demo: Demo, width: int, texts: list[str], epochs: int) -> LlamaForCausalLM:
    """A Llama of this width, fitted to the texts in the demo's vocabulary."""
    torch.manual_seed(width)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 32,
        vocab_size=len(demo.tokenizer),
        max_position_embeddings=256,
        bos_token_id=demo.tokenizer.bos_token_id,
        eos_token_id=demo.tokenizer.eos_token_id,
        pad_token_id=demo.tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    rows = demo.tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs * len(texts) // 64):
        chosen = torch.randint(len(texts), (64,))
        loss = model(rows["input_ids"][chosen], rows["attention_mask"][chosen], labels=labels[chosen]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"width {width}: {model.num_parameters() / 1e6:.1f} M parameters, {loss.item():.2f} nats a token", flush=True)
    return enable_recontrol(model.eval())


def with_model(demo: Demo, model: Any) -> Demo:
    """The demo with another language model."""
    other = Demo()
    other.__dict__.update({"model": model, "tokenizer": demo.tokenizer, "scorers": demo.scorers, "reward": demo.reward})
    return other


def heads_for(demo: Demo, prompts: int, folder: Path) -> dict[str, ValueHead]:
    """An MLP and a linear head for the demo's model, calibrated."""
    rollouts = collect(demo, demo.prompts["train"][:prompts], folder, answers=4)
    train, held_out = rollouts.split(0.2, seed=0)
    linear = fit_linear_head(train)
    calibrate(linear, demo.model, sample_states(held_out))
    arguments = training_arguments(folder)
    arguments.disable_tqdm = True
    return {"MLP": train_value_head(demo, train, held_out, arguments), "linear": linear}


def measured_kl(demo: Demo, head: ValueHead, strength: float, prompts: int) -> float:
    """Nats per token of the texts that the strength gives."""
    control = ControlConfig(strength=strength)
    rows = sample(demo.model, demo.tokenizer, demo.prompts["test"][:prompts], head, control)
    figures = evaluate_answers(rows, model=demo.model, tokenizer=demo.tokenizer, controller=Controller(head, control))
    return figures["kl_per_token"]


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 192])
    parser.add_argument("--texts", type=int, default=1500, help="that the small models are trained on")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=300, help="4 answers to each are the heads' rollouts")
    parser.add_argument("--test-prompts", type=int, default=150)
    args = parser.parse_args(arguments)
    demo = Demo()
    prompts = (demo.prompts["train"] * 2)[: args.texts]
    written = [sample(demo.model, demo.tokenizer, prompts[i : i + 200]) for i in range(0, len(prompts), 200)]
    texts = [row["prompt"] + row["completion"] for rows in written for row in rows]
    models = {"the demo's, 256": demo}
    models |= {str(width): with_model(demo, small_model(demo, width, texts, args.epochs)) for width in args.widths}
    rows = []
    print(f"{'width':16} {'head':8}" + "".join(f"{f'{strength} asked':>12}" for strength in STRENGTHS))
    for name, part in models.items():
        with tempfile.TemporaryDirectory() as folder:
            heads = heads_for(part, args.prompts, Path(folder))
        for kind, head in heads.items():
            kl = {strength: measured_kl(part, head, strength, args.test_prompts) for strength in STRENGTHS}
            rows.append({"model": name, "head": kind, "kl_per_token": kl})
            print(f"{name:16} {kind:8}" + "".join(f"{nats:12.4f}" for nats in kl.values()), flush=True)
    return rows


if __name__ == "__main__":
    main()
