"""What fitting a control to a large vocabulary takes: peak memory and time of the objective, for more and more tokens.

python tests/benchmarks/fitting_memory.py --vocabulary 151936 --width 1024 --tokens 128 512
"""

import argparse
import resource
import time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_recontrol.control_fitting import policy_losses
from hf_recontrol.forwards import logits_at_once


def peak_bytes(device: str) -> int:
    """Of memory in use so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512])
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(
        hidden_size=args.width,
        intermediate_size=args.width,
        num_hidden_layers=1,
        num_attention_heads=args.width // 64,
        vocab_size=args.vocabulary,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device).eval()
    print(f"{args.vocabulary} tokens, width {args.width}, bfloat16, {device}; {logits_at_once(model)} tokens at a time")
    for tokens in args.tokens:
        states = torch.randn(tokens, args.width, device=device, dtype=torch.bfloat16)
        u = torch.zeros(tokens, args.width, device=device, requires_grad=True)
        chosen, advantages = torch.randint(args.vocabulary, (tokens,)), torch.randn(tokens, device=device)
        before, start = peak_bytes(device), time.perf_counter()
        losses = policy_losses(model, states, u, chosen.to(device), advantages, beta=0.3, clip_ratio=2.0)
        losses.mean().backward()
        seconds, grown = time.perf_counter() - start, peak_bytes(device) - before
        whole = 4 * tokens * args.vocabulary / 2**20
        print(f"{tokens:6} tokens: {seconds:6.1f} s, peak memory {grown / 2**20:.0f} MiB higher", end="; ")
        print(f"one copy of their logits in float32, held in one piece, would take {whole:.0f} MiB")


if __name__ == "__main__":
    main()
