"""Fits a head to rollouts: a transformers Trainer whose batches are packed answers and whose checkpoints are heads."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import HubStrategy, TrainOutput

from .calibration import calibrate, sample_states
from .control import Controller
from .control_checks import check_control_inputs, check_lm_head, check_rewards_differ
from .control_fitting import ControlObjective
from .control_head import ControlHead
from .errors import HeadMismatch, HeadUnavailable
from .fitting import ValueObjective, check_answers, fit_linear_head, float64_device, pack_answers, set_scales
from .head import Head
from .head_format import CONFIG_NAME, WEIGHTS_NAME
from .head_hub import push_files
from .keywords import check_base_model
from .training_args import RecontrolTrainingArguments, newest_complete_checkpoint
from .value_head import ValueHead


def _checked_args(
    model: object, args: object, base_model: object, critic: object, behavior: object
) -> RecontrolTrainingArguments:
    """The training arguments; refuses what cannot be meant."""
    if not isinstance(model, ValueHead | ControlHead):
        raise TypeError(
            f"model is a {type(model).__name__}, but RecontrolTrainer trains a head. Make one: "
            "ValueHead(ValueHeadConfig(hidden_size=train_dataset.hidden_size)), or a ControlHead."
        )
    control = isinstance(model, ControlHead)
    check_control_inputs(base_model, critic, behavior)
    for name, given in (("critic", critic), ("behavior", behavior)):
        if given is not None and not control:
            raise ValueError(f"{name} is for a ControlHead, but the model is a ValueHead. Leave it out.")
    if isinstance(critic, ValueHead):
        critic.check_width(model.config.hidden_size, "the control head's model")
    if control and base_model is None:
        raise ValueError(
            "A ControlHead is trained through the language model's LM head. Pass base_model=, the model that wrote the "
            "rollouts."
        )
    if args is None:
        args = RecontrolTrainingArguments()
    if not isinstance(args, RecontrolTrainingArguments):
        raise TypeError(
            f"args is a {type(args).__name__}; expected RecontrolTrainingArguments, which has all that "
            "TrainingArguments has, and the objective's own."
        )
    if args.recipe is not None and (args.recipe == "control") != control:
        raise ValueError(
            f"recipe is {args.recipe!r}, but the model is a {type(model).__name__}. Take recipe="
            f"{'control' if control else 'paper'!r}, or leave it out."
        )
    return args.for_control() if control else args


class RecontrolTrainer(Trainer):
    """Fits a head to rollouts: a value head V to what the answers will earn, a control head u = f(h) to earn more.

    V: minimise mean over tokens (V(s_t) − v_t)², v_t = (1 − λ) V(s_{t+1}) + λ v_{t+1}, v_T = the reward. Policy
    evaluation of RE-Control (Kong et al. 2024, arXiv:2406.05954, section 4). s_t is the state that predicts token y_t;
    the targets carry no gradient; the reward stands at the last token. Departures: λ = 1 by default (`recipe="paper"`
    has the paper's λ = 0), the mean over tokens where the paper has the sum, and rewards and inputs standardised by the
    training set's mean and std, which are stored in the head.

    u: maximise mean over tokens min(ρ_t A_t, clip(ρ_t, 1/c, c) A_t) − β KL(p_u ‖ p_base), ρ_t = p_u(y_t)/p_old(y_t) and
    A_t = v_t − V(s_t), V the critic. Beyond the paper. Of the language model the LM head is run, on stored states (and
    for each few hundred tokens the rest on one token, to know what it does after its LM head).
    A fresh control head starts from the best constant, see fit_constant_control.

    A transformers Trainer: callbacks, report_to, resume_from_checkpoint, load_best_model_at_end and the rest are
    Trainer's own. Its checkpoints are folders that from_pretrained loads. A head that was trained before keeps the
    scales that its weights were fitted to.

    Args:
        model: a ValueHead or ControlHead. Written in place: weights, scales, config.reward, config.info, base model.
        args: RecontrolTrainingArguments; where None its defaults, for a control head recipe="control".
        train_dataset: a RolloutDataset, or a Subset or ConcatDataset of them. Read once here for the scales.
        eval_dataset: the same, of other prompts (RolloutDataset.split), or a dict of them; see value_metrics and
            ControlObjective.metrics.
        base_model: the language model of the rollouts, which a control head needs. It also calibrates the head for
            `recontrol_strength` when training ends, on states of eval_dataset; see `calibrate`. Where None a value head
            is not calibrated.
        critic: for a control head: V of the advantages; where None the linear head of train_dataset.
        behavior: for a control head: the control that the rollouts were collected under; None is none.
        callbacks: as Trainer's.
        optimizers: as Trainer's.

    Raises:
        HeadMismatch: the rollouts' hidden states are not as wide as the head reads, or not of base_model.
        TypeError, ValueError: there are no answers, some have a reward that is not a finite number, or an argument is
            missing or is for the other kind of head.
        FloatingPointError: (from train) a loss that is not finite; nothing is saved after it.
    """

    _name = "RE-Control"
    _paper: ClassVar[dict[str, str]] = {
        "title": "Aligning Large Language Models with Representation Editing: A Control Perspective",
        "id": "2406.05954",
    }
    model: Head
    args: RecontrolTrainingArguments
    train_dataset: Any
    eval_dataset: Any
    objective: ValueObjective | ControlObjective

    def __init__(
        self,
        model: Head,
        args: RecontrolTrainingArguments | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        base_model: PreTrainedModel | None = None,
        critic: ValueHead | None = None,
        behavior: Controller | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ):
        args = _checked_args(model, args, base_model, critic, behavior)
        eval_datasets = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
        datasets = {"train_dataset": train_dataset, **eval_datasets}
        datasets = {name: dataset for name, dataset in datasets.items() if dataset is not None}
        for name, dataset in datasets.items():
            check_answers(dataset, name, model.config.hidden_size)
            if isinstance(model, ControlHead) and base_model is not None:
                check_lm_head(base_model, dataset, behavior)
        if train_dataset is not None:
            if isinstance(model, ControlHead):
                check_rewards_differ(train_dataset)
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
        self.objective = self._objective(critic, behavior)
        self._evaluation: tuple[int, dict[str, Any]] | None = None

    def _objective(self, critic: ValueHead | None, behavior: Controller | None) -> ValueObjective | ControlObjective:
        args, head = self.args, self.model
        if isinstance(head, ValueHead):
            return ValueObjective(head, self.train_dataset, td_lambda=args.td_lambda, device=args.device)
        if critic is None:
            if self.train_dataset is None:
                raise ValueError(
                    "Without a train_dataset there is nothing to fit a critic to. Pass critic=, a ValueHead."
                )
            critic = fit_linear_head(self.train_dataset, reward=head.config.reward, device=float64_device(args.device))
        assert self.base_model is not None  # for the type checker: it was asked for
        return ControlObjective(
            self.base_model,
            critic,
            behavior,
            td_lambda=args.td_lambda,
            beta=args.beta,
            clip_ratio=args.clip_ratio,
            device=args.device,
        )

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
        """The mean over tokens of the objective; over num_items_in_batch tokens where gradients are accumulated."""
        losses = self.objective.losses(model, inputs)
        if num_items_in_batch is None:
            loss = losses.mean()
        else:  # processes average their gradients, so each counts for all
            loss = losses.sum() / num_items_in_batch * self.accelerator.num_processes
        return (loss, losses) if return_outputs else loss

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
        """What the objective observes of each token, (answers, longest, k); rewards and lengths, (answers,).

        No loss: Trainer would average the batches' means, which is not the mean over tokens; the metrics have that.
        """
        inputs = self._prepare_inputs(inputs)
        observed = self.objective.observe(model, inputs)
        lengths = inputs["offsets"].diff()
        return None, pad_sequence(observed.split(lengths.tolist()), batch_first=True), (inputs["rewards"], lengths)

    def _compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        padded = torch.as_tensor(prediction.predictions)
        rewards, lengths = (torch.as_tensor(labels) for labels in prediction.label_ids)
        observed = padded[torch.arange(padded.shape[1]) < lengths[:, None]]
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return self.objective.metrics(observed, rewards, offsets)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """What the objective's metrics say of held-out answers, each key with eval_ in front (eval_<name>_ for a dict).

        See value_metrics, and ControlObjective.metrics.
        """
        metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if not self.is_in_train:
            self._restore_forward()
        if eval_dataset is None and metric_key_prefix == "eval":
            timings = ("_runtime", "_per_second", "_preparation_time", "epoch")
            kept = {name: value for name, value in metrics.items() if not name.endswith(timings)}
            figures: dict[str, Any] = {name.removeprefix("eval_"): value for name, value in kept.items()}
            if not isinstance(self.eval_dataset, dict):
                quarters = [name for name in figures if name.startswith("rank_correlation_q")]
                if quarters:  # as the card reads them
                    figures["rank_correlation"] = [figures.pop(name) for name in quarters]
                figures["answers"] = len(self.eval_dataset)
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
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_complete_checkpoint(self.args.output_dir)
        if self.train_dataset is None:
            raise ValueError("There is no train_dataset. Pass one to RecontrolTrainer.")
        self.model.config.control.forget_calibration()
        self.model.config.info.pop("calibration", None)
        if isinstance(self.model, ControlHead) and not resume_from_checkpoint:
            self.objective.start(self.model, self.train_dataset)  # type: ignore[union-attr]
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
        if isinstance(self.model, ControlHead):
            info["training"] |= {"beta": args.beta, "clip_ratio": args.clip_ratio}
        info.pop("evaluation", None)
        if self._evaluation is not None and self._evaluation[0] == self.state.global_step:
            info["evaluation"] = dict(self._evaluation[1])

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """A folder that from_pretrained loads, read back through it. No training_args.bin: it is a pickle."""
        if not self.args.should_save:
            return
        if self.is_in_train:
            self._describe_run()
        self.model.save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved: Head = type(self.model).from_pretrained(resume_from_checkpoint)
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
        """Send the head's three files to the Hub in one commit, nothing else of output_dir. See Head.push_to_hub.

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
