"""What collect_rollouts was asked for: checked at the door, and as plain JSON that a resumed run is compared with."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config_checks import shown
from .fingerprints import sha256_of, weight_samples
from .hooks import model_name
from .rewards import RESERVED, Text
from .rollout_blocks import GREEDY, Collector

COLLECTOR_VERSION = 1  # raised when the same settings give other rollouts: a folder is not resumed across that

_OWN_GENERATE = set(
    """inputs input_ids inputs_embeds attention_mask do_sample max_length max_new_tokens num_return_sequences
    pad_token_id return_dict_in_generate stop_strings stopping_criteria temperature top_k top_p""".split()  # noqa: SIM905
)


def as_columns(prompts: Any, columns: Mapping[str, Sequence[Any]] | None) -> tuple[Sequence[Text], dict[str, Any]]:
    found: dict[str, Any] = {}
    if hasattr(prompts, "column_names"):
        if "prompt" not in prompts.column_names:
            raise ValueError(f"The dataset has the columns {prompts.column_names}; it must have one called 'prompt'.")
        own = ("prompt", "completion")
        # [:] makes lists, for a datasets.Column reads its table at each index.
        found = {name: prompts[name][:] for name in prompts.column_names if not name.startswith(own)}
        prompts = prompts["prompt"][:]
    found |= columns or {}
    for name, column in found.items():
        if name in RESERVED:
            raise ValueError(f"A column is called {name!r}, which reward functions are given by us. Rename it.")
        if len(column) != len(prompts):
            raise ValueError(
                f"The column {name!r} has {len(column)} values for {len(prompts)} prompts; give one for each."
            )
    if isinstance(prompts, str) or len(prompts) == 0:
        raise ValueError(f"prompts is {shown(prompts)}; expected is a list of one text or message list, or more.")
    return prompts, found


def is_conversational(prompts: Sequence[Text], tokenizer: PreTrainedTokenizerBase) -> bool:
    kinds = {type(prompt) for prompt in prompts}
    if kinds not in ({str}, {list}) or not all(prompts):
        raise ValueError(
            f"The prompts are of the kinds {sorted(kind.__name__ for kind in kinds)}, or one is empty; expected are "
            'texts, or lists of messages {"role": …, "content": …}, all of one kind.'
        )
    if kinds == {list} and tokenizer.chat_template is None:
        raise ValueError(
            "The prompts are message lists, but the tokenizer has no chat template. Set tokenizer.chat_template, or "
            "give texts as prompts."
        )
    return kinds == {list}


def check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if type(count) is not int or count < 1:
            raise ValueError(f"{name} is {count!r}; it must be an integer ≥ 1.")


def sampling_of(temperature: float, top_p: float, top_k: int) -> dict[str, Any]:
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1 or type(top_k) is not int or top_k < 0:
        raise ValueError(
            f"temperature={temperature!r}, top_p={top_p!r}, top_k={top_k!r}; expected are a temperature ≥ 0 (0 is "
            "greedy), 0 < top_p ≤ 1 and an integer top_k ≥ 0 (0 is off)."
        )
    if temperature == 0:
        return dict(GREEDY)
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}


def more_generation(generation_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    more = dict(generation_kwargs or {})
    refused = sorted(name for name in more if name in _OWN_GENERATE or name.startswith(("recontrol_", "output_")))
    if refused:
        raise ValueError(
            f"generation_kwargs has {refused}, which collect_rollouts sets itself. Use its own arguments "
            "(temperature, max_new_tokens, stop_strings, controller, …)."
        )
    try:
        return dict(json.loads(json.dumps(more, allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"generation_kwargs must be plain JSON values, so that a resumed run can be compared, but: {error}."
        ) from error


def fingerprint_of(collector: Collector, prompt_token_ids_sha256: str, answered: int) -> dict[str, Any]:
    """All that decides what a collector's answers are, but how they are cut into blocks and seeded.

    Args:
        answered: of its prompts; the others are too long.
    """
    texts, generation = collector.prompts, collector.generation
    prompts = (_as_json(text, collector.columns, i) for i, text in enumerate(texts))
    defaults = generation_defaults(collector.model)
    found = {
        **model_facts(collector.model),
        "prompts": len(texts),
        "prompts_sha256": sha256_of(prompts),
        "prompt_token_ids_sha256": prompt_token_ids_sha256,
        "tokenizer_sha256": sha256_of(tokenizer_facts(collector.tokenizer)),
        "generation": {**generation, "stop_strings": collector.stop_strings, "model_defaults": defaults},
        "num_return_sequences": collector.num_return_sequences,
        "drop_truncated": collector.drop_truncated,
        **collector.rewards.facts(),
        "collector_version": COLLECTOR_VERSION,
    }
    if collector.controller is not None:
        found["control"] = collector.controller.facts()
    if answered < len(texts):
        found["skipped_prompts"] = len(texts) - answered
    return found


def model_facts(model: PreTrainedModel) -> dict[str, Any]:
    """Which model, and with what weights."""
    text_config = model.config.get_text_config()
    return {
        "base_model_name_or_path": model_name(model),
        "base_model_revision": getattr(model.config, "_commit_hash", None),
        "base_model_type": model.config.model_type,
        "hidden_size": getattr(text_config, "hidden_size", None),
        "config_sha256": sha256_of([_config_json(model)]),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights_sample_sha256": sha256_of(weight_samples(model)),
    }


def _config_json(model: PreTrainedModel) -> str:
    """What of the config decides the forward pass, and is not in the fingerprint by itself."""
    config = model.config.to_diff_dict()
    others = {"transformers_version", "_name_or_path", "dtype", "use_cache"}
    kept = {name: value for name, value in config.items() if name not in others and not name.endswith("_token_id")}
    return json.dumps(kept, sort_keys=True, default=str)


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """What the answers' texts and ends depend on."""
    yield f"eos {tokenizer.eos_token_id}"
    for token, i in sorted(tokenizer.get_vocab().items()):
        yield f"{i} {token}"


def generation_defaults(model: PreTrainedModel) -> Any:
    """What of the model's own generation config is not transformers' default, as plain JSON."""
    defaults = model.generation_config.to_diff_dict()
    defaults.pop("transformers_version", None)
    return json.loads(json.dumps(defaults, default=str))


def _as_json(prompt: Text, columns: Mapping[str, Sequence[Any]], i: int) -> str:
    return json.dumps([prompt, {name: column[i] for name, column in columns.items()}], sort_keys=True, default=str)
