"""Train the demo's two sentiment classifiers: the reward, and a judge that learned from other texts than the reward.

    python examples/demo/classifiers.py FOLDER_OF_TEXTS --output src/hf_recontrol/demo

Each is a stock EuroBERT without layers: a text's logit is the mean over its words of a small function of each word's
vector. The vectors are naive Bayes, a word's log-count ratio between positive and negative texts; to train them
further by gradient descent did not raise the cross-validated accuracy, nor did random ones reach it.
The function is trained with BCE-with-logits on a fifth of the texts while only the others' words are counted, so
that its logits are not overconfident; then the words of all are. Nothing is random. About 20 seconds of one core.
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

Groups = list[tuple[list[str], int]]  # the sentences of each document, and its label

CARD = """---
license: cc-by-4.0
language: en
library_name: transformers
pipeline_tag: text-classification
---

# Sentiment of film reviews: the {name} of hf_recontrol's demo

`logits[:, 0]` is a text's score, higher for praise; its sigmoid estimates the probability of praise.
{role}

- **Model**: EuroBERT with no layers and hidden size 2: the mean over words of a function of each word's vector.
- **Data**: {count} {data},
  CC BY 4.0, <https://www.cs.cornell.edu/people/pabo/movie-review-data/>.
- **Training**: a word's vector holds its log-count ratio between positive and negative texts (naive Bayes, {vocabulary}
  words, {smoothing} added to each count). The head is trained with binary cross-entropy on a fifth of the data, at
  vectors counted without it.
  {choice}
- **Accuracy** on held-out sentences of the Sentence Polarity Dataset: {accuracy:.1%} ± {error:.1%} (a standard error,
  n = {n}). The correlation of its logits with the {other}'s there is {correlation:.2f}.
- **Made by** `python examples/demo/classifiers.py FOLDER_OF_TEXTS --output src/hf_recontrol/demo`
- **Limits**: English film reviews only. It knows no word order ("not good" is "not" and "good"), and a word that it has
  not seen is neutral. Words of praise without sense score high. The reward and the judge learned from other texts but
  are of one kind: what fools the one may fool the other.
"""
REWARD = {
    "name": "reward",
    "other": "judge",
    "role": "The demo steers a language model towards it.",
    "data": "sentences of the Sentence Polarity Dataset 1.0 (Pang and Lee, Seeing Stars, ACL 2005)",
    "choice": "Vocabulary and smoothing were chosen by four-fold cross-validation on these sentences.",
}
JUDGE = {
    "name": "judge",
    "other": "reward",
    "role": "The demo asks it whether text with more reward is better to a second reader too.",
    "data": "whole reviews of the Polarity Dataset 2.0 (Pang and Lee, A Sentimental Education, ACL 2004)",
    "choice": "Words are counted in pieces of 20 sentences. This, the vocabulary and the smoothing were chosen by the\n"
    "  accuracy on the sentences that the reward is trained on ({seen_accuracy:.1%}, n = {seen_n}).",
}


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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=inputs, model_max_length=8192, **special
    )


def pieces(groups: Groups, size: int) -> tuple[list[str], torch.Tensor]:
    """Texts of `size` sentences in a row, and their labels."""
    rows = [(" ".join(parts[i : i + size]), label) for parts, label in groups for i in range(0, len(parts), size)]
    return [text for text, _ in rows], torch.tensor([label for _, label in rows])


def word_vectors(tokenizer: PreTrainedTokenizerFast, groups: Groups, size: int, smoothing: float) -> torch.Tensor:
    """(0.3 r, y) for each word, r = log p(word | positive) − log p(word | negative), p counted over texts.

    y brings the vector's length to √2, so that EuroBERT's norm leaves it as it is. Returns float (vocabulary, 2).
    """
    texts, labels = pieces(groups, size)
    counts = torch.full((2, len(tokenizer)), float(smoothing))
    for token_ids, label in zip(tokenizer(texts)["input_ids"], labels.tolist(), strict=True):
        counts[label, list(set(token_ids))] += 1
    negative, positive = (counts / counts.sum(dim=1, keepdim=True)).log()
    x = (0.3 * (positive - negative)).clamp(-1.4, 1.4)
    x[:3] = 0  # the special tokens say nothing
    return torch.stack([x, (2 - x.square()).sqrt()], dim=1)


def train(folder: Path, groups: Groups, *, vocabulary: int, smoothing: float, size: int) -> None:
    """Save a classifier whose words are counted in pieces of `size` sentences, and its tokenizer."""
    tokenizer = train_tokenizer([part for parts, _ in groups for part in parts], vocabulary)
    config = EuroBertConfig(
        vocab_size=len(tokenizer), hidden_size=2, intermediate_size=2, num_hidden_layers=0, num_attention_heads=1,
        num_labels=1, id2label={0: "positive"}, problem_type="multi_label_classification", use_cache=False,
        pad_token_id=0, mask_token_id=1, bos_token_id=2, eos_token_id=None,
    )  # fmt: skip
    model = EuroBertForSequenceClassification(config)
    vectors = model.model.embed_tokens.weight.requires_grad_(False)
    vectors.copy_(word_vectors(tokenizer, [group for i, group in enumerate(groups) if i % 5], size, smoothing))
    model.dense.weight.data = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # with gelu(x) − gelu(−x) = x,
    model.classifier.weight.data = torch.tensor([[10.0, -10.0]])  # the logit starts as 10 x

    texts, labels = pieces(groups[::5], 2)  # about as long as the texts that the demo scores
    batch = tokenizer(texts, padding=True, return_tensors="pt") | {"labels": labels[:, None].float()}
    parameters = [*model.dense.parameters(), *model.classifier.parameters()]
    optimizer = torch.optim.LBFGS(parameters, max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    vectors.copy_(word_vectors(tokenizer, groups, size, smoothing))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"), pretty=False)  # half the size


@torch.no_grad()
def score(folder: Path, rows: list[tuple[str, int]]) -> tuple[torch.Tensor, float]:
    """The texts' logits, float (texts,), and the share of them whose sign is the label's."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts, labels = zip(*rows, strict=True)
    logits = model(**tokenizer(list(texts), padding=True, return_tensors="pt")).logits[:, 0]
    return logits, ((logits > 0) == torch.tensor(labels)).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--output", type=Path, default=Path("classifiers"))
    args = parser.parse_args()

    seen, held_out = sentences(args.texts)
    data = {"reward": [([text], label) for text, label in seen], "judge": reviews(args.texts)}
    options = {
        "reward": {"vocabulary": 12_000, "smoothing": 1, "size": 1},
        "judge": {"vocabulary": 16_000, "smoothing": 8, "size": 20},
    }
    for name, groups in data.items():
        train(args.output / name, groups, **options[name])
    results = {name: score(args.output / name, held_out) for name in data}
    correlation = torch.corrcoef(torch.stack([logits for logits, _ in results.values()]))[0, 1].item()
    for facts in (REWARD, JUDGE):
        name, accuracy = facts["name"], results[facts["name"]][1]
        choice = facts["choice"].format(seen_accuracy=score(args.output / name, seen)[1], seen_n=len(seen))
        error = (accuracy * (1 - accuracy) / len(held_out)) ** 0.5
        figures = {"accuracy": accuracy, "error": error, "n": len(held_out), "correlation": correlation}
        card = CARD.format(**facts | options[name] | figures | {"choice": choice, "count": len(data[name])})
        (args.output / name / "README.md").write_text(card, encoding="utf-8")
        print(f"{name}: accuracy {accuracy:.4f}, n = {len(held_out)}; the logits' correlation {correlation:.3f}")


if __name__ == "__main__":
    main()
