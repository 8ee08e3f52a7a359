"""hf-recontrol rollouts: a model's answers to a dataset's prompts, scored, with their hidden states, in a folder."""

import json
import tempfile
import time
from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_inputs import ends_at_sigterm, is_first_process, language_model, own_device, processes, reward_functions
from .control import Controller
from .head import Head
from .rollouts import collect_rollouts

TIMED_PROMPTS = 8


class Dtype(StrEnum):
    """What --dtype takes."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Engine(StrEnum):
    """What --engine takes."""

    transformers = "transformers"
    vllm = "vllm"


class Features(StrEnum):
    """What --features-from takes."""

    generation = "generation"
    dataset = "dataset"


def rollouts(
    model: Annotated[str, typer.Option(help="A language model: an id on the Hub or a folder.")],
    dataset: Annotated[str, typer.Option(help="The prompts: an id on the Hub, a folder, or a JSONL or Parquet file.")],
    output_dir: Annotated[Path, typer.Option(help="Where the rollouts go; begun before, it is gone on with.")],
    reward: Annotated[
        list[str] | None,
        typer.Option(
            help="A sequence classifier with one label (an id on the Hub or a folder), or file.py:function, which is "
            "called as TRL's are. Repeat it for a weighted sum. Leave it out where the dataset has answers with a "
            "column 'reward'."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Of the dataset.")] = "train",
    name: Annotated[str | None, typer.Option(help="The name of the dataset's configuration on the Hub.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="How prompts are found in the dataset, where its columns do not say.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many prompts, at most.")] = None,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Longer prompts are left out.")] = None,
    features_from: Annotated[
        Features,
        typer.Option(help="Whose answers: the model generates them, or reads those that the dataset has."),
    ] = Features.generation,
    sampling: Annotated[
        str | None,
        typer.Option(
            help="With a dataset's answers: 'own softmax' vouches that this very model drew them at temperature 1, "
            "which control heads need."
        ),
    ] = None,
    num_return_sequences: Annotated[int, typer.Option(min=1, help="Answers to each prompt.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where an answer is cut.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy decoding.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus, 0 to 1; 1 is off.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="The k likeliest tokens; 0 is off.")] = 0,
    stop_strings: Annotated[
        list[str] | None, typer.Option(help="A text that ends an answer. Repeat it for more.")
    ] = None,
    drop_truncated: Annotated[
        bool, typer.Option("--drop-truncated", help="Keep no states of answers that were cut.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    block_size: Annotated[
        int, typer.Option(min=1, help="Prompts answered together, and lost together when interrupted.")
    ] = 64,
    generation_kwargs: Annotated[
        str | None, typer.Option(metavar="JSON", help="More for generate(): '{\"repetition_penalty\": 1.1}'.")
    ] = None,
    controller: Annotated[
        str | None, typer.Option(help="A head, calibrated, that the answers are written under: an id or a folder.")
    ] = None,
    reward_weights: Annotated[
        list[float] | None, typer.Option(help="Of a reward; repeat it, once for each. All are 1 where not given.")
    ] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds that a function may take for a batch.")] = None,
    retries: Annotated[int, typer.Option(min=0, help="How often a function that fails is tried again.")] = 2,
    engine: Annotated[
        Engine,
        typer.Option(
            help="What writes the answers. vllm (extra: vllm) starts two engines beside the model, one process."
        ),
    ] = Engine.transformers,
    engine_args: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="With vllm, more for vllm.LLM, of both: '{\"tensor_parallel_size\": 2}'."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the model and the stored states; auto is the model's own.")] = (
        Dtype.auto
    ),
    device: Annotated[
        str | None, typer.Option(help="Of the model, with vllm of rewards; the first accelerator where not given.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model on the Hub.")] = None,
    progress: Annotated[bool, typer.Option(help="Show a bar, with the answers per second.")] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say how much there is to do, and time a small batch. Writes nothing.")
    ] = False,
) -> None:
    """Collect a model's answers to prompts, their rewards and hidden states: what a head is trained on.

    Interrupted, call it again as before: what was done is kept. In several processes:
    accelerate launch -m hf_recontrol rollouts …
    """
    if dry_run and processes() > 1:
        raise ValueError("--dry-run measures one process. Leave out the launcher: hf-recontrol rollouts … --dry-run.")
    with ends_at_sigterm():
        from .prompts import load_prompts

        more = _json(generation_kwargs, "--generation-kwargs", '{"min_new_tokens": 4}')
        engines = _json(engine_args, "--engine-args", '{"tensor_parallel_size": 2}')
        _check_engine(engine, engines)
        prompts = load_prompts(dataset, split=split, name=name, recipe=recipe, limit=limit)
        device = device or own_device()
        place = "cpu" if engine is Engine.vllm else device  # there the accelerator is the engines' and the rewards'
        lm, tokenizer = language_model(model, dtype=dtype, device=place, revision=revision)
        rewards = None
        if reward:
            rewards = reward_functions(reward, reward_weights, device=device, timeout=timeout, retries=retries)
        settings: dict[str, Any] = {
            "num_return_sequences": num_return_sequences,
            "block_size": block_size,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "stop_strings": stop_strings or None,
            "drop_truncated": drop_truncated,
            "seed": seed,
            "controller": _controller(controller),
            "engine": _engine(engine, lm, engines),
            "generation_kwargs": more,
            "features_from": features_from.value,
            "sampling": sampling,
        }
        if max_prompt_tokens is not None:
            settings["max_prompt_tokens"] = max_prompt_tokens
        if dry_run:
            _say_what_it_takes(lm, tokenizer, prompts, rewards, settings, output_dir)
            return
        _collect(lm, tokenizer, prompts, rewards, settings, output_dir, progress)


def _json(text: str | None, option: str, example: str) -> Any:
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise ValueError(f"{option} is {text!r}, which is no JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{option} is {text!r}; it must be a JSON object, such as {example}.")
    return found


def _check_engine(engine: Engine, arguments: dict[str, Any]) -> None:
    if engine is Engine.vllm and processes() > 1:
        raise ValueError(
            "--engine vllm is one process, whose engines start others. Leave out the launcher; for several "
            "accelerators pass --engine-args '{\"tensor_parallel_size\": 2}'."
        )
    if engine is not Engine.vllm and arguments:
        raise ValueError("--engine-args are of vLLM. Pass --engine vllm too, or leave them out.")


def _controller(head: str | None) -> Any:
    return None if head is None else Controller(Head.from_pretrained(head))


def _engine(engine: Engine, model: Any, arguments: dict[str, Any]) -> Any:
    if engine is Engine.transformers:
        return None
    from .serving.vllm_rollouts import VllmAnswers

    return VllmAnswers(model, engine_args=arguments)


def _collect(
    model: Any, tokenizer: Any, prompts: Any, rewards: Any, settings: dict[str, Any], folder: Path, progress: bool
) -> None:
    made = collect_rollouts(model, tokenizer, prompts, rewards, folder, progress=progress, **settings)
    if is_first_process():
        ends: Counter[str] = Counter()
        failed = 0
        for row in made.rows():
            ends[row["finish_reason"]] += 1
            failed += bool(row["errors"])
        typer.echo(
            f"{ends.total():,} answers in {folder}: {', '.join(f'{n:,} {end}' for end, n in ends.most_common())}"
        )
        mean = f", mean reward {float(made.rewards.mean()):.4g}" if len(made) else ""
        typer.echo(f"{len(made):,} of them have states and a reward{mean}.")
        if failed:
            typer.echo(f'A reward function failed on {failed:,}: see "errors" in the folder\'s tables.')


def _say_what_it_takes(
    model: Any, tokenizer: Any, prompts: Any, rewards: Any, settings: dict[str, Any], folder: Path
) -> None:
    """The size of it all, and its time from one batch, which is collected into a temporary folder."""
    timed = min(TIMED_PROMPTS, settings["block_size"], len(prompts))
    answers = len(prompts) * settings["num_return_sequences"]
    cut = settings["max_new_tokens"]
    bytes_per_token = model.config.get_text_config().hidden_size * model.dtype.itemsize + 8  # and the token's id
    rows = [
        ("prompts", f"{len(prompts):,}, in {-(-len(prompts) // settings['block_size']):,} blocks"),
        ("answers", f"{answers:,}"),
    ]
    if settings["features_from"] == Features.generation:
        rows.append(("tokens, at most", f"{answers * cut:,}"))
        rows.append(("disk, at most", f"{size(answers * cut * bytes_per_token)} in {folder}"))
    seconds, tokens, measured = _time_a_batch(model, tokenizer, _first(prompts, timed), rewards, settings)
    rows += [
        (
            "measured",
            f"one batch of {timed} prompts: {measured:,} answers, {tokens:,} tokens, rewards and storing in "
            f"{seconds:.2f} s on {model.device}",
        ),
        ("at that length", f"{size(answers * tokens / measured * bytes_per_token)}"),
        ("at that speed", f"{duration(seconds * answers / measured)}; batches of a whole block are often faster"),
    ]
    for name, text in rows:
        typer.echo(f"{name:<16}{text}")
    typer.echo(f"Nothing was written to {folder}.")


def _time_a_batch(
    model: Any, tokenizer: Any, prompts: Any, rewards: Any, settings: dict[str, Any]
) -> tuple[float, int, int]:
    """Seconds, tokens and answers of one block."""
    with tempfile.TemporaryDirectory() as scratch:
        short = {"max_new_tokens": 1} if settings["features_from"] == Features.generation else {}
        first = settings | short  # what is only done once must not be counted
        collect_rollouts(model, tokenizer, _first(prompts, 1), rewards, Path(scratch, "1"), progress=False, **first)
        start = time.perf_counter()
        made = collect_rollouts(model, tokenizer, prompts, rewards, Path(scratch, "2"), progress=False, **settings)
        seconds = time.perf_counter() - start
        lengths = [row["length"] for row in made.rows()]
    return seconds, sum(lengths), len(lengths)


def _first(prompts: Any, count: int) -> Any:
    return prompts.select(range(count)) if hasattr(prompts, "select") else prompts[:count]


def size(count: float) -> str:
    """In bytes, KiB, …"""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def duration(seconds: float) -> str:
    """In the unit that one would say."""
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
