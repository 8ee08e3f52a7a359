"""What a head's config.info, and so its card, tells of the run that trained it: data, settings, figures, curves."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import ConcatDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .config_checks import MAX_INFO_BYTES
from .fitting import parts_of
from .head import Head
from .intervals import ratio_interval
from .rollout_dataset import RolloutDataset
from .training_args import RecontrolTrainingArguments

MOST_POINTS = 24
MOST_BYTES = 4096  # of curves
OTHERS = 3072  # bytes for figures, calibration and settings that are written after the curves
TIMINGS = ("_runtime", "_per_second", "_preparation_time", "epoch", "step")


class RunRecord(TrainerCallback):
    """Keeps head.config.info["curves"]: what was logged and evaluated while training, [step, value] by name."""

    def __init__(self) -> None:
        self._training = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A resumed run's state has the log of what was before."""
        self._training = True
        self.on_log(args, state, control, **kwargs)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Draw the curves anew."""
        if self._training:
            head: Head = kwargs["model"]
            write_curves(head.config.info, state.log_history)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What is evaluated later is no part of the run."""
        self._training = False


def write_curves(info: dict[str, Any], log_history: Sequence[Mapping[str, Any]]) -> None:
    """Set info["curves"] to as many points as `info` has room for, at most 24 of each curve; none, and it is absent."""
    info.pop("curves", None)
    curves: dict[str, list[list[float]]] = {}
    for line in log_history:
        for name, value in line.items():
            number = isinstance(value, int | float) and math.isfinite(value)
            if number and name != "total_flos" and not name.startswith("train_") and not name.endswith(TIMINGS):
                curves.setdefault(name, []).append([line["step"], float(f"{value:.4g}")])
    room = min(MOST_BYTES, MAX_INFO_BYTES - OTHERS - len(json.dumps(info)))
    for most in (MOST_POINTS, 12, 6, 3):
        thinned = {name: _thinned(curves[name], most) for name in sorted(curves)}
        if curves and len(json.dumps(thinned)) <= room:
            info["curves"] = thinned
            return


def _thinned(points: list[list[float]], most: int) -> list[list[float]]:
    """The first, the last, and others evenly between."""
    if len(points) <= most:
        return points
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def settings(
    args: RecontrolTrainingArguments, state: TrainerState, dataset: Any, batch_size: int, *, control: bool
) -> dict[str, Any]:
    """config.info["training"]: what the head was trained on, and how far.

    Args:
        batch_size: answers in an optimiser step, on all devices.
        control: whether it is a control head.
    """
    fingerprints = [getattr(part, "fingerprint", None) or {} for part in parts_of(dataset)]
    prompts = [facts["prompts"] for facts in fingerprints if type(facts.get("prompts")) is int]
    facts = {
        "recipe": args.recipe,
        "td_lambda": args.td_lambda,
        "gamma": args.gamma,
        "answers": len(dataset),
        "prompts": sum(prompts) if len(prompts) == len(fingerprints) else None,
        "steps": state.global_step,
        "epochs": state.epoch,
        "batch_size": batch_size,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm,
        "seed": args.seed,
    }
    return facts | ({"beta": args.beta, "clip_ratio": args.clip_ratio} if control else {})


def figures(
    metrics: Mapping[str, float], eval_dataset: Any, ratios: Mapping[str, tuple[Tensor, Tensor]], seed: int
) -> dict[str, Any]:
    """config.info["evaluation"], as the card reads it: evaluate()'s metrics, less what depends on the machine.

    Args:
        ratios: of metrics that are ratios of sums over answers, the numerators and denominators, (answers,): they get
            a 95 % interval over prompts.
        seed: of the training.
    """
    kept = {name: value for name, value in metrics.items() if not name.endswith(TIMINGS)}
    found: dict[str, Any] = {name.removeprefix("eval_"): value for name, value in kept.items()}
    if not isinstance(eval_dataset, dict):
        quarters = [name for name in found if name.startswith("rank_correlation_q")]
        if quarters:
            found["rank_correlation"] = [found.pop(name) for name in quarters]
        prompts = prompts_of(eval_dataset)
        for name, (numerators, denominators) in ratios.items():
            if name in found and prompts and (interval := ratio_interval(numerators, denominators, prompts)):
                found[f"{name}_interval"] = [float(f"{end:.4g}") for end in interval]
        found |= {"answers": len(eval_dataset), "seed": seed}
    return found


def prompts_of(dataset: Any) -> list[str]:
    """What prompt each answer of rollouts belongs to; none where the dataset does not say."""
    parts = dataset.datasets if isinstance(dataset, ConcatDataset) else [dataset]
    known = [part.prompt_hashes for part in parts if isinstance(part, RolloutDataset)]
    return [prompt for part in known for prompt in part] if len(known) == len(parts) else []
