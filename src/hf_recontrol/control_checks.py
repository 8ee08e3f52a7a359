"""What a control may be fitted to: rollouts of this very model, drawn from its own softmax, whose rewards differ."""

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from transformers import PreTrainedModel

from .answers import evaluating
from .config_checks import shown
from .control import Controller
from .errors import HeadMismatch
from .fitting import parts_of, rewards_of
from .forwards import logits_of
from .hooks import lm_head
from .kl_bound import kl_divergence
from .replay import OWN_SOFTMAX
from .value_head import ValueHead

CHECKED_ANSWERS = 4
CHECKED_TOKENS = 64  # of each
SAME_MODEL = 0.05  # nats: bfloat16 and another batch shape give 0.001, another model 1 or more
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "do_sample": (True,),
    "temperature": (1.0,),
    "top_p": (1.0,),
    "top_k": (0,),
    "min_p": (0.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "guidance_scale": (1.0,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "length_penalty": (1.0,),
    "diversity_penalty": (0.0,),
    "remove_invalid_values": (False,),
}
"""Values of generate()'s settings under which a token is drawn from the softmax of the logits."""
HARMLESS = set(
    """max_length max_new_tokens max_time stop_strings early_stopping eos_token_id pad_token_id bos_token_id
    decoder_start_token_id num_return_sequences renormalize_logits use_cache cache_implementation cache_config
    compile_config disable_compile token_healing model_defaults transformers_version output_attentions
    output_hidden_states output_scores output_logits return_dict_in_generate""".split()  # noqa: SIM905
)
"""Settings that decide where an answer ends, or how it is computed, but not the distribution of a token."""


def unlike_softmax(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of generate()'s settings that change what a token is drawn from, or may."""
    return {
        name: value
        for name, value in settings.items()
        if value is not None
        and name not in HARMLESS
        and not name.startswith(("recontrol_", "_"))
        and value not in NEUTRAL.get(name, ())
    }


def check_lm_head(model: PreTrainedModel, dataset: Any, behavior: Controller | None = None) -> None:
    """Refuse a model whose LM head, given the stored states, does not give the logits of the model itself.

    Runs the model over a few stored answers, and compares.

    Raises:
        HeadMismatch: another model wrote the rollouts, or this one's logits are not a function of h_t alone.
        ValueError: rollouts of a control that is not `behavior`, or without the prompts' token ids.
    """
    for part in parts_of(dataset):
        if hasattr(part, "fingerprint"):
            _check_sampling(part.fingerprint, behavior)
        for i in range(min(CHECKED_ANSWERS, len(part))):
            answer = part[i]
            prompt = part.row(i).get("prompt_token_ids") if hasattr(part, "row") else answer.get("prompt_token_ids")
            if prompt is None:
                raise ValueError(
                    "The rollouts do not have their prompts' token ids, so nothing can show that their states are this "
                    "model's. Collect them with collect_rollouts."
                )
            _check_answer(model, list(prompt), answer)


def _check_sampling(fingerprint: dict[str, Any], behavior: Controller | None) -> None:
    under = fingerprint.get("control")
    if under != (None if behavior is None else behavior.facts()):
        found = "no control" if not under else "a control" if behavior is None else "another control than behavior"
        raise ValueError(
            f"The rollouts were collected under {found}. Pass as behavior= the Controller they were collected under, "
            "or None for those of the base model."
        )
    generation = fingerprint.get("generation") or {}
    if generation.get("features_from") == "dataset":
        _check_vouched(generation.get("sampling"))
        return
    given = {name: value for name, value in generation.items() if value is not None}
    check_sampling((generation.get("model_defaults") or {}) | given)


def _check_vouched(sampling: object) -> None:
    if sampling != OWN_SOFTMAX:
        raise ValueError(
            "A control is fitted to answers sampled from the model's own distribution, as its ratios divide by their "
            "probabilities, but these were taken from a dataset, and nothing says how they were sampled. If it was "
            "from this very model at temperature 1, with nothing that changes its logits, vouch for it: "
            f'collect_rollouts(…, features_from="dataset", sampling="{OWN_SOFTMAX}"). A value head fits any answers.'
        )


def check_sampling(settings: Mapping[str, Any]) -> None:
    """Raise ValueError unless under these settings of generate() a token is drawn from the softmax of the logits."""
    if changed := unlike_softmax(settings):
        raise ValueError(
            "A control is fitted to answers sampled from the model's own distribution, as its ratios divide by their "
            f"probabilities, but these are collected with {shown(changed)}. Collect with temperature=1, top_p=1, "
            "top_k=0 and nothing that changes the logits. What model.generation_config says is undone there, or by its "
            'neutral value, say generation_kwargs={"repetition_penalty": 1.0}.'
        )


def _check_answer(model: PreTrainedModel, prompt: list[int], answer: Any) -> None:
    states = answer["hidden_states"][:CHECKED_TOKENS]
    token_ids = torch.as_tensor(answer["token_ids"])[: len(states)]
    ids = torch.cat([torch.tensor(prompt), token_ids[:-1]])[None].to(model.device)
    sizes = model.config.get_text_config()
    if states.shape[-1] != getattr(lm_head(model), "in_features", states.shape[-1]) or ids.max() >= sizes.vocab_size:
        raise HeadMismatch(
            f"The rollouts have hidden states {states.shape[-1]} wide and the token id {int(ids.max())}, but "
            f"{type(model).__name__} is {sizes.hidden_size} wide and knows {sizes.vocab_size} tokens. Pass the model "
            "that wrote them."
        )
    with torch.no_grad(), evaluating(model):
        enough = {"logits_to_keep": len(states)} if "logits_to_keep" in signature(model.forward).parameters else {}
        own = model(input_ids=ids, **enough).logits[0, -len(states) :]
        kl = float(kl_divergence(logits_of(model, states), own).mean())
    if not kl < SAME_MODEL:
        raise HeadMismatch(
            f"The LM head of {type(model).__name__}, given the stored hidden states, gives other logits than the model "
            f"itself over the same text: {kl:.3g} nats apart, at most {SAME_MODEL} are rounding. Were the rollouts "
            "written by this very model? A model whose logits depend on more than the last hidden state cannot be used."
        )


def check_control_inputs(base_model: object, critic: object, behavior: object = None) -> None:
    """Raise TypeError where one of them is something else."""
    for name, given, kind, needed in (
        ("base_model", base_model, PreTrainedModel, "the transformers model that wrote the rollouts"),
        ("critic", critic, ValueHead, "a ValueHead"),
        ("behavior", behavior, Controller, "the Controller that the rollouts were collected under"),
    ):
        if given is not None and not isinstance(given, kind):
            raise TypeError(f"{name} is a {type(given).__name__}; pass {needed}, or leave it out.")


def check_rewards_differ(dataset: Any) -> None:
    """Raise ValueError where all rewards are equal: what would be fitted is noise."""
    rewards = rewards_of(dataset)
    if rewards.min() == rewards.max():
        raise ValueError(
            f"All {len(rewards)} rewards are {rewards[0].item():g}, so no control is better than another. Collect "
            "rollouts that differ in reward."
        )
