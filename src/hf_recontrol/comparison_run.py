"""A comparison from its plan to its rows: what `hf-recontrol evaluate` does once everything is loaded."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils import logging

from .baselines import Base, Steered
from .chat_judge import ChatJudge
from .coherence import Coherence
from .comparison import Comparison, Entry, figures
from .comparison_plan import Plan
from .comparison_sweeps import sweep_rows, time_rows
from .comparison_verdicts import win_rate_over
from .control import Controller
from .evaluation import side_effects
from .rewards import Rewards, Text
from .tuning import Strengths

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What is compared, by what."""

    plan: Plan
    strengths: Strengths
    scorers: Mapping[str, Rewards]
    """What scores answers, by the name of its column: the judges, the one that counts first, and "reward"."""
    better: Rewards | ChatJudge
    """What says which of two answers is better, for win rates."""
    coherence: Coherence | None = None

    def rows(self, comparison: Comparison) -> list[Row]:
        """The base model's row and one for each method at each strength."""
        base = comparison.answered(Entry(Base()))
        rows = [figures(base, base, self.scorers, coherence=self.coherence)]
        for entry in _counted(self.plan.entries(self.strengths)):
            answered = comparison.answered(entry)
            row = figures(answered, base, self.scorers, coherence=self.coherence)
            rows.append(row | {"win_rate": win_rate_over(answered, base, self.better, comparison.folder)})
        return rows

    def rows_of_others(self, comparison: Comparison, references: Sequence[Text] | None = None) -> list[Row]:
        """As rows, and what each head does to texts that it did not write: what it costs where nothing is asked of it.

        Args:
            references: one for each of the comparison's prompts; None: the base model's own answers to them.

        Returns:
            Those of heads have "reference_kl" (nats a token) and "reference_perplexity" (over that without the head)
            too; see side_effects.
        """
        if references is None:
            references = [rows[0]["completion"] for rows in comparison.answered(Entry(Base())).answers]
        sampler, rows = comparison.sampler, self.rows(comparison)
        for row, entry in zip(rows[1:], self.plan.entries(self.strengths), strict=True):
            method = entry.method
            if isinstance(method, Steered) and method.head is not None:
                controller = Controller(method.head, method.config)
                texts = (comparison.prompts, references)
                effects = side_effects(sampler.model, sampler.tokenizer, *texts, controller, sampler.batch_size)
                row["reference_kl"] = effects["kl_per_token"]
                row["reference_perplexity"] = effects["steered_perplexity"] / effects["perplexity"]
        return rows

    def more(self, tuned: Comparison, *, sweep: bool, batch_sizes: Sequence[int]) -> dict[str, list[Row]]:
        """Rows of further figures, by the figure's name: "sweep" of α and n, and "time" against batch size."""
        more: dict[str, list[Row]] = {}
        if sweep and self.plan.value_head is not None:
            name, head = self.plan.value_head
            more["sweep"] = sweep_rows(tuned, head, name, self.scorers, coherence=self.coherence)
        if batch_sizes:
            strongest = max(self.strengths.targets)
            entries = self.plan.entries(self.strengths)
            methods = [entry.method for entry in entries if entry.setting in (None, strongest)]
            prompts = [tuned.prompts[i % len(tuned.prompts)] for i in range(max(batch_sizes))]
            rows = time_rows(tuned.sampler, prompts, [Base(), *methods], batch_sizes)
            more["time"] = [row | {"drawn": row["method"] in self.plan.published} for row in rows]
        return more


def _counted(entries: Iterable[Entry]) -> Iterable[Entry]:
    with logging.tqdm(desc="methods") as bar:
        for entry in entries:
            yield entry
            bar.update()
