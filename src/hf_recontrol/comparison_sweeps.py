"""Beside the table: what α and n do, what a token costs by batch size, and one answer seen from close up."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from .answers import evaluating, padding_token_id, seeded
from .baselines import Base, Method, Steered
from .coherence import Coherence
from .comparison import Comparison, Entry, figures
from .control_config import ControlConfig
from .forwards import enabled, last_hidden_states
from .landscape import Landscape, value_landscape
from .rewards import Rewards, Text
from .sampling import Sampler
from .trace import Trace
from .value_head import ValueHead

STEP_SIZES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Multiples of the head's own α."""
NUM_STEPS = (3, 10, 30, 100)
ROUNDS = 3


def sweep_rows(
    comparison: Comparison,
    head: ValueHead,
    name: str,
    judges: Mapping[str, Rewards],
    *,
    step_sizes: Sequence[float] = STEP_SIZES,
    num_steps: Sequence[int] = NUM_STEPS,
    coherence: Coherence | None = None,
) -> list[dict[str, Any]]:
    """The figures of a value head at each α and n, with nothing that holds it back. See comparison.figures.

    α is step_sizes × the head's own α × the head's own n / n: what one step of the whole length would be stays.

    Args:
        comparison: on prompts that nothing is tested on; keeps the answers.
        head, name: of the rows.
        judges: by name.
        coherence: also measured where given.

    Returns:
        Rows with "step_size" and "num_steps" too.
    """
    base = comparison.answered(Entry(Base()))
    own = head.config.control
    rows = []
    for n in num_steps:
        for share in step_sizes:
            alpha = share * own.step_size * own.num_steps / n
            config = ControlConfig(step_size=alpha, num_steps=n, max_kl=float("inf"))
            method = Steered(f"{name}, n = {n}, {share:g} × α", head, config)
            row = figures(comparison.answered(Entry(method)), base, judges, coherence=coherence)
            rows.append(row | {"method": name, "step_size": alpha, "num_steps": n})
    return rows


def time_rows(
    sampler: Sampler, prompts: Sequence[Text], methods: Sequence[Method], batch_sizes: Sequence[int]
) -> list[dict[str, Any]]:
    """Seconds per token of each method at each batch size: the median of three rounds in which they take turns.

    A batch is answered once before, unmeasured. Seconds are of all that a method does, divided by the tokens of all its
    answers.

    Raises:
        ValueError: fewer prompts than the largest batch has.
    """
    if len(prompts) < max(batch_sizes):
        raise ValueError(
            f"There are {len(prompts)} prompts for a batch of {max(batch_sizes)}. Pass more prompts or smaller batches."
        )
    cells = [(method, size) for size in batch_sizes for method in methods]
    seconds: dict[int, list[float]] = {place: [] for place in range(len(cells))}
    for number in range(ROUNDS + 1):
        for place, (method, size) in enumerate(cells):
            took = _seconds_per_token(replace(sampler, batch_size=size, meters=False), prompts[:size], method)
            if number:
                seconds[place].append(took)
    return [
        {"method": method.name, "batch_size": size, "seconds_per_token": median(seconds[place])}
        for place, (method, size) in enumerate(cells)
    ]


def _seconds_per_token(sampler: Sampler, prompts: Sequence[Text], method: Method) -> float:
    start = time.perf_counter()
    answers = method.answer(sampler, prompts)
    if sampler.model.device.type == "cuda":
        torch.cuda.synchronize(sampler.model.device)
    return (time.perf_counter() - start) / sum(len(row["token_ids"]) for rows in answers for row in rows)


def close_up(sampler: Sampler, prompt: Text, head: ValueHead) -> tuple[Landscape, Trace]:
    """V about the state at the end of a prompt, and the trace of an answer to it, steered as the head says itself."""
    model, eos = sampler.model, sampler.eos_token_ids
    ids = torch.tensor([sampler.prompt_token_ids(prompt)], device=model.device)
    states, _ = last_hidden_states(model, ids, torch.ones_like(ids))
    settings: dict[str, Any] = {"max_new_tokens": sampler.max_new_tokens, "eos_token_id": eos or None}
    with enabled(model), evaluating(model), seeded(model.device.type, sampler.seed):
        output = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pad_token_id=padding_token_id(sampler.tokenizer, eos),
            return_dict_in_generate=True,
            recontrol_value_head=head,
            recontrol_trace=True,
            **(settings | sampler.generation),
        )
    return value_landscape(head, states[0]), output.recontrol_trace
