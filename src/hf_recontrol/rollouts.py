"""collect_rollouts: generate answers, score them, and keep the hidden state that predicted each of their tokens."""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .config_checks import shown
from .control import Controller
from .finite_states import check_share, left_out, without_bad_states
from .hooks import model_name
from .preemption import Preemption
from .processes import Processes, check_own
from .rewards import RESERVED, RewardFunc, Rewards, Text
from .rollout_blocks import Collector, evaluating, seeded
from .rollout_store import RolloutDataset, RolloutStore

COLLECTOR_VERSION = 1  # raised when the same settings give other rollouts: a folder is not resumed across that

_OWN_GENERATE = set(
    """inputs input_ids inputs_embeds attention_mask do_sample max_length max_new_tokens num_return_sequences
    pad_token_id return_dict_in_generate stop_strings stopping_criteria temperature top_k top_p""".split()  # noqa: SIM905
)


def collect_rollouts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Any,
    reward_funcs: RewardFunc | list[RewardFunc] | Rewards,
    output_dir: str | os.PathLike[str],
    *,
    reward_weights: Sequence[float] | None = None,
    num_return_sequences: int = 1,
    block_size: int = 64,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop_strings: str | list[str] | None = None,
    drop_truncated: bool = False,
    seed: int = 0,
    columns: Mapping[str, Sequence[Any]] | None = None,
    controller: Controller | None = None,
    generation_kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> RolloutDataset:
    """Sample answers to prompts, score them, and write them with their hidden states into a folder.

    The disk takes hidden_size × bytes per number for each token: 1 MiB per 128 tokens of a 7B model in bfloat16.
    Interrupted in any way, call it again with the same arguments: committed blocks are kept, the others are made as
    they would have been (bit for bit, on the same machine and versions). On SIGTERM, in the main thread, the block in
    hand is finished, for at most 20 seconds, and SystemExit(143) raised. Torch's random state, the tokenizer and the
    model's mode are left as they were.

    In a script that `accelerate launch` or torchrun has started in several processes, each calls this with the same
    arguments, and a model of its own. They share the blocks out, wait for each other, and return the same rollouts as
    one process would; their number may change when a run is resumed.

    State s_t is the one that predicts token t (Kong et al. 2024, arXiv:2406.05954, section 4): an answer that ended by
    EOS has a state for EOS, its last.

    Args:
        model: a causal language model, on its device.
        tokenizer: its tokenizer. Needs no pad token.
        prompts: texts (tokenised with special tokens), or message lists (through the chat template), or a
            datasets.Dataset with them as column "prompt"; its other columns go to the reward functions.
        reward_funcs: see Rewards.
        output_dir: made, or resumed. Other settings than it was begun with are refused.
        reward_weights: one for each reward function; 1 where None.
        num_return_sequences: answers to each prompt.
        block_size: prompts generated together, and lost together when interrupted. It decides what is sampled, for a
            sampled row depends on its batch.
        max_new_tokens: where an answer is cut; finish_reason "length", and its last state is terminal like that of EOS.
        temperature: > 0, or 0 for greedy decoding.
        top_p: nucleus, 0 to 1; 1 is off.
        top_k: the k likeliest tokens; 0 is off.
        stop_strings: texts that end an answer. Like EOS, one belongs to the tokens and the states (the token that
            completes it is the last), not to the completion's text; finish_reason "stop".
        drop_truncated: keep no states of answers cut at max_new_tokens; they are in the table all the same.
        seed: block b samples with a seed made from this and b.
        columns: further columns for the reward functions, each with a value for each prompt.
        controller: the control that the answers are written under, to improve it on its own answers; None is the model
            itself. The states are those before the edit.
        generation_kwargs: more for generate(), plain JSON values.
        progress: show a bar.

    Returns:
        The folder's RolloutDataset. An answer that is EOS alone (finish_reason "empty") has no states, and is in the
        table only.

    Raises:
        TypeError, ValueError: an argument out of bounds; checked, as the next, before anything is generated. Also a
            model that is split over the processes.
        CollectError: a prompt with no room for its answer, a folder with other settings or in use by another run, a
            wrong return of a reward function, a full disk, another process of the run that has ended, or hidden states
            that are not finite in more than 5 % of the answers. Where they are fewer, these answers have no states, and
            a warning says how many.
    """
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; rollouts are of decoder-only models.")
    if controller is not None and not isinstance(controller, Controller):
        raise TypeError(f"controller is a {type(controller).__name__}; pass a Controller(head), or None.")
    texts, extra = _as_columns(prompts, columns)
    _check_counts(num_return_sequences=num_return_sequences, block_size=block_size, max_new_tokens=max_new_tokens)
    if num_return_sequences > 1 and temperature == 0:
        raise ValueError(
            f"temperature=0 gives the same answer {num_return_sequences} times. Set a temperature, or leave "
            "num_return_sequences out."
        )
    stop = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or [])
    generation = {"max_new_tokens": max_new_tokens, **_sampling(temperature, top_p, top_k), **_more(generation_kwargs)}
    if not isinstance(reward_funcs, Rewards):
        reward_funcs = Rewards(reward_funcs, reward_weights, device=model.device)
    reward_funcs.check(conversational=_is_conversational(texts, tokenizer))
    collector = Collector(
        model, tokenizer, reward_funcs, texts, extra, num_return_sequences, drop_truncated, stop, generation, controller
    )
    fingerprint = {
        **_model_facts(model),
        "prompts": len(texts),
        "prompts_sha256": _hash(_as_json(text, extra, i) for i, text in enumerate(texts)),
        "prompt_token_ids_sha256": _hash(repr(ids) for ids in collector.checked_token_ids()),
        "tokenizer_sha256": _hash(_tokenizer_facts(tokenizer)),
        "generation": {**generation, "stop_strings": stop, "model_defaults": generation_defaults(model)},
        "num_return_sequences": num_return_sequences,
        "block_size": block_size,
        "drop_truncated": drop_truncated,
        "seed": seed,
        "rewards": dict(zip(reward_funcs.names, reward_funcs.weights, strict=True)),
        "collector_version": COLLECTOR_VERSION,
    }
    if controller is not None:
        fingerprint["control"] = controller.facts()
    _collect_together(collector, output_dir, fingerprint, progress)
    return RolloutDataset(output_dir, verify=False)  # the store has checked each block, or has just written it


