"""RecontrolTrainer with a ControlHead: the reward of answers sampled under it goes up."""

import copy
import gc
import math
import shutil

import pytest
import torch
from tiny import CONTROL_SHAPES, tiny_control_head, tiny_head, tiny_model, tiny_tokenizer
from transformers import TrainerCallback

from hf_recontrol import (
    ControlConfig,
    ControlHead,
    ControlHeadConfig,
    Controller,
    RecontrolTrainer,
    RecontrolTrainingArguments,
    calibrate,
    collect_rollouts,
    fit_constant_control,
    fit_linear_head,
    sample_states,
)
from hf_recontrol.calibration import mean_kl
from hf_recontrol.control_fitting import advantages_of
from hf_recontrol.errors import HeadMismatch
from hf_recontrol.fitting import pack_answers

pytestmark = pytest.mark.versions
PROMPTS = [f"w{i} w{i + 1}" for i in range(3, 62)]
QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 10**6}
CONTROL = {"recipe": "control", "per_device_eval_batch_size": 64}


def two_words(completions, **kwargs):
    return [float(sum(word in ("w7", "w9") for word in completion.split())) for completion in completions]


def collect(folder, controller=None, **options):
    options = {"num_return_sequences": 8, "max_new_tokens": 8, "progress": False} | options
    return collect_rollouts(
        tiny_model(), tiny_tokenizer(), PROMPTS, two_words, folder, controller=controller, **options
    )


@pytest.fixture(scope="module", autouse=True)
def little_garbage():
    """Trainer collects garbage each time that it starts, half a second over all that is imported here."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    return collect(tmp_path_factory.mktemp("rollouts")).split(0.3)


@pytest.fixture(scope="module")
def behavior():
    return Controller(tiny_control_head(seed=5, intermediate_size=16), ControlConfig(scale=0.5))


@pytest.fixture(scope="module")
def steered(tmp_path_factory, behavior):
    return collect(tmp_path_factory.mktemp("steered"), behavior, num_return_sequences=3).split(0.3)


def new_head(seed=0, **config):
    torch.manual_seed(seed)
    return ControlHead(ControlHeadConfig(**{"hidden_size": 16} | config))


def arguments(folder, **settings):
    return RecontrolTrainingArguments(output_dir=str(folder), **CONTROL | QUIET | settings)


def trainer_of(folder, rollouts, model, head=None, critic=None, behavior=None, callbacks=None, **settings):
    train, held_out = rollouts
    head = new_head() if head is None else head
    datasets = {"train_dataset": train, "eval_dataset": held_out}
    more = {"base_model": model, "critic": critic, "behavior": behavior, "callbacks": callbacks}
    return RecontrolTrainer(head, arguments(folder, **settings), **datasets, **more)


def fit(*args, resume=None, **settings):
    trainer = trainer_of(*args, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def whole(dataset):
    return pack_answers([dataset[i] for i in range(len(dataset))])


def rise(steered, plain):
    """Of the mean reward, in its standard errors."""
    error = math.hypot(*(x.rewards.std().item() / len(x) ** 0.5 for x in (steered, plain)))
    return (steered.rewards.mean() - plain.rewards.mean()).item() / error


@pytest.mark.parametrize("shape", CONTROL_SHAPES)
def test_the_reward_of_answers_sampled_under_the_control_goes_up(tmp_path, rollouts, model, shape):
    trainer = fit(tmp_path / "head", rollouts, model, head=new_head(**CONTROL_SHAPES[shape]))
    evaluation = trainer.model.config.info["evaluation"]
    assert evaluation["gain"] > 0.5
    assert 0.05 < evaluation["kl_per_token"] < 1
    answers = collect(tmp_path / "rollouts", Controller(trainer.model, ControlConfig(scale=1.0)), seed=1)
    assert rise(answers, rollouts[1]) > 8
    if shape == "linear":  # and does so with the strength that it is calibrated to
        mild = collect(tmp_path / "mild", Controller(trainer.model, ControlConfig(strength=0.1)), seed=1)
        assert 3 < rise(mild, rollouts[1]) < rise(answers, rollouts[1])


def gains(trainer, dataset):
    """Σ (ρ − 1) A of each answer."""
    batch = whole(dataset)
    log_ratios, _, advantages = trainer.objective.observe(trainer.model, batch).double().unbind(-1)
    each = ((log_ratios.exp() - 1) * advantages).split(batch["offsets"].diff().tolist())
    return torch.stack([gain.sum() for gain in each])


def test_shuffled_rewards_gain_nothing_on_held_out_answers_where_true_ones_do(tmp_path, rollouts, model):
    def t(datasets):
        trainer = fit(tmp_path, datasets, model)
        found = gains(trainer, datasets[1])
        assert found.mean().item() == pytest.approx(trainer.model.config.info["evaluation"]["gain"], rel=1e-4)
        return (found.mean() / (found.std() / len(found) ** 0.5)).item()

    def shuffled(dataset):
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
        prompts = [{"prompt_token_ids": dataset.row(i)["prompt_token_ids"]} for i in range(len(dataset))]
        return [dataset[i] | prompts[i] | {"reward": dataset.rewards[j]} for i, j in enumerate(order)]

    rollouts = rollouts[::-1]  # more to measure it on than to fit it to
    assert abs(t([shuffled(dataset) for dataset in rollouts])) < 3
    assert t(rollouts) > 4


class AtTheStart(TrainerCallback):
    """Keeps the head as it was before the first step."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.head = copy.deepcopy(model)


