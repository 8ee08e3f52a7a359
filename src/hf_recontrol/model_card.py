"""The card of a head: facts in, text out. What is not known is left out; what a file says stays one line of text."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined, unused-ignore]

from .card_comparison import comparison_gains, comparison_lines
from .card_text import code, escaped, mapping, number, one_line, pair
from .card_tuning import tuning_lines

TAGS = ("recontrol", "test-time-alignment", "representation-editing")
REWARD_TAG = "reward:"
"""With what the reward is called; `hf-recontrol list` shows it."""
MAX_POINTS = 24
METRIC_NAMES = {
    "explained_variance": "Explained variance of the reward",
    "explained_variance_linear": "Explained variance of the reward, by a linear head",
    "rank_correlation": "Rank correlation with the reward",
    "calibration_slope": "Slope of the reward on the prediction (1: calibrated, below 1: exaggerated)",
    "loss": "Mean squared error to the λ-return",
    "objective": "Objective: β times the KL less the clipped gain, mean over tokens",
    "gain": "Gain of the reward at scale 1, in its standard deviations, estimated from answers without this control",
    "kl_per_token": "KL from the base model at scale 1, nats per token",
    "kl_per_answer": "KL from the base model at scale 1, nats per answer",
    "clipped": "Share of tokens beyond the clipping range",
    "distance": "Mean squared distance from the values it was distilled from",
}
OBJECTIVES = {
    "value": "squared error to the λ-return of the reward, over the tokens of the base model's own answers",
    "control": "clipped probability ratio times advantage, less β times the KL from the base model, over the tokens of "
    "answers",
}
TRAINING_NAMES = {
    "answers": "Answers",
    "tokens": "Tokens",
    "td_lambda": "λ of the returns (0: Bellman, 1: Monte Carlo)",
    "gamma": "γ of the returns (1: no discount)",
    "prompts": "Prompts of the rollouts, with those held out",
    "recipe": "Recipe",
    "steps": "Steps",
    "epochs": "Epochs",
    "batch_size": "Answers in a batch",
    "learning_rate": "Learning rate",
    "lr_scheduler_type": "Its schedule",
    "weight_decay": "Weight decay",
    "max_grad_norm": "Gradients are clipped to this norm (0: not)",
    "ridge": "Ridge",
    "beta": "β of the KL from the base model",
    "clip_ratio": "Probability ratios are clipped to this and its inverse",
    "iterations": "Rounds of answers collected",
    "heads": "Heads of other seeds whose values it was distilled from",
    "kappa": "κ: their mean, less κ standard deviations of their disagreement",
    "seed": "Seed",
}


@dataclass(frozen=True)
class CardFacts:
    """What a card may say. None, or an absent key of `info`: not known, not said."""

    repo_id: str | None = None
    """The head's repository on the Hub."""
    kind: str = "value"
    """"value" or "control"."""
    base_model: str | None = None
    """The base model's id on the Hub; anything else is left out."""
    base_model_revision: str | None = None
    """The commit of that model."""
    reward: str | None = None
    """What the reward is called."""
    reward_mean: float | None = None
    """Mean of the raw reward over the training rollouts."""
    reward_std: float | None = None
    """Its standard deviation."""
    head: str | None = None
    """The head's shape in words."""
    step_size: float | None = None
    """α that the head is used with unless told otherwise."""
    num_steps: int | None = None
    """n that the head is used with unless told otherwise."""
    scale: float | None = None
    """What the u of a control head is multiplied by unless told otherwise."""
    strength: float | None = None
    """Mean KL per token, in nats, that the head is used with unless told otherwise; α or the scale belongs to it."""
    calibration: Sequence[Sequence[float]] = ()
    """Pairs (mean KL per token in nats, the α at n steps, or the scale, that gives it)."""
    custom_generate: bool = False
    """Whether the repository has custom_generate/generate.py."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """The config's `info`. Read: training, curves ([step, value] by name), evaluation (figures by name,
    `name_interval`, `answers`, `seed`), comparison (see comparison_info), tuning (see Search.apply_to), merged ([name,
    weight]), data, data_license, license (the head's), language."""


def card(facts: CardFacts) -> str:
    """The text of README.md: YAML for the Hub, what the head steers, how to use it, training, figures, tuning, limits.

    A number in `info["evaluation"]` is a figure on held-out answers; `answers` there is how many, `seed` the seed, and
    `<name>_interval` a figure's 95 % interval. A list of numbers has one for each equal part of the answer.
    """
    results = _results(facts)
    base_model = _hub_id(facts.base_model)
    shown_results = [(escaped(result.metric_name), _with_interval(result)) for result in results]
    text: str = ModelCard.from_template(
        _yaml(facts, [*results, *_gains(facts)]),
        template_str=Path(__file__).with_name("MODEL_CARD_TEMPLATE.md").read_text(encoding="utf-8"),
        kind=facts.kind,
        title=escaped(facts.repo_id or _title(facts)),
        base_model=f"[{escaped(base_model)}](https://huggingface.co/{base_model})" if base_model else None,
        base_model_revision=code(facts.base_model_revision),
        base_model_arguments=_arguments(base_model, facts.base_model_revision) if base_model else None,
        head_literal=json.dumps(facts.repo_id or "path/to/this/folder"),
        custom_generate=facts.custom_generate,
        reward=code(facts.reward),
        control=_control(facts),
        keyword="recontrol_strength" if facts.strength is not None else f"recontrol_{_multiplier(facts)}",
        multiplier=_multiplier(facts).replace("_", " "),
        calibration=[(f"{kl:g}", f"{step_size:.4g}") for kl, step_size in facts.calibration],
        calibration_states=number(mapping(facts.info, "calibration").get("states")),
        training=list(_training(facts)),
        curves=list(_curves(facts)),
        evaluation=shown_results,
        evaluation_note=_evaluation_note(facts),
        comparison=comparison_lines(facts.info),
        tuning=tuning_lines(facts.info),
    ).content
    return text.rstrip("\n") + _seal(text)


SEAL = "<!-- Written by hf-recontrol, which keeps it once it is edited: "


def is_as_written(data: bytes) -> bool:
    """Whether a card is as `card` wrote it, in this version or another. One that a person edited is kept."""
    text = "\n".join(data.decode("utf-8", "replace").splitlines()).rstrip()
    above, seal, _ = text.rpartition("\n\n" + SEAL)
    return bool(seal) and text == (above + _seal(above)).rstrip()


def _seal(text: str) -> str:
    """A last line, which no page shows, by which an edited card is known."""
    digest = hashlib.sha256("\n".join(text.rstrip("\n").splitlines()).encode()).hexdigest()
    return f"\n\n{SEAL}{digest[:32]} -->\n"


def _yaml(facts: CardFacts, results: list[EvalResult]) -> ModelCardData:
    info, base_model = facts.info, _hub_id(facts.base_model)
    dataset = _dataset_id(info.get("data"))
    more = ["custom_generate"] if facts.custom_generate else []
    more += [REWARD_TAG + one_line(facts.reward)] if facts.reward else []
    return ModelCardData(
        library_name="hf-recontrol",
        pipeline_tag="text-generation",
        tags=[TAGS[0], f"{facts.kind}-head", *TAGS[1:], *more],
        base_model=base_model,
        base_model_relation="adapter" if base_model else None,
        datasets=dataset,
        license=_identifier(info.get("license")),
        language=_identifier(info.get("language")),
        model_name=one_line(facts.repo_id or _title(facts)) if results else None,
        eval_results=results or None,
    )


def _arguments(base_model: str, revision: str | None) -> str:
    """Arguments of from_pretrained, as Python text."""
    return json.dumps(base_model) + (f", revision={json.dumps(one_line(revision))}" if revision else "")


def _title(facts: CardFacts) -> str:
    return f"{facts.kind.capitalize()} head"


def _multiplier(facts: CardFacts) -> str:
    return "scale" if facts.kind == "control" else "step_size"


def _control(facts: CardFacts) -> str | None:
    if facts.scale is not None:
        how = f"scale {facts.scale:.4g}"
    elif facts.step_size is not None and facts.num_steps is not None:
        how = f"α = {facts.step_size:.4g} and n = {facts.num_steps} steps at each token"
    else:
        return None
    return how if facts.strength is None else f"a strength of {facts.strength:g} nats a token ({how})"


def _training(facts: CardFacts) -> Iterator[str]:
    if facts.head:
        yield f"Head: {escaped(facts.head)}"
    if facts.reward:
        scale = "" if facts.reward_mean is None else f", mean {facts.reward_mean:.4g}"
        scale += "" if facts.reward_std is None else f", standard deviation {facts.reward_std:.4g}"
        yield f"Reward: {code(facts.reward)}{scale}"
    merged = facts.info.get("merged")
    for one in merged if isinstance(merged, list) else []:
        if isinstance(one, list) and len(one) == 2 and (weight := number(one[1])) is not None:
            yield f"Merged of: {weight:.4g} × {code(one[0])}"
    if mapping(facts.info, "training"):
        yield f"Objective: {OBJECTIVES.get(facts.kind, facts.kind)}"
    if facts.info.get("data") is not None:
        licence = facts.info.get("data_license")
        yield f"Data: {code(facts.info['data'])}" + (f", licence {code(licence)}" if isinstance(licence, str) else "")
    for name, value in mapping(facts.info, "training").items():
        if isinstance(value, str) or number(value) is not None:
            yield f"{TRAINING_NAMES.get(name) or code(name)}: {code(value) if isinstance(value, str) else value}"


def _curves(facts: CardFacts) -> Iterator[tuple[str | None, str]]:
    for name, points in mapping(facts.info, "curves").items():
        pairs = [pair(point) for point in points] if isinstance(points, list) else []
        shown = [f"{ends[0]:g}: {ends[1]:.4g}" for ends in pairs if ends is not None]
        if shown:
            yield code(name), ", ".join(shown[:MAX_POINTS])


def _results(facts: CardFacts) -> list[EvalResult]:
    evaluation = mapping(facts.info, "evaluation")
    n, seed = number(evaluation.get("answers")), number(evaluation.get("seed"))
    dataset = _dataset_id(facts.info.get("data"))
    results = []
    names = METRIC_NAMES | ({"loss": METRIC_NAMES["objective"]} if facts.kind == "control" else {})
    for name, value in evaluation.items():
        if name in ("answers", "seed") or name.endswith("_interval"):
            continue
        parts = value if isinstance(value, list) else [value]
        interval = pair(evaluation.get(f"{name}_interval")) if len(parts) == 1 else None
        conditions = {"n": n, "seed": seed, "interval": interval}
        for i, part in enumerate(parts):
            where = f", part {i + 1} of {len(parts)} of the answer" if len(parts) > 1 else ""
            if number(part) is not None:
                result = EvalResult(
                    task_type="text-generation",
                    dataset_type=dataset or "rollouts",
                    dataset_name=one_line(facts.info.get("data") or "") or "held-out rollouts",
                    metric_type=one_line(name),
                    metric_name=(names.get(name) or one_line(name)) + where,
                    metric_value=part,
                    metric_args={key: fact for key, fact in conditions.items() if fact is not None} or None,
                )
                results.append(result)
    return results


def _gains(facts: CardFacts) -> list[EvalResult]:
    """What the head gained in a comparison with other methods."""
    dataset = one_line(mapping(mapping(facts.info, "comparison"), "facts").get("dataset") or "") or "prompts"
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="prompts",
            dataset_name=dataset,
            metric_type=one_line(f"{gain['judge']} gain"),
            metric_name=one_line(
                f"Gain over the base model by the {gain['judge']}, in standard deviations of its answers, at "
                f"{gain['nats']:g} nats an answer"
            ),
            metric_value=gain["mean"],
            metric_args={name: gain[name] for name in ("n", "seed", "interval") if gain[name] is not None},
        )
        for gain in comparison_gains(facts.info)
    ]


