"""RecontrolTrainer on rollouts whose true V is known: a random walk, which ends, on average, where it is."""

import copy
import hashlib
import json
import shutil

import pytest
import torch
from hub_server import TOKEN
from tiny import tiny_model
from torch.utils.data import ConcatDataset
from transformers import HfArgumentParser

import hf_recontrol.training_args as args_module
import hf_recontrol.value_fitting as value_fitting
from hf_recontrol.calibration import calibrate, mean_kl, sample_states
from hf_recontrol.checkpoints import newest_complete_checkpoint
from hf_recontrol.control import Controller
from hf_recontrol.control_config import ControlConfig
from hf_recontrol.errors import HeadError, HeadMismatch, HeadUnavailable
from hf_recontrol.fitting import fit_linear_head, pack_answers
from hf_recontrol.head_config import ValueHeadConfig
from hf_recontrol.objectives import lambda_returns
from hf_recontrol.rollout_dataset import RolloutDataset
from hf_recontrol.rollout_store import RolloutStore
from hf_recontrol.trainer import RecontrolTrainer
from hf_recontrol.training_args import RecontrolTrainingArguments
from hf_recontrol.value_head import ValueHead

pytestmark = pytest.mark.versions
WIDTH = 4


def random_walk(folder, answers=360, seed=0, width=WIDTH, equal_rewards=False):
    """Progress in dimension 0, noise in the others; the reward is the progress at the last step. V(s_t) = progress."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (answers,), generator=generator)
    states = [torch.randn(length, width, generator=generator) for length in lengths.tolist()]
    for walk in states:
        walk[:, 0] = walk[:, 0].cumsum(0)
    rewards = torch.stack([0 * walk[-1, 0] if equal_rewards else 3 * walk[-1, 0] + 10 for walk in states])
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    rows = [{"prompt_id": i, "prompt": f"prompt {i}", "finish_reason": "eos"} for i in range(answers)]
    token_ids = torch.zeros(int(offsets[-1]), dtype=torch.long)
    fingerprint = {"base_model_name_or_path": "org/base", "base_model_type": "llama", "rewards": {"progress": 1.0}}
    with RolloutStore(folder, fingerprint) as store:
        store.commit(0, torch.cat(states), offsets, rewards, token_ids, rows)
    return RolloutDataset(folder)


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    return random_walk(tmp_path_factory.mktemp("rollouts")).split(0.25)


def new_head(seed=0, **config):
    torch.manual_seed(seed)
    return ValueHead(ValueHeadConfig(**{"hidden_size": WIDTH, "intermediate_size": 16} | config))


def arguments(folder, **settings):
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 10**6}
    return RecontrolTrainingArguments(output_dir=str(folder), **quiet | settings)


def fit(folder, rollouts, head=None, trainer_class=RecontrolTrainer, resume=None, **settings):
    train, held_out = rollouts
    head = new_head() if head is None else head
    trainer = trainer_class(head, arguments(folder, **settings), train_dataset=train, eval_dataset=held_out)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def against_the_true_v(head, rollouts):
    """Correlation with the true V, and the slope of V on it, on held-out states, in the reward's own units."""
    states = torch.cat([rollouts[1][i]["hidden_states"] for i in range(len(rollouts[1]))])
    truth = 3 * states[:, 0] + 10
    values = head(states).detach() * head.config.reward.std + head.config.reward.mean
    covariance = torch.cov(torch.stack([values, truth]))
    return (covariance[0, 1] / (covariance[0, 0] * covariance[1, 1]).sqrt()).item(), (
        covariance[0, 1] / covariance[1, 1]
    ).item()


def weights_of(head):
    return {name: tensor.tolist() for name, tensor in head.state_dict().items()}


