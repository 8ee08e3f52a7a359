"""What collecting rollouts adds to plain generate(): time, peak memory, and bytes on the disk; random weights.

python tests/benchmarks/collecting.py --shape 135M --rows 8 --tokens 128
"""

import argparse
import contextlib
import gc
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import DEVICE, SHAPES, interleaved, machine, model_of, parser_of, ratio, report, shown
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_recontrol import RolloutDataset, collect_rollouts, enable_recontrol
from hf_recontrol.forwards import generate_with_hidden_states

PLAIN, RECORDING, COLLECTING = "generate()", "with hidden states", "collect_rollouts()"
WORDS_OF_A_PROMPT = 8


def tokenizer_of(vocabulary: int) -> PreTrainedTokenizerFast:
    """A word for each of the model's tokens, and no EOS: every answer is as long as it may be."""
    words = ["<pad>", "<unk>", *(f"w{i}" for i in range(2, vocabulary))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def length(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward that costs nothing."""
    return [float(len(completion)) for completion in completions]


class Runs:
    """The same sampled answers in three ways; collect_rollouts() into a fresh folder each time."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.model, self.folder, self.rollouts = model_of(args.shape), folder, 0
        enable_recontrol(self.model)
        self.tokenizer = tokenizer_of(self.model.config.vocab_size)
        self.prompts = [
            " ".join(f"w{2 + WORDS_OF_A_PROMPT * row + i}" for i in range(WORDS_OF_A_PROMPT))
            for row in range(args.rows)
        ]

    def calls(self, tokens: int) -> dict[str, Callable[[], object]]:
        inputs = self.tokenizer(self.prompts, return_tensors="pt", return_token_type_ids=False).to(DEVICE)
        sampled = {"max_new_tokens": tokens, "do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}

        def collect() -> object:
            self.rollouts += 1
            sampling = {"max_new_tokens": tokens, "block_size": len(self.prompts), "progress": False}
            return collect_rollouts(self.model, self.tokenizer, self.prompts, length, self.latest(), **sampling)

        return {
            PLAIN: lambda: self.model.generate(**inputs, **sampled),
            RECORDING: lambda: generate_with_hidden_states(self.model, **inputs, **sampled),
            COLLECTING: collect,
        }

    def latest(self) -> Path:
        return self.folder / str(self.rollouts)


def peak_of(runs: Runs, variant: str, tokens: int) -> dict[str, float]:
    """Bytes: in use before, and at the peak of one run after a short one that warms up."""
    runs.calls(2)[variant]()
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        runs.calls(tokens)[variant]()
        return {"before": before, "peak": torch.cuda.max_memory_allocated()}
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: the peak so far is what is in use now
    before = resident_peak()
    runs.calls(tokens)[variant]()
    return {"before": before, "peak": resident_peak()}


def resident_peak() -> int:
    """The highest resident memory so far, in bytes."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM"):
                return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peaks(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Each variant's peak in a process of its own, against that of plain generate()."""
    found: dict[str, dict[str, float]] = {}
    for variant in (PLAIN, RECORDING, COLLECTING):
        options = ["--shape", args.shape, "--rows", str(args.rows), "--tokens", str(args.tokens)]
        command = [sys.executable, __file__, *options, "--peak-of", variant]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[variant] = json.loads(output.splitlines()[-1])
    plain, results = found[PLAIN], []
    for variant, one in found.items():
        growth, plain_growth = one["peak"] - one["before"], plain["peak"] - plain["before"]
        results.append({"variant": variant, "peak_ratio": one["peak"] / plain["peak"], "growth": growth})
        grown = f"grows by {growth / 2**20:.1f} MiB, {(growth - plain_growth) / 2**20:+.1f} MiB from {PLAIN}"
        print(f"{variant:20} peak memory {results[-1]['peak_ratio']:.4f} × {PLAIN}; {grown}", flush=True)
    return results


def on_disk(folder: Path) -> dict[str, Any]:
    """Bytes on the disk for each useful byte, one number of the hidden states being two bytes."""
    rollouts = RolloutDataset(folder)
    useful = int(rollouts.lengths.sum()) * rollouts.hidden_size * 2
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    shards = sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
    result = {"variant": "disk", "disk_ratio": sum(sizes.values()) / useful, "shards_ratio": shards / useful}
    print(f"disk: {result['disk_ratio']:.4f} × the useful bytes; the shards alone {result['shards_ratio']:.4f} ×")
    return result


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="135M")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--peak-of", choices=[PLAIN, RECORDING, COLLECTING], help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(args, Path(folder))
        if args.peak_of:
            print(json.dumps(peak_of(runs, args.peak_of, args.tokens)))
            return
        about = f"{args.rows} rows of {args.tokens} tokens, {machine()}"
        print(f"{args.shape}, bfloat16, {about}; medians of {args.rounds} rounds")
        seconds = interleaved(runs.calls(args.tokens), args.rounds)
        results = [{"variant": name, **ratio(seconds, name, PLAIN)} for name in seconds]
        for result in results:
            print(f"{result['variant']:20}{shown(result)}", flush=True)
        results.append(on_disk(runs.latest()))
        del runs
        gc.collect()
        report(args, results + peaks(args), dtype="bfloat16")


if __name__ == "__main__":
    with torch.no_grad():
        main()