def _evaluation_note(facts: CardFacts) -> str:
    evaluation = mapping(facts.info, "evaluation")
    answers, seed = number(evaluation.get("answers")), number(evaluation.get("seed"))
    note = f"On {answers} held-out answers" if answers else "On held-out answers"
    note += "" if seed is None else f", seed {seed}"
    has_intervals = any(name.endswith("_interval") for name in evaluation)
    return note + ("; in brackets 95 % intervals of a bootstrap over prompts." if has_intervals else ".")


def _with_interval(result: EvalResult) -> str:
    interval = (result.metric_args or {}).get("interval")
    return f"{result.metric_value:.4g}" + (f" [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else "")


def _identifier(value: object) -> str | None:
    """A licence or language as the Hub writes them: apache-2.0, en."""
    known = (
        isinstance(value, str)
        and len(value) <= 40
        and value.isascii()
        and value.replace("-", "").replace(".", "").isalnum()
    )
    return value.lower() if known and isinstance(value, str) else None


def _dataset_id(value: object) -> str | None:
    """A dataset's id on the Hub has an owner; a bare word may be anything."""
    return _hub_id(value) if isinstance(value, str) and "/" in value else None


def _hub_id(value: object) -> str | None:
    """`value`, if it can be the id of a repository on the Hub."""
    if not isinstance(value, str) or not value.isascii():
        return None
    try:
        validate_repo_id(value)
    except HFValidationError:
        return None
    return value