def _collect_together(
    collector: Collector, output_dir: str | os.PathLike[str], fingerprint: dict[str, Any], progress: bool
) -> None:
    """Make the folder complete, with the other processes if there are some."""
    with Preemption() as preemption, Processes(collector.model.device.type) as processes, evaluating(collector.model):
        if processes.size > 1:
            check_own(collector.model)
        first = processes.rank == 0
        if not first:
            processes.wait()  # until the first has mended the folder
        with RolloutStore(output_dir, fingerprint, process=processes.rank) as store:
            if first:
                processes.wait()
            _collect_missing(collector, store, fingerprint, processes, preemption, progress and first)
            if not first:
                store.close()
            processes.wait()
            if first:
                store.take_over()
                answers, not_finite = store.answers
                if not_finite:
                    warnings.warn(left_out(answers, not_finite, output_dir), stacklevel=3)
        processes.wait()


def _collect_missing(
    collector: Collector,
    store: RolloutStore,
    fingerprint: dict[str, Any],
    processes: Processes,
    preemption: Preemption,
    progress: bool,
) -> None:
    """Collect those of the missing blocks that no other process has begun."""
    prompts, answers = range(len(collector.prompts)), collector.num_return_sequences
    starts = prompts[:: fingerprint["block_size"]]
    committed = store.committed
    there = processes.from_first(torch.tensor([block in committed for block in range(len(starts))]))
    collected, not_finite = store.answers
    with logging.tqdm(total=answers * len(prompts), desc="rollouts", unit="answer", disable=not progress) as bar:
        for block, start in enumerate(starts):
            prompt_ids = prompts[start : start + fingerprint["block_size"]]
            if not there[block] and (processes.size == 1 or store.claim(block)):
                with preemption.finishing():
                    with seeded(collector.model.device.type, _block_seed(fingerprint["seed"], block)):
                        contents = without_bad_states(collector.collect(prompt_ids))
                    collected += len(contents[-1])
                    not_finite += sum(row.get("finite") is False for row in contents[-1])
                    check_share(collected, not_finite)
                    store.commit(block, *contents)
            bar.update(answers * len(prompt_ids))


