"""The demo's texts: how they are read, tidied and split. Used by the other scripts of this folder.

The folder that the user gives holds two JSON-lines files, each row {"text": …, "label": 0 or 1}:

- `sentence_polarity.jsonl.gz`: sentences of film reviews (Sentence Polarity Dataset 1.0, Pang and Lee 2005, CC BY 4.0);
- `movie_reviews.jsonl.gz`: whole film reviews (Sentiment Polarity Dataset 2.0, Pang and Lee 2004, CC BY 4.0).
"""

import gzip
import hashlib
import json
import re
from pathlib import Path

PROMPT_WORDS = 6
HELD_OUT_SHARE = 0.15


def tidy(text: str) -> str:
    """Undo the tokenisation of the data sets: `a " fine " film , too .` becomes `a "fine" film, too.`"""
    text = text.replace("\\/", "/").replace("\\*", "*").replace("``", '"').replace("''", '"')
    text = re.sub(r"\.(?: \.)+", "...", text)
    text = re.sub(r'" (.*?) "', r'"\1"', text)
    text = re.sub(r" (?=[.,!?;:)\]%]|'s\b|n't\b|'ll\b|'re\b|'ve\b|'d\b|'m\b)", "", text)
    text = re.sub(r"(?<=[(\[$#]) ", "", text)
    return re.sub(r"\s+", " ", text).strip()


def read(folder: Path, name: str) -> list[tuple[str, int]]:
    """(text, label) of each row, tidied, without repeats."""
    with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return list({text: (text, int(row["label"])) for row in rows if (text := tidy(row["text"]))}.values())


def held_out(text: str) -> bool:
    """Whether a sentence is kept from all training: by a hash of its text, so every script makes the same split."""
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return digest / 2**64 < HELD_OUT_SHARE


def sentences(folder: Path) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """The sentences to train on, and those held out."""
    rows = read(folder, "sentence_polarity")
    return [row for row in rows if not held_out(row[0])], [row for row in rows if held_out(row[0])]


def reviews(folder: Path) -> list[tuple[list[str], int]]:
    """Each whole review as a list of its sentences, with its label. Sentences that are held out are left out."""
    rows = [(re.split(r"(?<=[.!?]) (?=\S)", text), label) for text, label in read(folder, "movie_reviews")]
    return [([part for part in parts if not held_out(part)], label) for parts, label in rows]


def prompt(sentence: str) -> str | None:
    """The first six whole words of a sentence, None where fewer than four words would be left to write."""
    words = sentence.split(" ")
    return " ".join(words[:PROMPT_WORDS]) if len(words) >= PROMPT_WORDS + 4 else None
