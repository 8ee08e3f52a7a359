"""What the benchmarks share: variants that take turns, their ratios, models of real shapes, the authors' loop, JSON.

A ratio is the median, over the rounds, of what a variant took divided by what its base took in the same round: what
slows the machine for a while slows both.
"""

import argparse
import contextlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_recontrol import ValueHead, ValueHeadConfig

SHAPES: dict[str, dict[str, Any]] = {
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "1.2B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
             "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False},
}  # fmt: skip

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parser_of(description: str | None, rounds: int = 9) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds that count; one more warms up")
    parser.add_argument("--output", type=Path, help="write the results there as JSON")
    return parser


def model_of(shape: str) -> Any:
    """A Llama of that shape in bfloat16 with random weights, made on the device itself, and without an EOS."""
    config = LlamaConfig(**SHAPES[shape], eos_token_id=None, pad_token_id=0)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def value_head_of(width: int, num_hidden_layers: int = 1) -> ValueHead:
    """A fresh head as wide inside as outside, float32. It flips more gates on its way than a trained one."""
    torch.manual_seed(0)
    return ValueHead(ValueHeadConfig(width, num_hidden_layers=num_hidden_layers)).eval().to(DEVICE)


def authors_loop(head: ValueHead, step_size: float, num_steps: int) -> Callable[[Tensor], Tensor]:
    """From hidden states to edited ones as the paper's authors do it: SGD on −V(h), n times, by autograd.

    The value network is not frozen, so each backward makes its weights' gradients too. In float32, where theirs is in
    float16; the network has no standardisation.
    """
    first, last = (layer for layer in head.layers)
    network = nn.Sequential(nn.Linear(*first.weight.T.shape), nn.ReLU(), nn.Linear(*last.weight.T.shape)).to(DEVICE)
    network.load_state_dict(
        {"0.weight": first.weight, "0.bias": first.bias, "2.weight": last.weight, "2.bias": last.bias}
    )

    def edited(hidden_states: Tensor) -> Tensor:
        h = hidden_states.detach().float().clone().requires_grad_(True)
        optimizer = torch.optim.SGD([h], lr=step_size)
        with torch.enable_grad():
            for _ in range(num_steps):
                optimizer.zero_grad()
                (-network(h).sum()).backward()
                optimizer.step()
        return h.detach().to(hidden_states.dtype)

    return edited


def now() -> float:
    """Seconds: of this process's work on a CPU, which other processes do not lengthen; of the clock on a GPU."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


class Caches:
    """Fills the caches with other numbers, as the model's weights do before each edit in a decoding step."""

    def __init__(self) -> None:
        self.others = torch.zeros(2**26, device=DEVICE)  # 256 MiB: more than one core or one GPU keeps

    def evict(self) -> None:
        self.others += 1


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    rounds_of: Mapping[str, int] | None = None,
    prepare: Callable[[str], None] | None = None,
    warm_up: int = 1,
) -> dict[str, list[float]]:
    """Seconds of one call of each variant in each round; in a round the variants take turns.

    Args:
        variants: what to time.
        rounds: how many rounds count.
        rounds_of: fewer rounds, for slow variants: the first ones.
        prepare: called with the variant's name before its turn, not timed.
        warm_up: rounds that do not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(-warm_up, rounds):
        for name, variant in variants.items():
            if turn >= (rounds_of or {}).get(name, rounds) or (name in (rounds_of or {}) and -warm_up < turn < 0):
                continue
            if prepare is not None:
                prepare(name)
            start = now()
            variant()
            if turn >= 0:
                seconds[name].append(now() - start)
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> dict[str, Any]:
    """The median over the rounds of name / base, its quartiles, and for information the milliseconds."""
    ratios = sorted(one / other for one, other in zip(seconds[name], seconds[base], strict=False))
    quartiles = [ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]]
    milliseconds = 1000 * statistics.median(seconds[name])
    return {"ratio": statistics.median(ratios), "base": base, "quartiles": quartiles, "milliseconds": milliseconds}


def shown(result: Mapping[str, Any]) -> str:
    """A ratio in words."""
    low, high = result["quartiles"]
    return f"{result['ratio']:9.3f} × {result['base']} ({low:.3f} to {high:.3f}; {result['milliseconds']:.3f} ms)"


def machine() -> str:
    """The machine and the software, in words."""
    name = platform.processor() or platform.machine()
    if DEVICE == "cuda":
        name = torch.cuda.get_device_name()
    else:
        with contextlib.suppress(OSError):
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    threads = torch.get_num_threads()
    software = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{name}, {software}, {threads} thread{'s' * (threads > 1)}"


def report(args: argparse.Namespace, results: Iterable[Mapping[str, Any]], **more: Any) -> None:
    """Write the results, with the machine and the options, where --output says."""
    if args.output is None:
        return
    options = {name: value for name, value in vars(args).items() if name != "output"}
    words = [word for word in sys.argv[1:] if word not in ("--output", str(args.output))]
    command = " ".join([f"tests/benchmarks/{Path(sys.argv[0]).name}", *words])
    whole = {"machine": machine(), "command": command, "options": options, **more, "results": list(results)}
    args.output.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