def _as_columns(prompts: Any, columns: Mapping[str, Sequence[Any]] | None) -> tuple[Sequence[Text], dict[str, Any]]:
    found: dict[str, Any] = {}
    if hasattr(prompts, "column_names"):
        if "prompt" not in prompts.column_names:
            raise ValueError(f"The dataset has the columns {prompts.column_names}; it must have one called 'prompt'.")
        found = {name: prompts[name] for name in prompts.column_names if not name.startswith(("prompt", "completion"))}
        prompts = prompts["prompt"]
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


def _is_conversational(prompts: Sequence[Text], tokenizer: PreTrainedTokenizerBase) -> bool:
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


def _sampling(temperature: float, top_p: float, top_k: int) -> dict[str, Any]:
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1 or type(top_k) is not int or top_k < 0:
        raise ValueError(
            f"temperature={temperature!r}, top_p={top_p!r}, top_k={top_k!r}; expected are a temperature ≥ 0 (0 is "
            "greedy), 0 < top_p ≤ 1 and an integer top_k ≥ 0 (0 is off)."
        )
    if temperature == 0:
        return {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}  # the values that mean "unset"
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if type(count) is not int or count < 1:
            raise ValueError(f"{name} is {count!r}; it must be an integer ≥ 1.")


def _more(generation_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
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


def _model_facts(model: PreTrainedModel) -> dict[str, Any]:
    text_config = model.config.get_text_config()
    return {
        "base_model_name_or_path": model_name(model),
        "base_model_revision": getattr(model.config, "_commit_hash", None),
        "base_model_type": model.config.model_type,
        "hidden_size": getattr(text_config, "hidden_size", None),
        "config_sha256": _hash([_config_json(model)]),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights_sample_sha256": _hash(_samples(model)),
    }


def _config_json(model: PreTrainedModel) -> str:
    """What of the config decides the forward pass, and is not in the fingerprint by itself."""
    config = model.config.to_diff_dict()
    others = {"transformers_version", "_name_or_path", "dtype", "use_cache"}
    kept = {name: value for name, value in config.items() if name not in others and not name.endswith("_token_id")}
    return json.dumps(kept, sort_keys=True, default=str)


def _tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """What the answers' texts and ends depend on."""
    yield f"eos {tokenizer.eos_token_id}"
    for token, i in sorted(tokenizer.get_vocab().items()):
        yield f"{i} {token}"


def _samples(model: PreTrainedModel) -> Iterator[str]:
    """64 values of each weight: enough to tell two models of one name apart, and quick with any."""
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and not tensor.is_meta:
            flat = tensor.detach().reshape(-1)
            sample = flat[:: max(1, len(flat) // 64)][:64].cpu().contiguous()
            yield f"{name} {tuple(tensor.shape)} {tensor.dtype} {sample.view(torch.uint8).tolist()}"


def generation_defaults(model: PreTrainedModel) -> Any:
    """What of the model's own generation config is not transformers' default, as plain JSON."""
    defaults = model.generation_config.to_diff_dict()
    defaults.pop("transformers_version", None)
    return json.loads(json.dumps(defaults, default=str))


def _as_json(prompt: Text, columns: Mapping[str, Sequence[Any]], i: int) -> str:
    return json.dumps([prompt, {name: column[i] for name, column in columns.items()}], sort_keys=True, default=str)


def _hash(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _block_seed(seed: int, block: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{block}".encode()).digest()[:7], "big")
