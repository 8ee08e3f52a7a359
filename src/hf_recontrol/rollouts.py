"""collect_rollouts: generate answers, score them, and keep the hidden state that predicted each of their tokens."""

import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .answers import evaluating, seeded
from .control import Controller
from .finite_states import check_share, left_out, without_bad_states
from .preemption import Preemption
from .processes import Processes, check_own
from .prompts import stop_strings_of
from .replay import Replay, given_answers, rewards_or_given
from .rewards import RewardFunc, Rewards
from .rollout_blocks import AnswerEngine, Collector
from .rollout_dataset import RolloutDataset
from .rollout_settings import as_columns, check_counts, fingerprint_of, is_conversational, more_generation, sampling_of
from .rollout_store import RolloutStore


def collect_rollouts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Any,
    reward_funcs: RewardFunc | list[RewardFunc] | Rewards | None,
    output_dir: str | os.PathLike[str],
    *,
    features_from: str = "generation",
    sampling: str | None = None,
    reward_weights: Sequence[float] | None = None,
    num_return_sequences: int = 1,
    block_size: int = 64,
    max_prompt_tokens: int | None = None,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop_strings: str | list[str] | None = None,
    drop_truncated: bool = False,
    seed: int = 0,
    columns: Mapping[str, Sequence[Any]] | None = None,
    controller: Controller | None = None,
    engine: AnswerEngine | None = None,
    generation_kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> RolloutDataset:
    """Sample answers to prompts, or take given ones, score them, and write them with their hidden states into a folder.

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

    features_from="dataset" generates nothing: `prompts` is a datasets.Dataset with the columns
    - prompt and completion: texts, or message lists and [{"role": "assistant", "content": text}]. A completion is
      tokenised by itself, without special tokens, so that the prompt's tokens (behind a chat template, with its
      generation prompt) stay what they are; EOS is put behind it. And, where there are any,
    - completion_ids (or token_ids, the name in a table of rollouts): token ids of the answers, with EOS where they have
      one, taken as they are instead of the completions; prompt_token_ids likewise;
    - finish_reason: "length" or "stop" where no EOS belongs behind a completion;
    - reward: a number or None, where reward_funcs is None.
    One forward of each block gives the states, those of generating up to rounding.

    Args:
        model: a causal language model, on its device.
        tokenizer: its tokenizer. Needs no pad token.
        prompts: texts (tokenised with special tokens), or message lists (through the chat template), or a
            datasets.Dataset with them as column "prompt"; its other columns go to the reward functions.
        reward_funcs: see Rewards. None takes a dataset's column "reward", with features_from="dataset".
        output_dir: made, or resumed. Other settings than it was begun with are refused.
        features_from: "generation", or "dataset" for answers that exist, see above.
        sampling: "own softmax" vouches that a dataset's answers were sampled from this very model at temperature 1,
            with nothing that changes its logits. Control heads are fitted to such answers only; value heads to any.
        reward_weights: one for each reward function; 1 where None.
        num_return_sequences: answers to each prompt.
        block_size: prompts generated (or replayed) together, and lost together when interrupted. It decides what is
            sampled, for a sampled row depends on its batch.
        max_prompt_tokens: longer prompts are skipped; None is as many as leave their answer room in the model's
            context. How many were is logged and stands in the fingerprint; a row's prompt_id counts them all.
        max_new_tokens: where an answer is cut; finish_reason "length", and its last state is terminal like that of EOS.
        temperature: > 0, or 0 for greedy decoding.
        top_p: nucleus, 0 to 1; 1 is off.
        top_k: the k likeliest tokens; 0 is off.
        stop_strings: texts that end an answer. Like EOS, one belongs to the tokens and the states (the token that
            completes it is the last), not to the completion's text; finish_reason "stop". None takes those of the
            recipe that load_prompts loaded the prompts by, [] takes none.
        drop_truncated: keep no states of answers cut at max_new_tokens; they are in the table all the same.
        seed: block b samples with a seed made from this and b.
        columns: further columns for the reward functions, each with a value for each prompt.
        controller: the control that the answers are written under, to improve it on its own answers; None is the model
            itself. The states are those before the edit.
        engine: answers in place of the model's generate(): VllmAnswers(model), of serving/vllm_rollouts.py. None is the
            model itself.
        generation_kwargs: more for generate(), plain JSON values.
        progress: show a bar.

    Returns:
        The folder's RolloutDataset. An answer that is EOS alone (finish_reason "empty") has no states, and is in the
        table only.

    Raises:
        TypeError, ValueError: an argument out of bounds; checked, as the next, before anything is generated. Also a
            model that is split over the processes.
        CollectError: a prompt without tokens, or all without room for their answers, a folder with other settings or in
            use by another run, a wrong return of a reward function, a full disk, another process of the run that has
            ended, or hidden states that are not finite in more than 5 % of the answers. Where they are fewer, these
            answers have no states, and a warning says how many.
        SteeringNotApplied: one forward of this model does not give the states of generating, and the answers are a
            dataset's.
    """
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; rollouts are of decoder-only models.")
    if controller is not None and not isinstance(controller, Controller):
        raise TypeError(f"controller is a {type(controller).__name__}; pass a Controller(head), or None.")
    given = _given_answers(
        prompts,
        features_from,
        sampling,
        num_return_sequences=num_return_sequences,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop_strings=stop_strings,
        controller=controller,
        engine=engine,
    )
    if engine is not None and controller is not None:
        raise ValueError("An engine answers without a controller. Leave one of the two out.")
    texts, extra = as_columns(prompts, columns)
    check_counts(num_return_sequences=num_return_sequences, block_size=block_size, max_new_tokens=max_new_tokens)
    if max_prompt_tokens is not None:
        check_counts(max_prompt_tokens=max_prompt_tokens)
    if num_return_sequences > 1 and temperature == 0:
        raise ValueError(
            f"temperature=0 gives the same answer {num_return_sequences} times. Set a temperature, or leave "
            "num_return_sequences out."
        )
    ends = stop_strings_of(prompts) if stop_strings is None else stop_strings
    stop = [ends] if isinstance(ends, str) else list(ends)
    generation = {
        "max_new_tokens": max_new_tokens,
        **sampling_of(temperature, top_p, top_k),
        **more_generation(generation_kwargs),
    }
    if engine is not None:
        engine.check(generation)
    if given is not None:
        stop, generation = [], {"features_from": "dataset", "sampling": sampling, **more_generation(generation_kwargs)}
        reward_funcs = rewards_or_given(prompts, reward_funcs)
    if reward_funcs is None:
        raise ValueError("reward_funcs is None; answers that are generated need a reward. Pass a function or a model.")
    if not isinstance(reward_funcs, Rewards):
        reward_funcs = Rewards(reward_funcs, reward_weights, device=model.device)
    reward_funcs.check(conversational=is_conversational(texts, tokenizer))
    common = (model, tokenizer, reward_funcs, texts, extra, num_return_sequences, drop_truncated, stop, generation)
    collector = Collector(*common, controller, engine) if given is None else Replay(*common, given=given)
    prompt_ids, token_ids_sha256 = collector.fitting(max_prompt_tokens)
    fingerprint = fingerprint_of(collector, token_ids_sha256, len(prompt_ids))
    fingerprint |= {"block_size": block_size, "seed": seed, **(engine.facts if engine is not None else {})}
    if max_prompt_tokens is not None:
        fingerprint["max_prompt_tokens"] = max_prompt_tokens
    _collect_together(collector, prompt_ids, output_dir, fingerprint, progress)
    return RolloutDataset(output_dir, verify=False)  # the store has checked each block, or has just written it


