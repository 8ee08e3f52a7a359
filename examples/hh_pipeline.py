"""From preference pairs to a table: language model, reward models, rollouts, heads, and what each gains.

    python examples/hh_pipeline.py PAIRS.jsonl.gz --output hh

PAIRS has rows {"chosen", "rejected"}, whole dialogues as in Anthropic/hh-rlhf. Their texts may offend; none is printed,
but OUTPUT holds answers like them. All is made from the pairs, in some twenty minutes of one core, so the language model
babbles: this checks the pipeline, and says nothing of large models.

Two reward models of different kinds learn from the training pairs: the mean over an answer's words, and the language
model itself. The better one on validation pairs is the reward, the other one the judge, which no head is trained on.
A reward that is right on less than 60 % of the held-out pairs is no reward: then there is no table.

What is in OUTPUT is not made again, so take another one for other pairs or settings.
"""

import argparse
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EuroBertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_recontrol import (
    ControlConfig,
    ControlHead,
    ControlHeadConfig,
    Controller,
    Head,
    RecontrolTrainer,
    RecontrolTrainingArguments,
    RolloutDataset,
    ValueHead,
    ValueHeadConfig,
    calibrate,
    collect_rollouts,
    enable_recontrol,
    fit_constant_control,
    fit_linear_head,
    load_prompts,
    sample_states,
)
from hf_recontrol.demo.assets import Demo
from hf_recontrol.demo.training import random_direction
from hf_recontrol.evaluation import evaluate_answers, paired_bootstrap
from hf_recontrol.rewards import Rewards

ENOUGH = 0.60  # accuracy on held-out pairs, for a reward to be worth steering to
CONTROL = ControlConfig(strength=0.1)
TURN = "\n\nAssistant:"
CONTEXT, ROW, ROWS = 512, 256, 8
METHODS = ("linear value head", "MLP value head", "constant control", "MLP control", "random direction")
FIGURES = {
    "kl_per_answer": "nats an answer",
    "perplexity": "perplexity",
    "distinct_3": "distinct-3",
    "length": "tokens",
}
Pairs = list[dict[str, Any]]
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    vocabulary: int = 2048
    hidden_size: int = 192
    layers: int = 3
    language_model_steps: int = 1200  # of ROWS × ROW tokens each
    reward_epochs: int = 3
    reward_tokens: int = 160  # the last ones of a dialogue, that the language model judges it by
    prompt_tokens: int = 160
    new_tokens: int = 48
    answers: int = 8  # to each training prompt, for the heads
    test_answers: int = 4  # to each held-out prompt, by each method


TINY = Settings(300, 32, 1, 40, 3, 64, 64, 8, 2, 2)


def split(rows: Any) -> dict[str, Any]:
    """Training, validation and held-out pairs, by the first turn: dialogues that begin alike are on one side."""
    first = [prompt.partition(TURN)[0] for prompt in rows["prompt"][:]]
    groups = sorted(set(first))
    random.Random(0).shuffle(groups)
    place = {group: i / len(groups) for i, group in enumerate(groups)}
    bounds = {"held_out": (0, 0.22), "validation": (0.22, 0.34), "train": (0.34, 1)}
    return {
        side: rows.select([i for i, group in enumerate(first) if low <= place[group] < high])
        for side, (low, high) in bounds.items()
    }


