"""What steering adds to a decoding step: generate() with a head against stock generate(), interleaved, random weights.

python tests/benchmarks/steering_overhead.py --shape 1.2B --rows 1 8 --steps 30 100 --max-kl
python tests/benchmarks/steering_overhead.py --shape 7B --rows 1 8 32 --steps 30 100 --compiled    # on a GPU
"""

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from measuring import (
    DEVICE,
    SHAPES,
    Caches,
    authors_loop,
    interleaved,
    machine,
    model_of,
    now,
    parser_of,
    ratio,
    report,
    shown,
    value_head_of,
)

from hf_recontrol import (
    ControlConfig,
    ControlHead,
    ControlHeadConfig,
    Controller,
    ValueHead,
    disable_recontrol,
    enable_recontrol,
)

STOCK, INERT = "stock", "enabled, no head"


def heads_of(width: int) -> dict[str, Any]:
    """The heads whose control is no ascent of many steps."""
    heads = {
        "control head, MLP": ControlHead(ControlHeadConfig(width)),
        "control head, constant": ControlHead(ControlHeadConfig(width, num_hidden_layers=0, rank=0)),
        "value head, linear": value_head_of(width, num_hidden_layers=0),
    }
    for head in heads.values():
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.01)  # a fresh control head is 0, and would be skipped
        head.eval().to(DEVICE)
    return heads