@pytest.mark.parametrize("shape", ["constant", "one hidden layer"])
def test_a_new_head_starts_from_the_best_constant(tmp_path, rollouts, model, shape):
    start, critic = AtTheStart(), tiny_head()
    settings = {"beta": 0.7, "td_lambda": 0.5, "max_steps": 1}
    fit(tmp_path, rollouts, model, new_head(**CONTROL_SHAPES[shape]), critic, callbacks=[start], **settings)
    constant = fit_constant_control(rollouts[0], model, critic=critic, beta=0.7, td_lambda=0.5)
    states = torch.randn(5, 16)
    torch.testing.assert_close(start.head(states), constant(states))
    torch.testing.assert_close(start.head.output_scale, constant.output_scale)
    assert start.head.input_std.ne(1).any()
    assert start.head.config.reward.std != 1


def test_a_head_that_was_trained_before_goes_on_from_where_it_was(tmp_path, rollouts, model):
    head = fit(tmp_path, rollouts, model, max_steps=2).model
    before, scales, start = copy.deepcopy(head), copy.deepcopy(head.config.reward), AtTheStart()
    other = rollouts[1].split(0.5, seed=3)  # their rewards have another mean and spread
    fit(tmp_path, other, model, head, callbacks=[start], max_steps=1)
    assert start.head.digest() == before.digest() != head.digest()
    assert head.config.reward == scales
    torch.testing.assert_close(head.input_std, before.input_std, rtol=0, atol=0)


def test_on_answers_of_a_control_a_new_head_starts_from_nothing_but_in_its_units(tmp_path, steered, behavior, model):
    start = AtTheStart()
    trainer = fit(tmp_path, steered, model, behavior=behavior, callbacks=[start], max_steps=1)
    assert start.head.is_zero()
    assert start.head.output_scale.ne(1).all()
    assert not trainer.model.is_zero()


