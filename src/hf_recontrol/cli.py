"""hf-recontrol: the demo, steered text from any model, and what a head's folder or repository holds."""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from .errors import CollectError, HeadError, HeadMismatch, HeadUnavailable, SteeringNotApplied

USER_ERRORS = (
    CollectError,
    HeadError,
    HeadMismatch,
    HeadUnavailable,
    SteeringNotApplied,
    ValueError,
    OSError,
    ImportError,
)

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode=None)

StepSize = Annotated[float | None, typer.Option(help="α, the size of a step; the head's where not given.")]
NumSteps = Annotated[
    int | None, typer.Option(help="n, the steps at each token, 0 to 1024; the head's where not given.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a head on the Hub.")]


@app.command()
def demo(
    train: Annotated[
        bool, typer.Option("--train", help="First collect rollouts and train the heads anew (extra: train; minutes).")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="With --train: a folder where the heads are kept.")] = None,
    prompts: Annotated[int, typer.Option(min=10, max=400, help="Prompts of the table; fewer is faster.")] = 400,
) -> None:
    """A tiny language model of film reviews with and without control: a few texts, and a table. No network."""
    import torch

    from .demo.assets import Demo
    from .demo.report import show

    if "OMP_NUM_THREADS" not in os.environ:  # torch's default leaves out hyper-threads, which help a model this small
        torch.set_num_threads(min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1))
    if not train:
        show(Demo(), prompts, typer.echo)
        return
    from .demo.training import make_heads

    with tempfile.TemporaryDirectory() as scratch:
        folder = output or Path(scratch)
        make_heads(Demo(), folder, prompts=3000, answers=4, validation_answers=2, echo=typer.echo)
        show(Demo(heads_folder=folder), prompts, typer.echo)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A language model: an id on the Hub or a folder.")],
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    value_head: Annotated[str | None, typer.Option(help="A value head: an id on the Hub or a folder.")] = None,
    step_size: StepSize = None,
    num_steps: NumSteps = None,
    revision: Revision = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write, at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy decoding.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
) -> None:
    """Go on from PROMPT with MODEL, steered by a value head. Without one, the plain text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from transformers.utils import logging

    from .generation import enable_recontrol

    logging.disable_progress_bar()

    keywords = {"value_head": value_head, "step_size": step_size, "num_steps": num_steps, "revision": revision}
    given = {f"recontrol_{name}": value for name, value in keywords.items() if value is not None}
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    tokenizer = AutoTokenizer.from_pretrained(model)
    language_model = enable_recontrol(AutoModelForCausalLM.from_pretrained(model))
    inputs = tokenizer(prompt, return_tensors="pt").to(language_model.device)
    set_seed(seed)
    output = language_model.generate(**inputs, **sampling, max_new_tokens=max_new_tokens, **given)
    typer.echo(tokenizer.decode(output[0], skip_special_tokens=True))


@app.command()
def info(
    head: Annotated[str, typer.Argument(help="A value head: an id on the Hub or a folder.")],
    revision: Revision = None,
) -> None:
    """What HEAD is: its config, checked, as JSON."""
    from .value_head import ValueHead

    loaded = ValueHead.from_pretrained(head, revision=revision)
    parameters = sum(p.numel() for p in loaded.parameters())
    typer.echo(json.dumps({**loaded.config.to_dict(), "parameters": parameters}, indent=2, ensure_ascii=False))


def main() -> None:
    """The console script: a user's error is one line and exit status 2."""
    try:
        app()
    except USER_ERRORS as error:
        typer.echo(f"hf-recontrol: {' '.join(str(error).split())}", err=True)
        sys.exit(2)
