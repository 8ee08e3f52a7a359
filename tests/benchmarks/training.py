"""How much of a training step is its matrix products: RecontrolTrainer's time a step against the products alone.

python tests/benchmarks/training.py --width 576 2048
"""

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import DEVICE, interleaved, machine, now, parser_of, ratio, report, shown, value_head_of
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from hf_recontrol import RecontrolTrainer, RecontrolTrainingArguments, RolloutDataset
from hf_recontrol.fitting import batches, set_scales
from hf_recontrol.rollout_store import RolloutStore
from hf_recontrol.value_fitting import ValueObjective

PRODUCTS, OBJECTIVE, TRAINER = "products alone", "objective and optimiser", "RecontrolTrainer"


def rollouts_of(folder: Path, width: int, answers: int, tokens: int) -> RolloutDataset:
    """Random states in bfloat16, and random rewards; all answers are of one length, so that all batches are."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(answers, generator=generator)
    with RolloutStore(folder, {"base_model_name_or_path": "random", "rewards": {"random": 1.0}}) as store:
        for block, start in enumerate(range(0, answers, 32)):
            ids = range(start, min(start + 32, answers))
            rows = [{"prompt_id": i, "prompt": f"prompt {i}", "finish_reason": "eos"} for i in ids]
            states = torch.randn(len(ids) * tokens, width, generator=generator).bfloat16()
            offsets = tokens * torch.arange(len(ids) + 1)
            token_ids = torch.zeros(len(states), dtype=torch.long)
            store.commit(block, states, offsets, rewards[ids.start : ids.stop], token_ids, rows)
    return RolloutDataset(folder, verify=False)


def products(width: int, tokens: int) -> Callable[[], object]:
    """The products of a forward and a backward pass of V, float32; the gradient of its input is not needed."""
    x, first, last = (torch.randn(*shape, device=DEVICE) for shape in ((tokens, width), (width, width), (1, width)))
    hidden, values = torch.randn(tokens, width, device=DEVICE), torch.randn(tokens, 1, device=DEVICE)

    def alone() -> list[Tensor]:
        forward = [x @ first.T, hidden @ last.T]
        return [*forward, values.T @ hidden, values @ last, hidden.T @ x]

    return alone


def by_hand(dataset: RolloutDataset, width: int, size: int) -> Callable[[], object]:
    """A step as RecontrolTrainer takes it, without Trainer: a packed batch, the loss, its gradients, clipped AdamW."""
    head = value_head_of(width).train()
    set_scales(head, dataset)
    objective = ValueObjective(head, dataset, td_lambda=1.0, device=torch.device(DEVICE))
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.0)

    def endless() -> Any:
        while True:
            yield from batches(dataset, size)

    stream = endless()

    def step() -> None:
        batch = {name: tensor.to(DEVICE) for name, tensor in next(stream).items()}
        optimizer.zero_grad()
        objective.losses(head, batch).mean().backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()

    return step


class Clock(TrainerCallback):
    """Seconds of each of Trainer's steps, its batch's reading included; after each it times the products alone."""

    def __init__(self, products: Callable[[], object]):
        self.products, self.start = products, None
        self.seconds: dict[str, list[float]] = {TRAINER: [], PRODUCTS: []}

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self.start is not None:  # the first step warms up
            self.seconds[TRAINER].append(now() - self.start)
            start = now()
            self.products()
            self.seconds[PRODUCTS].append(now() - start)
        else:
            self.products()
        self.start = now()


def trained(dataset: RolloutDataset, width: int, size: int, steps: int, folder: Path) -> dict[str, list[float]]:
    """Seconds of the steps of RecontrolTrainer.train(), and between them of the products."""
    clock = Clock(products(width, size * int(dataset.lengths[0])))
    args = RecontrolTrainingArguments(
        output_dir=str(folder),
        use_cpu=DEVICE == "cpu",
        per_device_train_batch_size=size,
        max_steps=steps + 1,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )
    trainer = RecontrolTrainer(value_head_of(width), args, train_dataset=dataset, callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock.seconds


def measure(width: int, folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Of one width, printed as it comes."""
    dataset = rollouts_of(folder / str(width), width, args.batch_size * args.batches, args.tokens)
    step, alone = by_hand(dataset, width, args.batch_size), products(width, args.batch_size * args.tokens)
    measured = {OBJECTIVE: interleaved({PRODUCTS: alone, OBJECTIVE: step}, args.rounds)}
    if importlib.util.find_spec("accelerate"):
        measured[TRAINER] = trained(dataset, width, args.batch_size, args.rounds, folder / "trained")
    else:
        print("RecontrolTrainer is left out: accelerate is not installed (pip install 'hf-recontrol[train]').")
    results = []
    for name, seconds in measured.items():
        result = {"width": width, "variant": name, **ratio(seconds, name, PRODUCTS)}
        result["products_share"] = ratio(seconds, PRODUCTS, name)["ratio"]
        results.append(result)
        print(f"d = m = {width:5}  {name:25}{shown(result)}; the products are {result['products_share']:.3f} of it")
    return results


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--width", type=int, nargs="+", default=[576, 2048], help="of the hidden state and the head")
    parser.add_argument("--batch-size", type=int, default=32, help="answers in a batch")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--batches", type=int, default=4, help="in the rollouts, which are read again and again")
    args = parser.parse_args()
    about = f"{args.batch_size} answers of {args.tokens} tokens in a batch, {machine()}"
    print(f"value head in float32, states in bfloat16, {about}; medians of {args.rounds} rounds")
    with tempfile.TemporaryDirectory() as folder:
        results = [result for width in args.width for result in measure(width, Path(folder), args)]
    report(args, results, dtype="float32")


if __name__ == "__main__":
    main()
