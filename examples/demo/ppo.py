"""PPO: the demo's language model, trained on the reward of the answers it gives, with TRL and LoRA.

    pip install "trl==1.12.0" "peft==0.21.2"
    python examples/demo/ppo.py --output ppo

Schulman et al. 2017 (arXiv:1707.06347), with an answer's value estimated by a second copy of the language model. TRL
1.12.0 has PPO among its experiments; 1.16.0 has it no more. Some ten minutes on two cores. `hf-recontrol evaluate …
--checkpoint PPO=ppo` compares the model with heads. TRL tells the Hub that it is used; HF_HUB_DISABLE_TELEMETRY=1 keeps
it from that.
"""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification
from transformers.modeling_outputs import BaseModelOutput

from hf_recontrol.demo.assets import MAX_NEW_TOKENS, Demo

try:
    from fine_tuning import LORA, checked, load_model, options, report, save_merged, training_settings
    from trl.experimental.ppo import PPOConfig, PPOTrainer
except ImportError as error:
    raise SystemExit(f'{error}. Run: pip install "trl==1.12.0" "peft==0.21.2"') from error


class ScoresText(torch.nn.Module):
    """The demo's reward in the place where PPOTrainer wants the body of a classifier that reads the model's tokens.

    Its reward reads words, so the tokens become text first. A row's score stands at each of its tokens; PPOTrainer
    takes the last one's.
    """

    def __init__(self, demo: Demo):
        super().__init__()
        self.demo = demo

    def forward(self, input_ids: torch.Tensor, **unread: object) -> BaseModelOutput:
        texts = self.demo.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        scores = torch.tensor(self.demo.reward([""] * len(texts), texts, input_ids.tolist()).total)
        return BaseModelOutput(hidden_states=(scores[:, None, None].expand(*input_ids.shape, 1),))


class DemoReward(torch.nn.Module):
    """A classifier as PPOTrainer takes it apart: a body under the name `base_model_prefix`, and a `score`."""

    base_model_prefix = "body"

    def __init__(self, demo: Demo):
        super().__init__()
        self.body, self.score = ScoresText(demo), torch.nn.Identity()


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = options(__doc__, "ppo", learning_rate=1e-3, beta=0.05)
    parser.add_argument("--steps", type=int, default=20, help="of 64 answers each")
    args = checked(parser, argv)
    demo = Demo()
    rows = 8 if args.tiny else 64
    config = PPOConfig(
        **training_settings(args),
        kl_coef=args.beta,
        per_device_train_batch_size=rows,
        num_mini_batches=1,
        total_episodes=rows * (2 if args.tiny else args.steps),
        response_length=MAX_NEW_TOKENS,
        stop_token="eos",
        temperature=1.0,
        num_sample_generations=0,
        logging_steps=10,
    )
    prompts = [{"input_ids": demo.tokenizer(text)["input_ids"]} for text in demo.prompts["train"]]
    language_model = demo.folder / "language_model"
    trainer = PPOTrainer(
        args=config,
        processing_class=demo.tokenizer,
        model=load_model(language_model),
        ref_model=None,  # the model without its adapter
        reward_model=DemoReward(demo),
        value_model=AutoModelForSequenceClassification.from_pretrained(
            language_model, num_labels=1, dtype=torch.float32
        ),
        train_dataset=Dataset.from_list(prompts),
        peft_config=LORA,
    )
    trainer.train()
    save_merged(trainer.model.policy, demo, args.output)
    return report(demo, "PPO", args.output, demo.prompts["validation"][: 8 if args.tiny else None])


if __name__ == "__main__":
    main()
