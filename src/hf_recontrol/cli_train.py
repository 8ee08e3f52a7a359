"""hf-recontrol train: a head from a folder of rollouts, or from prompts and a reward in rounds."""

import contextlib
import copy
import signal
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import typer
from torch.utils.data import ConcatDataset
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from . import on_policy
from .calibration import calibrate, sample_states
from .cli_inputs import ends_at_sigterm, is_first_process, language_model, processes, reward_functions
from .cli_rollouts import duration, size
from .control_fitting import fit_constant_control
from .control_head import ControlHead
from .ensemble import check_ensemble, fit_ensemble
from .fitting import fit_linear_head
from .head import Head
from .head_config import ControlHeadConfig, ValueHeadConfig
from .rollout_dataset import RolloutDataset
from .train_options import TrainOptions, help_text, parse
from .trainer import RecontrolTrainer
from .training_args import RecontrolTrainingArguments
from .value_head import ValueHead

TIMED_STEPS = 6  # the first is not counted
LINEAR = {"value": "linear head", "control": "constant control"}  # what a head of each kind has to beat


def train(ctx: typer.Context) -> None:
    """Train a head on rollouts, or from prompts and a reward in rounds; hf-recontrol train --help has the options."""
    if {"-h", "--help", "--help_all", "--help-all"} & set(ctx.args) or not ctx.args:
        typer.echo(help_text(everything=bool({"--help_all", "--help-all"} & set(ctx.args))))
        return
    options, args = parse(ctx.args)
    _check(options, args)
    with ends_at_sigterm():
        if options.dry_run:
            _say_what_it_takes(options, args)
        elif options.rollouts:
            _fit(options, args)
        else:
            _fit_in_rounds(options, args)


def _check(options: TrainOptions, args: RecontrolTrainingArguments) -> None:
    """What would only be noticed after the model was loaded."""
    collecting = {"dataset": options.dataset, "reward": options.reward}
    given = [f"--{name}" for name, value in collecting.items() if value]
    if bool(options.rollouts) == bool(given):
        raise ValueError("Pass what to train on: --rollouts FOLDER, or --model, --dataset and --reward to collect it.")
    if not options.rollouts and (len(given) < 2 or options.model is None):
        raise ValueError(f"Without --rollouts, --model, --dataset and --reward are needed; of the last two: {given}.")
    if options.kind in ("control", "constant") and options.model is None:
        raise ValueError(f"A {options.kind} head is fitted through the language model's LM head: pass --model.")
    if options.num_heads != 1:
        check_ensemble(options.num_heads, options.kappa)
        if options.kind != "value" or args.resume_from_checkpoint:
            raise ValueError(
                "--num_heads is for --kind value, without --resume_from_checkpoint. Leave one of them out."
            )
    if not 0 < options.held_out < 1:
        raise ValueError(f"--held_out is {options.held_out}; it must be a share of the prompts, between 0 and 1.")
    if options.rollouts:
        if options.iterations != 1:
            raise ValueError("--iterations collects anew: leave --rollouts out, and pass --dataset and --reward.")
    elif options.kind not in LINEAR:
        raise ValueError(f"--kind {options.kind} is fitted to --rollouts. Collect them first: hf-recontrol rollouts.")
    elif options.dry_run:
        raise ValueError(
            "--dry_run times a fit to --rollouts. For the answers, use hf-recontrol rollouts --dry-run first."
        )
    elif args.resume_from_checkpoint:
        raise ValueError("Rounds are gone on with by the same command: leave --resume_from_checkpoint out.")


def _split(options: TrainOptions, seed: int) -> tuple[Any, Any]:
    """(train, held out), by prompt."""
    parts = [RolloutDataset(folder).split(options.held_out, seed=seed) for folder in options.rollouts]
    if len(parts) == 1:
        return parts[0]
    return ConcatDataset([part for part, _ in parts]), ConcatDataset([part for _, part in parts])


def _load_model(options: TrainOptions, args: RecontrolTrainingArguments) -> tuple[Any, Any]:
    if options.model is None:
        return None, None
    return language_model(options.model, dtype=options.dtype, device=args.device, revision=options.revision)