def keywords_of(width: int, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What generate() is given in each variant."""
    unbounded = {"recontrol_max_kl": math.inf}  # whatever the heads' own defaults are
    head = value_head_of(width)
    keywords = {
        f"value head, n = {steps}": {
            "recontrol_value_head": head,
            "recontrol_step_size": args.step_size,
            "recontrol_num_steps": steps,
            **unbounded,
        }
        for steps in args.steps
    }
    if args.max_kl:
        bounded = keywords.get("value head, n = 30") or next(iter(keywords.values()))
        steps = bounded["recontrol_num_steps"]
        keywords[f"value head, n = {steps}, max_kl 0.4"] = bounded | {"recontrol_max_kl": 0.4}
    if not args.only_value:
        keywords |= {name: {"recontrol_value_head": head, **unbounded} for name, head in heads_of(width).items()}
    return keywords


def controller_of(keywords: dict[str, Any]) -> Controller:
    """The control that generate() makes of these keywords."""
    head = keywords["recontrol_value_head"]
    if not isinstance(head, ValueHead):
        return Controller(head)
    steps = keywords.get("recontrol_num_steps")
    return Controller(head, ControlConfig(step_size=keywords.get("recontrol_step_size"), num_steps=steps))


def edit_seconds(controller: Controller, rows: int, calls: int) -> float:
    """Of the edit alone, from cold caches, the median; end to end it drowns in the spread of a step's time."""
    states = torch.randn(rows, 1, controller.heads[0].config.hidden_size, dtype=torch.bfloat16, device=DEVICE)
    caches, seconds = Caches(), []
    for call in range(calls + 1):
        caches.evict()
        start = now()
        controller.edit(states)
        if call:  # the first warms up
            seconds.append(now() - start)
    return statistics.median(seconds)


class Runs:
    """generate() in all its variants, on one model that is enabled, disabled and hooked between the turns."""

    def __init__(self, model: Any, rows: int, args: argparse.Namespace):
        self.model, self.tokens, self.hook = model, args.tokens, None
        self.inputs = torch.randint(3, 1000, (rows, 4), device=DEVICE)
        self.static = {"cache_implementation": "static"} if args.compiled else {}
        self.hooks: dict[str, Any] = {}
        if rows == 1 and not args.compiled:
            head = value_head_of(model.config.hidden_size)
            self.hooks = {f"authors' loop, n = {n}": authors_loop(head, args.step_size, n) for n in args.authors_steps}

    def prepare(self, variant: str) -> None:
        """Not timed."""
        if self.hook is not None:
            self.hook.remove()
            self.hook = None
        if variant == STOCK or variant in self.hooks:
            disable_recontrol(self.model)
        else:
            enable_recontrol(self.model)
        if variant in self.hooks:
            edited = self.hooks[variant]
            self.hook = self.model.lm_head.register_forward_pre_hook(lambda _, inputs: (edited(inputs[0][:, -1:]),))

    def call(self, keywords: dict[str, Any]) -> Callable[[], object]:
        options = {"max_new_tokens": self.tokens, "do_sample": False, "use_cache": True, **self.static, **keywords}
        return lambda: self.model.generate(self.inputs, **options)

    def seconds(self, keywords: dict[str, dict[str, Any]], args: argparse.Namespace) -> dict[str, list[float]]:
        """Seconds a token, of all variants in one interleaved run."""
        calls = {STOCK: self.call({}), INERT: self.call({})}
        calls |= {name: self.call(words) for name, words in keywords.items()}
        calls |= {name: self.call({}) for name in self.hooks}
        few = {name: min(args.rounds, args.slow_rounds) for name in self.hooks}
        try:
            measured = interleaved(calls, args.rounds, rounds_of=few, prepare=self.prepare)
        finally:
            self.prepare(INERT)
        return {name: [one / self.tokens for one in times] for name, times in measured.items()}

    def compiled_pairs(self, keywords: dict[str, dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
        """Seconds a token of each variant, with those of the plain compiled generate() beside it, pair by pair.

        Each pair starts from nothing compiled: Dynamo stops compiling a forward after a handful of versions of it.
        """
        pairs = {}
        for name, words in keywords.items():
            torch._dynamo.reset()
            enable_recontrol(disable_recontrol(self.model))  # this drops transformers' compiled forward
            calls = {INERT: self.call({}), name: self.call(words)}
            measured = interleaved(calls, args.rounds, warm_up=3)
            pairs[name] = {one: [time / self.tokens for time in times] for one, times in measured.items()}
        return pairs


def measure(model: Any, rows: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Of one number of rows, printed as it comes."""
    keywords, runs = keywords_of(model.config.hidden_size, args), Runs(model, rows, args)
    if args.compiled:
        pairs = runs.compiled_pairs(keywords, args)
        compared = [(name, INERT, seconds) for name, seconds in pairs.items()]
    else:
        seconds = runs.seconds(keywords, args)
        compared = [(name, STOCK, seconds) for name in seconds]
    results = []
    for name, base, seconds in compared:
        result: dict[str, Any] = {"shape": args.shape, "rows": rows, "variant": name, **ratio(seconds, name, base)}
        step, alone = statistics.median(seconds[base]), ""
        if name in keywords and "max_kl" not in name and not args.compiled:  # compiled, there is no edit alone
            edit = edit_seconds(controller_of(keywords[name]), rows, args.edit_calls)
            result |= {"one_and_edit": 1 + edit / step, "edit_milliseconds": 1000 * edit}
            alone = f"; 1 + edit / step {1 + edit / step:.4f}"
        results.append(result)
        print(f"rows {rows:3}  {name:30}{shown(result)}{alone}", flush=True)
    if not args.compiled:
        results += against_the_unbounded(seconds, rows, args)
    return results


def against_the_unbounded(seconds: dict[str, list[float]], rows: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """max_kl against the same control without it."""
    results = []
    for name in seconds:
        base, _, bounded = name.partition(", max_kl")
        if bounded:
            where = {"shape": args.shape, "rows": rows, "variant": name}
            results.append({**where, **ratio(seconds, name, base)})
            print(f"rows {rows:3}  {name:30}{shown(results[-1])}")
    return results


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="135M")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 10, 30, 100, 200], help="n of the value head")
    parser.add_argument("--step-size", type=float, default=1.0, help="α; a smaller one flips fewer gates")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--max-kl", action="store_true", help="also a value head under recontrol_max_kl=0.4")
    parser.add_argument("--only-value", action="store_true", help="no linear, constant or control head")
    parser.add_argument(
        "--authors-steps", type=int, nargs="*", default=[10, 30], help="n of the authors' loop, one row"
    )
    parser.add_argument("--slow-rounds", type=int, default=3, help="rounds of the authors' loop")
    parser.add_argument("--edit-calls", type=int, default=50, help="calls of the edit alone")
    parser.add_argument("--compiled", action="store_true", help="static cache and transformers' compiled forward")
    args = parser.parse_args()
    if args.compiled and DEVICE != "cuda":
        parser.error("--compiled needs a GPU: on a CPU transformers does not compile the forward.")
    model = model_of(args.shape)
    print(f"{args.shape}, bfloat16, α = {args.step_size:g}, {machine()}; medians of {args.rounds} rounds")
    results = [result for rows in args.rows for result in measure(model, rows, args)]
    report(args, results, dtype="bfloat16", step_size=args.step_size)


if __name__ == "__main__":
    with torch.no_grad():
        main()
