"""A comparison: every method's answers to the same prompts, kept on the disk as they are made, and their figures."""

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .answers import prompt_token_ids
from .baselines import Answers, Method, rewards_of_answers
from .control import Controller
from .disk import faults, make_folder, write_file
from .errors import CollectError
from .evaluation import evaluate_answers
from .fingerprints import sha256_of
from .intervals import paired_bootstrap
from .rewards import Rewards, Text
from .rollout_settings import generation_defaults, model_facts, tokenizer_facts
from .sampling import Sampler
from .token_statistics import token_statistics

ENDS = {"answers_cut": "length", "answers_empty": "empty"}


@dataclass(frozen=True)
class Entry:
    """A method, at one setting."""

    method: Method
    setting: float | None = None
    """Nats per answer that it was tuned to spend on other prompts; None where it has no strength, or its own."""
    placebo: bool = False

    @property
    def label(self) -> str:
        return self.method.name if self.setting is None else f"{self.method.name}, {self.setting:g} nats"


@dataclass(frozen=True)
class Answered:
    """What a method gave."""

    entry: Entry
    answers: Answers
    """Rows with "prompt", "completion", "token_ids", "log_prob" (of the answer under the base model, nats) and "kl" (of
    its distribution from the base model's, summed over the tokens, nats; None where it is not known)."""
    seconds: float
    """That generating took, without measuring."""
    peak_memory: int | None
    """Bytes on the accelerator; None on a CPU."""
    kl_is_bound: bool


class Comparison:
    """Answers by many methods to the same prompts. What is in the folder is not made again.

    Args:
        sampler: how all of them generate.
        prompts: texts or message lists.
        output_dir: a file of JSON lines for each method goes there; made if it does not exist.
        answers: to each prompt, by each method.

    Raises:
        ValueError: fewer than two prompts, of which no interval can be given.

    Attributes:
        facts: what decides the answers beside the method, as plain JSON.
    """

    def __init__(self, sampler: Sampler, prompts: Sequence[Text], output_dir: str | Path, *, answers: int = 1):
        if len(prompts) < 2 or answers < 1:
            raise ValueError(
                f"There are {len(prompts)} prompts and answers={answers}; expected are two prompts or more, for an "
                "interval, and one answer or more to each."
            )
        self.sampler, self.prompts, self.number = sampler, list(prompts), answers
        self.folder = Path(output_dir) / "answers"
        self.facts = {
            **model_facts(sampler.model),
            "tokenizer_sha256": sha256_of(tokenizer_facts(sampler.tokenizer)),
            "prompts_sha256": sha256_of(json.dumps(prompt, sort_keys=True) for prompt in self.prompts),
            "generation": {**sampler.generation, "model_defaults": generation_defaults(sampler.model)},
            "sampling": [sampler.max_new_tokens, sampler.batch_size, sampler.seed, sampler.instruction],
            "stop_strings": list(sampler.stop_strings),
            "answers": answers,
        }

    def answered(self, entry: Entry) -> Answered:
        """The method's answers: from its file, or made, measured and put there.

        Raises:
            CollectError: the file is of other settings or damaged; or the disk refused.
        """
        file = self.folder / f"{slug(entry.label)}.jsonl"
        facts = json.loads(json.dumps({**self.facts, "method": entry.method.facts(), "setting": entry.setting}))
        if not file.exists():
            made = self._answer(entry)
            head = {"facts": facts, "seconds": made.seconds, "peak_memory": made.peak_memory}
            lines = [json.dumps(line, ensure_ascii=False) for line in [head, *made.answers]]
            with faults(f"Writing {file}"):
                make_folder(self.folder)
                write_file(file, "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogatepass"))
        return self._read(entry, file, facts)

    def _answer(self, entry: Entry) -> Answered:
        method, device = entry.method, self.sampler.model.device
        on_cuda = device.type == "cuda"
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        answers = method.answer(self.sampler, self.prompts, self.number)
        if on_cuda:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated(device) if on_cuda else None
        self.measure(method, answers)
        return Answered(entry, answers, seconds, peak, method.kl_bound(1) is not None)

    def measure(self, method: Method, answers: Answers) -> None:
        """Put "log_prob" and "kl" into the rows."""
        rows = [row for of_prompt in answers for row in of_prompt]
        tokenizer, instructed = self.sampler.tokenizer, replace(self.sampler, instruction=method.instruction)
        known = method.kl_bound(1) is not None or any("kl" in row for row in rows)
        steered: dict[str, Any] = {}
        if not known and method.instruction:
            steered["steered_prompt_ids"] = [instructed.prompt_token_ids(row["prompt"]) for row in rows]
        if not known and method.model is not None:
            steered["steered_model"] = method.model
        controller = Controller(method.head, method.config) if method.head is not None and not known else None
        statistics = token_statistics(
            self.sampler.model,
            [prompt_token_ids(tokenizer, row["prompt"]) for row in rows],
            [row["token_ids"] for row in rows],
            controller,
            batch_size=self.sampler.batch_size,
            **steered,
        )
        for row, log_probs, kl in zip(rows, statistics.log_probs, statistics.kl, strict=True):
            bound = method.kl_bound(len(row["token_ids"]))
            row["log_prob"] = float(log_probs.double().sum())
            spent = math.fsum(row["kl"]) if "kl" in row else float(kl.double().sum())
            row["kl"] = spent if bound is None else bound if math.isfinite(bound) else None

    def _read(self, entry: Entry, file: Path, facts: Mapping[str, Any]) -> Answered:
        with faults(f"Reading {file}"):
            lines = file.read_text(encoding="utf-8", errors="surrogatepass").removesuffix("\n").split("\n")
        try:
            head, *answers = [json.loads(line) for line in lines]
            found, seconds, peak = head["facts"], head["seconds"], head["peak_memory"]
        except (ValueError, KeyError, TypeError) as error:
            raise CollectError(f"{file} is damaged ({error}). Delete it, and its answers are made again.") from error
        if found != facts:
            names = sorted(name for name in {*found, *facts} if found.get(name) != facts.get(name))
            raise CollectError(
                f"{file} holds answers of another comparison: {', '.join(names)} differ. Give another folder, or "
                "delete the file, and its answers are made again."
            )
        if len(answers) != len(self.prompts):
            raise CollectError(
                f"{file} is damaged: it holds answers to {len(answers)} of {len(self.prompts)} prompts. Delete it, "
                "and its answers are made again."
            )
        return Answered(entry, answers, seconds, peak, entry.method.kl_bound(1) is not None)


