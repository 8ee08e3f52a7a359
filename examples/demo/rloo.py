"""RLOO: the demo's language model, trained on the reward of the answers it gives, with TRL and LoRA.

    pip install "trl==1.16.0" "peft==0.21.2"
    python examples/demo/rloo.py --output rloo

Ahmadian et al. 2024 (arXiv:2402.14740): REINFORCE, an answer's baseline being the mean reward of the others to its
prompt. Some five minutes on two cores. `hf-recontrol evaluate … --checkpoint RLOO=rloo` compares the model with heads.
The KL that it spends is β's to choose: with 0.05 and 60 steps it was 68 nats an answer, words of praise without sense.
TRL tells the Hub that it is used; HF_HUB_DISABLE_TELEMETRY=1 keeps it from that.
"""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from hf_recontrol.demo.assets import MAX_NEW_TOKENS, Demo

try:
    from fine_tuning import LORA, checked, load_model, options, report, save_merged, training_settings
    from trl import RLOOConfig, RLOOTrainer
except ImportError as error:
    raise SystemExit(f'{error}. Run: pip install "trl==1.16.0" "peft==0.21.2"') from error


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = options(__doc__, "rloo", learning_rate=1e-3, beta=0.15)
    parser.add_argument("--steps", type=int, default=40, help="of 64 answers each")
    args = checked(parser, argv)
    demo = Demo()

    def reward(
        prompts: list[str], completions: list[str], completion_ids: list[list[int]], **unread: object
    ) -> list[float | None]:
        # Not the reward's folder itself: TRL would leave out the [CLS] that the classifier was trained with.
        return demo.reward(prompts, completions, completion_ids).total

    config = RLOOConfig(
        **training_settings(args),
        beta=args.beta,
        num_generations=4,
        max_completion_length=MAX_NEW_TOKENS,
        per_device_train_batch_size=8 if args.tiny else 64,
        max_steps=2 if args.tiny else args.steps,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=0.05,
        logging_steps=10,
    )
    trainer = RLOOTrainer(
        load_model(demo.folder / "language_model"),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": demo.prompts["train"]}),
        processing_class=demo.tokenizer,
        peft_config=LORA,
    )
    trainer.train()
    save_merged(trainer.model, demo, args.output)
    return report(demo, "RLOO", args.output, demo.prompts["validation"][: 8 if args.tiny else None])


if __name__ == "__main__":
    main()