def weights_hash(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


QUICK = {"learning_rate": 1e-2, "num_train_epochs": 12, "per_device_train_batch_size": 32}


@pytest.mark.parametrize(
    "settings", [{"td_lambda": 1.0}, {"td_lambda": 0.0}, {"recipe": "paper"}], ids=["Monte Carlo", "Bellman", "paper"]
)
def test_the_head_recovers_the_true_value(tmp_path, rollouts, settings):
    trainer = fit(tmp_path, rollouts, **QUICK, **settings)
    correlation, slope = against_the_true_v(trainer.model, rollouts)
    assert correlation > 0.97
    assert slope == pytest.approx(1, abs=0.12)


def test_a_reward_on_the_first_token_would_be_noticed(tmp_path, rollouts, monkeypatch):
    def on_the_first_token(values, rewards, offsets, td_lambda, gamma):
        targets = torch.cat([values[:1], values[:-1]])
        targets[offsets[:-1]] = rewards
        return targets

    monkeypatch.setattr(value_fitting, "lambda_returns", on_the_first_token)
    _, slope = against_the_true_v(fit(tmp_path, rollouts, td_lambda=0.0, **QUICK).model, rollouts)
    assert slope < 0.7


def test_targets_that_carry_gradient_would_be_noticed(tmp_path, rollouts):
    class Attached(RecontrolTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            values, last = model(inputs["hidden_states"]), inputs["offsets"][1:] - 1
            targets = torch.cat([values[1:], values[:1]]).index_put(
                (last,), self.objective._standardized(inputs["rewards"])
            )
            return (values - targets).square().sum() / num_items_in_batch

    trainer = fit(tmp_path, rollouts, trainer_class=Attached, td_lambda=0.0, **QUICK)
    _, slope = against_the_true_v(trainer.model, rollouts)
    assert slope < 0.8


@pytest.mark.parametrize("td_lambda", [0.0, 0.5, 1.0])
def test_the_loss_is_the_mean_over_tokens_and_its_targets_are_constants(tmp_path, rollouts, td_lambda):
    head = new_head()
    trainer = RecontrolTrainer(head, arguments(tmp_path, td_lambda=td_lambda), train_dataset=rollouts[0])
    batch = pack_answers([rollouts[0][i] for i in range(5)])
    loss = trainer.compute_loss(head, batch)
    scale = head.config.reward
    values = head(batch["hidden_states"])
    targets = lambda_returns(values.detach(), (batch["rewards"] - scale.mean) / scale.std, batch["offsets"], td_lambda)
    torch.testing.assert_close(loss, (values - targets).square().mean())
    for actual, value_gradient in zip(
        torch.autograd.grad(loss, head.parameters()),
        torch.autograd.grad(values, head.parameters(), grad_outputs=2 * (values - targets).detach() / len(values)),
        strict=True,
    ):
        torch.testing.assert_close(actual, value_gradient)


def test_accumulated_batches_train_as_one_batch_of_all_their_tokens(tmp_path, rollouts):
    def trained(name, **settings):
        return fit(tmp_path / name, rollouts, max_steps=3, optim="sgd", **settings).model.state_dict()

    whole = trained("whole", per_device_train_batch_size=8)
    accumulated = trained("parts", per_device_train_batch_size=2, gradient_accumulation_steps=4)
    torch.testing.assert_close(accumulated, whole)


def test_a_resumed_run_ends_bit_for_bit_as_a_whole_one(tmp_path, rollouts):
    settings = {"max_steps": 20, "save_strategy": "steps", "save_steps": 10, "eval_strategy": "steps", "eval_steps": 4}
    fit(tmp_path / "whole", rollouts, **settings)
    shutil.copytree(tmp_path / "whole/checkpoint-10", tmp_path / "resumed/checkpoint-10")
    (tmp_path / "resumed/checkpoint-15").mkdir()  # as a run that was killed while it saved leaves one
    fit(tmp_path / "resumed", rollouts, head=new_head(seed=1), resume=True, **settings)
    last = "checkpoint-20"
    assert weights_hash(tmp_path / "resumed" / last) == weights_hash(tmp_path / "whole" / last)
    configs = [json.loads((tmp_path / run / last / "config.json").read_text()) for run in ("whole", "resumed")]
    assert configs[0] == configs[1]
    assert configs[0]["info"]["training"]["steps"] == 20
    assert configs[0]["info"]["evaluation"]["loss"] > 0


def test_a_resumed_head_keeps_the_scales_that_its_weights_were_fitted_to(tmp_path, rollouts):
    before = fit(tmp_path / "head", rollouts, max_steps=1, save_strategy="steps", save_steps=1).model
    other = random_walk(tmp_path / "other", answers=20, seed=5).split(0.25)
    after = fit(tmp_path / "head", other, resume=True, max_steps=2).model
    assert after.config.reward == before.config.reward
    assert after.input_std.tolist() == before.input_std.tolist()


def test_a_checkpoint_is_a_head_with_no_pickled_arguments(tmp_path, rollouts):
    trainer = fit(tmp_path, rollouts, max_steps=2, save_strategy="steps", save_steps=2)
    saved = ValueHead.from_pretrained(tmp_path / "checkpoint-2")
    assert weights_of(saved) == weights_of(trainer.model)
    assert saved.config.reward == trainer.model.config.reward
    assert saved.config.reward.name == "progress"
    assert (saved.config.base_model_name_or_path, saved.config.base_model_type) == ("org/base", "llama")
    assert {"config.json", "model.safetensors", "README.md"} <= {
        file.name for file in (tmp_path / "checkpoint-2").iterdir()
    }
    trainer.save_model()
    assert {file.name for file in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
        "checkpoint-2",
    }


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path):
    head, rest = ("config.json", "model.safetensors"), ("optimizer.pt", "scheduler.pt")
    for step, state, files in ((9, "{}", head + rest), (10, '{"global_step": 10', head + rest), (15, "{}", head)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for name in files:
            (tmp_path / f"checkpoint-{step}" / name).touch()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-20").mkdir()
    assert newest_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")
    assert newest_complete_checkpoint(tmp_path, save_only_model=True) == str(tmp_path / "checkpoint-15")
    (tmp_path / "checkpoint-9/trainer_state.json").unlink()
    with pytest.raises(ValueError, match="no complete checkpoint to resume from, of 4 begun"):
        newest_complete_checkpoint(tmp_path)


def test_a_damaged_checkpoint_is_refused(tmp_path, rollouts):
    fit(tmp_path, rollouts, max_steps=1, save_strategy="steps", save_steps=1)
    weights = tmp_path / "checkpoint-1/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(HeadError, match="SHA-256"):
        fit(tmp_path, rollouts, resume=True, max_steps=2)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path, rollouts):
    fit(tmp_path, rollouts, max_steps=1, save_strategy="steps", save_steps=1)
    with pytest.raises(HeadMismatch, match="Make the head with the checkpoint's config"):
        fit(tmp_path, rollouts, head=new_head(intermediate_size=8), resume=True, max_steps=2)


def test_the_best_head_comes_back_in_the_end_with_its_own_figures(tmp_path, rollouts):
    every = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    # The greatest loss is called the best: then it is the first checkpoint, as the loss goes down from there.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = fit(tmp_path, rollouts, max_steps=6, learning_rate=1e-2, **best, **every)
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert losses[0] > losses[1] > losses[2]
    assert trainer.evaluate()["eval_loss"] == trainer.model.config.info["evaluation"]["loss"] == losses[0]
    assert weights_of(trainer.model) == weights_of(ValueHead.from_pretrained(tmp_path / "checkpoint-2"))


def test_a_loss_that_is_not_finite_ends_the_training_and_nothing_is_saved(tmp_path, rollouts):
    with pytest.raises(FloatingPointError, match=r"The loss is (inf|nan) at step 2.*Lower learning_rate"):
        fit(tmp_path, rollouts, max_steps=5, learning_rate=1e30, save_strategy="steps", save_steps=2)
    assert not list(tmp_path.rglob("model.safetensors"))


class Smuggled:
    """Answers one of which turns bad after all was checked."""

    def __init__(self, dataset, bad, **change):
        self.dataset, self.bad, self.change, self.armed = dataset, bad, change, False
        self.fingerprint = dataset.fingerprint

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index] | (self.change if self.armed and index == self.bad else {})


