"""DPO: the demo's language model, trained on pairs of its own answers with TRL and LoRA.

    pip install "trl==1.16.0" "peft==0.21.2"
    python examples/demo/dpo.py --output dpo

Rafailov et al. 2023 (arXiv:2305.18290). A pair is the best and the worst of four answers to a training prompt, by the
demo's reward; a prompt whose answers have all one reward gives none. Some ten minutes on two cores, most of it to
collect the answers. `hf-recontrol evaluate … --checkpoint DPO=dpo` compares the model with heads. TRL tells the Hub
that it is used; HF_HUB_DISABLE_TELEMETRY=1 keeps it from that.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_recontrol import RolloutDataset
from hf_recontrol.demo.assets import Demo
from hf_recontrol.demo.training import collect

try:
    from fine_tuning import LORA, checked, load_model, options, report, save_merged, training_settings
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference
except ImportError as error:
    raise SystemExit(f'{error}. Run: pip install "trl==1.16.0" "peft==0.21.2"') from error


SIDES = ("prompt", "chosen", "rejected")


class AsSampled(DataCollatorForPreference):
    """Batches of the token ids that were sampled.

    Those that TRL makes of the texts differ: tokens merge, of which it warns, and an answer that was cut at 40 tokens
    gets an EOS that the model never wrote.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return super().torch_call([{f"{side}_ids": row[f"{side}_token_ids"] for side in SIDES} for row in examples])


def pairs(rollouts: RolloutDataset) -> Iterator[dict[str, Any]]:
    """The best and the worst answer to each prompt, where their rewards differ: texts and token ids."""
    answers: dict[int, list[dict[str, Any]]] = {}
    for row in rollouts.rows():
        if row["reward"] is not None:
            answers.setdefault(row["prompt_id"], []).append(row)
    for rows in answers.values():
        worst, best = (choose(rows, key=lambda row: row["reward"]) for choose in (min, max))
        if worst["reward"] < best["reward"]:
            texts = best["prompt"], best["completion"], worst["completion"]
            token_ids = best["prompt_token_ids"], best["token_ids"], worst["token_ids"]
            yield dict(zip(SIDES, texts, strict=True)) | {
                f"{side}_token_ids": ids for side, ids in zip(SIDES, token_ids, strict=True)
            }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = options(__doc__, "dpo", learning_rate=3e-4, beta=0.1)
    parser.add_argument("--rollouts", type=Path, help="a folder of collect_rollouts; OUTPUT-rollouts is made if absent")
    parser.add_argument("--prompts", type=int, default=1500, help="training prompts to collect 4 answers to")
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over the pairs")
    args = checked(parser, argv)
    demo = Demo()
    if args.rollouts:
        rollouts = RolloutDataset(args.rollouts)
    else:
        texts = demo.prompts["train"][: 16 if args.tiny else args.prompts]
        rollouts = collect(demo, texts, Path(f"{args.output}-rollouts"), answers=4, seed=args.seed)
    dataset = Dataset.from_list(list(pairs(rollouts)))
    if not len(dataset):
        parser.error(f"{rollouts.output_dir} has no two answers to one prompt whose rewards differ. Collect more.")
    print(f"{len(dataset)} pairs", flush=True)
    config = DPOConfig(
        **training_settings(args),
        beta=args.beta,
        per_device_train_batch_size=8 if args.tiny else 32,
        num_train_epochs=args.epochs,
        max_steps=2 if args.tiny else -1,
        warmup_steps=0.1,
        remove_unused_columns=False,  # AsSampled reads them
    )
    trainer = DPOTrainer(
        load_model(demo.folder / "language_model"),
        args=config,
        train_dataset=dataset,
        processing_class=demo.tokenizer,
        data_collator=AsSampled(demo.tokenizer.pad_token_id),
        peft_config=LORA,
    )
    trainer.train()
    save_merged(trainer.model, demo, args.output)
    return report(demo, "DPO", args.output, demo.prompts["validation"][: 8 if args.tiny else None])


if __name__ == "__main__":
    main()
