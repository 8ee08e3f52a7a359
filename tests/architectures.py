"""Every architecture of the installed transformers, tiny and random: built, run, and steered beside an oracle.

`python tests/architectures.py` prints the README's section on support, `--check` compares it with the README's,
`--json FILE` keeps the result of each class, and names after it run those classes only.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import io
import json
import re
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
import transformers
from architecture_checks import check, generated, inputs_of, tiny
from architecture_configs import ALL, classes

from hf_recontrol.hooks import lm_head

SECONDS = 20  # for each class

NOT_RUN: dict[str, str] = {
    "DiffusionGemmaForBlockDiffusion": "denoises whole blocks of tokens",
    "Gemma3nForConditionalGeneration": "needs the package timm",
    "Gemma4AssistantForCausalLM": "drafts from another model's cache",
    "Gemma4UnifiedAssistantForCausalLM": "drafts from another model's cache",
    "Llama4ForConditionalGeneration": "its own forward fails in transformers 5.24",
    "MusicgenForCausalLM": "needs codes of sound",
    "PI0ForConditionalGeneration": "makes actions, no text",
    "VoxtralRealtimeForConditionalGeneration": "needs sound",
}
"""Classes that are not built or do not generate here, with the reason."""

REFUSED: dict[str, str] = {
    "FSMTForConditionalGeneration": "its output embeddings are an Embedding",
    "MusicgenMelodyForCausalLM": "an LM head for each code of sound",
}
"""Classes that generate, and that enable_recontrol refuses, with the reason."""


@dataclasses.dataclass
class Outcome:
    """What came of a class."""

    status: str
    """"passes", "refused" by enable_recontrol, "not run" (not built, or no stock generate()), or "fails"."""
    reason: str = ""
    seconds: float = 0.0


@contextlib.contextmanager
def limited(seconds: int):
    """Raises TimeoutError after so many seconds."""

    def out_of_time(signum, frame):
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@functools.cache
def outcome(name: str) -> Outcome:
    """Build, run and steer one class."""
    stage, began = "not run", time.perf_counter()
    try:
        with limited(SECONDS), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message=".*hidden states were not finite")
            model = tiny(name)
            inputs = inputs_of(model)
            tokens, base = generated(model, inputs)
            stage = "refused"
            lm_head(model)
            stage = "fails"
            check(model, inputs, tokens, base)
    except Exception as error:  # of any model's code, which must not end the others' run
        return Outcome(stage, f"{type(error).__name__}: {error}", time.perf_counter() - began)
    finally:
        gc.collect()
    return Outcome("passes", "", time.perf_counter() - began)


AUTO = {
    "causal": "AutoModelForCausalLM",
    "sequence-to-sequence": "AutoModelForSeq2SeqLM",
    "image-text": "AutoModelForImageTextToText",
}


def section(outcomes: dict[str, Outcome]) -> str:
    """The README's section, in Markdown."""
    rows = []
    for mapping, auto in AUTO.items():
        found = [outcomes[name].status for name in classes(mapping)]
        run = sum(status != "not run" for status in found)
        rows.append(f"| {auto} | {len(found)} | {run} | {found.count('passes')} | {found.count('refused')} |")
    table = "\n".join(rows)
    return f"""\
Every class of three of transformers {transformers.__version__}'s auto classes, built tiny and random, and given text, \
with an image where it must have one. The LM head is reached once a forward, logits and greedy tokens are those of an \
oracle without our hooks, zero steps change nothing, and `recontrol_max_kl` holds (`python tests/architectures.py`).

| | classes | built and run | as the oracle | refused |
|---|---|---|---|---|
{table}

Refused by `enable_recontrol`: {listed(REFUSED, outcomes, "refused")}.

Not tried: {listed(NOT_RUN, outcomes, "not run")}."""


def listed(reasons: dict[str, str], outcomes: dict[str, Outcome], status: str) -> str:
    """The classes of one status by their reason."""
    names: dict[str, list[str]] = {}
    for name in ALL:
        if outcomes[name].status == status:
            names.setdefault(reasons.get(name, "no reason known"), []).append(name)
    return "; ".join(f"{', '.join(group)} ({reason})" for reason, group in names.items()) or "none"


README = Path(__file__).parent.parent / "README.md"
MARKERS = re.compile(r"<!-- support -->\n(.*?)\n<!-- /support -->", re.DOTALL)


def section_of_readme() -> str | None:
    """What the README has between its markers; None where it has no markers."""
    found = MARKERS.search(README.read_text(encoding="utf-8"))
    return None if found is None else found[1].strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="classes; all where none is named")
    parser.add_argument("--check", action="store_true", help="compare with README.md")
    parser.add_argument("--json", type=Path, help="keep the result of each class")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    outcomes: dict[str, Outcome] = {}
    for name in options.names or ALL:
        outcomes[name] = outcome(name)
        print(f"{name}: {outcomes[name].status} {outcomes[name].reason[:2000]}".strip(), file=sys.stderr, flush=True)
    if options.json:
        options.json.write_text(json.dumps({name: dataclasses.asdict(one) for name, one in outcomes.items()}, indent=1))
    if options.names:
        return 0
    if options.check and section(outcomes) == section_of_readme():
        return 0
    print(section(outcomes))
    if options.check:
        print("README.md says something else between its support markers; put this there.", file=sys.stderr)
    return int(options.check)


if __name__ == "__main__":
    sys.exit(main())
