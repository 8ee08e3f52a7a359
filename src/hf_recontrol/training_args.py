"""TrainingArguments for a head: the objective, and defaults that suit a small head, not a language model."""

import copy
import math
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils.import_utils import is_accelerate_available

DEFAULTS: dict[str, Any] = {
    "td_lambda": 1.0,  # on small data λ = 0 learns little: explained variance 0.01, against 0.04–0.05 for λ ≥ 0.9
    "standardize_inputs": True,  # the spread of hidden states differs between dimensions and models; lr need not
    "learning_rate": 1e-3,  # a small MLP on standardised inputs, not a language model: 5e-5 would hardly move it
    "per_device_train_batch_size": 32,
    "num_train_epochs": 3.0,  # the states of an answer share one reward, so more epochs learn the answers by heart
    "lr_scheduler_type": "linear",
    "max_grad_norm": 1.0,
}
SETTINGS: dict[str | None, dict[str, Any]] = {
    None: DEFAULTS,
    # a control sees the rewards through noisier eyes: three passes gain a seventh less on held-out answers than one
    "control": DEFAULTS | {"num_train_epochs": 1.0},
    "paper": {
        "td_lambda": 0.0,
        "standardize_inputs": False,
        "learning_rate": 1e-4,
        "per_device_train_batch_size": 512,
        "num_train_epochs": 100.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,  # unclipped, Adam's steps are the same for the paper's sum over tokens and our mean
    },
}
METRICS = {
    "loss": False,
    "explained_variance": True,
    **{f"rank_correlation_q{quarter}": True for quarter in (1, 2, 3, 4)},
    "gain": True,
    "kl_per_token": False,
    "kl_per_answer": False,
    "clipped": False,
    "distance": False,
}
"""What evaluate() measures that can be best (a calibration_slope is best at 1), and whether greater is better."""


def _setting(name: str, text: str) -> Any:
    default, paper = SETTINGS[None][name], SETTINGS["paper"][name]
    return field(default=None, metadata={"help": f'{text} {default} where left out, {paper} under recipe="paper".'})