def made(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, made if it is not there; an interrupted one is begun again."""
    if not folder.is_dir():
        start = time.perf_counter()
        make(folder.with_name(folder.name + ".unfinished"))
        folder.with_name(folder.name + ".unfinished").rename(folder)
        print(f"{folder.name}: made in {time.perf_counter() - start:.0f} s", flush=True)
    return folder


def fit(name: str, model: Any, loss_of_batch: Callable[[], torch.Tensor], steps: int, rate: float) -> None:
    """AdamW, with a warm-up and then a linear decay to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20, 1 - step / steps))
    every, losses = max(1, steps // 5), []
    for step in range(1, steps + 1):
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
    dialogues = tokenizer([text + tokenizer.eos_token for text in texts])["input_ids"]

    generator, tokens = random.Random(0), []

    def loss_of_batch() -> torch.Tensor:
        while len(tokens) < ROW * ROWS:
            tokens.extend(generator.choice(dialogues))
        rows = torch.tensor(tokens[: ROW * ROWS]).view(ROWS, ROW)
        del tokens[: ROW * ROWS]
        return model(input_ids=rows, labels=rows).loss

    fit(folder.name, model, loss_of_batch, settings.language_model_steps, 3e-3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def word_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """The words and marks behind the last "Assistant:", in lower case; those of fewer than three texts are one."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    behind = normalizers.Replace(Regex(rf"(?m)\A.*{TURN}"), "")  # (?m): in Oniguruma the dot is then any character
    tokenizer.normalizer = normalizers.Sequence([behind, normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+(?:'\w+)?|[!?.,]"), "removed", invert=True)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    trainer = trainers.WordLevelTrainer(min_frequency=3, special_tokens=list(special.values()), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"], **special
    )


def margins(model: Any, tokenizer: Any, pairs: Pairs, longest: int) -> torch.Tensor:
    """Score of the chosen dialogue less that of the rejected one, float (pairs,)."""
    texts = [pair[side] for side in ("chosen", "rejected") for pair in pairs]
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    chosen, rejected = model(**inputs).logits[:, 0].chunk(2)
    return chosen - rejected


def train_reward_model(folder: Path, pairs: Pairs, language_model: Path, settings: Settings) -> None:
    """By Bradley and Terry (1952): the loss is −log σ(margin). Of the kind that the folder's name says.

    The settings were chosen by four-fold cross-validation on the training pairs of Anthropic's harmless-base.
    """
    torch.manual_seed(0)
    if folder.name.startswith("words"):
        tokenizer: Any = word_tokenizer([pair[side] for pair in pairs for side in ("chosen", "rejected")])
        config: Any = EuroBertConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=0, num_labels=1,
            num_attention_heads=1, pad_token_id=0, mask_token_id=1, bos_token_id=2, eos_token_id=None,
        )  # fmt: skip
        model, rate, size, longest = AutoModelForSequenceClassification.from_config(config), 3e-3, 32, CONTEXT
    else:
        base = AutoModelForCausalLM.from_pretrained(language_model)
        tokenizer = AutoTokenizer.from_pretrained(language_model, padding_side="right", truncation_side="left")
        config = base.config.__class__.from_pretrained(language_model, num_labels=1, use_cache=False)
        model, rate, size = AutoModelForSequenceClassification.from_config(config), 3e-4, 16
        model.model.load_state_dict(base.model.state_dict())
        torch.nn.init.zeros_(model.score.weight)
        longest = settings.reward_tokens
    generator, size = random.Random(0), min(size, len(pairs))

    def loss_of_batch() -> torch.Tensor:
        return -torch.nn.functional.logsigmoid(margins(model, tokenizer, generator.sample(pairs, size), longest)).mean()

    fit(folder.name, model, loss_of_batch, settings.reward_epochs * len(pairs) // size, rate)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def right(folder: Path, pairs: Pairs, longest: int) -> float:
    """How many pairs the reward model tells apart; a tie is half of one."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    parts = [margins(model, tokenizer, pairs[i : i + 64], longest) for i in range(0, len(pairs), 64)]
    return count(torch.cat(parts))


def count(margin: torch.Tensor) -> float:
    return float((margin > 0).sum() + (margin == 0).sum() / 2)


def wilson(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    share, spread = successes / n, z * z / n
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return (share + spread / 2 - half) / (1 + spread), (share + spread / 2 + half) / (1 + spread)


def accuracy(name: str, successes: float, n: int) -> float:
    """Prints it, with its interval."""
    low, high = wilson(successes, n)
    print(f"{name}: right on {successes / n:.1%} of {n} pairs, 95 % interval {low:.1%} to {high:.1%}", flush=True)
    return successes / n


def choose_reward(output: Path, sides: dict[str, Any], settings: Settings) -> tuple[float, list[Path]]:
    """The accuracy of the reward on held-out pairs, and the folders of reward and judge."""
    language_model, longest = output / "language_model", settings.reward_tokens
    train, validation, held_out = (list(sides[name]) for name in ("train", "validation", "held_out"))
    folders = [
        made(output / kind, lambda folder: train_reward_model(folder, train, language_model, settings))
        for kind in ("words", "transformer")
    ]
    by_validation = {folder: right(folder, validation, longest) for folder in folders}
    for folder, successes in by_validation.items():
        accuracy(f"{folder.name}, validation", successes, len(validation))
    folders.sort(key=lambda folder: -by_validation[folder])
    lengths = torch.tensor([len(pair["rejected"]) - len(pair["chosen"]) for pair in held_out])
    accuracy("the shorter answer, held out", count(lengths), len(held_out))
    shares = [
        accuracy(f"{role} ({folder.name}), held out", right(folder, held_out, longest), len(held_out))
        for role, folder in zip(("reward", "judge"), folders, strict=True)
    ]
    return shares[0], folders


def train_heads(folder: Path, model: Any, rollouts: RolloutDataset) -> None:
    """Heads of every kind and a placebo, calibrated."""
    train, held_out = rollouts.split(0.1)
    torch.manual_seed(0)
    heads: dict[str, Any] = {
        "linear value head": fit_linear_head(train),
        "MLP value head": ValueHead(ValueHeadConfig(hidden_size=train.hidden_size)),
        "constant control": fit_constant_control(train, model),
        "MLP control": ControlHead(ControlHeadConfig(hidden_size=train.hidden_size)),
        "random direction": random_direction(train.hidden_size),
    }
    for name, recipe in (("MLP value head", None), ("MLP control", "control")):
        args = RecontrolTrainingArguments(
            str(folder), recipe=recipe, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True
        )
        trainer = RecontrolTrainer(heads[name], args, train_dataset=train, eval_dataset=held_out, base_model=model)
        trainer.train()
        figures = {key: round(value, 3) for key, value in trainer.evaluate().items()}
        print(f"{name}, on {len(held_out)} held-out answers: {figures}", flush=True)
    for name, head in heads.items():
        if not head.config.control.calibration:
            calibrate(head, model, sample_states(held_out))
        head.save_pretrained(folder / name)


def table(output: Path, prompts: Any, collect: Callable[..., RolloutDataset], model: Any, tokenizer: Any) -> list[Row]:
    """One row for each method: gains over the base model in standard deviations of its answers, and what they cost."""
    rows: list[Row] = []
    base: dict[str, torch.Tensor] = {}
    for method in ("base", *METHODS):
        head = None if method == "base" else Head.from_pretrained(output / "heads" / method)
        controller = None if head is None else Controller(head, CONTROL)
        answers = list(collect(prompts, output / "answers" / method, controller=controller).rows())
        prompt_count = len({answer["prompt_id"] for answer in answers})
        scores = {
            name: torch.tensor([answer["rewards"][name] for answer in answers]).view(prompt_count, -1)
            for name in answers[0]["rewards"]
        }
        base = base or scores
        gains = {name: paired_bootstrap(base[name], scores[name], in_baseline_sd=True) for name in scores}
        figures = evaluate_answers(answers, model=model, tokenizer=tokenizer, controller=controller)
        rows.append({"method": method, "gains": gains, **figures})
    return rows


def as_markdown(rows: list[Row]) -> str:
    """Gains with their 95 % intervals, by a bootstrap over prompts. The first scorer is the reward."""
    reward, judge = rows[0]["gains"]
    names = ["method", f"reward ({reward})", f"judge ({judge})", *FIGURES.values()]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        gains = [f"{gain.mean:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}]" for gain in row["gains"].values()]
        lines.append("| " + " | ".join([row["method"], *gains, *(f"{row[name]:.3g}" for name in FIGURES)]) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> list[Row] | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--output", type=Path, default=Path("hh"))
    parser.add_argument("--tiny", action="store_true", help="seconds: for a test")
    args = parser.parse_args(arguments)
    settings, output, start = TINY if args.tiny else Settings(), args.output, time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    sides = split(load_prompts(args.pairs, recipe="hh"))
    texts = [pair[side] for pair in sides["train"] for side in ("chosen", "rejected")]
    folder = made(output / "language_model", lambda folder: train_language_model(folder, texts, settings))
    share, scorers = choose_reward(output, sides, settings)
    if share < ENOUGH:
        print(f"The reward is right on {share:.1%} of the held-out pairs, less than {ENOUGH:.0%}: no table.")
        return None

    model = enable_recontrol(AutoModelForCausalLM.from_pretrained(folder).eval())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rewards = Rewards([str(scorer) for scorer in scorers], [1, 0])

    def collect(prompts: Any, folder: Path, answers: int = settings.test_answers, **control: Any) -> RolloutDataset:
        return collect_rollouts(
            model, tokenizer, prompts, rewards, folder, num_return_sequences=answers, seed=answers,
            max_prompt_tokens=settings.prompt_tokens, max_new_tokens=settings.new_tokens, **control,
        )  # fmt: skip

    rollouts = collect(sides["train"], output / "rollouts", settings.answers)
    made(output / "heads", lambda folder: train_heads(folder, model, rollouts))
    rows = table(output, sides["held_out"], collect, model, tokenizer)
    print(
        as_markdown(rows) + f"\n{rows[0]['n']:.0f} answers by each method. {time.perf_counter() - start:.0f} s in all."
    )
    return rows


if __name__ == "__main__":
    main()
