"""hf-recontrol push, list and merge: heads on their way to others."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_inputs import as_named
from .control_config import ControlConfig

Strength = Annotated[float | None, typer.Option(help="Mean KL per token in nats, by each head's own calibration.")]
StepSize = Annotated[float | None, typer.Option(help="α of value heads, where theirs differ or another is wanted.")]
NumSteps = Annotated[int | None, typer.Option(help="n of value heads, where theirs differ or another is wanted.")]
Scale = Annotated[float | None, typer.Option(help="Of control heads, where theirs differ or another is wanted.")]


def push(
    head: Annotated[str, typer.Argument(help="A value or control head: a folder, an id on the Hub or id@revision.")],
    repo_id: Annotated[str, typer.Argument(metavar="USER/REPO", help="Made if it does not exist.")],
    private: Annotated[
        bool | None, typer.Option(help="Of a repository that is made; else as the account has it.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to, made if it does not exist.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    custom_generate: Annotated[
        bool,
        typer.Option(
            "--custom-generate",
            help="Also send custom_generate/generate.py, which steers where this package is not installed.",
        ),
    ] = False,
    base_model: Annotated[
        str | None,
        typer.Option(help="The base model's id on the Hub, of a head that was trained on a model in a folder."),
    ] = None,
    replace_model_card: Annotated[
        bool, typer.Option("--replace-model-card", help="Write the card anew, even if it was edited by hand.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
) -> None:
    """Check HEAD and send it to the Hub, with its card. Log in before: hf auth login."""
    from .sharing import push_head

    url = push_head(
        head,
        repo_id,
        base_model=base_model,
        private=private,
        revision=revision,
        create_pr=create_pr,
        custom_generate=custom_generate,
        replace_model_card=replace_model_card,
        commit_message=message,
    )
    typer.echo(url)


def list_(
    base_model: Annotated[str, typer.Argument(help="A language model's id on the Hub.")],
    kind: Annotated[str | None, typer.Option(help="value or control.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="As many at most.")] = None,
) -> None:
    """The heads on the Hub for BASE_MODEL, as their cards describe them; those downloaded most first."""
    from .sharing import list_heads

    heads = list_heads(base_model, kind=kind, limit=limit)
    if not heads:
        typer.echo(f"No head for {base_model} was found.")
        return
    rows = [("head", "kind", "reward", "licence", "downloads", "changed")]
    for head in heads:
        changed = f"{head.last_modified:%Y-%m-%d}" if head.last_modified else ""
        downloads = "" if head.downloads is None else str(head.downloads)
        reward = (head.reward or "")[:40]
        rows.append((head.repo_id, head.kind or "", reward, head.license or "", downloads, changed))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def merge(
    heads: Annotated[
        list[str], typer.Argument(metavar="HEAD[=WEIGHT]…", help="Folders or ids on the Hub; user/head=0.5.")
    ],
    output: Annotated[Path | None, typer.Option(help="Folder of the merged head.")] = None,
    logit_bias: Annotated[
        Path | None,
        typer.Option(help="Linear and constant heads: a file (.json, .safetensors) of the bias on --model's logits."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="For --logit-bias: the language model.")] = None,
    strength: Strength = None,
    step_size: StepSize = None,
    num_steps: NumSteps = None,
    scale: Scale = None,
) -> None:
    """One head that steers as several do with their weights, or a bias on the logits, for other engines."""
    if output is None and logit_bias is None:
        raise ValueError("Nothing is to be written: pass --output FOLDER, or --logit-bias FILE with --model MODEL.")
    if (logit_bias is None) != (model is None):
        raise ValueError("--logit-bias FILE and --model MODEL belong together: the bias is of one model's vocabulary.")
    config = ControlConfig(strength=strength, step_size=step_size, num_steps=num_steps, scale=scale)
    named = [_head_and_weight(text) for text in heads]
    loaded = _loaded(named)
    if output is not None:
        _save_merged(loaded, config, [as_named(name) for name, _ in named], output)
    if logit_bias is not None and model is not None:
        _save_bias(loaded, config, model, logit_bias)


def _head_and_weight(text: str) -> tuple[str, float]:
    name, equals, weight = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        return name, float(weight)
    except ValueError:
        raise ValueError(f"A head is {text!r}; what stands behind = must be its weight: user/head=0.5.") from None


def _loaded(named: list[tuple[str, float]]) -> dict[Any, float]:
    from .head import Head

    return {Head.from_pretrained(name): weight for name, weight in named}


def _save_merged(heads: dict[Any, float], config: ControlConfig, names: list[str], output: Path) -> None:
    from .merging import merge_heads

    merged = merge_heads(heads, config, names=names)
    merged.save_pretrained(output)
    for name, weight in merged.config.info["merged"]:
        typer.echo(f"{weight:8.4g} × {name}")
    typer.echo(
        f"Saved in {output}. It has no calibration, and so no strength, yet: "
        f"hf-recontrol tune {output} --calibrate --model MODEL --rollouts FOLDER"
    )


def _save_bias(heads: dict[Any, float], config: ControlConfig, model: str, path: Path) -> None:
    from .cli_inputs import language_model
    from .logit_bias import logit_bias, save_logit_bias

    language, _ = language_model(model, device="cpu")
    bias = logit_bias(heads, language, config)
    save_logit_bias(bias, path)
    typer.echo(f"Saved {len(bias)} biases, from {bias.min():.3g} to {bias.max():.3g}, in {path}.")
