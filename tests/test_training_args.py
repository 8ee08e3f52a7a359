"""RecontrolTrainingArguments as a citizen of transformers: YAML, callbacks, loggers, the best checkpoint."""

import pytest
import torch
from test_train_control import little_garbage  # noqa: F401
from test_trainer import arguments, fit, new_head, random_walk
from transformers import EarlyStoppingCallback, HfArgumentParser, TrainerCallback

from hf_recontrol import RecontrolTrainer, RecontrolTrainingArguments, ValueHead
from hf_recontrol.training_args import METRICS

pytestmark = pytest.mark.versions
EVERY = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    return random_walk(tmp_path_factory.mktemp("rollouts")).split(0.25)


def from_yaml(folder, text):
    (folder / "train.yaml").write_text(f"output_dir: {folder}/head\nuse_cpu: true\nreport_to: none\n{text}")
    (parsed,) = HfArgumentParser(RecontrolTrainingArguments).parse_yaml_file(str(folder / "train.yaml"))
    return parsed


def test_a_yaml_file_can_say_every_argument(tmp_path):
    parsed = from_yaml(tmp_path, "recipe: paper\ntd_lambda: 0.5\ngamma: 0.99\nlearning_rate: 1e-4\nbeta: 2e-1\n")
    assert (parsed.recipe, parsed.td_lambda, parsed.gamma, parsed.num_train_epochs) == ("paper", 0.5, 0.99, 100)
    assert (parsed.learning_rate, parsed.beta) == (1e-4, 0.2)  # YAML has no number without a point: it says "1e-4"


def test_an_unknown_or_senseless_key_of_a_yaml_file_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="td_lamda"):
        from_yaml(tmp_path, "td_lamda: 0.5\n")
    with pytest.raises(ValueError, match="learning_rate is 'fast'; it must be a number"):
        from_yaml(tmp_path, "learning_rate: fast\n")


def test_a_dict_can_say_the_arguments_and_an_unknown_key_is_refused(tmp_path):
    parser = HfArgumentParser(RecontrolTrainingArguments)
    (parsed,) = parser.parse_dict({"output_dir": str(tmp_path), "use_cpu": True, "td_lambda": 0.25})
    assert (parsed.td_lambda, parsed.learning_rate) == (0.25, 1e-3)
    with pytest.raises(ValueError, match="labmda"):
        parser.parse_dict({"output_dir": str(tmp_path), "use_cpu": True, "labmda": 0.25})


@pytest.mark.parametrize("gamma", [0.0, -0.5, 1.5, float("nan")])
def test_a_senseless_discount_is_refused(tmp_path, gamma):
    with pytest.raises(ValueError, match=rf"gamma is {gamma}; it must be above 0, and 1 \(no discount\) or less"):
        arguments(tmp_path, gamma=gamma)


def test_a_discount_makes_early_tokens_expect_less(tmp_path, rollouts):
    settings = {"learning_rate": 1e-2, "num_train_epochs": 8}
    plain, discounted = (fit(tmp_path, rollouts, gamma=gamma, **settings) for gamma in (1.0, 0.5))
    states = torch.cat([rollouts[1][i]["hidden_states"] for i in range(len(rollouts[1]))])
    slopes = [trainer.model(states).std().item() for trainer in (plain, discounted)]
    assert slopes[1] < 0.75 * slopes[0]
    assert discounted.model.config.info["training"]["gamma"] == 0.5
    assert discounted.model.config.info["evaluation"]["explained_variance"] > 0.3  # of the discounted returns
    assert "γ of the returns (1: no discount): 0.5" in discounted.model.model_card()


@pytest.mark.parametrize("name", METRICS)
def test_each_metric_is_best_on_its_own_side(tmp_path, name):
    for metric in (name, f"eval_{name}", f"eval_far_{name}"):
        better = arguments(tmp_path, metric_for_best_model=metric).greater_is_better
        assert better == (name.startswith(("explained", "rank", "gain")))
    assert arguments(tmp_path, metric_for_best_model=name, greater_is_better=True).greater_is_better is True


@pytest.mark.parametrize("name", ["explained_varience", "calibration_slope", "accuracy"])
def test_a_metric_that_is_not_measured_or_has_no_better_side_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"metric_for_best_model is '{name}'; it must be one of loss, explained_var"):
        arguments(tmp_path, metric_for_best_model=name)


@pytest.mark.parametrize("metric", ["explained_variance", "loss"])
def test_early_stopping_ends_the_training_and_the_best_head_comes_back(tmp_path, rollouts, metric):
    # the learning rate rises until V gets worse
    settings = {"max_steps": 200, "learning_rate": 3.0, "lr_scheduler_type": "linear", "warmup_steps": 100} | EVERY
    best = {"metric_for_best_model": metric, "load_best_model_at_end": True}
    trainer = RecontrolTrainer(
        new_head(),
        arguments(tmp_path, **settings, **best),
        train_dataset=rollouts[0],
        eval_dataset=rollouts[1],
        callbacks=[EarlyStoppingCallback(early_stopping_patience=3)],
    )
    trainer.train()
    assert trainer.state.global_step < 200
    measured = {line["step"]: line[f"eval_{metric}"] for line in trainer.state.log_history if "eval_loss" in line}
    choose = min if metric == "loss" else max
    at = choose(measured, key=measured.get)
    assert at == trainer.state.global_step - 6
    assert trainer.model.digest() == ValueHead.from_pretrained(tmp_path / f"checkpoint-{at}").digest()
    assert trainer.model.config.info["evaluation"][metric] == measured[at]


def test_a_callback_sees_the_run(tmp_path, rollouts):
    class Seen(TrainerCallback):
        def __init__(self):
            self.events = []

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.events.append(("step", state.global_step, type(model).__name__))

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            self.events.append(("evaluate", state.global_step, metrics["eval_explained_variance"]))

    seen = Seen()
    args = arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2)
    trainer = RecontrolTrainer(new_head(), args, train_dataset=rollouts[0], eval_dataset=rollouts[1], callbacks=[seen])
    trainer.train()
    explained = trainer.model.config.info["evaluation"]["explained_variance"]
    assert seen.events == [("step", 1, "ValueHead"), ("step", 2, "ValueHead"), ("evaluate", 2, explained)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own
def test_tensorboard_gets_the_losses_and_the_metrics(tmp_path, rollouts, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    settings = {"report_to": "tensorboard", "logging_steps": 1, "max_steps": 4} | EVERY
    fit(tmp_path / "head", rollouts, **settings | {"save_strategy": "no"})
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("eval/explained_variance")] == [2, 4]
    assert '"td_lambda": 1.0' in events.Tensors("args/text_summary")[0].tensor_proto.string_val[0].decode()
