"""The command line: what it prints, and its exit status."""

import json
import subprocess
import sys

import pytest
from tiny import tiny_head

from hf_recontrol.demo.assets import FOLDER

MODEL = str(FOLDER / "language_model")


def run(*arguments, timeout=300):
    """A hf-recontrol process without a network."""
    command = [sys.executable, "-m", "hf_recontrol", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def test_help_names_the_commands():
    process = run("--help")
    assert process.returncode == 0
    assert all(name in process.stdout for name in ("demo", "generate", "info", "serve", "tune"))


def test_the_version_is_that_of_the_package(command):
    from importlib.metadata import version

    assert command("--version") == f"{version('hf-recontrol')}\n"


def test_what_is_no_head_is_named_as_what_it_is(command):
    assert "is that of a model ('llama'), not of a head" in command("info", MODEL, status=2)
    assert "'nope' is neither a folder nor the id" in command("info", "nope", status=2)


def test_info_is_the_heads_config(command):
    config = json.loads(command("info", FOLDER / "value_head"))
    assert config["kind"] == "value"
    assert config["base_model_name_or_path"] == "./language_model"
    assert (
        config["parameters"]
        == config["hidden_size"] * config["intermediate_size"] + 2 * config["intermediate_size"] + 1
    )


def test_generate_steers_and_says_nothing_else():
    texts = {}
    for name, extra in {"plain": (), "steered": ("--value-head", str(FOLDER / "value_head"))}.items():
        process = run("generate", MODEL, "the film is a", "--max-new-tokens", "12", "--temperature", "0", *extra)
        assert process.returncode == 0, process.stderr
        assert process.stdout.startswith("the film is a ")
        texts[name] = process.stdout
    assert texts["plain"] != texts["steered"]


def test_a_trace_shows_what_the_control_did_in_plain_text_without_a_terminal(command):
    steer = ("--value-head", FOLDER / "value_head", "--strength", "0.2", "--trace")
    printed = command("generate", MODEL, "the film is a", "--max-new-tokens", "6", "--temperature", "0", *steer)
    assert "nats" in printed
    assert "\x1b" not in printed


def test_any_head_can_be_calibrated_from_prompts(tmp_path, command):
    head = tiny_head(hidden_size=256, base_model_name_or_path="./language_model", base_model_type="llama")
    head.save_pretrained(tmp_path / "head")
    (tmp_path / "prompts.txt").write_text("the film is\n\na story of love\n", encoding="utf-8")
    source = ("--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", "20")
    printed = command("tune", tmp_path / "head", "--model", MODEL, "--calibrate", *source)
    control = json.loads((tmp_path / "head" / "config.json").read_text(encoding="utf-8"))["control"]
    assert [kl for kl, _ in control["calibration"]] == [0.02, 0.05, 0.1, 0.2, 0.4]
    assert all(f"{step_size:.4g}" in printed for _, step_size in control["calibration"])
    assert "0.1 nats a token" in (tmp_path / "head" / "README.md").read_text(encoding="utf-8")
    assert command("generate", MODEL, "the film", "--value-head", tmp_path / "head", "--strength", "0.3")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("info", "no/such-folder/here"), "no/such-folder/here"),
        (("generate", MODEL, "the film", "--step-size", "1"), "Pass --value-head"),
        (("generate", MODEL, "the film", "--value-head", "OTHER"), "8 wide"),
        (("generate", MODEL, "the film", "--value-head", "HEAD", "--num-steps", "2000"), "0 to 1024"),
        (("generate", MODEL, "the film", "--value-head", "HEAD", "--strength", "9"), "calibrated up to 0.4"),
        (("tune", "HEAD", "--model", MODEL), "pass --calibrate"),
        (("demo", "--iterations", "2"), "pass --train"),
        (("tune", "HEAD", "--model", MODEL, "--calibrate"), "one of --rollouts FOLDER and --prompts FILE"),
        (("tune", "user/head", "--model", MODEL, "--calibrate", "--rollouts", "HEAD"), "pass --output"),
    ],
)
def test_a_users_error_is_one_line_and_status_2(tmp_path, command, arguments, words):
    tiny_head(hidden_size=8).save_pretrained(tmp_path)
    folders = {"OTHER": str(tmp_path), "HEAD": str(FOLDER / "value_head")}
    error = command(*(folders.get(argument, argument) for argument in arguments), status=2).strip().splitlines()
    assert words in error[-1]
    assert sum(line.startswith("hf-recontrol:") for line in error) == 1


def test_a_users_error_ends_the_process_without_a_traceback():
    process = run("info", "no/such-folder/here")
    assert process.returncode == 2
    assert "no/such-folder/here" in process.stderr
    assert "Traceback" not in process.stderr
