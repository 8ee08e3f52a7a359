"""hf-recontrol: rollouts, heads trained on them and calibrated, steered text, also from a server, and a demo."""

import json
import os
import sys
import tempfile
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_evaluate import evaluate
from .cli_inputs import language_model, named_heads
from .cli_rollouts import rollouts
from .cli_share import list_, merge, push
from .cli_train import train
from .cli_tune import tune
from .errors import CollectError, HeadError, HeadMismatch, HeadUnavailable, SteeringNotApplied
from .head_hub import package_version

USER_ERRORS = (
    CollectError,
    HeadError,
    HeadMismatch,
    HeadUnavailable,
    SteeringNotApplied,
    ValueError,
    OSError,
    ImportError,
    FloatingPointError,
)


class Engine(StrEnum):
    """What serves."""

    transformers = "transformers"
    vllm = "vllm"


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help=__doc__,
    rich_markup_mode=None,
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},  # --output_dir is --output-dir
)
app.command()(rollouts)
app.command()(evaluate)
app.command()(tune)
app.command()(push)
app.command("list")(list_)
app.command()(merge)
app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(train)

StepSize = Annotated[float | None, typer.Option(help="α of a value head; its own where not given.")]
Scale = Annotated[float | None, typer.Option(help="What a control head's u is multiplied by; its own where not given.")]
NumSteps = Annotated[
    int | None, typer.Option(help="n of a value head, steps at each token, 0 to 1024; its own where not given.")
]
Strength = Annotated[
    float | None, typer.Option(help="Mean KL per token to spend, in nats; picks α or the scale from the calibration.")
]
MaxKL = Annotated[float | None, typer.Option(help="No token's KL above it, in nats; 4 × the strength where not given.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a head on the Hub.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(package_version() or "unknown")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    train: Annotated[
        bool, typer.Option("--train", help="First collect rollouts and train the heads anew (extra: train; minutes).")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="With --train: a folder where the heads are kept.")] = None,
    iterations: Annotated[
        int, typer.Option(min=1, help="With --train: rounds of answers that the control head is fitted to.")
    ] = 1,
    prompts: Annotated[int, typer.Option(min=10, max=400, help="Prompts of the table; fewer is faster.")] = 400,
    page: Annotated[
        bool, typer.Option("--page", help="A page in the browser instead: type, steer, see the tokens (extra: demo).")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="With --page: another language model, an id on the Hub or a folder.")
    ] = None,
    head: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=HEAD", help="With --page: a head to choose, as of serve. Repeat it for more."),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="With --page: 127.0.0.1 where not given, which no other machine sees.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="With --page: the first that is free from 7860 where not given.")
    ] = None,
) -> None:
    """A tiny language model of film reviews with and without control: a few texts, and a table. No network."""
    if not train and (output is not None or iterations > 1):
        raise ValueError("--output and --iterations are for heads that are made anew: pass --train too.")
    if not page and any(given is not None for given in (model, head, host, port)):
        raise ValueError("--model, --head, --host and --port are of the page: pass --page too.")
    if page and train:
        raise ValueError("--page and --train are two things. Train first, then --page --head mine=FOLDER/control_head.")
    import torch

    from .demo.assets import Demo
    from .demo.report import show

    if "OMP_NUM_THREADS" not in os.environ:  # torch's default leaves out hyper-threads, which help a model this small
        torch.set_num_threads(min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1))
    if page:
        _page(model, named_heads(head or [], "--head"), host, port)
        return
    if not train:
        show(Demo(), prompts, typer.echo)
        return
    from .demo.training import make_heads

    with tempfile.TemporaryDirectory() as scratch:
        folder = output or Path(scratch)
        make_heads(Demo(), folder, prompts=3000, answers=4, iterations=iterations)
        show(Demo(heads_folder=folder), prompts, typer.echo)


