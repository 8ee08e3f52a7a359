"""What the command line is given in tests: folders of a tiny language model and a reward model, files of the rest."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from tiny import tiny_model, tiny_tokenizer
from transformers import LlamaForSequenceClassification

REWARD = """
import time

def two_words(completions, **kwargs):
    return [float(sum(word in ("w7", "w9") for word in text.split())) for text in completions]

def slow(completions, **kwargs):
    time.sleep(0.3)
    return two_words(completions)

def broken(completions, **kwargs):
    raise ConnectionError("503")

NUMBER = 3
"""


def save_all(folder: Path, prompts: int = 40) -> SimpleNamespace:
    """model, judge, rewards (a file), and prompts (JSONL), as strings."""
    model = tiny_model()
    model.save_pretrained(folder / "model")
    torch.manual_seed(0)
    model.config.num_labels = 1
    LlamaForSequenceClassification(model.config).save_pretrained(folder / "judge")
    for name in ("model", "judge"):
        tiny_tokenizer().save_pretrained(folder / name)
    (folder / "rewards.py").write_text(REWARD, encoding="utf-8")
    lines = [json.dumps({"prompt": f"w{3 + i} w{4 + i}", "answer": i}) for i in range(prompts)]
    (folder / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return SimpleNamespace(
        model=str(folder / "model"),
        judge=str(folder / "judge"),
        rewards=str(folder / "rewards.py"),
        prompts=str(folder / "prompts.jsonl"),
    )