@dataclass
class RecontrolTrainingArguments(TrainingArguments):
    """TrainingArguments with the objective of a head. A field that is given always wins over the recipe.

    Trainer's optimiser is AdamW with weight_decay = 0, which is Adam.
    """

    output_dir: str = field(default="trainer_output", metadata={"help": "Where the head and its checkpoints go."})
    recipe: str | None = field(
        default=None,
        metadata={
            "help": 'None; "control", for a control head: one epoch; or "paper", for a value head: λ = 0, Adam at a '
            "constant 1e-4, batches of 512 answers, 100 epochs, raw inputs (arXiv:2406.05954, appendix). It fills in "
            "the fields that are left out."
        },
    )
    td_lambda: float = _setting(
        "td_lambda", "λ of the returns that V is fitted to, 0 (Bellman) to 1 (Monte Carlo: the final reward)."
    )
    gamma: float = field(
        default=1.0,
        metadata={
            "help": "γ of the returns, above 0 to 1: what the reward, in its standard deviations from the mean, is "
            "worth one token earlier. 1, as in the paper, is no discount."
        },
    )
    beta: float = field(
        default=0.3,
        metadata={"help": "β of a control's KL from the base model, in standard deviations of the reward per nat."},
    )
    clip_ratio: float = field(
        default=2.0, metadata={"help": "c: a control gains nothing by probability ratios beyond 1/c to c."}
    )
    standardize_inputs: bool = _setting(
        "standardize_inputs", "Whether the head reads (h − mean) / std, by the training states' mean and std."
    )
    learning_rate: float = _setting("learning_rate", "The initial learning rate.")
    per_device_train_batch_size: int = _setting(
        "per_device_train_batch_size", "Answers (not tokens) in a batch, on each device."
    )
    num_train_epochs: float = _setting("num_train_epochs", "Passes over the training answers.")
    lr_scheduler_type: str = _setting("lr_scheduler_type", "The learning rate's schedule.")
    max_grad_norm: float = _setting("max_grad_norm", "Gradients are clipped to this norm; 0 does not clip.")
    logging_steps: float = field(default=50, metadata={"help": "Optimiser steps between two lines of the log."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Must be False: the filter would log a NaN loss as 0 and train on."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "All parameters of a head are used at each step."}
    )
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "A head's buffers, the inputs' mean and std, are fixed."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must be False: the columns of rollouts are not V's arguments."}
    )

    def __post_init__(self) -> None:
        if not is_accelerate_available():
            raise ImportError(
                "Training a head needs accelerate, which is not installed. "
                "Install the extra: pip install 'hf-recontrol[train]'"
            )
        if self.recipe not in SETTINGS:
            raise ValueError(f"recipe is {self.recipe!r}; it must be None, 'control' or 'paper'.")
        self._left_out = [name for name in DEFAULTS if getattr(self, name) is None]
        for name in self._left_out:
            setattr(self, name, SETTINGS[self.recipe][name])
        self._read_numbers()
        self._settle_the_best()
        if not torch.accelerator.is_available():  # pinned memory is an accelerator's; torch would warn
            self.dataloader_pin_memory = False
        super().__post_init__()
        if not 0 <= self.td_lambda <= 1:
            raise ValueError(f"td_lambda is {self.td_lambda!r}; it must be from 0 (Bellman) to 1 (Monte Carlo).")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma is {self.gamma!r}; it must be above 0, and 1 (no discount) or less.")
        if not 0 < self.beta < math.inf or not 1 < self.clip_ratio < math.inf:
            raise ValueError(
                f"beta is {self.beta!r} and clip_ratio {self.clip_ratio!r}; they must be finite, beta > 0 and "
                "clip_ratio > 1."
            )
        for name, reason in (
            ("logging_nan_inf_filter", "it would hide a NaN loss"),
            ("remove_unused_columns", "it would drop the rewards"),
            ("fp16_full_eval", "a head computes in float32"),
            ("bf16_full_eval", "a head computes in float32"),
            ("fsdp", "a head fits on one device"),
            ("deepspeed", "a head fits on one device"),
            ("enable_jit_checkpoint", "RecontrolTrainer itself writes a checkpoint on SIGTERM, and exits with 143"),
        ):
            if getattr(self, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; a head is trained without: {reason}. Leave it out."
                )
        if self.push_to_hub and self.hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
            raise ValueError(
                f"hub_strategy is {HubStrategy(self.hub_strategy).value!r}, which uploads the optimiser's pickles, but "
                "a head's repository holds config.json, model.safetensors and README.md. Use 'every_save' or 'end'."
            )

    def _read_numbers(self) -> None:
        """YAML reads 1e-4, without a point, as a text."""
        for name in [one.name for one in fields(self) if one.type is float]:
            value = getattr(self, name)
            if isinstance(value, str):
                try:
                    setattr(self, name, float(value))
                except ValueError:
                    raise ValueError(f"{name} is {value!r}; it must be a number.") from None

    def _settle_the_best(self) -> None:
        """Which way metric_for_best_model is better, where that is not said."""
        if self.metric_for_best_model is None:
            return
        known = [name for name in METRICS if self.metric_for_best_model.endswith(name)]
        if not known:
            raise ValueError(
                f"metric_for_best_model is {self.metric_for_best_model!r}; it must be one of {', '.join(METRICS)}, "
                "with the evaluation set's name and _ in front where there are several."
            )
        if self.greater_is_better is None:
            self.greater_is_better = METRICS[max(known, key=len)]

    def for_control(self) -> Self:
        """These, with recipe="control" where no recipe was given: it fills in the fields that were left out."""
        if self.recipe is not None:
            return self
        args = copy.copy(self)
        args.recipe = "control"
        for name in self._left_out:
            setattr(args, name, SETTINGS["control"][name])
        return args
