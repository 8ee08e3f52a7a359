"""hf-recontrol tune: a head is calibrated, or how hard it steers is chosen on validation prompts."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .calibration import calibrate as calibrate_head
from .calibration import sample_states
from .cli_inputs import function_or_name, language_model, reward_functions
from .cli_rollouts import Dtype
from .coherence import SIMCSE, Coherence
from .control_search import MAX_PERPLEXITY_RATIO, check_coherence, load_optuna, named_objective, search_control
from .generation import enable_recontrol
from .head import Head
from .prompts import load_prompts
from .rollout_dataset import RolloutDataset
from .rollouts import collect_rollouts
from .sampling import Sampler
from .search_ranges import Range, search_ranges
from .search_results import AGAINST, Search, Trial


def tune(
    head: Annotated[str, typer.Argument(help="A value or control head: a folder or an id on the Hub.")],
    model: Annotated[str, typer.Option(help="Its base model: an id on the Hub or a folder.")],
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Find what spends 0.02 to 0.4 nats a token.")] = False,
    rollouts: Annotated[
        Path | None,
        typer.Option(help="With --calibrate: a folder of the model's rollouts, to take states from."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="With --calibrate: or a text file, a prompt a line, for the model to answer."),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="Choose the control by it: reward (the highest within --max-perplexity-ratio), paper (coherence + "
            "diversity + reward), or file.py:function, from a dict of figures to a number."
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="With --objective: the prompts, an id on the Hub, a folder, or a JSONL or Parquet file."),
    ] = None,
    split: Annotated[str, typer.Option(help="Of the dataset; one that nothing is tested on.")] = "train",
    limit: Annotated[int, typer.Option(min=1, help="Prompts to answer in each trial, at most.")] = 100,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            help="With --objective: a sequence classifier with one label (an id on the Hub or a folder), or "
            "file.py:function. Repeat it for a sum."
        ),
    ] = None,
    trials: Annotated[int, typer.Option(min=2, help="Settings to try, the one that does not steer included.")] = 20,
    against: Annotated[
        str, typer.Option(help=f"What the front in the card trades the reward for: {' or '.join(AGAINST)}.")
    ] = "perplexity",
    encoder: Annotated[
        str | None, typer.Option(help=f"Of the coherence, which is then measured; {SIMCSE} where it is needed.")
    ] = None,
    ranges: Annotated[
        list[str] | None,
        typer.Option(
            "--range",
            metavar="NAME=LOW:HIGH",
            help="What to search: strength, step_size, num_steps or scale. Repeat it. Where not given, what the head "
            "is calibrated for, or about what it has.",
        ),
    ] = None,
    max_perplexity_ratio: Annotated[
        float, typer.Option(help="With --objective reward: to the perplexity without control, ≥ 1.")
    ] = MAX_PERPLEXITY_RATIO,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write, at most.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered together.")] = 16,
    dtype: Annotated[Dtype, typer.Option(help="Of the model's weights.")] = Dtype.auto,
    seed: Annotated[int, typer.Option(help="Of the prompts' choice, the settings tried and the sampling.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Where the head is saved; HEAD where not given.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a head on the Hub.")] = None,
) -> None:
    """Calibrate HEAD for its model, or choose how hard it steers by an objective on validation prompts."""
    _check_asked(calibrate, objective, for_search=(dataset, reward, encoder, ranges), sources=(rollouts, prompts))
    if output is None and not Path(head).is_dir():
        raise ValueError(f"{head!r} is not a folder, so the tuned head has no place: pass --output FOLDER.")
    if objective is None:
        _calibrate(head, model, rollouts, prompts, max_new_tokens, Path(output or head), revision)
        return
    if dataset is None or not reward:
        raise ValueError("--objective needs prompts and a reward: pass --dataset DATASET and --reward REWARD.")
    load_optuna()
    chosen = function_or_name(objective, "--objective")
    name, _ = named_objective(chosen, max_perplexity_ratio)
    measured = encoder is not None or name == "paper" or against == "coherence"
    check_coherence(name, against, measured)
    loaded = Head.from_pretrained(head, revision=revision)
    searched = search_ranges(loaded, _ranges(ranges))
    texts = load_prompts(dataset, split=split, limit=limit, seed=seed)["prompt"]
    language, tokenizer = language_model(model, dtype=dtype.value)
    search = search_control(
        loaded,
        Sampler(language, tokenizer, max_new_tokens, batch_size, seed),
        list(texts),
        reward_functions(reward, None, device=language.device),
        objective=chosen,
        against=against,
        trials=trials,
        coherence=Coherence(encoder or SIMCSE, device=language.device) if measured else None,
        ranges=searched,
        max_perplexity_ratio=max_perplexity_ratio,
        seed=seed,
    )
    _show(search)
    search.apply_to(loaded)
    loaded.save_pretrained(output or head)
    typer.echo(f"Saved in {output or head}. Trial {search.best.number} is how it steers unless told otherwise.")


def _check_asked(
    calibrate: bool, objective: str | None, *, for_search: Sequence[object], sources: Sequence[object]
) -> None:
    """Raise ValueError unless one thing is to be done, and what is given is for it."""
    if not calibrate and objective is None:
        raise ValueError("There is nothing to do: pass --calibrate, or --objective NAME to choose the control.")
    if calibrate and objective is not None:
        raise ValueError("--calibrate and --objective are two runs. Calibrate first, then pass --objective alone.")
    if calibrate and any(for_search):
        raise ValueError(
            "--dataset, --reward, --encoder and --range are for --objective. To calibrate, pass --rollouts FOLDER or "
            "--prompts FILE alone."
        )
    if not calibrate and any(sources):
        raise ValueError("--rollouts and --prompts are for --calibrate. With --objective pass --dataset DATASET.")


def _calibrate(
    head: str,
    model: str,
    rollouts: Path | None,
    prompts: Path | None,
    max_new_tokens: int,
    output: Path,
    revision: str | None,
) -> None:
    if (rollouts is None) == (prompts is None):
        raise ValueError("Pass the hidden states' source: one of --rollouts FOLDER and --prompts FILE.")
    loaded = Head.from_pretrained(head, revision=revision)
    dataset: Any = RolloutDataset(rollouts) if rollouts is not None else None
    language, tokenizer = language_model(model, device="cpu")
    enable_recontrol(language)
    if prompts is not None:
        dataset = _answers_to(prompts, language, tokenizer, max_new_tokens)
    states = sample_states(dataset)
    calibrate_head(loaded, language, states)
    loaded.save_pretrained(output)
    control = loaded.config.control
    steps = getattr(control, "num_steps", None)
    typer.echo(f"On {len(states)} states" + (f", at n = {steps}:" if steps else ":"))
    for kl, multiplier in control.calibration:
        typer.echo(f"{kl:8g} nats a token: {control.multiplier.replace('_', ' ')} {multiplier:.4g}")
    typer.echo(f"Saved in {output}. Its strength is {control.strength:g} unless told otherwise.")


def _answers_to(prompts: Path, model: Any, tokenizer: Any, max_new_tokens: int) -> Any:
    """One sampled answer of the model, with its states, to each line of a file."""

    def nothing(completions: list[str], **_: Any) -> list[float]:
        return [0.0] * len(completions)

    texts = [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    with tempfile.TemporaryDirectory() as folder:
        rollouts = collect_rollouts(model, tokenizer, texts, nothing, folder, max_new_tokens=max_new_tokens)
        return [rollouts[i] for i in range(len(rollouts))]


def _ranges(given: Sequence[str] | None) -> Mapping[str, Range] | None:
    """From "step_size=0.1:2", each."""
    ranges: dict[str, Range] = {}
    for text in given or []:
        name, _, pair = text.partition("=")
        try:
            low, high = map(float, pair.split(":"))
        except ValueError:
            raise ValueError(f"--range is {text!r}; it must be such as step_size=0.1:2, the lowest first.") from None
        ranges[name.replace("-", "_")] = (low, high)
    return ranges or None


def _show(search: Search) -> None:
    names = [name for name in search.trials[0].figures if name != "perplexity_ratio"]
    on_front, best = {trial.number for trial in search.front}, search.best.number
    typer.echo("\t".join(["trial", "control", *names, "score", ""]))
    for trial in search.trials:
        numbers = [f"{value:.4g}" for value in (*(trial.figures[name] for name in names), trial.score)]
        marks = ("on the front" if trial.number in on_front else "", "best" if trial.number == best else "")
        typer.echo("\t".join([str(trial.number), _in_words(trial), *numbers, ", ".join(filter(None, marks))]))


def _in_words(trial: Trial) -> str:
    return " ".join(f"{name}={value:g}" for name, value in trial.options.items())
