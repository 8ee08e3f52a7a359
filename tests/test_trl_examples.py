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
WITH_TRL = pytest.mark.skipif(find_spec("trl") is None, reason='TRL is not installed: pip install "trl==1.16.0"')


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
@pytest.mark.parametrize("name", ["dpo", "rloo", "ppo"])
def test_the_checkpoint_answers_as_a_baseline(script, tmp_path, capsys, name):
    if name == "ppo" and find_spec("trl.experimental.ppo") is None:
        pytest.skip('this TRL has no PPO: pip install "trl==1.12.0"')
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
                for reward in rewards:
                    yield {"prompt_id": prompt_id, "prompt": "A", "completion": f" {reward}", "reward": reward}

    assert list(script("dpo")["pairs"](Rollouts())) == [{"prompt": "A", "chosen": " 3.0", "rejected": " -2.0"}]


@WITH_TRL
@pytest.mark.slow
def test_only_an_answer_that_ended_keeps_its_end(script):
    collate = script("dpo")["AsSampled"](pad_token_id=0)
    batch = collate([{"prompt_ids": [1, 5], "chosen_ids": [7, 2], "rejected_ids": [8] * 40 + [2]}])
    assert batch["input_ids"].tolist() == [[1, 5, 7, 2] + [0] * 38, [1, 5] + [8] * 40]
    assert batch["completion_mask"].sum(1).tolist() == [2, 40]