def _page(model: str | None, heads: dict[str, str], host: str | None, port: int | None) -> None:
    """The page, of the demo's model and heads or of others."""
    from .demo.page import demo_page
    from .head import Head
    from .page import build_page, launch_page

    if model is not None and not heads:
        raise ValueError(f"--model is {model!r}, but no head for it was named. Add --head NAME=HEAD.")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    loaded = {name: Head.from_pretrained(head) for name, head in heads.items()}
    page = demo_page(loaded) if model is None else build_page(*language_model(model), loaded)
    launch_page(page, host=host, port=port)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A language model: an id on the Hub or a folder.")],
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    value_head: Annotated[
        str | None, typer.Option(help="A value or control head: an id on the Hub or a folder.")
    ] = None,
    strength: Strength = None,
    max_kl: MaxKL = None,
    step_size: StepSize = None,
    num_steps: NumSteps = None,
    scale: Scale = None,
    revision: Revision = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write, at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy decoding.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    trace: Annotated[
        bool, typer.Option("--trace", help="Show what the control did to each token, and of a value head its value.")
    ] = False,
) -> None:
    """Go on from PROMPT with MODEL, steered by a head. Without one, the plain text."""
    from transformers import set_seed

    keywords: dict[str, object] = {"value_head": value_head, "strength": strength, "max_kl": max_kl}
    keywords |= {"step_size": step_size, "num_steps": num_steps, "scale": scale}
    keywords |= {"revision": revision, "trace": trace or None}
    if value_head is None and any(value is not None for value in keywords.values()):
        raise ValueError("Options were given that steer, but no head. Pass --value-head, or leave the others out.")
    given = {f"recontrol_{name}": value for name, value in keywords.items() if value is not None}
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    language_model, tokenizer = _model_and_tokenizer(model)
    inputs = tokenizer(prompt, return_tensors="pt").to(language_model.device)
    set_seed(seed)
    sampling |= {"max_new_tokens": max_new_tokens, "return_dict_in_generate": True}
    output = language_model.generate(**inputs, **sampling, **given)
    if trace:
        from .plots import show

        typer.echo(f"{prompt} …")
        typer.echo(str(show(output.recontrol_trace, tokenizer)))
    else:
        typer.echo(tokenizer.decode(output.sequences[0], skip_special_tokens=True))


def _model_and_tokenizer(model: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from .generation import enable_recontrol

    logging.disable_progress_bar()
    return enable_recontrol(AutoModelForCausalLM.from_pretrained(model)), AutoTokenizer.from_pretrained(model)


@app.command()
def info(
    head: Annotated[str, typer.Argument(help="A value or control head: an id on the Hub or a folder.")],
    revision: Revision = None,
) -> None:
    """What HEAD is: its config, checked, as JSON."""
    from .head import Head

    loaded = Head.from_pretrained(head, revision=revision)
    parameters = sum(p.numel() for p in loaded.parameters())
    shown = json.dumps({**loaded.config.to_dict(), "parameters": parameters}, indent=2)  # ASCII: it may be a stranger's
    typer.echo(shown.replace("\x7f", "\\u007f"))


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="A language model: an id on the Hub or a folder.")],
    head: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=HEAD",
            help="A head that requests may name: a folder, an id on the Hub or id@revision. Repeat it for more.",
        ),
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="What else the engine's `serve` takes, after --: -- --dtype bfloat16")
    ] = None,
    engine: Annotated[
        Engine, typer.Option(help="transformers, or vllm for many requests at once (extra: vllm).")
    ] = Engine.transformers,
    default: Annotated[
        str | None, typer.Option(help="NAME of the head for requests that name none; they are not steered otherwise.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="As of the engine: localhost; of vllm, all addresses.")] = None,
    port: Annotated[int | None, typer.Option(help="As of the engine, 8000.")] = None,
) -> None:
    """OpenAI's API for MODEL, steered request by request.

    By `transformers serve`, which reads a request's generation_config, or `vllm serve`, which reads its vllm_xargs.
    """
    if engine is Engine.vllm:
        from .serving.vllm_serve import serve as serve_model
    else:
        from .serving.transformers_serve import serve as serve_model

    address = {"--host": host, "--port": port}
    given = [part for name, value in address.items() if value is not None for part in (name, str(value))]
    serve_model(model, named_heads(head, "--head"), default=default, arguments=[*given, *(arguments or [])])


def main() -> None:
    """The console script: a user's error is one line and exit status 2."""
    warnings.formatwarning = lambda message, *_: f"hf-recontrol: {message}\n"  # no line of our source
    try:
        app()
    except USER_ERRORS as error:
        typer.echo(f"hf-recontrol: {' '.join(str(error).split())}", err=True)
        sys.exit(2)