def _new_head(options: TrainOptions, args: RecontrolTrainingArguments, answers: Any, model: Any) -> Head:
    """Of the kind asked for; closed forms are fitted, others have their first weights."""
    if options.kind == "linear":
        return fit_linear_head(answers)
    if options.kind == "constant":
        return fit_constant_control(answers, model, beta=args.beta, td_lambda=args.td_lambda)
    shape: dict[str, Any] = {
        "hidden_size": answers[0]["hidden_states"].shape[-1],
        "num_hidden_layers": options.num_hidden_layers,
    }
    if options.intermediate_size is not None:
        shape["intermediate_size"] = options.intermediate_size
    torch.manual_seed(args.seed)
    return ValueHead(ValueHeadConfig(**shape)) if options.kind == "value" else ControlHead(ControlHeadConfig(**shape))


def _fit(options: TrainOptions, args: RecontrolTrainingArguments) -> None:
    answers, held_out = _split(options, args.seed)
    model, _ = _load_model(options, args)
    head = _new_head(options, args, answers, model)
    trainer = RecontrolTrainer(head, args, train_dataset=answers, eval_dataset=held_out, base_model=model)
    if options.num_heads > 1:
        fit_ensemble(
            answers,
            eval_dataset=held_out,
            base_model=model,
            head=head,  # type: ignore[arg-type]  # a ValueHead: the options were checked
            args=args,
            num_heads=options.num_heads,
            kappa=options.kappa,
        )
        metrics = head.config.info["evaluation"]
    elif options.kind in LINEAR:
        _train(trainer, args)
        metrics = head.config.info["evaluation"]
    else:
        metrics = _evaluate(trainer)
        if model is not None:
            calibrate(head, model, sample_states(held_out, seed=args.seed))
    beside = {}
    if options.kind == "control":
        constant = _new_head(replace(options, kind="constant"), args, answers, model)
        other = RecontrolTrainer(constant, args, train_dataset=answers, eval_dataset=held_out, base_model=model)
        beside = _evaluate(other)
    _save(head, options, args)
    if args.push_to_hub:
        trainer.push_to_hub()
    calibrated = bool(head.config.control.calibration)
    _report(options.kind, metrics, beside, len(held_out), args.output_dir, calibrated=calibrated)


def _train(trainer: RecontrolTrainer, args: RecontrolTrainingArguments) -> None:
    """Ctrl-C keeps a checkpoint too; once more, and it ends at once."""
    trainer.termination.signals.append(signal.SIGINT)
    resume = args.resume_from_checkpoint
    try:
        trainer.train(resume_from_checkpoint=True if str(resume).lower() in ("true", "last") else resume)
    except SystemExit:
        if is_first_process() and args.save_strategy != SaveStrategy.NO:
            typer.echo(
                f"hf-recontrol: stopped at step {trainer.state.global_step}, which {args.output_dir} keeps. To go on, "
                "add --resume_from_checkpoint true.",
                err=True,
            )
        raise


def _evaluate(trainer: RecontrolTrainer) -> dict[str, Any]:
    return {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}


def _fit_in_rounds(options: TrainOptions, args: RecontrolTrainingArguments) -> None:
    from .prompts import load_prompts

    prompts = load_prompts(
        options.dataset,
        split=options.split,
        name=options.dataset_name,
        recipe=options.dataset_recipe,
        limit=options.limit,
    )
    model, tokenizer = _load_model(options, args)
    rewards = reward_functions(
        options.reward, options.reward_weights, device=model.device, timeout=options.timeout, retries=options.retries
    )
    of_a_round = copy.copy(args)  # what is kept of a round are its answers and its head, and one push is enough
    of_a_round.output_dir = str(Path(args.output_dir, "training"))
    of_a_round.save_strategy, of_a_round.push_to_hub = SaveStrategy.NO, False
    head: Head = getattr(on_policy, f"train_{options.kind}")(
        model,
        tokenizer,
        prompts,
        rewards,
        args.output_dir,
        iterations=options.iterations,
        args=of_a_round,
        held_out=options.held_out,
        seed=args.seed,
        **({"num_heads": options.num_heads, "kappa": options.kappa} if options.kind == "value" else {}),
        num_return_sequences=options.num_return_sequences,
        max_new_tokens=options.max_new_tokens,
        block_size=options.block_size,
    )
    _save(head, options, args)
    if args.push_to_hub and is_first_process():
        head.push_to_hub(
            args.hub_model_id or Path(args.output_dir).absolute().name,
            revision=args.hub_revision,
            token=args.hub_token,
            private=args.hub_private_repo,
        )
    evaluation = head.config.info["evaluation"]
    _report(options.kind, evaluation, {}, evaluation.get("answers"), args.output_dir, calibrated=True)