@pytest.mark.parametrize("with_behavior", [False, True], ids=["base model's answers", "a control's answers"])
def test_the_metrics_are_those_computed_by_hand(
    tmp_path, rollouts, steered, behavior, model, with_behavior, monkeypatch
):
    monkeypatch.setattr("hf_recontrol.control_fitting.logits_at_once", lambda model: 5)
    datasets, behavior = (steered, behavior) if with_behavior else (rollouts, None)
    settings = {"td_lambda": 0.9, "beta": 0.4, "clip_ratio": 1.3, "per_device_eval_batch_size": 7}
    trainer = fit(tmp_path, datasets, model, behavior=behavior, **settings)
    metrics, batch = trainer.evaluate(), whole(datasets[1])
    h, weight = batch["hidden_states"], model.lm_head.weight.detach().double()
    shifts = trainer.model(h).double(), torch.zeros(len(h), 16), behavior.control(h) if behavior else torch.zeros(1, 16)
    log_p, base, old = (((h + shift) @ weight.T).log_softmax(-1).detach() for shift in (x.double() for x in shifts))
    kl = (log_p.exp() * (log_p - base)).sum(-1)
    log_ratios = (log_p - old).gather(1, batch["token_ids"][:, None])[:, 0]
    critic = fit_linear_head(datasets[0], reward=trainer.model.config.reward)
    advantages = advantages_of(critic, batch, 0.9).double()
    clipped = log_ratios.exp().clamp(1 / 1.3, 1.3)
    expected = {
        "loss": (0.4 * kl - torch.minimum(log_ratios.exp() * advantages, clipped * advantages)).mean(),
        "gain": (log_ratios.expm1() * advantages).sum() / len(datasets[1]),
        "kl_per_token": kl.mean(),
        "kl_per_answer": kl.sum() / len(datasets[1]),
        "clipped": (log_ratios.abs() > math.log(1.3)).double().mean(),
    }
    assert 0.05 < expected["clipped"] < 0.95, "the test says too little"
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
        assert trainer.model.config.info["evaluation"][name] == metrics[f"eval_{name}"]
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(metrics["eval_loss"], rel=1e-4, abs=1e-6)


def test_a_copy_of_the_behavior_gains_nothing_over_it(tmp_path, steered, behavior, model):
    head = copy.deepcopy(behavior.heads[0])
    head.output_scale *= 0.5  # the scale that it steered at
    metrics = trainer_of(tmp_path, steered, model, head, behavior=behavior).evaluate()
    assert (abs(metrics["eval_gain"]), metrics["eval_clipped"]) == (pytest.approx(0, abs=1e-4), 0)
    assert metrics["eval_kl_per_token"] > 0.01


def test_accumulated_batches_train_as_one_batch_of_all_their_tokens(tmp_path, rollouts, model):
    def trained(name, **settings):
        return fit(tmp_path / name, rollouts, model, max_steps=3, optim="sgd", **settings).model.state_dict()

    parts = trained("parts", per_device_train_batch_size=2, gradient_accumulation_steps=4)
    torch.testing.assert_close(parts, trained("whole", per_device_train_batch_size=8), rtol=1e-4, atol=1e-5)


def test_the_figures_of_a_run_have_intervals(tmp_path, rollouts, model):
    evaluation = fit(tmp_path, rollouts, model, max_steps=3).model.config.info["evaluation"]
    for name in ("gain", "kl_per_answer", "kl_per_token"):
        low, high = evaluation[f"{name}_interval"]
        assert low < evaluation[name] < high


def test_a_resumed_run_ends_bit_for_bit_as_a_whole_one(tmp_path, rollouts, model):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 2}
    fit(tmp_path / "whole", rollouts, model, **settings)
    shutil.copytree(tmp_path / "whole/checkpoint-3", tmp_path / "resumed/checkpoint-3")
    fit(tmp_path / "resumed", rollouts, model, head=new_head(seed=1), resume=True, **settings)
    for name in ("model.safetensors", "config.json"):
        files = [(tmp_path / run / "checkpoint-6" / name).read_bytes() for run in ("whole", "resumed")]
        assert files[0] == files[1]


