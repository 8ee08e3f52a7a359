"""Which rows a comparison has: what the comparison fits by itself never stands in for a head of the user's."""

from dataclasses import replace

import pytest
from tiny import tiny_control_head, tiny_head, tiny_model, tiny_tokenizer

from hf_recontrol import ControlConfig, cli_evaluate, load_prompts
from hf_recontrol.baselines import Base, Blockwise, Steered
from hf_recontrol.comparison_heads import random_direction
from hf_recontrol.comparison_plan import Plan
from hf_recontrol.rewards import Rewards
from hf_recontrol.sampling import Sampler

pytest.importorskip("datasets")

RANDOM = {"random direction": random_direction(16)}


def plan(**heads):
    return Plan(Rewards(lambda completions, **_: [0.0] * len(completions)), heads, {}, [2]).with_fitted(RANDOM)


def names(of):
    return [*(method.name for method in of.fixed()), *(name for name, *_ in of.families())]


def test_a_placebo_scores_nothing_and_is_not_prompted():
    for heads in ({}, {"mine": tiny_control_head()}):
        of = plan(**heads)
        assert of.value_head is None
        assert not any(name.startswith(("CD prefix", "random direction +")) for name in names(of))
    assert "random direction" not in plan().published
    assert {"CD prefix", "mine + prompting"} <= set(names(plan(mine=tiny_head())))


def test_what_a_heads_config_says_of_the_control_decides_its_answers():
    head = tiny_head()
    before = Steered("RE-Control", head, ControlConfig(step_size=1.0)).facts()
    head.config.control.num_steps = 7
    assert Steered("RE-Control", head, ControlConfig(step_size=1.0)).facts() != before
    head.config.control.num_steps = before["config"]["num_steps"]
    head.config.control.calibration = [[0.1, 2.0]]  # a step size is given
    head.config.info["comparison"] = {"noted": True}
    assert Steered("RE-Control", head, ControlConfig(step_size=1.0)).facts() == before


def test_a_stop_string_ends_an_answer_as_eos_does():
    plain = Sampler(tiny_model(), tiny_tokenizer(), max_new_tokens=8, batch_size=4, generation={"do_sample": False})
    prompts = ["w5 w6", "w7", "w9 w9", "w11 w4"]
    before = [rows[0] for rows in plain(prompts)]
    stop = before[0]["completion"].split()[2]
    sampler = replace(plain, stop_strings=(stop,))
    for method in (Base(), Blockwise(tiny_head(), size=1, block=2)):
        for row, (stopped,) in zip(before, method.answer(sampler, prompts), strict=True):
            assert stopped["token_ids"] == row["token_ids"][: len(stopped["token_ids"])]
            if stop in row["completion"]:
                assert stopped["completion"] == row["completion"].partition(stop)[0]
                assert stopped["finish_reason"] == "stop"
            else:
                assert stopped == row


def test_the_recipes_stop_strings_are_those_of_the_comparison(monkeypatch):
    loaded = load_prompts([{"chosen": f"\n\nHuman: {i}\n\nAssistant: yes"} for i in range(9)], recipe="hh")
    monkeypatch.setattr(cli_evaluate, "load_prompts", lambda *_, **__: loaded)
    (tuned_on, tested_on), ends = cli_evaluate._prompts("Anthropic/hh-rlhf", "test", 4, None, 5, 0)
    assert (len(tuned_on), len(tested_on)) == (5, 4)
    assert "\n\nHuman:" in ends
