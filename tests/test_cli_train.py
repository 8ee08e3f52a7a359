"""hf-recontrol train, from folders of rollouts, or prompts and a reward, to a head in a folder."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml
from hub_server import TOKEN
from saved import save_all

from hf_recontrol import Head, RolloutDataset, cli_train, collect_rollouts, on_policy
from hf_recontrol.cli_inputs import language_model, reward_functions
from hf_recontrol.train_options import parse

QUIET = ("--use_cpu", "--disable_tqdm", "true", "--logging_steps", "1000", "--save_strategy", "no")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return save_all(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def rollouts(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollouts")
    rewards = reward_functions([f"{files.rewards}:two_words"], None)
    with open(files.prompts, encoding="utf-8") as file:
        prompts = [json.loads(line)["prompt"] for line in file]
    collect_rollouts(
        *language_model(files.model, device="cpu"),
        prompts,
        rewards,
        folder,
        num_return_sequences=4,
        max_new_tokens=8,
        progress=False,
    )
    return str(folder)


@pytest.mark.parametrize("kind", ["value", "linear", "control", "constant"])
def test_a_head_of_each_kind_is_fitted_measured_and_saved(command, files, rollouts, tmp_path, kind):
    model = () if kind == "linear" else ("--model", files.model)
    printed = command("train", "--rollouts", rollouts, "--output_dir", tmp_path / "out", "--kind", kind, *model, *QUIET)
    head = Head.from_pretrained(tmp_path / "out")
    assert head.config.kind == {"linear": "value", "constant": "control"}.get(kind, kind)
    assert ("held-out answers, at scale 1:" in printed) == (kind in ("control", "constant"))
    assert "runtime" not in printed.rpartition("held-out answers")[2]
    assert f"Saved in {tmp_path / 'out'}." in printed
    assert ("It has no calibration" in printed) == (not model)
    assert ("explained variance" in printed) == (head.config.kind == "value")
    if kind in ("value", "linear"):
        assert "nan" not in printed
    if kind == "value":
        assert re.search(r"explained variance +\S+ \[\S+, \S+\]  \(linear head: \S+\)", printed)
    if kind == "control":
        assert re.search(r"gain +\S+ \[\S+, \S+\]  \(constant control: \S+\)", printed)
    assert bool(head.config.control.calibration) == bool(model)


def test_several_heads_are_fitted_and_one_stands_for_them(command, rollouts, tmp_path):
    command("train", "--rollouts", rollouts, "--output_dir", tmp_path, "--num_heads", 2, "--kappa", 0.5, *QUIET)
    training = Head.from_pretrained(tmp_path).config.info["training"]
    assert (training["heads"], training["kappa"]) == (2, 0.5)
    for options, words in ((("--num_heads", 0), "num_heads is 0"), (("--num_heads", 2, "--kind", "linear"), "value")):
        error = command("train", "--rollouts", rollouts, "--output_dir", tmp_path, *options, *QUIET, status=2)
        assert words in error


def test_the_shape_and_the_training_arguments_are_obeyed(command, rollouts, tmp_path):
    shape = ("--num_hidden_layers", 2, "--intermediate-size", 5)
    more = ("--num-train-epochs", 1, "--per_device_train_batch_size", 16, "--held_out", 0.5, "--seed", 7)
    command("train", "--rollouts", rollouts, "--output-dir", tmp_path, *shape, *more, *QUIET)
    head = Head.from_pretrained(tmp_path)
    assert (head.config.num_hidden_layers, head.config.intermediate_size) == (2, 5)
    training = head.config.info["training"]
    assert (training["epochs"], training["batch_size"], training["seed"]) == (1.0, 16, 7)
    assert training["answers"] == len(RolloutDataset(rollouts).split(0.5, seed=7)[0])


def test_several_folders_are_trained_on_together(command, rollouts, tmp_path):
    command("train", "--rollouts", rollouts, rollouts, "--output_dir", tmp_path, *QUIET)
    assert Head.from_pretrained(tmp_path).config.info["training"]["answers"] == 2 * 144


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path):
    config = tmp_path / "train.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "rollouts": "a",
                "kind": "control",
                "learning-rate": "1e-4",
                "num_train_epochs": 5,
                "reward_weights": [1, "2"],
                "standardize_inputs": False,
                "push_to_hub": False,
            }
        ),
        encoding="utf-8",
    )
    options, args = parse(["--config", str(config), "--num_train_epochs", "2", "--use_cpu"])
    assert (options.rollouts, options.kind, options.reward_weights) == (["a"], "control", [1.0, 2.0])
    assert (args.learning_rate, args.num_train_epochs, args.standardize_inputs) == (1e-4, 2.0, False)
    assert args.per_device_train_batch_size == 32
    plain, _ = parse(["--use_cpu"])
    assert (plain.rollouts, plain.kind) == ([], "value")


@pytest.mark.parametrize("kind", ["value", "control"])
def test_a_dry_run_times_a_few_steps_and_writes_nothing(command, files, rollouts, tmp_path, kind):
    options = ("--kind", kind, "--model", files.model, "--num_train_epochs", 4, "--dry_run")
    printed = command("train", "--rollouts", rollouts, "--output_dir", tmp_path / "out", *options, *QUIET)
    assert "144 to train on, 16 held out" in printed
    assert "steps           20 of 32 answers" in printed  # ⌈144 / 32⌉ · 4
    assert "the mean of 5" in printed
    assert f"{16 * 17 + 17 if kind == 'value' else 16 * 17 + 16 * 17:,}" in printed
    assert "Nothing was written" in printed
    assert not (tmp_path / "out").exists()


def test_training_is_resumed_from_the_newest_checkpoint(command, rollouts, tmp_path, monkeypatch):
    options = ("--rollouts", rollouts, "--output_dir", tmp_path, *QUIET[:-1], "steps", "--save_steps", 4)
    command("train", *options, "--max_steps", 8)
    seen = []
    train = cli_train.RecontrolTrainer.train
    monkeypatch.setattr(
        cli_train.RecontrolTrainer, "train", lambda self, **kwargs: (seen.append(kwargs), train(self, **kwargs))[1]
    )
    command("train", *options, "--max_steps", 12, "--resume_from_checkpoint", "true")
    assert seen == [{"resume_from_checkpoint": True}]
    assert Head.from_pretrained(tmp_path).config.info["training"]["steps"] == 12
    command("train", *options, "--max_steps", 12, "--resume_from_checkpoint", tmp_path / "checkpoint-4")
    assert seen[1:] == [{"resume_from_checkpoint": str(tmp_path / "checkpoint-4")}]


def rounds(files, folder, kind):
    return (
        *("train", "--model", files.model, "--dataset", files.prompts, "--reward", f"{files.rewards}:two_words"),
        *("--kind", kind, "--iterations", 2, "--output_dir", folder, "--max_new_tokens", 8, *QUIET),
    )


def test_a_control_head_is_trained_in_rounds(command, files, tmp_path):
    printed = command(*rounds(files, tmp_path, "control"))
    head = Head.from_pretrained(tmp_path)
    assert [len(RolloutDataset(tmp_path / f"rollouts-{i}")) for i in (1, 2)] == [160, 160]
    assert len(head.config.info["iterations"]) == 2
    assert "gain" in printed
    assert f"Saved in {tmp_path}." in printed


def test_a_value_head_is_trained_in_rounds_by_train_value(command, files, tmp_path, monkeypatch, make_head):
    seen = {}

    def train_value(model, tokenizer, prompts, reward_funcs, output_dir, *, iterations, args, **settings):
        seen.update(settings, iterations=iterations, prompts=prompts["prompt"], args=args)
        head = make_head(16)
        head.config.info["evaluation"] = {"loss": 0.5, "explained_variance": 0.25, "answers": 16}
        return head

    monkeypatch.setattr(on_policy, "train_value", train_value, raising=False)
    printed = command(*rounds(files, tmp_path, "value"), "--seed", 5)
    assert (seen["iterations"], seen["max_new_tokens"], seen["seed"], len(seen["prompts"])) == (2, 8, 5, 40)
    assert seen["args"].output_dir == str(tmp_path / "training")
    assert "On 16 held-out answers" in printed
    assert Head.from_pretrained(tmp_path).config.hidden_size == 16


def test_what_only_a_person_knows_is_said_for_the_card(command, rollouts, tmp_path):
    said = ("--license", "apache-2.0", "--language", "en", "--data", "user/prompts", "--data_license", "odc-by")
    command("train", "--rollouts", rollouts, "--output_dir", tmp_path, "--kind", "linear", *QUIET, *said)
    card = (tmp_path / "README.md").read_text()
    for line in ("license: apache-2.0", "language: en", "datasets: user/prompts", "`user/prompts`, licence `odc-by`"):
        assert line in card


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_training_with_a_checkpoint_and_without_a_traceback(rollouts, tmp_path, signum):
    command = [sys.executable, "-m", "hf_recontrol", "train", "--rollouts", rollouts, "--output_dir", str(tmp_path)]
    options = ("--num_train_epochs", "100000", "--use_cpu", "--save_steps", "50", "--save_total_limit", "2")
    process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signum)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signum, error
    assert "Traceback" not in error
    step = int(re.search(r"stopped at step (\d+), which .* keeps", error)[1])
    assert (tmp_path / f"checkpoint-{step}" / "model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore:Cannot enable progress bars")  # Trainer's, beside conftest's environment
def test_a_head_is_pushed_where_that_is_asked_for(command, rollouts, tmp_path, hub):
    more = ("--push_to_hub", "--hub_model_id", "user/head", "--hub_token", TOKEN)
    with pytest.warns(UserWarning, match="'./model' is not the id of a Hub repository"):
        command("train", "--rollouts", rollouts, "--output_dir", tmp_path, *QUIET, *more)
    assert Head.from_pretrained("user/head", token=TOKEN).config.hidden_size == 16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--learning_rat", "1"), "There is no option '--learning_rat'; do you mean '--learning_rate'?"),
        (("--rolouts", "x"), "do you mean '--rollouts'?"),
        (("--learning_rate", "much"), "invalid float value: 'much'"),
        (("--kind", "valu"), "invalid choice: 'valu'"),
        (("--config", "nowhere.yaml"), "there is no such file"),
        (("--config", "UNKNOWN"), "'learning_rat', which is no option; do you mean 'learning_rate'?"),
        (("--config", "CHOICE"), "kind: 'valu'; it must be one of"),
        (("--config", "LIST"), "holds a list"),
        (("--config", "TORN"), "is no YAML"),
        ((), "Pass what to train on"),
        (("--rollouts", "ROLLOUTS", "--reward", "x.py:f"), "Pass what to train on"),
        (("--reward", "x.py:f"), "--model, --dataset and --reward are needed"),
        (("--rollouts", "ROLLOUTS", "--kind", "control"), "pass --model"),
        (("--rollouts", "ROLLOUTS", "--held_out", "1"), "--held_out is 1.0"),
        (("--rollouts", "ROLLOUTS", "--iterations", "2"), "--iterations collects anew"),
        (("--rollouts", "nowhere"), "is no folder of rollouts"),
        (("--rollouts", "ROLLOUTS", "--kind", "linear", "--dry_run"), "no steps to time"),
        (("--rollouts", "ROLLOUTS", "--td_lambda", "2"), "td_lambda is 2.0"),
        (("--rollouts", "ROLLOUTS", "--resume_from_checkpoint", "true"), "no complete checkpoint"),
    ],
)
def test_a_users_error_is_one_line_and_status_2(command, rollouts, tmp_path, arguments, words):
    contents = {"UNKNOWN": "learning_rat: 1", "CHOICE": "kind: valu", "LIST": "- 1", "TORN": "a: [1"}
    files = {"ROLLOUTS": rollouts}
    for name, text in contents.items():
        files[name] = tmp_path / f"{name}.yaml"
        files[name].write_text(text, encoding="utf-8")
    given = [files.get(argument, argument) for argument in arguments]
    error = command("train", *given, "--output_dir", tmp_path / "out", *QUIET, status=2).strip().splitlines()
    assert words in error[-1]
    assert sum(line.startswith("hf-recontrol:") for line in error) == 1


def test_help_has_our_options_first_and_transformers_where_they_are_asked_for(command):
    printed = command("train", "--help")
    assert printed.index("--rollouts ROLLOUTS") < printed.index("--learning_rate")
    assert "--weight_decay" not in printed
    assert "--weight_decay" in command("train", "--help-all")