def test_a_checkpoint_is_a_control_head_whose_card_tells_of_the_run(tmp_path, rollouts, model):
    settings = {"beta": 0.45, "clip_ratio": 1.75, "max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = fit(tmp_path, rollouts, model, **settings)
    saved = ControlHead.from_pretrained(tmp_path / "checkpoint-2")
    assert saved.digest() == trainer.model.digest()
    assert saved.config.info["training"]["beta"] == 0.45
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    for line in (
        "β of the KL from the base model",
        "0.45",
        "Probability ratios are clipped",
        "1.75",
        "Gain of the reward",
        "two_words",
    ):
        assert line in text


def test_the_final_head_is_calibrated_on_held_out_states(tmp_path, rollouts, model):
    trainer = fit(tmp_path, rollouts, model)
    control, twin = trainer.model.config.control, copy.deepcopy(trainer.model)
    calibrate(twin, model, sample_states(rollouts[1], seed=trainer.args.seed))
    assert twin.config.control == control
    assert (control.strength, control.scale) == (0.1, dict(control.calibration)[0.1])
    controller = Controller(trainer.model, ControlConfig(scale=control.scale))
    assert mean_kl(controller, model, sample_states(rollouts[1]), 0.4) == pytest.approx(0.1, rel=0.05)


def test_nothing_but_the_head_is_written(tmp_path, rollouts):
    model, critic = tiny_model(attention_dropout=0.5).train(), tiny_head().train()
    model.model.layers[1].train(False)
    before = [copy.deepcopy(one.state_dict()) for one in (model, critic)]
    modes = [module.training for module in model.modules()]
    fit(tmp_path, rollouts, model, critic=critic)
    for one, state in zip((model, critic), before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())
        assert all(parameter.grad is None for parameter in one.parameters())
    assert modes == [module.training for module in model.modules()]
    assert critic.training


def test_the_critic_given_is_the_one_that_counts(tmp_path, rollouts, model):
    own, given = (trainer_of(tmp_path, rollouts, model, critic=critic).evaluate() for critic in (None, tiny_head()))
    assert own["eval_loss"] != given["eval_loss"]


def test_a_loss_that_is_not_finite_ends_the_training_and_nothing_is_saved(tmp_path, rollouts, model):
    settings = {"max_steps": 5, "learning_rate": 1e38, "save_strategy": "steps", "save_steps": 2}
    with pytest.raises(FloatingPointError, match=r"The loss is (inf|nan) at step 2.*Lower learning_rate"):
        fit(tmp_path, rollouts, model, **settings)
    assert not list(tmp_path.rglob("model.safetensors"))


def test_bfloat16_autocast_trains_almost_the_same_head(tmp_path, rollouts, model):
    u = [fit(tmp_path, rollouts, model, bf16=bf16).model(torch.ones(3, 16)).detach() for bf16 in (False, True)]
    assert u[1].dtype == torch.float32
    torch.testing.assert_close(u[1], u[0], rtol=0.05, atol=0.05)


def test_where_no_arguments_are_given_they_are_those_of_the_recipe_for_controls(tmp_path, rollouts, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = RecontrolTrainer(new_head(), train_dataset=rollouts[0], base_model=model).args
    assert (args.recipe, args.num_train_epochs, args.td_lambda) == ("control", 1.0, 1.0)
    assert (args.beta, args.clip_ratio, args.standardize_inputs) == (0.3, 2.0, True)
    assert RecontrolTrainer(tiny_head(), train_dataset=rollouts[0]).args.recipe is None


@pytest.mark.parametrize(
    ("name", "value"), [("beta", 0.0), ("beta", math.inf), ("clip_ratio", 1.0), ("beta", math.nan)]
)
def test_senseless_numbers_are_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=rf"{name} (is )?{value}.*they must be finite, beta > 0 and clip_ratio > 1"):
        arguments(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "model is a Linear, but RecontrolTrainer trains a head"),
        ({"args": "folder"}, TypeError, "args is a str; expected RecontrolTrainingArguments"),
        ({"base_model": "org/base"}, TypeError, "base_model is a str; pass the transformers model that wrote"),
        ({"base_model": None}, ValueError, "LM head. Pass base_model="),
        ({"critic": tiny_control_head()}, TypeError, "critic is a ControlHead; pass a ValueHead, or leave it out"),
        ({"behavior": tiny_control_head()}, TypeError, "behavior is a ControlHead; pass the Controller that"),
        (
            {"model": tiny_head(), "critic": tiny_head()},
            ValueError,
            "critic is for a ControlHead, but the model is a V",
        ),
        ({"model": tiny_head(), "behavior": Controller(tiny_head())}, ValueError, "behavior is for a ControlHead"),
        ({"recipe": "paper"}, ValueError, "recipe is 'paper', but the model is a ControlHead. Take recipe='control'"),
        ({"model": tiny_head()}, ValueError, "recipe is 'control', but the model is a ValueHead. Take recipe='paper'"),
        ({"base_model": tiny_model(seed=1)}, HeadMismatch, "Were the rollouts written by this very model"),
        ({"behavior": Controller(tiny_control_head())}, ValueError, "collected under no control"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_training(tmp_path, rollouts, model, change, error, words):
    args = arguments(tmp_path, recipe=change.get("recipe", "control"))
    given = {"model": new_head(), "args": args, "base_model": model, "train_dataset": rollouts[0]} | change
    given.pop("recipe", None)
    with pytest.raises(error, match=words):
        RecontrolTrainer(**given)


def test_the_recipes_of_the_other_kind_may_be_left_out(tmp_path, rollouts, model):
    args = arguments(tmp_path, recipe=None)
    assert args.num_train_epochs == 3.0
    taken = RecontrolTrainer(new_head(), args, train_dataset=rollouts[0], base_model=model).args
    assert (taken.recipe, taken.num_train_epochs, args.num_train_epochs) == ("control", 1.0, 3.0)
    args = arguments(tmp_path, recipe=None, num_train_epochs=2)  # what is given stays
    assert RecontrolTrainer(new_head(), args, train_dataset=rollouts[0], base_model=model).args.num_train_epochs == 2


def test_a_behavior_may_hold_the_very_head_that_is_trained(tmp_path, model, steered, behavior):
    head = copy.deepcopy(behavior.heads[0])
    own = Controller(head, behavior.config)
    args = RecontrolTrainingArguments(str(tmp_path), **QUIET, **CONTROL, learning_rate=0.1)
    trainer = RecontrolTrainer(
        head, args, train_dataset=steered[0], eval_dataset=steered[1], base_model=model, behavior=own
    )
    trainer.train()
    assert head.config.info["evaluation"]["clipped"] > 0  # p_old did not move along with the head


def test_rewards_that_are_all_equal_are_refused(tmp_path, model, rollouts):
    part = torch.utils.data.Subset(rollouts[0], [i for i, reward in enumerate(rollouts[0].rewards) if reward == 0])
    with pytest.raises(ValueError, match="rewards are 0, so no control is better than another"):
        fit_constant_control(part, model)
    with pytest.raises(ValueError, match="rewards are 0, so no control is better than another"):
        RecontrolTrainer(ControlHead(ControlHeadConfig(16)), train_dataset=part, base_model=model)


def test_a_control_can_be_evaluated_without_training_answers(tmp_path, model, rollouts):
    args = RecontrolTrainingArguments(str(tmp_path), **QUIET, **CONTROL)
    head, critic = tiny_control_head(), fit_linear_head(rollouts[0])
    with pytest.raises(ValueError, match="Pass critic="):
        RecontrolTrainer(head, args, eval_dataset=rollouts[1], base_model=model)
    metrics = RecontrolTrainer(head, args, eval_dataset=rollouts[1], base_model=model, critic=critic).evaluate()
    assert metrics["eval_kl_per_token"] > 0
    with pytest.raises(HeadMismatch, match="8 wide"):
        RecontrolTrainer(head, args, eval_dataset=rollouts[1], base_model=model, critic=tiny_head(hidden_size=8))
