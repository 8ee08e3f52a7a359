"""Fits a head to rollouts: a transformers Trainer whose batches are packed answers and whose checkpoints are heads."""

import gc
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import EvalPrediction, PreTrainedModel, TrainerCallback
from transformers.trainer_utils import TrainOutput

from .calibration import calibrate, sample_states
from .checkpoints import HeadTrainer, newest_complete_checkpoint
from .control import Controller
from .control_checks import check_control_inputs, check_lm_head, check_rewards_differ
from .control_fitting import ControlObjective
from .control_head import ControlHead
from .fitting import (
    check_answers,
    check_one_model,
    fit_linear_head,
    float64_device,
    pack_answers,
    set_scales,
    warn_of_empty,
)
from .head import Head
from .keywords import check_base_model
from .run_record import RunRecord, figures, settings
from .sigterm import Termination
from .training_args import RecontrolTrainingArguments
from .value_fitting import ValueObjective
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


class RecontrolTrainer(HeadTrainer):
    """Fits a head to rollouts: a value head V to what the answers will earn, a control head u = f(h) to earn more.

    V: minimise mean over tokens (V(s_t) − v_t)², v_t = γ ((1 − λ) V(s_{t+1}) + λ v_{t+1}), v_T = the reward. Policy
    evaluation of RE-Control (Kong et al. 2024, arXiv:2406.05954, section 4). s_t is the state that predicts token y_t;
    the targets carry no gradient; the reward stands at the last token. Departures: λ = 1 by default (`recipe="paper"`
    has the paper's λ = 0), an optional γ, the mean over tokens where the paper has the sum, and rewards and inputs
    standardised by the training set's mean and std, which are stored in the head (set_scales).

    u: maximise mean over tokens min(ρ_t A_t, clip(ρ_t, 1/c, c) A_t) − β KL(p_u ‖ p_base), ρ_t = p_u(y_t)/p_old(y_t) and
    A_t = v_t − V(s_t), V the critic. Beyond the paper. Of the language model the LM head is run, on stored states (and
    for each few hundred tokens the rest on one token, to know what it does after its LM head).
    A fresh control head starts from the best constant, see fit_constant_control.

    A transformers Trainer: callbacks, report_to, resume_from_checkpoint, load_best_model_at_end and the rest are
    Trainer's own. Its checkpoints are folders that from_pretrained loads. A head that was trained before keeps the
    scales that its weights were fitted to. Several processes (accelerate launch, torchrun) train as one with batches as
    large as theirs together: each token counts once, also in an epoch's last batch, which Trainer fills up. On SIGTERM
    the step is finished, a checkpoint written (unless save_strategy="no"), and the process ends with status 143.

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
        HeadMismatch: the rollouts' hidden states are not as wide as the head reads, of several models, or not of
            base_model.
        TypeError, ValueError: there are no answers, some have a reward that is not a finite number, or an argument is
            missing or is for the other kind of head.
        FloatingPointError: (from train) a loss that is not finite; nothing is saved after it.
        SystemExit: (from train) with status 143, after SIGTERM.
    """

    _name = "RE-Control"
    _paper: ClassVar[dict[str, str]] = {
        "title": "Aligning Large Language Models with Representation Editing: A Control Perspective",
        "id": "2406.05954",
    }
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
            warn_of_empty(dataset, name)
            if isinstance(model, ControlHead) and base_model is not None:
                check_lm_head(base_model, dataset, behavior)
        check_one_model(datasets)
        if train_dataset is not None:
            if isinstance(model, ControlHead):
                check_rewards_differ(train_dataset)
            set_scales(model, train_dataset, standardize_inputs=args.standardize_inputs)
        self.termination = Termination()
        super().__init__(
            model=model,
            args=args,
            data_collator=pack_answers,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=self._compute_metrics,
            callbacks=[RunRecord(), self.termination, *(callbacks or [])],
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the tokens of the whole optimiser step
        if base_model is not None:
            check_base_model(model, base_model)
        self.base_model = base_model
        self.objective = self._objective(critic, behavior)
        self._evaluation: tuple[int, dict[str, Any]] | None = None
        self._ratios: dict[str, tuple[Tensor, Tensor]] = {}

    def _objective(self, critic: ValueHead | None, behavior: Controller | None) -> ValueObjective | ControlObjective:
        args, head = self.args, self.model
        if isinstance(head, ValueHead):
            options = {"td_lambda": args.td_lambda, "gamma": args.gamma}
            return ValueObjective(head, self.train_dataset, **options, device=args.device)
        if critic is None:
            if self.train_dataset is None:
                raise ValueError(
                    "Without a train_dataset there is nothing to fit a critic to. Pass critic=, a ValueHead."
                )
            device = float64_device(args.device)
            critic = fit_linear_head(self.train_dataset, gamma=args.gamma, reward=head.config.reward, device=device)
        assert self.base_model is not None  # for the type checker: it was asked for
        return ControlObjective(
            self.base_model,
            critic,
            behavior,
            td_lambda=args.td_lambda,
            gamma=args.gamma,
            beta=args.beta,
            clip_ratio=args.clip_ratio,
            device=args.device,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The batches of one optimiser step, and the tokens that count in them on all devices together."""
        if self.state.global_step >= self.state.max_steps:  # resumed at its end, where Trainer would make one step more
            self.control.should_training_stop = True
            return [], torch.tensor(0, device=device)
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.args.world_size == 1:
            return batches, torch.tensor(sum(len(batch["hidden_states"]) for batch in batches), device=device)
        self._count_once(batches)
        own = [sum(batch["counted"] for batch in batches), bool(self.termination.received)]
        tokens, terminated = self.accelerator.gather(torch.tensor([own], device=device)).sum(0)
        self.termination.due = bool(terminated)
        return batches, tokens

    def _count_once(self, batches: list[dict[str, Any]]) -> None:
        """Mark how many tokens of each batch count: accelerate fills an epoch's last batches up with answers from its
        beginning, so that every process has as many; those are already learned from."""
        for batch in batches:
            batch["counted"] = int(batch["offsets"][-1])
        left_over = self.accelerator.gradient_state.remainder  # of the answers, beyond whole batches of all processes
        if batches and self.accelerator.gradient_state.end_of_dataloader and left_over > 0:
            offsets = batches[-1]["offsets"]
            size = len(offsets) - 1
            answers = min(max(left_over - self.args.process_index * size, 0), size)
            batches[-1]["counted"] = int(offsets[answers])

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
            counted = losses[: inputs.get("counted", len(losses))].sum()
            tokens = torch.as_tensor(num_items_in_batch).clamp(min=1)  # 0 where all answers are empty
            loss = counted / tokens * self.accelerator.num_processes
        return (loss, losses) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As Trainer's, but a loss that is not finite ends the training."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        losses = self.accelerator.gather(loss) if self.args.world_size > 1 else loss  # all end together, or none
        if not losses.isfinite().all():
            raise FloatingPointError(
                f"The loss is {losses.sum().item()} at step {self.state.global_step + 1}; it must be finite. Nothing "
                f"of it was saved in {self.args.output_dir!r}. Lower learning_rate, or look for rewards of absurd size."
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
        self._ratios = self.objective.ratios(observed, rewards, offsets)
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
            found = figures(metrics, self.eval_dataset, self._ratios, self.args.seed)
            self._evaluation = (self.state.global_step, found)
        return metrics

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As Trainer's; resume_from_checkpoint=True takes the newest checkpoint that is complete.

        In the end head.config.info holds "training" (what was done), "curves" (what was logged, thinned) and
        "evaluation" (the metrics of the final head).
        With base_model the final head is calibrated, or a warning says why it cannot be; a calibration from before the
        training is taken out.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_complete_checkpoint(
                self.args.output_dir, save_only_model=self.args.save_only_model
            )
        if self.train_dataset is None:
            raise ValueError("There is no train_dataset. Pass one to RecontrolTrainer.")
        self.model.config.control.forget_calibration()
        self.model.config.info.pop("calibration", None)
        if isinstance(self.model, ControlHead) and not resume_from_checkpoint:
            self.objective.start(self.model, self.train_dataset)  # type: ignore[union-attr]
        try:
            with self.termination.watching():
                output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
            if self.termination.received or self.termination.due:
                self._leave_group()
                raise SystemExit(self.termination.exit_status)
            stale = self._evaluation is None or self._evaluation[0] != self.state.global_step
            if self.eval_dataset is not None and (stale or self.args.load_best_model_at_end):
                self.evaluate()
        finally:
            self._restore_forward()
        self.describe_run()
        if self.base_model is not None:
            self._calibrate(self.base_model)
        return output

    def _calibrate(self, base_model: PreTrainedModel) -> None:
        """On the first process; the others wait for what it found."""
        from accelerate.utils import broadcast_object_list  # of the extra `train`

        config = self.model.config
        if self.is_world_process_zero():
            datasets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
            held_out = next(iter(datasets.values())) if self.eval_dataset is not None else self.train_dataset
            try:
                calibrate(self.model, base_model, sample_states(held_out, seed=self.args.seed))
            except ValueError as error:  # the training is done, and its head is sound
                warnings.warn(
                    f"The head is trained, but not calibrated, so it has no recontrol_strength. {error} Calibrate it "
                    "later with `hf-recontrol tune --calibrate`.",
                    stacklevel=3,
                )
        found = [config.control, config.info.get("calibration")]
        config.control, calibration = broadcast_object_list(found)
        if calibration is not None:
            config.info["calibration"] = calibration

    def _restore_forward(self) -> None:
        # Under bf16=True accelerate replaces head.forward by one that autocasts; a head computes in float32 elsewhere.
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    def _leave_group(self) -> None:
        """Before the process ends. gloo's threads let go of tensors under Python's lock, and abort a Python that ends
        meanwhile (-6 in place of 143); they are joined when nothing holds the group."""
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        self.accelerator.end_training()
        gc.collect()

    def describe_run(self) -> None:
        """Write into head.config.info what was done so far, and the metrics of the very weights the head has."""
        info, control = self.model.config.info, isinstance(self.model, ControlHead)
        batch_size = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        info["training"] = settings(self.args, self.state, self.train_dataset, batch_size, control=control)
        info.pop("evaluation", None)
        if self._evaluation is not None and self._evaluation[0] == self.state.global_step:
            info["evaluation"] = dict(self._evaluation[1])
        for name in ("training", "evaluation", "curves"):  # in this order, so that a resumed run writes the same bytes
            if name in info:
                info[name] = info.pop(name)
