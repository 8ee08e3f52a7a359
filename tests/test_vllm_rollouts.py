"""hf-recontrol rollouts --engine vllm: answers and states are those that the model itself would have stored."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
from datasets import Dataset
from tiny import tiny_head, tiny_model, tiny_tokenizer

from hf_recontrol import (
    ControlConfig,
    Controller,
    RolloutDataset,
    collect_rollouts,
    enable_recontrol,
    fit_linear_head,
)
from hf_recontrol.forwards import hidden_states_of
from hf_recontrol.serving.vllm_rollouts import VllmAnswers
from hf_recontrol.serving.vllm_settings import VARIABLE

pytest.importorskip("vllm", reason="vLLM is not installed")
import vllm
from test_vllm import LLAMA
from vllm_engine import environment

pytestmark = pytest.mark.vllm
REWARD = """
def early_words(completions, **kwargs):
    return [float(sum(int(word[1:]) < 30 for word in text.split() if word[0] == "w")) for text in completions]
"""
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def model():
    """One that ends its answers now and then."""
    return enable_recontrol(tiny_model(**LLAMA, eos_token_id=2))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollouts")
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "reward.py").write_text(REWARD)
    lines = [json.dumps({"prompt": f"w{3 + i} w{4 + i} w{60 - i}"}) for i in range(24)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return folder


def collect(folder, output, *extra):
    command = [sys.executable, "-m", "hf_recontrol", "rollouts", "--engine", "vllm", "--no-progress"]
    command += ["--model", folder / "model", "--dataset", folder / "prompts.jsonl", "--output-dir", folder / output]
    command += ["--reward", f"{folder / 'reward.py'}:early_words", "--max-new-tokens", NEW_TOKENS, "--block-size", 8]
    variables = environment(VLLM_ENABLE_V1_MULTIPROCESSING=None)
    return subprocess.run(
        [str(part) for part in [*command, *extra]], capture_output=True, text=True, timeout=900, env=variables
    )


@pytest.fixture(scope="module")
def sampled(folder):
    more = ("--engine-args", '{"max_num_seqs": 4, "gpu_memory_utilization": 0.4}')
    done = collect(folder, "sampled", "--num-return-sequences", 2, "--stop-strings", "w9", *more)
    assert done.returncode == 0, done.stdout + done.stderr
    return RolloutDataset(folder / "sampled")


def test_the_states_are_those_of_the_seam(model, sampled):
    assert len(sampled) > 40
    for i in range(len(sampled)):
        prompt, answer = sampled.row(i)["prompt_token_ids"], sampled[i]
        token_ids = answer["token_ids"].tolist()
        own = hidden_states_of(model, input_ids=torch.tensor([prompt + token_ids]))[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(answer["hidden_states"], own, rtol=0, atol=1e-4)


def test_answers_end_as_those_of_generate_do(sampled):
    rows = list(sampled.rows())
    assert len(rows) == 48
    assert {row["finish_reason"] for row in rows} >= {"length", "stop"}
    for row in rows:
        if row["finish_reason"] == "length":
            assert row["length"] == NEW_TOKENS
        if row["finish_reason"] == "eos":
            assert row["token_ids"][-1] == 2
        if row["finish_reason"] == "stop":
            assert row["token_ids"][-1] == 9
            assert "w9" not in row["completion"]


def test_the_engines_arguments_are_in_the_fingerprint_but_for_their_share_of_the_memory(sampled):
    assert sampled.fingerprint["engine_args"] == {"max_num_seqs": 4}
    assert sampled.fingerprint["engine"].startswith("vllm 0.32")


@pytest.fixture
def started(monkeypatch):
    """What engines would be started with; none is."""
    monkeypatch.delenv(VARIABLE, raising=False)
    found = []
    with warnings.catch_warnings(action="ignore"):  # of torch and vLLM, when they are imported
        monkeypatch.setattr(vllm, "LLM", lambda **arguments: found.append(arguments))
    return found


@pytest.mark.parametrize(
    ("engine_args", "told"),
    [
        ({"max_modell_len": 64}, r"have \['max_modell_len'\], which vllm.LLM does not know"),
        ({"runner": "draft", "dtype": "float16"}, r"have \['dtype', 'runner'\], .* which the rollouts decide"),
        ({"additional_config": {"recontrol": {}}}, "which the rollouts decide"),
    ],
)
def test_wrong_arguments_of_the_engines_are_refused(model, started, engine_args, told):
    with pytest.raises(ValueError, match=told):
        VllmAnswers(model, engine_args=engine_args)


def test_heads_in_the_environment_are_refused(model, started, monkeypatch):
    monkeypatch.setenv(VARIABLE, "{}")
    with pytest.raises(ValueError, match="HF_RECONTROL_VLLM is set, but rollouts with vLLM are of the plain model"):
        VllmAnswers(model)


def test_settings_of_the_model_that_vllm_would_not_follow_are_refused(model, started, monkeypatch):
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 1.5)
    with pytest.raises(ValueError, match=r"generation config has \{'repetition_penalty': 1\.5\}"):
        VllmAnswers(model)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"generation_kwargs": {"repetition_penalty": 1.1}}, r"has \['repetition_penalty'\], which vLLM is not given"),
        ({"temperature": 0.0, "num_return_sequences": 2}, "temperature=0 gives the same answer 2 times"),
        ({"controller": Controller(tiny_head(hidden_size=64))}, "An engine answers without a controller"),
        ({"features_from": "dataset"}, "engine"),
    ],
)
def test_what_is_wrong_with_the_rollouts_is_said_before_an_engine_starts(model, started, tmp_path, more, told):
    prompts = Dataset.from_list([{"prompt": "w3 w4", "completion": "w5"}])
    given = (model, tiny_tokenizer(), prompts, lambda **kwargs: [0.0], tmp_path / "out")
    with pytest.raises(ValueError, match=told):
        collect_rollouts(*given, engine=VllmAnswers(model), **more)
    assert not started
    assert not (tmp_path / "out").exists()


def test_two_engines_start_for_the_first_block_with_the_users_arguments(model, started):
    answers = VllmAnswers(model, engine_args={"tensor_parallel_size": 2})
    assert not started
    assert answers._engines
    writer, reader = started
    assert (writer["tensor_parallel_size"], writer["gpu_memory_utilization"], writer["dtype"]) == (2, 0.42, "float32")
    assert reader.pop("pooler_config").task == "token_embed"
    assert reader == writer | {"runner": "pooling"}


def test_a_head_fitted_to_them_steers_as_one_fitted_to_the_models_own_states(model, sampled):
    answers = [sampled[i] for i in range(len(sampled))]
    own = []
    for i, answer in enumerate(answers):
        prompt = sampled.row(i)["prompt_token_ids"]
        states = hidden_states_of(model, input_ids=torch.tensor([prompt + answer["token_ids"].tolist()]))
        own.append(answer | {"hidden_states": states[0, len(prompt) - 1 : -1]})
    heads = [fit_linear_head(answers), fit_linear_head(own)]
    ids = torch.tensor([[1, 5, 6], [1, 20, 30]])
    keywords = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": NEW_TOKENS}
    texts = [model.generate(ids, **keywords, recontrol_value_head=head, recontrol_step_size=20.0) for head in heads]
    assert torch.equal(*texts)
    assert not torch.equal(texts[0], model.generate(ids, **keywords))
    h = torch.cat([answer["hidden_states"] for answer in own])
    steer = [Controller(head, ControlConfig(step_size=1.0, num_steps=1)).control(h) for head in heads]
    torch.testing.assert_close(*steer, rtol=1e-2, atol=1e-4)
