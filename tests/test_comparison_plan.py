"""Which rows a comparison has: what the comparison fits by itself never stands in for a head of the user's."""

from tiny import tiny_control_head, tiny_head

from hf_recontrol import ControlConfig
from hf_recontrol.baselines import Steered
from hf_recontrol.comparison_heads import random_direction
from hf_recontrol.comparison_plan import Plan
from hf_recontrol.rewards import Rewards

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
