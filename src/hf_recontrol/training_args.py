"""TrainingArguments for a value head: the objective, and defaults that suit a small head, not a language model."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils.import_utils import is_accelerate_available

SETTINGS: dict[str | None, dict[str, Any]] = {
    None: {
        "td_lambda": 1.0,  # on small data λ = 0 learns little: explained variance 0.01, against 0.04–0.05 for λ ≥ 0.9
        "standardize_inputs": True,  # the spread of hidden states differs between dimensions and models; lr need not
        "learning_rate": 1e-3,  # a small MLP on standardised inputs, not a language model: 5e-5 would hardly move it
        "per_device_train_batch_size": 32,
        "num_train_epochs": 3.0,  # the states of an answer share one reward, so more epochs learn the answers by heart
        "lr_scheduler_type": "linear",
        "max_grad_norm": 1.0,
    },
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


def _setting(name: str, text: str) -> Any:
    default, paper = SETTINGS[None][name], SETTINGS["paper"][name]
    return field(default=None, metadata={"help": f'{text} {default} where left out, {paper} under recipe="paper".'})


@dataclass
class RecontrolTrainingArguments(TrainingArguments):
    """TrainingArguments with the objective of a value head. A field that is given always wins over the recipe.

    Trainer's optimiser is AdamW with weight_decay = 0, which is Adam.
    """

    output_dir: str = field(default="trainer_output", metadata={"help": "Where the head and its checkpoints go."})
    recipe: str | None = field(
        default=None,
        metadata={
            "help": 'None, or "paper": λ = 0, Adam at a constant 1e-4, batches of 512 answers, 100 epochs, raw inputs '
            "(arXiv:2406.05954, appendix). It fills in the fields that are left out."
        },
    )
    td_lambda: float = _setting(
        "td_lambda", "λ of the returns that V is fitted to, 0 (Bellman) to 1 (Monte Carlo: the final reward)."
    )
    standardize_inputs: bool = _setting(
        "standardize_inputs", "Whether V reads (h − mean) / std, by the training states' mean and std."
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
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must be False: the columns of rollouts are not V's arguments."}
    )

    def __post_init__(self) -> None:
        if not is_accelerate_available():
            raise ImportError(
                "Training a value head needs accelerate, which is not installed. "
                "Install the extra: pip install 'hf-recontrol[train]'"
            )
        if self.recipe not in SETTINGS:
            raise ValueError(f"recipe is {self.recipe!r}; it must be None or 'paper'.")
        for name, value in SETTINGS[self.recipe].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__()
        if not 0 <= self.td_lambda <= 1:
            raise ValueError(f"td_lambda is {self.td_lambda!r}; it must be from 0 (Bellman) to 1 (Monte Carlo).")
        for name, reason in (
            ("logging_nan_inf_filter", "it would hide a NaN loss"),
            ("remove_unused_columns", "it would drop the rewards"),
            ("fp16_full_eval", "a head computes in float32"),
            ("bf16_full_eval", "a head computes in float32"),
            ("fsdp", "a head fits on one device"),
            ("deepspeed", "a head fits on one device"),
        ):
            if getattr(self, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; a value head is trained without: {reason}. Leave it out."
                )
        if self.push_to_hub and self.hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
            raise ValueError(
                f"hub_strategy is {HubStrategy(self.hub_strategy).value!r}, which uploads the optimiser's pickles, but "
                "a head's repository holds config.json, model.safetensors and README.md. Use 'every_save' or 'end'."
            )