def figures(answered: Answered, base: Answered, judges: Mapping[str, Rewards], **options: Any) -> dict[str, Any]:
    """A row of the table.

    Args:
        answered: of the method.
        base: of the model itself, to the same prompts.
        judges: by name; "reward" is the one that heads were trained on, if it is among them.
        options: more for evaluate_answers, such as `coherence`.

    Returns:
        {"method", "setting", "placebo", "kl_per_answer" (nats), "kl_is_bound", "perplexity_ratio" (to base),
        "seconds_per_token", "forwards_per_token", "peak_memory" (bytes, on an accelerator), "answers_cut" and
        "answers_empty" (how many), what evaluate_answers measures, and by each judge's name the gain over base in its
        standard deviations: {"mean", "low", "high", "n"}, 95 % interval over prompts}.
    """
    rows = [row for of_prompt in answered.answers for row in of_prompt]
    spent = [row["kl"] for row in rows]
    row: dict[str, Any] = {"method": answered.entry.method.name, "setting": answered.entry.setting}
    row |= {"placebo": answered.entry.placebo, "kl_is_bound": answered.kl_is_bound}
    row["kl_per_answer"] = math.nan if None in spent else math.fsum(spent) / len(spent)
    for name, judge in judges.items():
        before, after = (_scores(name, judge, part) for part in (base, answered))
        if not before.std() > 0:
            raise ValueError(
                f"The {name}, {', '.join(judge.names)}, gives all answers of the base model the same number, which "
                "leaves no unit for gains. Take another one, or more prompts; the answers are kept."
            )
        row[name] = asdict(paired_bootstrap(before / before.std(), after / before.std()))
    row["perplexity_ratio"] = _perplexity(answered) / _perplexity(base)
    row |= evaluate_answers(rows, **options)
    row["seconds_per_token"] = answered.seconds / sum(len(one["token_ids"]) for one in rows)
    row |= {name: sum(one["finish_reason"] == reason for one in rows) for name, reason in ENDS.items()}
    row["forwards_per_token"] = answered.entry.method.forwards_per_token
    row["peak_memory"] = answered.peak_memory
    return row


def _scores(name: str, judge: Rewards, answered: Answered) -> torch.Tensor:
    """float64 (prompts, answers)."""
    scores = rewards_of_answers(judge, answered.answers)
    if missing := sum(score is None for of_prompt in scores for score in of_prompt):
        raise ValueError(
            f"The {name}, {', '.join(judge.names)}, gave no number for {missing} answers of {answered.entry.label}; "
            "expected is one for each. Let it return a number for every answer; the answers are kept."
        )
    return torch.tensor(scores, dtype=torch.float64)


def _perplexity(answered: Answered) -> float:
    rows = [row for of_prompt in answered.answers for row in of_prompt]
    tokens = sum(len(row["token_ids"]) for row in rows)
    return math.exp(-math.fsum(row["log_prob"] for row in rows) / tokens)


def slug(label: str) -> str:
    """A file's name for an entry's label."""
    return re.sub(r"[^\w.]+", "-", label.lower()).strip("-")
