"""Train the demo's two sentiment classifiers: the reward, and a judge that has seen neither its texts nor its labels.

    python examples/demo/classifiers.py FOLDER_OF_TEXTS --output src/hf_recontrol/demo

Each is a stock EuroBERT without layers, so a text's logit is the mean over its words of a small function of each
word's vector. The vectors are naive Bayes: a word's log-count ratio between positive and negative texts. They were
not trained further, since gradient descent from there (or from random vectors) lowered the cross-validated accuracy.
The function is trained with BCE-with-logits, on a fifth of the texts whose words were not counted, so that the
logits are not overconfident; then the words of all texts are counted. No randomness; half a minute on one core.
"""

import argparse
from pathlib import Path

import torch
from texts import reviews, sentences
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EuroBertConfig,
    EuroBertForSequenceClassification,
    PreTrainedTokenizerFast,
)

CARD = Path(__file__).with_name("classifiers_card.md")
Groups = list[tuple[list[str], int]]


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Whole words, ! and ?; all else is dropped. Each text begins with [CLS], so that an empty one has a mean too."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[!?]"), "removed", invert=True)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    trainer = trainers.WordLevelTrainer(vocab_size=vocabulary, special_tokens=list(special.values()))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **special)


def runs(groups: Groups, size: int) -> tuple[list[str], list[int]]:
    """Texts of `size` consecutive sentences, and their labels."""
    pieces = [(" ".join(parts[i : i + size]), label) for parts, label in groups for i in range(0, len(parts), size)]
    return [text for text, _ in pieces], [label for _, label in pieces]


def word_vectors(tokenizer: PreTrainedTokenizerFast, groups: Groups, size: int, smoothing: float) -> torch.Tensor:
    """(0.3 r, y) of each word, float (vocabulary, 2), r = log p(word | positive) / p(word | negative).

    p counts the texts that have the word. y puts the vector on the circle of radius √2, where EuroBERT's norm
    leaves it as it is.
    """
    texts, labels = runs(groups, size)
    counts = torch.full((2, len(tokenizer)), smoothing)
    for ids, label in zip(tokenizer(texts)["input_ids"], labels, strict=True):
        counts[label, list(set(ids))] += 1
    negative, positive = (counts / counts.sum(1, keepdim=True)).log()
    ratio = positive - negative
    ratio[:3] = 0  # the special tokens say nothing
    x = (0.3 * ratio).clamp(-1.4, 1.4)
    return torch.stack([x, (2 - x.square()).sqrt()], dim=1)


def train(folder: Path, groups: Groups, vocabulary: int, smoothing: float, size: int) -> None:
    """Save a classifier: words counted in runs of `size` sentences, the head trained on runs of two."""
    tokenizer = train_tokenizer([part for parts, _ in groups for part in parts], vocabulary)
    config = EuroBertConfig(
        vocab_size=len(tokenizer), hidden_size=2, intermediate_size=2, num_hidden_layers=0, num_attention_heads=1,
        num_labels=1, id2label={0: "positive"}, problem_type="multi_label_classification", use_cache=False,
        pad_token_id=0, mask_token_id=1, bos_token_id=2, eos_token_id=None,
    )  # fmt: skip
    model = EuroBertForSequenceClassification(config)
    embeddings, head = model.model.embed_tokens.weight.requires_grad_(False), [model.dense, model.classifier]
    for layer, weight in zip(head, ([[1.0, 0.0], [-1.0, 0.0]], [[10.0, -10.0]]), strict=True):
        torch.nn.init.zeros_(layer.bias)
        layer.weight.data = torch.tensor(weight)  # logit = 10 x at first, for gelu(x) - gelu(-x) = x

    texts, labels = runs(groups[::5], 2)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    embeddings.copy_(word_vectors(tokenizer, [g for i, g in enumerate(groups) if i % 5], size, smoothing))
    parameters = [parameter for layer in head for parameter in layer.parameters()]
    optimizer = torch.optim.LBFGS(parameters, max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(**batch, labels=torch.tensor(labels, dtype=torch.float)[:, None]).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    embeddings.copy_(word_vectors(tokenizer, groups, size, smoothing))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"), pretty=False)  # half the size


@torch.no_grad()
def score(folder: Path, texts: list[str]) -> torch.Tensor:
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--output", type=Path, default=Path("classifiers"))
    args = parser.parse_args()

    seen, held_out = sentences(args.texts)
    train(args.output / "reward", [([text], label) for text, label in seen], 12_000, smoothing=1, size=1)
    train(args.output / "judge", reviews(args.texts), 16_000, smoothing=8, size=20)
    print("done", len(seen), len(held_out))


if __name__ == "__main__":
    main()
