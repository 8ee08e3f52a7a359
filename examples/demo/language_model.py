"""Train the demo's language model: 4 million parameters, Llama's architecture, on sentences of film reviews.

    python examples/demo/language_model.py FOLDER_OF_TEXTS --output language_model --minutes 55

Two CPU cores do; the learning rate follows the clock, so that a run ends when its minutes are over.
"""

import argparse
import copy
import os
import random
import time
from pathlib import Path
from string import Template

import torch
from texts import reviews, sentences
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROW, ROWS = 128, 32
CARD = Path(__file__).with_name("language_model_card.md")


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose texts begin with <s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def documents(groups: list[list[str]], tokenizer: PreTrainedTokenizerFast, generator: random.Random) -> torch.Tensor:
    """Rows of tokens (rows, ROW + 1): runs of up to four sentences, each run between <s> and </s>, in a new order."""
    runs = [group[i : i + 4] for group in groups for i in range(0, len(group), 4)]
    generator.shuffle(runs)
    encoded = tokenizer([" ".join(run) + "</s>" for run in runs])["input_ids"]
    tokens = torch.tensor([token for ids in encoded for token in ids])
    return tokens[: len(tokens) // (ROW + 1) * (ROW + 1)].view(-1, ROW + 1)


def forever(groups, tokenizer, generator, joined):
    """One row of tokens after the other. Sentences that stand alone are joined anew, four by four, in each epoch."""
    while True:
        if joined:
            generator.shuffle(groups)
        yield from documents([[text for group in groups for text in group]] if joined else groups, tokenizer, generator)


@torch.no_grad()
def nats_per_token(model, rows: torch.Tensor) -> float:
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in rows[:, :ROW].split(64)]
    return sum(losses) / len(rows)


def write_card(folder: Path, parameters: int, tokens: int, nats: float, held_out_tokens: int) -> None:
    """The model's card, with the run's figures in place of its $names."""
    figures = {"parameters": f"{parameters / 1e6:.1f}", "tokens": f"{tokens / 1e6:.0f}", "nats": f"{nats:.2f}"}
    card = Template(CARD.read_text(encoding="utf-8")).substitute(figures, held_out=f"{held_out_tokens:,}")
    (folder / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--output", type=Path, default=Path("language_model"))
    parser.add_argument("--minutes", type=float, default=55)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)  # the default leaves out hyper-threads, which help here
    generator = random.Random(0)

    train, test = sentences(args.texts)
    short = [[text] for text, _ in train]
    long = [parts for parts, _ in reviews(args.texts)]
    tokenizer = train_tokenizer([text for group in short + long for text in group], args.vocabulary)
    held_out = documents([[text for text, _ in test]], tokenizer, random.Random(1))
    streams = forever(short, tokenizer, generator, True), forever(long, tokenizer, generator, False)

    heads = args.hidden_size // 64
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=args.hidden_size, intermediate_size=args.hidden_size * 5 // 2,
        num_hidden_layers=args.layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=256, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
    )
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, momentum=0.95),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.02),
    ]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    loss_of = torch.compile(lambda rows: model(input_ids=rows[:, :ROW], labels=rows[:, :ROW], use_cache=False).loss)

    step, start, best, done = 0, time.time(), float("inf"), 0.0
    while done < 1:
        share = 0.2 if done < 0.6 else 0.2 + 0.3 * (done - 0.6) / 0.4  # sentences come to the fore towards the end
        count = round(share * ROWS)
        rows = torch.stack([next(streams[0]) for _ in range(count)] + [next(streams[1]) for _ in range(ROWS - count)])
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 100, (1 - done) / 0.6 + 0.01)
            optimizer.step()
            optimizer.zero_grad()
        averaged.update_parameters(model)
        step, done = step + 1, (time.time() - start) / 60 / args.minutes
        if step % 500 == 0 or done >= 1:
            nats = nats_per_token(averaged.module, held_out)
            print(f"step {step}  {done:.0%}  loss {loss.item():.3f}  held-out sentences {nats:.3f} nats a token")
            if nats < best:
                best = nats
                copy.deepcopy(averaged.module).to(torch.bfloat16).save_pretrained(args.output)
                tokenizer.save_pretrained(args.output)
    write_card(args.output, model.num_parameters(), step * ROW * ROWS, best, len(held_out) * ROW)


if __name__ == "__main__":
    main()