@pytest.mark.parametrize(
    "change", [{"reward": torch.tensor(float("nan"))}, {"hidden_states": torch.full((2, WIDTH), torch.inf)}]
)
@pytest.mark.parametrize("accumulated", [1, 3])
def test_one_label_or_state_that_is_not_finite_ends_the_training_and_is_never_saved(
    tmp_path, rollouts, change, accumulated
):
    train = Smuggled(rollouts[0], 100, **change)
    settings = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": accumulated}
    args = arguments(tmp_path, per_device_train_batch_size=24 // accumulated, **settings)
    trainer = RecontrolTrainer(new_head(), args, train_dataset=train, eval_dataset=rollouts[1])
    train.armed = True
    with pytest.raises(FloatingPointError, match=r"it must be finite\. Nothing of it was saved"):
        trainer.train()
    saved = [ValueHead.from_pretrained(folder) for folder in tmp_path.glob("checkpoint-*")]
    assert len(saved) == trainer.state.global_step > 0
    assert all(tensor.isfinite().all() for head in saved for tensor in head.state_dict().values())


def test_one_answer_alone_warns_and_still_gives_a_head(tmp_path):
    answer = {"hidden_states": torch.randn(1, WIDTH), "reward": torch.tensor(2.0)}
    with pytest.warns(UserWarning, match="All 1 rewards are 2: nothing can be learned"):
        trainer = RecontrolTrainer(new_head(), arguments(tmp_path), train_dataset=[answer], eval_dataset=[answer])
    trainer.train()
    assert torch.cat([tensor.flatten() for tensor in trainer.model.state_dict().values()]).isfinite().all()
    assert all(value == value for value in trainer.model.config.info["evaluation"].values())


def test_answers_without_states_are_passed_over(tmp_path, rollouts):
    empty = {"hidden_states": torch.zeros(0, WIDTH), "reward": torch.tensor(5.0)}
    answers = [rollouts[0][i] for i in range(40)]
    settings = {"max_steps": 40, "per_device_train_batch_size": 2}  # some batches are empty all through
    with pytest.warns(UserWarning, match="20 of 60 answers of train_dataset have no hidden states"):
        trainer = RecontrolTrainer(
            new_head(), arguments(tmp_path, **settings), train_dataset=answers + [empty] * 20, eval_dataset=answers
        )
    trainer.train()
    assert trainer.model.config.info["evaluation"]["loss"] > 0


def test_a_store_has_left_answers_without_states_out(tmp_path):
    states = torch.randn(3, WIDTH)
    rows = [{"prompt_id": i, "prompt": f"{i}", "finish_reason": "eos"} for i in range(3)]
    with RolloutStore(tmp_path / "rollouts", {}) as store:
        store.commit(0, states, torch.tensor([0, 2, 2, 3]), torch.arange(3.0), torch.zeros(3, dtype=torch.long), rows)
    trainer = RecontrolTrainer(
        new_head(), arguments(tmp_path, max_steps=1), train_dataset=RolloutDataset(tmp_path / "rollouts")
    )
    trainer.train()
    assert trainer.model.config.info["training"]["answers"] == 2


def test_rollouts_of_two_models_are_refused_before_training(tmp_path, rollouts):
    other = random_walk(tmp_path / "other", answers=20, seed=1)
    other.fingerprint = other.fingerprint | {"base_model_name_or_path": "org/another"}
    with pytest.raises(HeadMismatch, match=r"2 models.*org/base, train_dataset: org/another"):
        RecontrolTrainer(new_head(), arguments(tmp_path), train_dataset=ConcatDataset([rollouts[0], other]))
    with pytest.raises(HeadMismatch, match=r"2 models.*org/base, eval_dataset: org/another"):
        RecontrolTrainer(new_head(), arguments(tmp_path), train_dataset=rollouts[0], eval_dataset=other)


def test_a_head_that_is_not_finite_is_never_saved(tmp_path, rollouts):
    trainer = fit(tmp_path, rollouts, max_steps=1)
    with torch.no_grad():
        trainer.model.layers[0].weight[0, 0] = float("nan")
    with pytest.raises(HeadError):
        trainer.save_model()
    assert not list(tmp_path.rglob("model.safetensors"))


def test_a_base_model_calibrates_the_final_head_on_held_out_states(tmp_path, rollouts):
    base_model = tiny_model(hidden_size=WIDTH, num_attention_heads=1, num_key_value_heads=1)
    train, held_out = rollouts
    trainer = RecontrolTrainer(
        new_head(), arguments(tmp_path, **QUICK), train_dataset=train, eval_dataset=held_out, base_model=base_model
    )
    trainer.train()
    control = trainer.model.config.control
    assert control.strength == 0.1
    twin = copy.deepcopy(trainer.model)
    calibrate(twin, base_model, sample_states(held_out, seed=trainer.args.seed))
    assert twin.config.control == control
    controller = Controller(trainer.model, ControlConfig(step_size=control.calibration[2][1]))
    assert mean_kl(controller, base_model, sample_states(held_out, seed=1), 0.4) == pytest.approx(0.1, rel=0.05)
    trainer.save_model()
    assert ValueHead.from_pretrained(tmp_path).config.control == control

    # weights that are trained on have no calibration: it was another head's
    again = RecontrolTrainer(trainer.model, arguments(tmp_path, max_steps=1), train_dataset=train)
    again.train()
    assert again.model.config.control.calibration == []
    assert again.model.config.control.strength is None


def test_a_head_that_cannot_be_calibrated_is_trained_all_the_same(tmp_path, rollouts):
    base_model = tiny_model(hidden_size=WIDTH, num_attention_heads=1, num_key_value_heads=1)
    head = new_head()
    head.config.control.max_relative_norm = 1e-4
    trainer = RecontrolTrainer(head, arguments(tmp_path), train_dataset=rollouts[0], base_model=base_model)
    with pytest.warns(UserWarning, match=r"trained, but not calibrated.*hf-recontrol tune --calibrate"):
        trainer.train()
    assert head.config.control.calibration == []
    assert head.config.info["training"]["steps"] > 0


def test_a_base_model_that_does_not_fit_is_refused_before_training(tmp_path, rollouts):
    with pytest.raises(HeadMismatch, match=r"4 wide .* are 16 wide"):
        RecontrolTrainer(new_head(), arguments(tmp_path), train_dataset=rollouts[0], base_model=tiny_model())
    with pytest.raises(TypeError, match="base_model is a str"):
        RecontrolTrainer(new_head(), arguments(tmp_path), train_dataset=rollouts[0], base_model="org/base")


def test_equal_rewards_warn_and_still_give_a_head(tmp_path):
    train = random_walk(tmp_path / "rollouts", answers=5, equal_rewards=True)
    trainer_arguments = arguments(tmp_path / "head", max_steps=2)
    with pytest.warns(UserWarning, match="nothing can be learned"):
        trainer = RecontrolTrainer(new_head(), trainer_arguments, train_dataset=train, eval_dataset=train)
    trainer.train()
    assert all(value == value for value in trainer.model.config.info["evaluation"].values())


def test_rollouts_of_another_width_are_refused_before_training(tmp_path, rollouts):
    for datasets in ({"train_dataset": rollouts[0]}, {"eval_dataset": rollouts[1]}):
        with pytest.raises(HeadMismatch, match=f"32 wide, but those of {next(iter(datasets))} are 4 wide"):
            RecontrolTrainer(new_head(hidden_size=32), arguments(tmp_path), **datasets)


def test_the_metrics_are_those_of_the_head_and_of_the_linear_head(tmp_path, rollouts):
    trainer = fit(tmp_path, rollouts, **QUICK | {"num_train_epochs": 2}, per_device_eval_batch_size=7)
    train, held_out = rollouts
    metrics = trainer.evaluate()
    batch = pack_answers([held_out[i] for i in range(len(held_out))])
    scale = trainer.model.config.reward
    returns = ((batch["rewards"] - scale.mean) / scale.std).repeat_interleave(batch["offsets"].diff())
    for head, key in ((trainer.model, "explained_variance"), (fit_linear_head(train), "explained_variance_linear")):
        errors = (head(batch["hidden_states"]) - returns).square().mean() / returns.var(unbiased=False)
        assert metrics[f"eval_{key}"] == pytest.approx(1 - errors.item(), abs=1e-5)
    assert metrics["eval_loss"] == pytest.approx(
        (trainer.model(batch["hidden_states"]) - returns).square().mean().item()
    )
    assert metrics["eval_rank_correlation_q1"] < metrics["eval_rank_correlation_q4"]
    evaluation = trainer.model.config.info["evaluation"]
    assert evaluation["rank_correlation"] == [metrics[f"eval_rank_correlation_q{quarter}"] for quarter in (1, 2, 3, 4)]
    assert (evaluation["loss"], evaluation["answers"]) == (metrics["eval_loss"], len(held_out))
    training = trainer.model.config.info["training"]
    assert (training["answers"], training["steps"]) == (len(train), trainer.state.global_step)


def test_several_evaluation_sets_are_named_in_their_metrics(tmp_path, rollouts):
    train, held_out = rollouts
    both = {"near": held_out, "far": held_out}
    trainer = RecontrolTrainer(new_head(), arguments(tmp_path), train_dataset=train, eval_dataset=both)
    metrics = trainer.evaluate()
    assert metrics["eval_near_explained_variance"] == metrics["eval_far_explained_variance"]


def test_rollouts_of_two_runs_train_together(tmp_path, rollouts):
    other = random_walk(tmp_path / "other", answers=20, seed=1)
    trainer = fit(tmp_path / "head", (ConcatDataset([rollouts[0], other]), rollouts[1]), max_steps=1)
    assert trainer.model.config.info["training"]["answers"] == len(rollouts[0]) + 20


def test_a_trained_head_can_be_evaluated_without_training_data(tmp_path, rollouts):
    head = fit_linear_head(rollouts[0])
    metrics = RecontrolTrainer(head, arguments(tmp_path), eval_dataset=rollouts[1]).evaluate()
    assert metrics["eval_explained_variance"] > 0.3
    assert "eval_explained_variance_linear" not in metrics


def test_bfloat16_autocast_trains_and_leaves_a_float32_head(tmp_path, rollouts):
    state = torch.randn(1, WIDTH)
    trainer = RecontrolTrainer(
        new_head(), arguments(tmp_path, max_steps=3, bf16=True), train_dataset=rollouts[0], eval_dataset=rollouts[1]
    )
    for act in (trainer.evaluate, trainer.train):
        act()
        assert trainer.model.dtype == torch.float32
        fresh = ValueHead(trainer.model.config)
        fresh.load_state_dict(trainer.model.state_dict())
        torch.testing.assert_close(trainer.model(state), fresh(state), rtol=0, atol=0)


def test_the_papers_recipe_fills_in_what_is_left_out(tmp_path):
    paper = arguments(tmp_path, recipe="paper")
    assert (paper.td_lambda, paper.learning_rate, paper.per_device_train_batch_size) == (0.0, 1e-4, 512)
    assert (paper.num_train_epochs, paper.weight_decay, paper.optim) == (100, 0.0, "adamw_torch_fused")
    shorter = arguments(tmp_path, recipe="paper", num_train_epochs=3.0)
    assert (shorter.num_train_epochs, shorter.td_lambda) == (3, 0.0)
    assert arguments(tmp_path).td_lambda == 1.0


def test_a_command_line_can_say_every_argument(tmp_path):
    words = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--recipe", "paper", "--standardize_inputs", "true"]
    (parsed,) = HfArgumentParser(RecontrolTrainingArguments).parse_args_into_dataclasses(words)
    assert (parsed.standardize_inputs, parsed.learning_rate, parsed.lr_scheduler_type) == (True, 1e-4, "constant")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"recipe": "papre"}, "recipe is 'papre'; it must be None, 'control' or 'paper'"),
        ({"td_lambda": 1.5}, r"td_lambda is 1\.5; it must be from 0"),
        ({"td_lambda": float("nan")}, "td_lambda is nan"),
        ({"logging_nan_inf_filter": True}, "logging_nan_inf_filter is True.*hide a NaN loss"),
        ({"remove_unused_columns": True}, "remove_unused_columns is True"),
        ({"bf16_full_eval": True}, "bf16_full_eval is True.*float32"),
        ({"push_to_hub": True, "hub_strategy": "checkpoint"}, "hub_strategy is 'checkpoint'.*pickles"),
    ],
)
def test_senseless_arguments_are_refused_by_name(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        arguments(tmp_path, **settings)


def test_without_accelerate_the_pip_command_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(args_module, "is_accelerate_available", lambda: False)
    with pytest.raises(ImportError, match=r"pip install 'hf-recontrol\[train\]'"):
        arguments(tmp_path)


def test_the_wrong_kind_of_model_or_arguments_is_said(tmp_path, rollouts):
    with pytest.raises(TypeError, match="model is a Linear"):
        RecontrolTrainer(torch.nn.Linear(4, 1), arguments(tmp_path))
    with pytest.raises(TypeError, match="args is a str"):
        RecontrolTrainer(new_head(), "folder")


@pytest.mark.filterwarnings("ignore:Cannot enable progress bars")
def test_a_push_sends_the_head_alone(tmp_path, rollouts, hub):
    settings = {
        "push_to_hub": True,
        "hub_model_id": "head",
        "hub_token": TOKEN,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    trainer = fit(tmp_path, rollouts, max_steps=2, **settings)
    repository = hub.repositories["user/head"]
    assert len(repository.commits) == 3  # the repository's first, and two while training
    assert "user/head/commit/" in trainer.push_to_hub(revision="done")
    assert set(repository.branches) == {"main", "done"}
    files = [set(files) - {".gitattributes"} for files in repository.commits.values()]
    assert files[1:3] == [{"config.json", "model.safetensors"}] * 2
    assert files[3] == {"config.json", "model.safetensors", "README.md"}
    pushed = ValueHead.from_pretrained("user/head", revision="done")
    assert weights_of(pushed) == weights_of(trainer.model)
    assert pushed.config.info == trainer.model.config.info


@pytest.mark.filterwarnings("ignore:Cannot enable progress bars")
def test_a_push_that_fails_does_not_end_the_training(tmp_path, rollouts, hub):
    settings = {"push_to_hub": True, "hub_model_id": "user/head", "hub_token": TOKEN, "save_strategy": "steps"}
    hub.fail("/commit/", status=403)
    with pytest.warns(UserWarning, match="Training goes on, but a push failed.*403"):
        trainer = fit(tmp_path, rollouts, max_steps=2, save_steps=1, **settings)
    assert trainer.state.global_step == 2
    with pytest.raises(HeadUnavailable, match="403"):
        trainer.push_to_hub()


def test_the_card_is_written_from_the_head(tmp_path, rollouts):
    trainer = fit(tmp_path, rollouts, max_steps=1)
    trainer.create_model_card("en", "apache-2.0", dataset="user/prompts")
    text = (tmp_path / "README.md").read_text()
    assert text == trainer.model.model_card(tmp_path.name)
    for line in ("license: apache-2.0", "language: en", "datasets: user/prompts"):
        assert line in text
    (tmp_path / "README.md").write_text("mine")
    trainer.create_model_card()
    assert (tmp_path / "README.md").read_text() == "mine"
