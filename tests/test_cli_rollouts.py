"""hf-recontrol rollouts, from files on the disk to a folder of rollouts."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from saved import save_all
from transformers.utils import logging

from hf_recontrol import RolloutDataset, cli_rollouts

SMALL = ("--max-new-tokens", "6", "--block-size", "10")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return save_all(tmp_path_factory.mktemp("files"))


@pytest.fixture
def given(files):
    return ("--model", files.model, "--dataset", files.prompts, "--reward", f"{files.rewards}:two_words")


def test_rollouts_are_collected_and_summed_up(command, files, given, tmp_path):
    printed = command("rollouts", *given, "--output-dir", tmp_path, *SMALL, "--num-return-sequences", 2)
    made = RolloutDataset(tmp_path)
    assert len(made) == 80
    assert "80 answers" in printed
    assert f"80 of them have states and a reward, mean reward {made.rewards.mean():.4g}" in printed
    assert made.fingerprint["rewards"] == {"two_words": 1.0}
    assert made.fingerprint["generation"]["max_new_tokens"] == 6
    before = (tmp_path / "manifest.jsonl").read_bytes()
    assert "80 answers" in command("rollouts", *given, "--output-dir", tmp_path, *SMALL, "--num-return-sequences", 2)
    assert (tmp_path / "manifest.jsonl").read_bytes() == before


def test_every_setting_arrives_and_underscores_are_dashes(command, files, given, tmp_path):
    more = {
        "--top_p": "0.9",
        "--top-k": "5",
        "--temperature": "0.7",
        "--seed": "3",
        "--stop_strings": "w7",
        "--generation_kwargs": '{"repetition_penalty": 1.5}',
        "--limit": "5",
        "--dtype": "bfloat16",
        "--device": "cpu",
        "--reward": files.judge,
    }
    options = [part for pair in more.items() for part in pair]
    weights = ("--reward_weights", "0.5", "--reward-weights", "2")
    command("rollouts", *given, "--output_dir", tmp_path, *SMALL, *options, *weights, "--drop_truncated")
    found = RolloutDataset(tmp_path).fingerprint
    expected = {"top_p": 0.9, "top_k": 5, "temperature": 0.7, "stop_strings": ["w7"], "repetition_penalty": 1.5}
    assert found["generation"].items() >= expected.items()
    assert (found["seed"], found["prompts"], found["dtype"], found["drop_truncated"]) == (3, 5, "bfloat16", True)
    assert found["rewards"] == {"two_words": 0.5, "judge": 2.0}


def test_answers_that_exist_are_replayed_with_their_own_rewards(command, files, given, tmp_path):
    command("rollouts", *given, "--output-dir", tmp_path / "made", *SMALL)
    made = RolloutDataset(tmp_path / "made")
    kept = ("prompt", "completion", "token_ids", "finish_reason", "reward")
    lines = [json.dumps({name: row[name] for name in kept}) for row in made.rows()]
    (tmp_path / "answers.jsonl").write_text("\n".join(lines), encoding="utf-8")
    answers = ("--model", files.model, "--dataset", tmp_path / "answers.jsonl", "--features-from", "dataset")
    assert "at that speed" in command("rollouts", *answers, "--output-dir", tmp_path / "none", "--dry-run")
    command("rollouts", *answers, "--output-dir", tmp_path / "again", "--sampling", "own softmax")
    again = RolloutDataset(tmp_path / "again")
    torch.testing.assert_close(again.rewards, made.rewards)
    for one, other in zip(made, again, strict=True):
        torch.testing.assert_close(one["hidden_states"], other["hidden_states"], rtol=0, atol=1e-5)
    error = command("rollouts", *answers, "--output-dir", tmp_path / "none", "--temperature", "0.5", status=2)
    assert "features_from='dataset' generates nothing, but ['temperature'] were given" in error


def test_what_only_some_need_is_passed_by_name(command, given, tmp_path, monkeypatch):
    seen = {}

    def collect(*args, **settings):
        seen.update(settings)
        raise ValueError("seen")

    monkeypatch.setattr("hf_recontrol.cli_rollouts.collect_rollouts", collect)
    options = ("--features_from", "dataset", "--max_prompt_tokens", "9")
    command("rollouts", *given, "--output_dir", tmp_path, *options, status=2)
    assert (seen["features_from"], seen["max_prompt_tokens"]) == ("dataset", 9)


def test_a_dry_run_says_how_much_there_is_to_do_and_writes_nothing(command, given, tmp_path):
    folder = tmp_path / "rollouts"
    printed = command("rollouts", *given, "--output-dir", folder, *SMALL, "--num-return-sequences", 3, "--dry-run")
    assert "40, in 4 blocks" in printed
    assert "tokens, at most 720" in printed  # 40 · 3 · 6
    assert f"disk, at most   {720 * (16 * 4 + 8) / 1024:.3g} KiB" in printed
    assert "one batch of 8 prompts: 24 answers, 144 tokens" in printed
    assert "at that speed" in printed
    assert not folder.exists()


def test_a_bar_shows_the_rate(command, given, tmp_path, monkeypatch):
    monkeypatch.setattr(logging, "_tqdm_active", True)
    monkeypatch.setattr(logging.hf_hub_utils, "enable_progress_bars", lambda: None)  # conftest's environment forbids it
    bars = []
    monkeypatch.setattr(logging, "tqdm", _spy(logging.tqdm, bars))
    command("rollouts", *given, "--output-dir", tmp_path / "a", *SMALL)
    command("rollouts", *given, "--output-dir", tmp_path / "b", *SMALL, "--no-progress")
    assert [bar.get("disable") for bar in bars if bar.get("unit") == "answer"] == [False, True]
    assert logging.is_progress_bar_enabled()


def _spy(tqdm, seen):
    def made(*args, **kwargs):
        seen.append(kwargs)
        return tqdm(*args, **kwargs)

    return made


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--reward": "FILE"}, "name the function in it"),
        ({"--reward": "FILE:three_words"}, "has no function 'three_words'. It has ['broken', 'slow', 'two_words']"),
        ({"--reward": "FILE:NUMBER"}, "has no function 'NUMBER'"),
        ({"--reward": "nowhere.py:reward"}, "there is no file 'nowhere.py'"),
        ({"--reward": "TYPO"}, "typo.py cannot be run: SyntaxError: '[' was never closed (line 2)"),
        ({"--reward": "RAISES"}, "raises.py cannot be run: ModuleNotFoundError: No module named 'nosuch' (line 1)"),
        ({"--reward": "MODEL"}, "not a reward model"),
        ({"--dataset": "nowhere.jsonl"}, "There is no file nowhere.jsonl"),
        ({"--dataset": "VOID"}, "void.jsonl is empty"),
        ({"--reward": "FILE:broken", "--retries": "0"}, "'broken' failed on 10 answers, of 40"),
        ({"--reward": "FILE:broken", "--retries": "0"}, "(rewards.py, line "),
        ({"--reward": "INSIDE", "--retries": "0"}, "(inside.py, line 4)"),
        ({"--model": "no/such-folder/here"}, "no/such-folder/here"),
        ({"--generation-kwargs": "[1]"}, "must be a JSON object"),
        ({"--generation-kwargs": "{"}, "is no JSON"),
        ({"--engine": "vllm", "--engine-args": "[1]"}, "--engine-args is '[1]'; it must be a JSON object"),
        ({"--engine-args": '{"tensor_parallel_size": 2}'}, "Pass --engine vllm too"),
        ({"--top-p": "2"}, "0 < top_p ≤ 1"),
        ({"--timeout": "0"}, "expected are seconds > 0"),
    ],
)
def test_a_users_error_is_one_line_and_status_2(command, files, tmp_path, change, words):
    options = {"--model": files.model, "--dataset": files.prompts, "--reward": files.judge} | change
    put = {"FILE": files.rewards, "MODEL": files.model, "VOID": str(tmp_path / "void.jsonl")}
    put |= {"TYPO": f"{tmp_path}/typo.py:reward", "RAISES": f"{tmp_path}/raises.py:reward"}
    (tmp_path / "void.jsonl").touch()
    (tmp_path / "typo.py").write_text("def reward(completions, **_):\n    return [1.0 for _ in completions\n")
    (tmp_path / "raises.py").write_text("import nosuch\n")
    put["INSIDE"] = f"{tmp_path}/inside.py:reward"
    (tmp_path / "inside.py").write_text("import json\n\ndef reward(completions, **_):\n    return json.loads('{')\n")
    arguments = [text for pair in options.items() for text in pair]
    for short, path in put.items():
        arguments = [text.replace(short, path) for text in arguments]
    error = command("rollouts", *arguments, "--output-dir", tmp_path / "out", *SMALL, status=2).strip().splitlines()
    assert words in error[-1]
    assert sum(line.startswith("hf-recontrol:") for line in error) == 1


def test_with_vllm_the_device_is_that_of_the_rewards_and_one_process_is_enough(command, given, tmp_path, monkeypatch):
    """The model itself is on the CPU: it only checks and names the rollouts."""
    found = {}
    monkeypatch.setattr(cli_rollouts, "language_model", lambda *a, device, **kw: (found.update(model=device), None))
    monkeypatch.setattr(cli_rollouts, "reward_functions", lambda *a, device, **kw: found.update(rewards=device))
    monkeypatch.setattr(cli_rollouts, "own_device", lambda: "cuda:0")
    monkeypatch.setattr(cli_rollouts, "_engine", lambda engine, model, arguments: found.update(arguments=arguments))
    monkeypatch.setattr(cli_rollouts, "_collect", lambda *a: None)
    arguments = ("rollouts", *given, "--output-dir", tmp_path, "--engine", "vllm")
    command(*arguments, "--engine-args", '{"tensor_parallel_size": 2}')
    assert found == {"model": "cpu", "rewards": "cuda:0", "arguments": {"tensor_parallel_size": 2}}
    command(*arguments, "--device", "cuda:1")
    assert found == {"model": "cpu", "rewards": "cuda:1", "arguments": {}}
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "Leave out the launcher" in command(*arguments, status=2)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_without_a_traceback_and_the_same_command_goes_on(
    command, files, given, tmp_path, signum, status
):
    arguments = ("rollouts", *given[:-1], f"{files.rewards}:slow", "--output-dir", str(tmp_path / "out"), *SMALL)
    command_line = [sys.executable, "-m", "hf_recontrol", *arguments]
    process = subprocess.Popen(command_line, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "block-00001.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signum)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == status, error
    assert "Traceback" not in error
    assert len(RolloutDataset(tmp_path / "out")) < 40
    assert "40 answers" in command(*arguments)