def _collect_together(
    collector: Collector,
    prompts: Sequence[int],
    output_dir: str | os.PathLike[str],
    fingerprint: dict[str, Any],
    progress: bool,
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
            _collect_missing(collector, prompts, store, fingerprint, processes, preemption, progress and first)
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
    prompts: Sequence[int],
    store: RolloutStore,
    fingerprint: dict[str, Any],
    processes: Processes,
    preemption: Preemption,
    progress: bool,
) -> None:
    """Collect those of the missing blocks that no other process has begun."""
    answers = collector.num_return_sequences
    starts = range(0, len(prompts), fingerprint["block_size"])
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


def _given_answers(prompts: Any, features_from: str, sampling: str | None, **generating: Any) -> dict[str, Any] | None:
    """The columns with answers; None where answers are generated."""
    if features_from not in ("generation", "dataset") or (features_from == "generation" and sampling is not None):
        raise ValueError(
            f"features_from is {features_from!r} and sampling {sampling!r}; expected is features_from='generation' "
            "without sampling, or features_from='dataset' for answers that exist."
        )
    if features_from == "generation":
        return None
    defaults = signature(collect_rollouts).parameters
    changed = sorted(name for name, value in generating.items() if value != defaults[name].default)
    if changed:
        raise ValueError(f"features_from='dataset' generates nothing, but {changed} were given. Leave them out.")
    return given_answers(prompts, sampling)


def _block_seed(seed: int, block: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{block}".encode()).digest()[:7], "big")
