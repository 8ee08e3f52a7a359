"""What hh_pipeline.py trains on preference pairs: a tokenizer, a language model, and reward models of two kinds."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn.functional import logsigmoid
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EuroBertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_recontrol.demo.assets import Demo

TURN = "\n\nAssistant:"
CONTEXT, ROW, ROWS = 512, 256, 8
Pairs = list[dict[str, Any]]


@dataclass(frozen=True)
class Settings:
    vocabulary: int = 2048
    hidden_size: int = 192
    layers: int = 3
    language_model_steps: int = 900  # of ROWS × ROW tokens each
    reward_epochs: int = 3
    reward_tokens: int = 160  # of a dialogue, its last ones, that the transformer learns from; of an answer, words
    prompt_tokens: int = 160
    new_tokens: int = 48
    answers: int = 8  # to each training prompt, for the heads
    test_answers: int = 4  # to each held-out prompt, by each method


TINY = Settings(300, 32, 1, 20, 3, 64, 64, 8, 2, 2)


def fit(name: str, model: Any, loss_of_batch: Callable[[], torch.Tensor], steps: int, rate: float) -> None:
    """AdamW, with a warm-up and then a linear decay to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20, 1 - step / steps))
    every, losses = max(1, steps // 5), []
    for step in range(1, steps + 1):
        with torch.autocast("cpu", torch.bfloat16):  # twice as fast where the processor knows bfloat16
            loss = loss_of_batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % every == 0:
            print(f"{name}: step {step} of {steps}, loss {sum(losses[-every:]) / every:.3f}", flush=True)


def train_language_model(folder: Path, texts: list[str], settings: Settings) -> None:
    """A tokenizer like the demo's, for these texts, and a Llama fitted to them, joined and cut into rows."""
    torch.manual_seed(0)
    tokenizer = Demo().tokenizer.train_new_from_iterator(texts, settings.vocabulary, show_progress=False)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=settings.hidden_size, intermediate_size=settings.hidden_size * 5 // 2,
        num_hidden_layers=settings.layers, num_attention_heads=settings.hidden_size // 32, tie_word_embeddings=True,
        max_position_embeddings=CONTEXT, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    dialogues = tokenizer([text + tokenizer.eos_token for text in random.Random(0).sample(texts, len(texts))])
    tokens = torch.tensor([token for token_ids in dialogues["input_ids"] for token in token_ids])
    rows = tokens[: len(tokens) // ROW * ROW].view(-1, ROW)

    def loss_of_batch() -> torch.Tensor:
        batch = rows[torch.randint(len(rows), (ROWS,))]
        return model(input_ids=batch, labels=batch).loss

    fit("language model", model, loss_of_batch, settings.language_model_steps, 3e-3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def word_model(texts: list[str]) -> tuple[Any, Any]:
    """The mean over the words and marks behind the last "Assistant:", and their tokenizer."""
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    behind = normalizers.Replace(Regex(rf"(?m)\A.*{TURN}"), "")  # (?m): in Oniguruma the dot is then any character
    words.normalizer = normalizers.Sequence([behind, normalizers.Lowercase()])
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+(?:'\w+)?|[!?.,]"), "removed", invert=True)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    trainer = trainers.WordLevelTrainer(min_frequency=3, special_tokens=list(special.values()), show_progress=False)
    words.train_from_iterator(texts, trainer)
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, model_input_names=["input_ids", "attention_mask"], **special
    )
    config = EuroBertConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=0, num_attention_heads=1,
        num_labels=1, pad_token_id=0, mask_token_id=1, bos_token_id=2, eos_token_id=None,
    )  # fmt: skip
    return AutoModelForSequenceClassification.from_config(config), tokenizer


def transformer(language_model: Path) -> tuple[Any, Any]:
    """The language model with a score, 0 at first, in place of its LM head, and its tokenizer."""
    base = AutoModelForCausalLM.from_pretrained(language_model)
    config = LlamaConfig.from_pretrained(language_model, num_labels=1, use_cache=False)
    model = AutoModelForSequenceClassification.from_config(config)
    model.model.load_state_dict(base.model.state_dict())
    torch.nn.init.zeros_(model.score.weight)
    return model, AutoTokenizer.from_pretrained(language_model, padding_side="right", truncation_side="left")


def margins(model: Any, tokenizer: Any, pairs: Pairs) -> torch.Tensor:
    """Score of the chosen dialogue less that of the rejected one, float (pairs,)."""
    texts = [pair[side] for side in ("chosen", "rejected") for pair in pairs]
    chosen, rejected = (
        model(**tokenizer(texts, padding=True, truncation=True, return_tensors="pt")).logits[:, 0].chunk(2)
    )
    return chosen - rejected


def train_reward_model(folder: Path, kind: str, pairs: Pairs, settings: Settings) -> None:
    """By Bradley and Terry (1952): the loss is −log σ(margin).

    The rate and epochs of the words model were chosen by cross-validation on pairs of Anthropic's harmless-base.
    """
    torch.manual_seed(0)
    if kind == "words":
        (model, tokenizer), rate = word_model([pair[side] for pair in pairs for side in ("chosen", "rejected")]), 3e-3
    else:
        (model, tokenizer), rate = transformer(folder.parent / "language_model"), 3e-4
    tokenizer.model_max_length = settings.reward_tokens
    generator, size = random.Random(0), min(32, len(pairs))

    def loss_of_batch() -> torch.Tensor:
        return -logsigmoid(margins(model, tokenizer, generator.sample(pairs, size))).mean()

    fit(kind, model, loss_of_batch, settings.reward_epochs * len(pairs) // size, rate)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def margins_of(folder: Path, pairs: Pairs) -> torch.Tensor:
    """By the reward model in the folder, float (pairs,)."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return torch.cat([margins(model, tokenizer, pairs[i : i + 64]) for i in range(0, len(pairs), 64)])
