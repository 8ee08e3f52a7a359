"""Train the demo's second judge: a small causal transformer, another family than the reward and the first judge.

    python examples/demo/second_judge.py FOLDER_OF_TEXTS --output second_judge

The first judge is of the reward's kind and learned from other texts; this one is of another kind and learned from the
reward's sentences. The lower two layers of the demo's language model become a stock LlamaForSequenceClassification.
Every token's score is trained, so that the last token's may be read wherever a text ends. Seeded; a few minutes of one
core.

The language model read the training sentences too, without labels; those held out it read not (texts.py leaves them
out), but for two short ones that are parts of sentences of reviews ("the worst film of the year.", "surprisingly
insightful"). Its checkpoint was chosen by its loss on the held-out texts, without labels.
"""

import argparse
import random
from pathlib import Path

import torch
from classifiers import score
from texts import sentences
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import AutoTokenizer, LlamaForSequenceClassification

DEMO = Path(__file__).parents[2] / "src" / "hf_recontrol" / "demo"
LAYERS, EPOCHS, ROW, ROWS, UNSCORED = 2, 4, 128, 32, 6  # UNSCORED: the first tokens of a row, which say too little
Row = tuple[list[int], int]  # token ids, and the label

CARD = """---
license: cc-by-4.0
language: en
library_name: transformers
pipeline_tag: text-classification
---

# Sentiment of film reviews: the second judge of hf_recontrol's demo

`logits[:, 0]` is a text's score, higher for praise; its sigmoid estimates the probability of praise.
It is a transformer, where the demo's reward and first judge are word models.

- **Model**: LlamaForSequenceClassification, {layers} layers, from the lower layers of the demo's language model.
- **Data**: {count} sentences of the Sentence Polarity Dataset 1.0 (Pang and Lee, Seeing Stars, ACL 2005), CC BY 4.0,
  <https://www.cs.cornell.edu/people/pabo/movie-review-data/>: those that the reward learned from.
- **Training**: {epochs} epochs, binary cross-entropy at every token.
- **Accuracy** on held-out sentences: {accuracy:.1%} ± {error:.1%} (a standard error, n = {n}). The correlation of its
  logits there with the reward's is {reward:.2f}, with the judge's {judge:.2f}.
- **Made by** `python examples/demo/second_judge.py FOLDER_OF_TEXTS --output second_judge`
- **Limits**: English film reviews only, at most 256 tokens.
"""


def batches(rows: list[Row], generator: random.Random) -> list[list[Row]]:
    """Rows of about one length together, in random order."""
    generator.shuffle(rows)
    chunks = [sorted(rows[i : i + 32 * ROWS], key=lambda row: len(row[0])) for i in range(0, len(rows), 32 * ROWS)]
    result = [chunk[i : i + ROWS] for chunk in chunks for i in range(0, len(chunk), ROWS)]
    generator.shuffle(result)
    return result


def train(folder: Path, texts: list[tuple[str, int]]) -> None:
    """Save the classifier and its tokenizer."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "language_model", padding_side="right")
    model = LlamaForSequenceClassification.from_pretrained(
        DEMO / "language_model", dtype=torch.float32, num_hidden_layers=LAYERS, num_labels=1, id2label={0: "positive"},
        problem_type="multi_label_classification", use_cache=False,
    ).train()  # fmt: skip
    torch.nn.init.zeros_(model.score.weight)
    head = {"params": model.score.parameters(), "lr": 2e-3}
    optimizer = torch.optim.AdamW([{"params": model.model.parameters(), "lr": 5e-4}, head], betas=(0.9, 0.98))
    ids = tokenizer([text for text, _ in texts], add_special_tokens=False).input_ids
    rows = [([tokenizer.bos_token_id, *row][:ROW], label) for row, (_, label) in zip(ids, texts, strict=True)]
    generator = random.Random(0)
    todo = [batch for _ in range(EPOCHS) for batch in batches(rows, generator)]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 30, (1 - step / len(todo)) / 0.7 + 0.01)
    )
    for step, batch in enumerate(todo):
        inputs = tokenizer.pad({"input_ids": [ids for ids, _ in batch]}, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16):
            logits = model.score(model.model(**inputs).last_hidden_state)[..., 0].float()
        labels = torch.tensor([[float(label)] for _, label in batch]).expand_as(logits)
        scored = inputs["attention_mask"].bool()
        scored[:, :UNSCORED] = False
        loss = binary_cross_entropy_with_logits(logits[scored], labels[scored])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step} of {len(todo)}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--output", type=Path, default=Path("second_judge"))
    args = parser.parse_args()

    seen, held_out = sentences(args.texts)
    train(args.output, seen)
    logits, accuracy = score(args.output, held_out)
    others = {name: score(DEMO / name, held_out)[0] for name in ("reward", "judge")}
    figures = {name: torch.corrcoef(torch.stack([logits, other]))[0, 1].item() for name, other in others.items()}
    figures |= {"accuracy": accuracy, "error": (accuracy * (1 - accuracy) / len(held_out)) ** 0.5}
    counts = {"n": len(held_out), "count": len(seen), "layers": LAYERS, "epochs": EPOCHS}
    (args.output / "README.md").write_text(CARD.format(**figures | counts), encoding="utf-8")
    print({name: round(figure, 4) for name, figure in figures.items()}, counts)


if __name__ == "__main__":
    main()
