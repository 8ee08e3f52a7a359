"""examples/demo/dpo.py, rloo.py and ppo.py at tiny settings, from end to end, where TRL is installed."""

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_recontrol.baselines import Checkpoint
from hf_recontrol.demo.assets import Demo
from hf_recontrol.sampling import Sampler

DEMO = Path(__file__).parents[1] / "examples" / "demo"
# TRL and peft use names that transformers 5.24 calls old: gradient_checkpointing, is_gradient_checkpointing.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'"),
]
TRL = find_spec("trl")
WITH_TRL = pytest.mark.skipif(TRL is None, reason='TRL is not installed: pip install "trl==1.16.0"')
HAS_PPO = TRL is not None and Path(TRL.origin).with_name("experimental").joinpath("ppo").is_dir()
WITH_PPO = pytest.mark.skipif(not HAS_PPO, reason='there is no TRL that has PPO: pip install "trl==1.12.0"')

WITH_RLOO = pytest.mark.skipif(HAS_PPO, reason="of TRL 1.12.0, RLOO wants a package more: requests")


@pytest.fixture
def script(monkeypatch):
    """script(name): what the example defines."""
    pytest.importorskip("datasets")
    monkeypatch.syspath_prepend(str(DEMO))  # as python does with a script's folder
    return lambda name: runpy.run_path(str(DEMO / f"{name}.py"))


@pytest.mark.parametrize(("name", "version"), [("dpo", "1.16.0"), ("rloo", "1.16.0"), ("ppo", "1.12.0")])
def test_without_trl_the_command_that_installs_it_is_named(script, monkeypatch, name, version):
    for module in [module for module in sys.modules if module.partition(".")[0] == "trl"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit, match=f'Run: pip install "trl=={version}" "peft=='):
        script(name)


@WITH_TRL
@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", pytest.param("rloo", marks=WITH_RLOO), pytest.param("ppo", marks=WITH_PPO)])
def test_the_checkpoint_answers_as_a_baseline(script, tmp_path, capsys, name):
    folder, demo = tmp_path / name, Demo()
    main = script(name)["main"]
    row = main(["--output", str(folder), "--tiny"])
    printed = capsys.readouterr().out
    assert row["kl_per_answer"] > 0
    assert "8 validation prompts: reward" in printed
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == demo.tokenizer.get_vocab()
    assert model.state_dict().keys() == demo.model.state_dict().keys()
    changed = [
        key for key, weight in demo.model.state_dict().items() if not torch.equal(model.state_dict()[key], weight)
    ]
    assert changed
    assert all("_proj" in key for key in changed)  # what the adapter was put on
    prompts = demo.prompts["test"][:3]
    answers = Checkpoint(name, model).answer(Sampler(demo.model, demo.tokenizer, 8), prompts, 2)
    assert [row["prompt"] for rows in answers for row in rows] == [prompt for prompt in prompts for _ in range(2)]
    assert all(0 < len(row["token_ids"]) <= 8 for rows in answers for row in rows)
    with pytest.raises(SystemExit):
        main(["--output", str(folder), "--tiny"])
    assert "holds a model already" in capsys.readouterr().err


@WITH_TRL
@pytest.mark.slow
def test_a_pair_is_the_best_and_the_worst_answer_and_equal_rewards_make_none(script):
    class Rollouts:
        def rows(self):
            for prompt_id, rewards in enumerate([[1.0, 3.0, None, -2.0], [0.5, 0.5], [None]]):
                for i, reward in enumerate(rewards):
                    ids = {"prompt_token_ids": [1, 5], "token_ids": [7] * (i + 1)}
                    yield {"prompt_id": prompt_id, "prompt": "A", "completion": f" {reward}", "reward": reward, **ids}

    (pair,) = script("dpo")["pairs"](Rollouts())
    assert [pair[side] for side in ("prompt", "chosen", "rejected")] == ["A", " 3.0", " -2.0"]
    batch = script("dpo")["AsSampled"](pad_token_id=0)([pair])
    assert batch["input_ids"].tolist() == [[1, 5, 7, 7, 0, 0], [1, 5, 7, 7, 7, 7]]
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]]


@WITH_PPO
@pytest.mark.slow
def test_ppo_reads_the_demos_reward(script):
    demo = Demo()
    prompts, completions = demo.prompts["test"][:2], [" wonderful .", " a dull and tedious mess ."]
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    inputs = demo.tokenizer(texts, padding=True, return_tensors="pt")
    reward = script("ppo")["DemoReward"](demo)
    scores = reward.score(reward.body(**inputs).hidden_states[-1])
    assert scores.shape == (*inputs["input_ids"].shape, 1)
    assert scores[:, -1, 0].tolist() == pytest.approx(demo.reward(prompts, completions, [[], []]).total)
