"""The edit alone: what the control costs, against the three products that an exact ascent of many steps needs.

python tests/benchmarks/edit.py --rows 1 8 32 --steps 1 10 30 100 200
python tests/benchmarks/edit.py --rows 1 --step-of 1.2B --output edit.json    # for figure.py
"""

import argparse
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
    parser_of,
    ratio,
    report,
    shown,
    value_head_of,
)
from torch import Tensor

from hf_recontrol import ControlConfig, ControlHead, ControlHeadConfig, Controller, ValueHead

FLOOR, OURS, CLOSED, AUTHORS = "three products", "ours", "closed form", "authors' loop"
ALL_POSITIONS, CONTROL, LINEAR, STEP = "authors' loop, all positions", "control head, MLP", "linear head", "plain step"
TOKENS = 8


def three_products(head: ValueHead) -> Callable[[Tensor], object]:
    """z = hW₁ᵀ + b₁, q = sG and u = sW₁ with G = W₁W₁ᵀ made before: the floor of two or more exact steps."""
    first, last = (layer for layer in head.layers)
    weight, bias, w = first.weight, first.bias, last.weight[0]
    gram = weight @ weight.T

    def products(h: Tensor) -> object:
        z = torch.addmm(bias, h, weight.T)
        s = w * (z > 0)
        return s @ gram, s @ weight

    return products


def closed_form(head: ValueHead, step_size: float, num_steps: int) -> Callable[[Tensor], Tensor]:
    """u ← u + α ∇V(h + u), n times: two products a step."""

    def control(h: Tensor) -> Tensor:
        u = torch.zeros_like(h)
        for _ in range(num_steps):
            u = u + step_size * head.gradient(h + u)
        return u

    return control


def flips(head: ValueHead, h: Tensor, step_size: float, num_steps: int) -> float:
    """How many gates of a row change between two steps, on average."""
    first, u, gates, changed = head.layers[0], torch.zeros_like(h), None, 0
    for _ in range(num_steps):
        before, gates = gates, first(head.standardized(h + u)) > 0
        changed += 0 if before is None else int((gates != before).sum())
        u = u + step_size * head.gradient(h + u)
    return changed / (len(h) * max(1, num_steps - 1))


def controller(head: Any, step_size: float, num_steps: int) -> Controller:
    is_value = isinstance(head, ValueHead)
    return Controller(head, ControlConfig(step_size=step_size, num_steps=num_steps) if is_value else None)


def heads_of(width: int) -> dict[str, Any]:
    """The heads by the variant that uses them."""
    heads: dict[str, Any] = {OURS: value_head_of(width), LINEAR: value_head_of(width, num_hidden_layers=0)}
    heads[CONTROL] = ControlHead(ControlHeadConfig(width)).eval().to(DEVICE)
    for parameter in heads[CONTROL].parameters():
        torch.nn.init.normal_(parameter, std=0.01)  # a fresh one is 0, and would be skipped
    return heads


def variants_of(heads: dict[str, Any], rows: int, steps: int, args: argparse.Namespace) -> dict[str, Any]:
    """What is timed, on the same hidden states; and how they differ."""
    head, width, alpha = heads[OURS], args.width, args.step_size
    h = torch.randn(rows, width, device=DEVICE)
    functions: dict[str, Callable[[Tensor], Any]] = {FLOOR: three_products(head)}
    functions |= {name: controller(one, alpha, steps).control for name, one in heads.items()}
    functions[CLOSED] = closed_form(head, alpha, steps)
    functions[AUTHORS] = authors_loop(head, alpha, steps)
    chosen = [name for name in functions if args.only is None or name in (FLOOR, OURS, *args.only)]
    calls = {name: (lambda function=functions[name]: function(h)) for name in chosen}
    if rows == 1 and steps == 10 and args.positions and args.only is None:  # at more steps it takes minutes
        prompt = torch.randn(args.positions, width, device=DEVICE)
        calls[ALL_POSITIONS] = lambda: functions[AUTHORS](prompt)
    ours, reference = functions[OURS](h), functions[CLOSED](h)
    difference = float(((ours - reference).norm(dim=-1) / reference.norm(dim=-1)).median())
    return {"calls": calls, "flips": flips(head, h, alpha, steps), "difference": difference}


def plain_step(model: Any, rows: int) -> Callable[[], object]:
    """Some steps of plain decoding, after a prompt of four tokens."""
    inputs = torch.randint(3, 1000, (rows, 4), device=DEVICE)
    return lambda: model.generate(inputs, max_new_tokens=TOKENS, do_sample=False)


def measure(heads: dict[str, Any], rows: int, steps: int, model: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Of one number of rows and steps, printed as it comes."""
    made = variants_of(heads, rows, steps, args)
    calls = made["calls"]
    if model is not None:
        calls[STEP] = plain_step(model, rows)
    few = {name: min(args.rounds, args.slow_rounds) for name in (AUTHORS, ALL_POSITIONS)}
    caches = Caches()

    def prepare(name: str) -> None:
        if args.hot and name not in few:  # of the slow ones, the first of many steps warms the caches
            calls[name]()
        elif not args.hot:
            caches.evict()

    seconds = interleaved(calls, args.rounds, rounds_of=few, prepare=prepare)
    if model is not None:
        seconds[STEP] = [one / TOKENS for one in seconds[STEP]]
    where = {"rows": rows, "steps": steps, "width": args.width}
    about = f"{made['flips']:.1f} gates flip in a row at a step; ours is {made['difference']:.0e} off the closed form"
    print(f"rows {rows}, n = {steps}, α = {args.step_size:g}: {about}")
    results = []
    for name in calls:
        result = {**where, "variant": name, **ratio(seconds, name, FLOOR)}
        result["over_ours"] = ratio(seconds, name, OURS)["ratio"]
        if model is not None:
            result["of_a_plain_step"] = ratio(seconds, name, STEP)["ratio"]
        results.append(result | {"flips": made["flips"], "difference": made["difference"]})
        print(f"  {name:29}{shown(result)}, {result['over_ours']:.3f} × ours", flush=True)
    return results


def main() -> None:
    parser = parser_of(__doc__, rounds=15)
    parser.add_argument("--width", type=int, help="of the hidden state and of the head; 2048, or as --step-of has it")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 10, 30, 100, 200])
    parser.add_argument("--step-size", type=float, default=1.0, help="α; a smaller one flips fewer gates")
    parser.add_argument("--positions", type=int, default=128, help="of the loop over a whole prompt; 0 leaves it out")
    parser.add_argument("--slow-rounds", type=int, default=3, help="rounds of the authors' loop")
    parser.add_argument("--only", nargs="+", choices=[CLOSED, AUTHORS, LINEAR, CONTROL], help="beside floor and ours")
    parser.add_argument("--hot", action="store_true", help="caches full of the head's weights, not of other numbers")
    parser.add_argument("--step-of", choices=SHAPES, help="also time a plain decoding step of a model of that shape")
    args = parser.parse_args()
    model = model_of(args.step_of) if args.step_of else None
    args.width = args.width or (model.config.hidden_size if model is not None else 2048)
    heads = heads_of(args.width)
    caches = "hot" if args.hot else "cold"
    print(f"d = m = {args.width}, float32, {caches} caches, {machine()}; medians of {args.rounds} rounds")
    results = [row for rows in args.rows for steps in args.steps for row in measure(heads, rows, steps, model, args)]
    report(args, results, dtype="float32", step_size=args.step_size, step_of=args.step_of, width=args.width)


if __name__ == "__main__":
    with torch.no_grad():
        main()
