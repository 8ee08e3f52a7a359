"""Fits V to rollouts: a transformers Trainer whose batches are packed answers and whose checkpoints are heads."""

import json
import warnings
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import HubStrategy, TrainOutput

from .calibration import calibrate, sample_states
from .errors import HeadMismatch, HeadUnavailable
from .fitting import check_answers, fit_linear_head, pack_answers, set_scales, value_metrics
from .head_format import CONFIG_NAME, WEIGHTS_NAME
from .head_hub import push_files
from .keywords import check_base_model
from .objectives import lambda_returns
from .training_args import RecontrolTrainingArguments
from .value_head import ValueHead


def newest_complete_checkpoint(output_dir: str | Path) -> str:
    """The checkpoint folder with the most steps whose trainer_state.json, the last file to be written, can be read.

    A run that was killed while it saved leaves a folder without one, and Trainer would try to resume from that.

    Raises:
        ValueError: there is none.
    """
    folders = [folder for folder in Path(output_dir).glob("checkpoint-*") if folder.name[11:].isdecimal()]
    for folder in sorted(folders, key=lambda folder: int(folder.name[11:]), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return str(folder)
    raise ValueError(
        f"{str(output_dir)!r} holds no complete checkpoint to resume from, of {len(folders)} begun. "
        "Start without resume_from_checkpoint."
    )


class RecontrolTrainer(Trainer):
    """Fits V: minimise mean over tokens (V(s_t) − v_t)², v_t = (1 − λ) V(s_{t+1}) + λ v_{t+1}, v_T = the reward.

    Policy evaluation of RE-Control (Kong et al. 2024, arXiv:2406.05954, section 4). s_t is the state that predicts
    token y_t; the targets carry no gradient; the reward stands at the last token. Departures: λ = 1 by default
    (`recipe="paper"` has the paper's λ = 0), the mean over tokens where the paper has the sum, and rewards and inputs
    standardised by the training set's mean and std, which are stored in the head.

    A transformers Trainer: callbacks, report_to, resume_from_checkpoint, load_best_model_at_end and the rest are
    Trainer's own. Its checkpoints are folders that ValueHead.from_pretrained loads. A head that was trained before
    keeps the scales that its weights were fitted to.

    Args:
        model: V. Written in place: weights, input_mean, input_std, config.reward, config.info, base model.
        args: RecontrolTrainingArguments.
        train_dataset: a RolloutDataset, or a Subset or ConcatDataset of them. Read once here for the scales.
        eval_dataset: the same, of other prompts (RolloutDataset.split), or a dict of them; see value_metrics.
        base_model: the language model of the rollouts, to calibrate the head for `recontrol_strength` when training
            ends, on states of eval_dataset; see `calibrate`. Where None the head is not calibrated.
        callbacks: as Trainer's.
        optimizers: as Trainer's.

    Raises:
        HeadMismatch: the rollouts' hidden states are not as wide as the head reads.
        ValueError: there are no answers, or some have a reward that is not a finite number.
        FloatingPointError: (from train) a loss that is not finite; nothing is saved after it.
    """

    _tag_names: ClassVar[list[str]] = ["recontrol", "value-head"]
    _name = "RE-Control"
    _paper: ClassVar[dict[str, str]] = {
        "title": "Aligning Large Language Models with Representation Editing: A Control Perspective",
        "id": "2406.05954",
    }
    model: ValueHead
    args: RecontrolTrainingArguments
    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        model: ValueHead,
        args: RecontrolTrainingArguments | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        base_model: PreTrainedModel | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ):
        if not isinstance(model, ValueHead):
            raise TypeError(
                f"model is a {type(model).__name__}, but RecontrolTrainer trains a value head. Make one: "
                "ValueHead(ValueHeadConfig(hidden_size=train_dataset.hidden_size))."
            )
        if base_model is not None and not isinstance(base_model, PreTrainedModel):
            raise TypeError(
                f"base_model is a {type(base_model).__name__}; pass the transformers model that wrote the rollouts, "
                "or leave it out and calibrate the head later."
            )
        args = RecontrolTrainingArguments() if args is None else args
        if not isinstance(args, RecontrolTrainingArguments):
            raise TypeError(
                f"args is a {type(args).__name__}; expected RecontrolTrainingArguments, which has all that "
                "TrainingArguments has, and td_lambda, standardize_inputs and recipe."
            )
        eval_datasets = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
        for name, dataset in [("train_dataset", train_dataset), *eval_datasets.items()]:
            if dataset is not None:
                check_answers(dataset, name, model.config.hidden_size)
        if train_dataset is not None:
            set_scales(model, train_dataset, standardize_inputs=args.standardize_inputs)
        super().__init__(
            model=model,
            args=args,
            data_collator=pack_answers,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=self._compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the tokens of the whole accumulated batch
        if base_model is not None:
            check_base_model(model, base_model)
        self.base_model = base_model
        self._evaluation: tuple[int, dict[str, Any]] | None = None

    @cached_property
    def linear_head(self) -> ValueHead | None:
        """The ridge head of the training answers that V is compared with; fitted when it is first asked for."""
        if self.train_dataset is None:
            return None
        device = self.args.device if self.args.device.type == "cuda" else "cpu"  # some other kinds have no float64
        head = fit_linear_head(self.train_dataset, reward=self.model.config.reward, device=device)
        return head.to(self.args.device)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The batches of one optimiser step, and the tokens in them on all devices together."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        tokens = torch.tensor(sum(len(batch["hidden_states"]) for batch in batches), device=device)
        return batches, self.accelerator.gather(tokens).sum() if self.args.world_size > 1 else tokens

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean over tokens of (V(s_t) − v_t)²; over num_items_in_batch tokens where gradients are accumulated."""
        values = model(inputs["hidden_states"])
        rewards = self._standardized(inputs["rewards"])
        targets = lambda_returns(values.detach(), rewards, inputs["offsets"], self.args.td_lambda)
        errors = (values - targets).square()
        if num_items_in_batch is None:
            loss = errors.mean()
        else:  # processes average their gradients, so each counts for all
            loss = errors.sum() / num_items_in_batch * self.accelerator.num_processes
        return (loss, values) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As Trainer's, but a loss that is not finite ends the training."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not loss.isfinite():
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}; it must be finite. Nothing of it was "
                f"saved in {self.args.output_dir!r}. Lower learning_rate, or look for rewards of absurd size."
            )
        return loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """V beside the linear head's values, float32 (answers, longest, 2); rewards and lengths, (answers,).

        No loss: Trainer would average the batches' means, which is not the mean over tokens; value_metrics has that.
        """
        inputs = self._prepare_inputs(inputs)
        heads = [model] if self.linear_head is None else [model, self.linear_head]
        with torch.no_grad():
            values = torch.stack([head(inputs["hidden_states"]).float() for head in heads], dim=-1)
        lengths = inputs["offsets"].diff()
        padded = pad_sequence(values.split(lengths.tolist()), batch_first=True)
        return None, padded, (self._standardized(inputs["rewards"]), lengths)

    def _compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        padded = torch.as_tensor(prediction.predictions)
        rewards, lengths = (torch.as_tensor(labels) for labels in prediction.label_ids)
        values = padded[torch.arange(padded.shape[1]) < lengths[:, None]]
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        linear = values[:, 1] if values.shape[1] > 1 else None
        return value_metrics(values[:, 0], rewards, offsets, self.args.td_lambda, linear)

    def _standardized(self, rewards: Tensor) -> Tensor:
        scale = self.model.config.reward
        return (rewards - scale.mean) / scale.std

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """What value_metrics says of held-out answers, each key with eval_ in front (eval_<name>_ for a dict)."""
        metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if not self.is_in_train:
            self._restore_forward()
        if eval_dataset is None and metric_key_prefix == "eval":
            timings = ("_runtime", "_per_second", "_preparation_time", "epoch")
            kept = {name: value for name, value in metrics.items() if not name.endswith(timings)}
            figures: dict[str, Any] = {name.removeprefix("eval_"): value for name, value in kept.items()}
            if not isinstance(self.eval_dataset, dict):
                quarters = [figures.pop(f"rank_correlation_q{quarter}") for quarter in (1, 2, 3, 4)]
                figures |= {"rank_correlation": quarters, "answers": len(self.eval_dataset)}  # as the card reads them
            self._evaluation = (self.state.global_step, figures)
        return metrics

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As Trainer's; resume_from_checkpoint=True takes the newest checkpoint that is complete.

        In the end head.config.info holds "training" (what was done) and "evaluation" (the metrics of the final head).
        With base_model the final head is calibrated, or a warning says why it cannot be; a calibration from before the
        training is taken out.
        """
        control = self.model.config.control
        control.calibration, control.calibration_num_steps, control.strength = [], None, None
        self.model.config.info.pop("calibration", None)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_complete_checkpoint(self.args.output_dir)
        try:
            output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
            stale = self._evaluation is None or self._evaluation[0] != self.state.global_step
            if self.eval_dataset is not None and (stale or self.args.load_best_model_at_end):
                self.evaluate()
        finally:
            self._restore_forward()
        self._describe_run()
        if self.base_model is not None:
            datasets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
            held_out = next(iter(datasets.values())) if self.eval_dataset is not None else self.train_dataset
            try:
                calibrate(self.model, self.base_model, sample_states(held_out, seed=self.args.seed))
            except ValueError as error:  # the training is done, and its head is sound
                warnings.warn(
                    f"The head is trained, but not calibrated, so it has no recontrol_strength. {error} Calibrate it "
                    "later with `hf-recontrol tune --calibrate`.",
                    stacklevel=2,
                )
        return output

    def _restore_forward(self) -> None:
        # Under bf16=True accelerate replaces head.forward by one that autocasts; a head computes in float32 elsewhere.
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    def _describe_run(self) -> None:
        """Write into head.config.info what was done so far, and the metrics of the very weights the head has."""
        args, info = self.args, self.model.config.info
        info["training"] = {
            "recipe": args.recipe,
            "td_lambda": args.td_lambda,
            "answers": len(self.train_dataset),
            "steps": self.state.global_step,
            "epochs": self.state.epoch,
            "batch_size": self._train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "learning_rate": args.learning_rate,
            "seed": args.seed,
        }
        info.pop("evaluation", None)
        if self._evaluation is not None and self._evaluation[0] == self.state.global_step:
            info["evaluation"] = dict(self._evaluation[1])

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """A folder that ValueHead.from_pretrained loads, read back through it. No training_args.bin: it is a pickle."""
        if not self.args.should_save:
            return
        if self.is_in_train:
            self._describe_run()
        self.model.save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved = ValueHead.from_pretrained(resume_from_checkpoint)
        if saved.config.tensor_shapes() != self.model.config.tensor_shapes():
            raise HeadMismatch(
                f"The head in {resume_from_checkpoint!r} has the tensors {saved.config.tensor_shapes()}, but the one "
                f"in training {self.model.config.tensor_shapes()}. Make the head with the checkpoint's config."
            )
        self.model.load_state_dict(saved.state_dict())
        self.model.config.reward = saved.config.reward

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the head's card into output_dir anew, from head.config; Trainer's arguments are not needed."""
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "README.md").write_text(self.model.model_card(self._repo_id()), encoding="utf-8")

    def _repo_id(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    def push_to_hub(  # type: ignore[override]  # Trainer returns a CommitInfo
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        replace_model_card: bool = False,
    ) -> str | None:
        """Send the head's three files to the Hub in one commit, nothing else of output_dir. See ValueHead.push_to_hub.

        Args:
            blocking: accepted as Trainer has it; a head is small, and this always waits.

        Returns:
            The URL of the commit; None on processes other than the first.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        url: str = self.model.push_to_hub(
            self._repo_id(),
            revision=revision or self.args.hub_revision,
            token=token or self.args.hub_token,
            private=self.args.hub_private_repo if private is None else private,
            commit_message=commit_message,
            replace_model_card=replace_model_card,
        )
        return url

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Send the two files that a head is loaded from; the card waits for push_to_hub and the final figures."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        try:
            push_files(
                self._repo_id(),
                {name: (Path(checkpoint_folder) / name).read_bytes() for name in (CONFIG_NAME, WEIGHTS_NAME)},
                revision=self.args.hub_revision,
                token=self.args.hub_token,
                private=self.args.hub_private_repo,
                commit_message=f"Training in progress, step {self.state.global_step}",
            )
        except HeadUnavailable as error:  # the checkpoint is on the disk: the network need not end the training
            warnings.warn(f"Training goes on, but a push failed. {error}", stacklevel=2)
