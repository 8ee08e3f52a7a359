"""The demo as a person reads it: a few texts side by side, and the table."""

import textwrap
import time
from collections.abc import Callable

import torch

from ..control_config import BELT
from ..intervals import Gain
from .assets import HEADS, Demo
from .comparison import CONTROL, STRENGTH, Result, compare, sample

WIDTH = 100
PAIRS = 4
CAUTION = (
    "This table checks the implementation on a tiny model of film reviews. "
    "It says nothing about alignment of assistants."
)
COLUMNS = ("", "judge", "reward", "perplexity", "nats/answer", "diversity", "distinct-3", "length", "forwards", "time")


def show(demo: Demo, prompts: int, echo: Callable[[str], None]) -> list[Result]:
    """Print the demo: texts, table, and what the columns mean. Returns the table's rows."""
    start = time.perf_counter()
    texts = demo.prompts["test"][:prompts]
    echo(f"A language model of {demo.model.num_parameters() / 1e6:.1f} million parameters goes on from the first six")
    echo("words of sentences of film reviews. A control head steers it towards praise. Temperature 0.7, not selected:")
    echo("")
    show_pairs(demo, texts, echo)
    echo(f"{len(texts)} held-out prompts, temperature 1. Gains over base in its standard deviations, ± 95 % interval.")
    echo("")
    results = compare(demo, texts)
    echo(line(COLUMNS))
    for result in results:
        echo(line(cells(result)))
    echo("")
    for paragraph in footnotes(demo, results):
        echo(textwrap.fill(paragraph, WIDTH))
    echo("")
    echo(CAUTION)
    echo(f"({time.perf_counter() - start:.0f} s on {torch.get_num_threads()} threads)")
    return results


def show_pairs(demo: Demo, prompts: list[str], echo: Callable[[str], None]) -> None:
    """The first few prompts, answered without and with control from one seed; not selected."""
    plain = sample(demo.model, demo.tokenizer, prompts[:PAIRS], temperature=0.7)
    steered = sample(demo.model, demo.tokenizer, prompts[:PAIRS], demo.head("control_head"), CONTROL, temperature=0.7)
    for before, after in zip(plain, steered, strict=True):
        echo(f"  {before['prompt']} …")
        for label, row in (("base", before), ("steered", after)):
            text = textwrap.fill("…" + row["completion"], WIDTH - 14, subsequent_indent=" " * 14)
            echo(f"    {label:8}  {text}")
        echo("")


def line(entries: tuple[str, ...]) -> str:
    """One line of the table: the name to the left, the figures to the right."""
    widths = [14, 14, *[12] * (len(entries) - 3)]
    figures = (f"{entry:>{width}}" for entry, width in zip(entries[1:], widths, strict=True))
    return f"{entries[0]:18}" + "".join(figures)


def cells(result: Result) -> tuple[str, ...]:
    """A row's entries, in the order of COLUMNS."""
    figures = result.figures
    bound = "≤ " if result.name.startswith("best-of") else ""
    return (
        result.name,
        *(("0" if result.name == "base" else interval(result.gains[name])) for name in ("judge", "reward")),
        f"{figures['perplexity']:.1f}",
        f"{bound}{figures['kl_per_answer']:.2f}",
        f"{figures['diversity_20']:.3f}",
        f"{figures['distinct_3']:.3f}",
        f"{figures['length']:.1f}",
        f"{figures['forwards_per_token']:.0f}",
        f"{figures['time']:.2f}×",
    )


def interval(gain: Gain) -> str:
    """A gain with half the width of its interval: +0.86 ± 0.08."""
    return f"{gain.mean:+.2f} ± {(gain.high - gain.low) / 2:.2f}"


def footnotes(demo: Demo, results: list[Result]) -> list[str]:
    """What a plain baseline does, what the columns mean, and what V explains."""
    by_name = {result.name: result for result in results}
    gains = {}
    for name, title in HEADS.items():
        gain, kl = by_name[title].gains["judge"].mean, by_name[title].figures["kl_per_answer"]
        gains[name] = f"{gain:+.2f} at {kl:.1f} nats an answer"
    evaluation = demo.head("value_head").config.info["evaluation"]
    return [
        "The plain baselines first. The constant control, one vector in closed form, gains "
        f"{gains['constant_control']} by the judge; the control head, a small network u = f(h), "
        f"{gains['control_head']}. Of value heads, whose gradient is followed as in the paper, the linear one (also "
        f"one vector) gains {gains['linear_head']}, the MLP {gains['value_head']}.",
        "judge: a classifier trained on other texts than the reward, which no head has seen. reward: what the heads "
        "were trained on. perplexity: of the texts under the base model. nats/answer: KL of the steered model from the "
        "base model; for best-of-n an upper bound, log n − (n−1)/n. diversity: of the first 20 words. distinct-3: "
        "across answers, of a quarter of the prompts. length: tokens. forwards: of the language model for each token "
        "of the answer. time: against base, sampled in turns; of best-of-n, n × base. Best-of-16 is of a quarter of "
        "the prompts, since it costs as much as all else together.",
        f"Each head was asked for the same: a strength of {STRENGTH} nats a token, and none above "
        f"{BELT * STRENGTH:g}. A step of this tiny model takes {milliseconds_per_step(demo):.0f} ms, so whatever is "
        "done beside it shows in the time.",
        f"On {evaluation['answers']} held-out answers the MLP value head explains "
        f"{evaluation['explained_variance']:.1%} of the variance of the final reward, seen from each token; the linear "
        f"one {evaluation['explained_variance_linear']:.1%}; a constant nothing.",
    ]


def milliseconds_per_step(demo: Demo, tokens: int = 30) -> float:
    """Of plain decoding at batch 1."""
    inputs = demo.tokenizer(demo.prompts["test"][0], return_tensors="pt")
    start = time.perf_counter()
    demo.model.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=tokens, min_new_tokens=tokens
    )
    return (time.perf_counter() - start) / tokens * 1000
