"""What rounding h + u once to bfloat16 costs, beside lm_head(h) + lm_head(u) in float32, which loses none of a small u.

python tests/benchmarks/rounding.py                # the demo's language model and heads
python tests/benchmarks/rounding.py --shape 1.2B   # random weights, random heads
"""

import argparse
from typing import Any

import torch
from measuring import DEVICE, SHAPES, machine, model_of, parser_of, report, value_head_of
from torch import Tensor
from torch.nn import functional

from hf_recontrol import ControlConfig, Controller
from hf_recontrol.calibration import mean_kl
from hf_recontrol.demo.assets import Demo
from hf_recontrol.forwards import generate_with_hidden_states


def kl(logits: Tensor, exact: Tensor) -> Tensor:
    """KL(exact ‖ what these logits give) of each token, in nats, float64."""
    p, q = exact.log_softmax(-1), logits.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def heads_and_model(shape: str | None) -> tuple[dict[str, Any], Any]:
    """What is steered, in bfloat16, and by which heads."""
    if shape is None:
        demo = Demo()
        return {name: demo.head(name) for name in ("value_head", "linear_head", "control_head")}, demo.model.bfloat16()
    return {"random value head": value_head_of(SHAPES[shape]["hidden_size"])}, model_of(shape)


def states_of(model: Any, rows: int, tokens: int) -> Tensor:
    """Hidden states of sampled answers, (rows · tokens, hidden_size) in bfloat16."""
    torch.manual_seed(0)
    ids = torch.randint(3, min(1000, model.config.vocab_size), (rows, 8), device=DEVICE)
    sampling = {"do_sample": True, "top_k": 0, "eos_token_id": None, "pad_token_id": 0}
    return generate_with_hidden_states(model, input_ids=ids, max_new_tokens=tokens, **sampling)[1].flatten(0, 1)


def multiplier_at(head: Any, model: Any, states: Tensor, strength: float) -> ControlConfig:
    """The step size, or scale, that spends `strength` nats a token: KL grows with the square of a small u."""
    name, multiplier = head.config.control.multiplier, 1.0
    for _ in range(30):
        config = ControlConfig(**{name: multiplier, "max_kl": float("inf")})
        multiplier *= (strength / max(mean_kl(Controller(head, config), model, states), 1e-12)) ** 0.5
    return ControlConfig(**{name: multiplier, "max_kl": float("inf")})


def measure(name: str, head: Any, model: Any, states: Tensor, strength: float) -> dict[str, Any]:
    """The mean KL from the exact distribution, of the three ways to make logits in bfloat16."""
    weight = model.get_output_embeddings().weight
    u = Controller(head, multiplier_at(head, model, states, strength)).control(states)
    exact = functional.linear((states + u).double(), weight.double())
    plain = functional.linear(states.double(), weight.double())
    ways = {
        "h + u, rounded once": (functional.linear((states + u).to(states), weight), exact),
        "lm_head(h) + lm_head(u)": (
            sum(functional.linear(part.to(states), weight).float() for part in (states, u)),
            exact,
        ),
        "no control": (functional.linear(states, weight), plain),
    }
    found = {way: float(kl(logits, true).mean()) for way, (logits, true) in ways.items()}
    size = float((u.norm(dim=-1) / states.float().norm(dim=-1)).mean())
    spent = ", ".join(f"{way} {value:.1e}" for way, value in found.items())
    strength = float(kl(plain, exact).mean())
    print(f"{name:18} strength {strength:.2g}, ‖u‖ / ‖h‖ {size:.4f}; mean KL from the exact: {spent}", flush=True)
    return {"head": name, "strength": strength, "relative_norm": size, **found}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--shape", choices=SHAPES, help="random weights; the demo's model where left out")
    parser.add_argument("--strengths", type=float, nargs="+", default=[1e-4, 1e-3, 0.005, 0.02, 0.1, 0.4])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16)
    args: argparse.Namespace = parser.parse_args()
    heads, model = heads_and_model(args.shape)
    states = states_of(model, args.rows, args.tokens)
    print(f"{args.shape or 'demo'}, bfloat16, {len(states)} states, {machine()}")
    results = [measure(name, heads[name], model, states, strength) for name in heads for strength in args.strengths]
    report(args, results, dtype="bfloat16")


if __name__ == "__main__":
    with torch.no_grad():
        main()