def _save(head: Head, options: TrainOptions, args: RecontrolTrainingArguments) -> None:
    said = {name: getattr(options, name) for name in ("license", "language", "data", "data_license")}
    head.config.info.update({name: value for name, value in said.items() if value is not None})
    if args.should_save:
        head.save_pretrained(args.output_dir)


def _report(
    kind: str, metrics: dict[str, Any], beside: dict[str, Any], answers: int | None, folder: str, *, calibrated: bool
) -> None:
    """The held-out metrics, beside those of the simplest head of the kind; where the head is."""
    if not is_first_process():
        return
    typer.echo(f"\nOn {answers} held-out answers{', at scale 1' if kind in ('control', 'constant') else ''}:")
    for name, value in metrics.items():
        if name.endswith(("_linear", "_interval", "runtime", "per_second", "preparation_time")):
            continue
        if name in ("epoch", "answers", "seed"):
            continue
        other = metrics.get(f"{name}_linear", beside.get(name))
        text = " ".join(f"{number:.4g}" for number in (value if isinstance(value, list) else [value]))
        if interval := metrics.get(f"{name}_interval"):
            text += f" [{interval[0]:.4g}, {interval[1]:.4g}]"
        compared = f"  ({LINEAR[kind]}: {other:.4g})" if kind in LINEAR and other is not None else ""
        typer.echo(f"  {name.replace('_', ' '):<24}{text}{compared}")
    typer.echo(f"Saved in {folder}.")
    if not calibrated:
        typer.echo(
            "It has no calibration, and so no strength, yet: "
            f"hf-recontrol tune {folder} --calibrate --model MODEL --rollouts FOLDER"
        )


class _Measured(Exception):  # noqa: N818 (no error: it ends a training that has been timed)
    """Enough steps were timed."""


class _Clock(TrainerCallback):
    """Times a few steps, and ends the training."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.steps = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps = state.max_steps
        self.times.append(time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if len(self.times) == min(TIMED_STEPS, state.max_steps):
            self.times.append(time.perf_counter())
            raise _Measured


def _say_what_it_takes(options: TrainOptions, args: RecontrolTrainingArguments) -> None:
    """Sizes, and the time from a few steps that are not kept."""
    if options.kind not in LINEAR:
        raise ValueError(f"--kind {options.kind} has no steps to time: it is fitted in one pass. Leave --dry_run out.")
    if processes() > 1:
        raise ValueError("--dry_run measures one process. Leave out the launcher: hf-recontrol train … --dry_run.")
    answers, held_out = _split(options, args.seed)
    model, _ = _load_model(options, args)
    head = _new_head(options, args, answers, model)
    clock, quiet = _Clock(), copy.copy(args)
    quiet.eval_strategy, quiet.save_strategy, quiet.logging_strategy = (
        IntervalStrategy.NO,
        SaveStrategy.NO,
        IntervalStrategy.NO,
    )
    quiet.report_to, quiet.disable_tqdm, quiet.push_to_hub, quiet.load_best_model_at_end = [], True, False, False
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        quiet.output_dir = scratch
        with contextlib.suppress(_Measured):
            RecontrolTrainer(head, quiet, train_dataset=answers, base_model=model, callbacks=[clock]).train()
    lead, timed = clock.times[0] - start, clock.times[1:] if len(clock.times) > 2 else clock.times
    step = (timed[-1] - timed[0]) / (len(timed) - 1)
    parameters = sum(parameter.numel() for parameter in head.parameters())
    lengths = torch.cat([part.lengths for part in getattr(answers, "datasets", [answers])])
    batch = args.train_batch_size * float(lengths.float().mean()) * head.config.hidden_size * 4
    rows = {
        "answers": f"{len(answers):,} to train on, {len(held_out):,} held out",
        "tokens": f"{int(lengths.sum()):,} to train on, {head.config.hidden_size:,} numbers each",
        "parameters": f"{parameters:,}",
        "memory": f"{size(16 * parameters)} of weights, gradients and Adam's moments; {size(batch)} of states a batch",
        "steps": f"{clock.steps:,} of {args.train_batch_size * args.gradient_accumulation_steps} answers",
        "measured": f"{lead:.2f} s until the first step; {1000 * step:.1f} ms a step, the mean of {len(timed) - 1}",
        "at that speed": f"{duration(lead + clock.steps * step)} on {args.device}, and the evaluations",
    }
    for name, text in rows.items():
        typer.echo(f"{name:<16}{text}")
    typer.echo(f"Nothing was written to {args.output_dir}.")
