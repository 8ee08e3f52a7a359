"""V, its gradient by hand, and the ascent, against autograd and the laws they must obey."""

import copy
import json
import math
from itertools import pairwise
from math import inf, nan

import numpy as np
import pytest
import torch
from tiny import tiny_head

from hf_recontrol import ControlConfig, ControlDefaults, Controller, HeadError, HeadMismatch, RewardScale, ValueHead
from hf_recontrol.control import control_by_autograd
from hf_recontrol.control_config import step_size_for
from hf_recontrol.head_config import ACTIVATIONS, ValueHeadConfig

SHAPES = [(16,), (1, 16), (3, 2, 16), (0, 16)]


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_control_takes_the_same_path_as_autograd(layers, activation, shape):
    head = tiny_head(num_hidden_layers=layers, hidden_act=activation).double()
    hidden_states = torch.randn(shape, dtype=torch.float64) * 3
    expected = control_by_autograd(head, hidden_states, 0.3, 7)
    actual = Controller(head, ControlConfig(0.3, 7)).control(hidden_states)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)
    assert expected.numel() == 0 or expected.abs().max() > 1e-3  # a path of no length would prove nothing


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gradient_by_hand_is_autograds_at_the_kink_too(activation):
    head = tiny_head(num_hidden_layers=2, hidden_act=activation).double()
    hidden_states = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():  # z₁ = 0 exactly for one unit
        head.layers[0].weight[0], head.layers[0].bias[0] = 0.0, 0.0
    (expected,) = torch.autograd.grad(head(hidden_states).sum(), hidden_states)
    torch.testing.assert_close(head.gradient(hidden_states), expected, rtol=0, atol=1e-12)


def test_a_small_step_raises_the_value():
    head, hidden_states = tiny_head(), torch.randn(50, 16)
    assert (head(Controller(head, ControlConfig(1e-2, 3))(hidden_states)) >= head(hidden_states)).all()


def test_one_step_is_the_gradient_times_alpha():
    head, hidden_states = tiny_head(), torch.randn(4, 16)
    u = Controller(head, ControlConfig(0.25, 1)).control(hidden_states)
    torch.testing.assert_close(u, 0.25 * head.gradient(hidden_states))


@pytest.mark.parametrize(("step_size", "num_steps"), [(0.0, 5), (0, 5), (0.3, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_step_leaves_the_hidden_states_bit_for_bit(step_size, num_steps, dtype):
    start = torch.randn(3, 2, 16).to(dtype)
    end = Controller(tiny_head(), ControlConfig(step_size, num_steps))(start)
    torch.testing.assert_close(end, start, rtol=0, atol=0)  # unlike torch.equal, this compares dtypes too


def test_a_row_does_not_depend_on_its_neighbours():
    head, hidden_states = tiny_head(num_hidden_layers=2).double(), torch.randn(6, 16, dtype=torch.float64)
    steer = Controller(head, ControlConfig(0.5, 10))
    alone = torch.cat([steer(row[None]) for row in hidden_states])
    torch.testing.assert_close(steer(hidden_states), alone, rtol=0, atol=1e-12)


def test_the_ascent_of_a_bfloat16_model_runs_in_float32_and_is_rounded_once():
    head, hidden_states = tiny_head(), torch.randn(4, 16).bfloat16()
    steer = Controller(head, ControlConfig(1e-3, 30))
    expected = (hidden_states.float() + control_by_autograd(head, hidden_states, 1e-3, 30)).bfloat16()
    torch.testing.assert_close(steer(hidden_states), expected, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(steer(hidden_states), expected, rtol=0, atol=0)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_passes_through_and_its_neighbours_are_edited(poison):
    head, hidden_states = tiny_head(), torch.randn(4, 16)
    expected = Controller(head)(hidden_states)
    hidden_states[2, 5] = poison
    edited, sound = Controller(head).edit(hidden_states)
    assert sound.squeeze(-1).tolist() == [True, True, False, True]
    torch.testing.assert_close(edited[2], hidden_states[2], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(edited[[0, 1, 3]], expected[[0, 1, 3]], rtol=0, atol=0)


def test_an_edit_that_overflows_the_models_dtype_leaves_the_row_as_it_came():
    head, hidden_states = tiny_head(num_hidden_layers=0), torch.randn(2, 16).half()
    edited, sound = Controller(head, ControlConfig(1e9, 10)).edit(hidden_states)
    assert not sound.any()
    torch.testing.assert_close(edited, hidden_states, rtol=0, atol=0)


def test_the_head_is_left_as_it_was():
    head = tiny_head().train()
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    with torch.inference_mode():
        Controller(head)(torch.randn(2, 16))
    assert head.training
    assert all(p.requires_grad and p.grad is None for p in head.parameters())
    for name, tensor in head.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_a_head_of_another_width_is_refused_with_both_widths_named():
    with pytest.raises(HeadMismatch, match=r"16 wide .* 32 wide"):
        Controller(tiny_head())(torch.randn(1, 1, 32))
    with pytest.raises(HeadMismatch, match=r"16 wide .* 32 wide"):
        tiny_head()(torch.randn(1, 32))


def test_a_head_in_half_precision_is_refused():
    with pytest.raises(ValueError, match=r"bfloat16.*head\.float\(\)"):
        Controller(tiny_head().bfloat16())


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "1", True, torch.tensor(1.0)])
def test_a_wrong_step_size_is_refused(value):
    with pytest.raises(ValueError, match=r"step_size is .* finite number ≥ 0"):
        ControlConfig(step_size=value)


@pytest.mark.parametrize("value", [-1, 1.0, "3", True, 1025, 10**9])
def test_a_wrong_number_of_steps_is_refused(value):
    with pytest.raises(ValueError, match=r"num_steps is .* from 0 to 1024"):
        ControlConfig(num_steps=value)


@pytest.mark.parametrize(("step_size", "num_steps"), [(float("nan"), 3), (-3.0, 3), (1.0, "3")])
def test_a_heads_own_control_is_checked_too(step_size, num_steps):
    head = tiny_head()
    head.config.control.step_size, head.config.control.num_steps = step_size, num_steps
    with pytest.raises(ValueError, match="must be"):
        Controller(head)


def test_numpys_numbers_are_numbers():
    assert Controller(tiny_head(), ControlConfig(np.float64(0.5), np.int64(3))).num_steps == 3


def test_none_means_the_heads_own_control():
    head = tiny_head()
    head.config.control.step_size, head.config.control.num_steps = 0.125, 4
    hidden_states = torch.randn(3, 16)
    torch.testing.assert_close(
        Controller(head)(hidden_states), Controller(head, ControlConfig(0.125, 4))(hidden_states)
    )


# The options, against a reference by autograd


def path_by_autograd(heads, hidden_states, step_size, num_steps, *, regularization=0.0, norm=inf, target=None):
    """u ← u + α(∇V(h + u) − 2λu), V = Σ wᵢVᵢ, and cut to ‖u‖ ≤ r‖h‖; towards a target by one Newton step at most."""
    u, limit = torch.zeros_like(hidden_states), norm * hidden_states.norm(dim=-1, keepdim=True)
    for _ in range(num_steps):
        with torch.enable_grad():
            u.requires_grad_(True)
            value = sum(weight * head(hidden_states + u) for head, weight in heads.items())
            (gradient,) = torch.autograd.grad(value.sum(), u)
        u, step = u.detach(), step_size * gradient
        if target is not None:
            (head,) = heads
            gap = (target - head.config.reward.mean) / head.config.reward.std - value.detach()
            step *= (gap / (step * gradient).sum(-1)).clamp(-1, 1).unsqueeze(-1)
        u = u + step - 2 * step_size * regularization * u
        too_long = u.norm(dim=-1, keepdim=True) > limit
        u = torch.where(too_long, u * limit / u.norm(dim=-1, keepdim=True), u)
    return u


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("options", ["regularization", "norm", "target", "regularization norm", "all"])
def test_every_option_takes_the_same_path_as_autograd(layers, activation, options):
    head = tiny_head(num_hidden_layers=layers, hidden_act=activation, reward=RewardScale("r", 3.0, 2.5)).double()
    hidden_states = torch.randn(8, 16, dtype=torch.float64) * torch.logspace(-1, 2, 8)[:, None]
    numbers = {"regularization": 0.4, "norm": 0.02, "target": float(2.5 * head(hidden_states).detach().mean() + 3.0)}
    chosen = {name: number for name, number in numbers.items() if name in options or options == "all"}
    names = {"norm": "max_relative_norm", "target": "target_value"}
    config = ControlConfig(0.4, 9, **{names.get(name, name): number for name, number in chosen.items()})
    actual = Controller(head, config).control(hidden_states)
    torch.testing.assert_close(
        actual, path_by_autograd({head: 1.0}, hidden_states, 0.4, 9, **chosen), rtol=0, atol=1e-9
    )
    for name in chosen:  # each option matters here, or nothing is shown of it
        others = {other: number for other, number in chosen.items() if other != name}
        without = path_by_autograd({head: 1.0}, hidden_states, 0.4, 9, **others)
        assert (actual - without).norm(dim=-1).max() > 1e-3


MIXTURES = {
    "two": [(1.0, {}), (0.5, {})],
    "one against": [(1.0, {}), (-0.7, {})],
    "mixed depths": [
        (1.0, {"num_hidden_layers": 0}),
        (-0.5, {"num_hidden_layers": 2, "intermediate_size": 5}),
        (2, {}),
    ],
    "mixed activations": [(0.3, {"hidden_act": name}) for name in ACTIVATIONS],
    "linear ones": [(1.0, {"num_hidden_layers": 0}), (-0.5, {"num_hidden_layers": 0})],
}


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("options", [{}, {"regularization": 0.2, "max_relative_norm": 0.3}], ids=["plain", "options"])
def test_several_heads_take_the_path_of_their_weighted_sum(mixture, options):
    heads = {tiny_head(i, **config).double(): weight for i, (weight, config) in enumerate(MIXTURES[mixture])}
    hidden_states = torch.randn(5, 16, dtype=torch.float64)
    actual = Controller(heads, ControlConfig(0.4, 7, **options)).control(hidden_states)
    expected = path_by_autograd(
        heads,
        hidden_states,
        0.4,
        7,
        regularization=options.get("regularization", 0.0),
        norm=options.get("max_relative_norm", inf),
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)
    assert actual.norm(dim=-1).min() > 1e-3


def test_the_value_of_several_heads_is_the_weighted_sum_in_raw_units():
    one, other = tiny_head(1, reward=RewardScale("a", 3.0, 2.0)), tiny_head(2, reward=RewardScale("b", -1.0, 0.5))
    hidden_states = torch.randn(4, 16)
    expected = 1.5 * (2.0 * one(hidden_states) + 3.0) - 2.0 * (0.5 * other(hidden_states) - 1.0)
    torch.testing.assert_close(Controller({one: 1.5, other: -2.0}).values(hidden_states), expected)


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_a_head_of_weight_one_is_the_head_bit_for_bit(layers):
    head, hidden_states = tiny_head(num_hidden_layers=layers), torch.randn(5, 16)
    config = ControlConfig(0.3, 5, regularization=0.1, max_relative_norm=0.5)
    expected = Controller(head, config)(hidden_states)
    torch.testing.assert_close(Controller({head: 1.0}, config)(hidden_states), expected, rtol=0, atol=0)
    torch.testing.assert_close(Controller({head: 1}, config)(hidden_states), expected, rtol=0, atol=0)


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_a_weight_scales_the_step_size(layers):
    head = tiny_head(num_hidden_layers=layers).double()
    hidden_states = torch.randn(5, 16, dtype=torch.float64)
    expected = Controller(head, ControlConfig(0.75, 6)).control(hidden_states)
    actual = Controller({head: 2.5}, ControlConfig(0.3, 6)).control(hidden_states)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_a_negative_weight_goes_down_the_value():
    head, hidden_states = tiny_head().double(), torch.randn(50, 16, dtype=torch.float64)
    steered = Controller({head: -1.0}, ControlConfig(1e-2, 3))(hidden_states)
    assert (head(steered) < head(hidden_states)).all()


def test_the_weights_of_two_equal_heads_add_up():
    head, hidden_states = tiny_head().double(), torch.randn(5, 16, dtype=torch.float64)
    expected = Controller({head: 0.5}, ControlConfig(0.3, 6)).control(hidden_states)
    actual = Controller({head: 2.0, copy.deepcopy(head): -1.5}, ControlConfig(0.3, 6)).control(hidden_states)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weight", [0, 0.0, nan, inf, True, "1", None, torch.tensor(1.0), 10**400])
def test_a_weight_that_is_no_number_or_does_nothing_is_refused(weight):
    with pytest.raises(ValueError, match=r"weight is .* finite number other than 0"):
        Controller({tiny_head(): 1.0, tiny_head(1): weight})


def test_what_makes_no_sum_of_heads_is_refused():
    with pytest.raises(ValueError, match="one or more"):
        Controller({})
    with pytest.raises(TypeError, match="A str was given for a head"):
        Controller({"user/head": 1.0})
    for wrong in (None, "user/head", [tiny_head()]):
        with pytest.raises(TypeError, match=f"a dict {{head: weight}}, not a {type(wrong).__name__}"):
            Controller(wrong)
    with pytest.raises(ValueError, match=r"float32.*float64.*of one dtype"):
        Controller({tiny_head(): 1.0, tiny_head(1).double(): 1.0})
    with pytest.raises(HeadMismatch, match=r"8 wide .* 16 wide"):
        Controller({tiny_head(): 1.0, tiny_head(1, hidden_size=8): 1.0})(torch.randn(1, 16))


DIFFERENT = {
    "step_size": (0.5, 0.25, "recontrol_strength or recontrol_step_size"),
    "num_steps": (30, 3, "recontrol_num_steps"),
    "strength": (None, 0.1, "recontrol_strength or recontrol_step_size"),
    "max_kl": (None, 0.3, "recontrol_max_kl"),
    "max_relative_norm": (0.5, 0.25, "recontrol_max_relative_norm"),
    "regularization": (0.0, 0.1, "recontrol_regularization"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_heads_that_differ_in_an_option_are_refused_until_the_call_settles_it(name):
    one, other, keyword = DIFFERENT[name]
    heads = {tiny_head(1): 1.0, tiny_head(2): 0.5}
    for head, value in zip(heads, (one, other), strict=True):
        head.config.control = ControlDefaults(calibration=[[0.02, 0.1], [0.4, 1.0]])
        setattr(head.config.control, name, value)
    with pytest.raises(ValueError, match=f"differ in their {name}: .*Pass {keyword} to settle it"):
        Controller(heads)
    assert getattr(Controller(heads, ControlConfig(**{name: other})).config, name) == other


# The target value


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("step_size", [50.0, 1e6])
def test_a_piecewise_linear_head_is_steered_to_its_target_from_both_sides_and_kept_there(layers, step_size):
    for seed in range(3):
        head = tiny_head(seed, num_hidden_layers=layers, reward=RewardScale("r", 3.0, 2.5)).double()
        hidden_states = torch.randn(100, 16, dtype=torch.float64) * 2
        start = 2.5 * head(hidden_states).detach() + 3.0
        target = float(start.median())
        assert min((start < target).sum(), (start > target).sum()) > 40
        for num_steps in (30, 31, 60):
            steer = Controller(head, ControlConfig(step_size, num_steps, target_value=target))
            end = 2.5 * head(steer(hidden_states)) + 3.0
            assert (end - target).abs().max() < 1e-6


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_small_steps_come_nearer_to_the_target_from_either_side(activation):
    head = tiny_head(num_hidden_layers=1, hidden_act=activation, reward=RewardScale("r", -1.0, 0.5)).double()
    hidden_states = torch.randn(50, 16, dtype=torch.float64)
    target = float(0.5 * head(hidden_states).detach().median() - 1.0)
    gaps = []
    for num_steps in range(8):
        steer = Controller(head, ControlConfig(0.05, num_steps, target_value=target))
        gaps.append(steer.values(steer(hidden_states)) - target)
    for gap, later in pairwise(gaps):
        assert (later.abs() <= gap.abs() + 1e-9).all()
        assert (later * gap.sign() >= -0.1 * gap.abs()).all()  # a smooth V is passed by what is not linear in a step
    assert gaps[-1].abs().sum() < 0.9 * gaps[0].abs().sum()


@pytest.mark.parametrize("target", [-40.0, 3.0, 77.5])
def test_a_linear_head_reaches_its_target_in_one_step(target):
    head = tiny_head(num_hidden_layers=0, reward=RewardScale("r", 3.0, 2.5)).double()
    hidden_states = torch.randn(20, 16, dtype=torch.float64)
    for num_steps in (1, 5):
        steered = Controller(head, ControlConfig(1e4, num_steps, target_value=target))(hidden_states)
        torch.testing.assert_close(2.5 * head(steered) + 3.0, torch.full((20,), target).double(), rtol=0, atol=1e-9)


def test_a_target_out_of_reach_is_full_steps():
    head, hidden_states = tiny_head(), torch.randn(5, 16)
    expected = Controller(head, ControlConfig(0.3, 5))(hidden_states)
    torch.testing.assert_close(Controller(head, ControlConfig(0.3, 5, target_value=1e9))(hidden_states), expected)
    away = Controller({head: -1.0}, ControlConfig(0.3, 5))(hidden_states)
    torch.testing.assert_close(Controller(head, ControlConfig(0.3, 5, target_value=-1e9))(hidden_states), away)


@pytest.mark.parametrize("options", [{"target_value": 0.0}, {"target_value": 1.0}, {"max_relative_norm": 0.1}], ids=str)
def test_a_flat_value_moves_nothing(options):
    """On its target and off it, and at h = 0 where no length is allowed: there are quotients 0/0 on the way."""
    head, hidden_states = tiny_head(), torch.randn(5, 16)
    hidden_states[0] = 0.0
    with torch.no_grad():
        head.layers[-1].weight.zero_()
        head.layers[-1].bias.zero_()
    u = Controller(head, ControlConfig(0.3, 5, **options)).control(hidden_states)
    torch.testing.assert_close(u, torch.zeros(5, 16), rtol=0, atol=0)


def test_a_target_is_of_one_head_of_weight_one():
    config = ControlConfig(0.3, 5, target_value=1.0)
    for heads in ({tiny_head(): 2.0}, {tiny_head(): 1.0, tiny_head(1): 1.0}, {tiny_head(): -1.0}):
        with pytest.raises(ValueError, match=r"target_value is 1\.0.*Give one head of weight 1"):
            Controller(heads, config)
    Controller({tiny_head(): 1.0}, config)
    with_its_own = tiny_head(2)
    with_its_own.config.control.target_value = 2.0
    with pytest.raises(ValueError, match=r"target_value is 2\.0.*also the heads' own"):
        Controller({tiny_head(): 1.0, with_its_own: 1.0})


# The bound on the norm, and the penalty


@pytest.mark.parametrize("num_steps", [1, 30])
@pytest.mark.parametrize("layers", [0, 1])
def test_no_row_moves_further_than_the_relative_norm_allows(num_steps, layers):
    head = tiny_head(num_hidden_layers=layers)
    hidden_states = torch.randn(40, 16) * torch.logspace(-3, 3, 40)[:, None]
    hidden_states[7] = 0.0
    norms, free = (
        Controller(head, ControlConfig(0.5, num_steps, max_relative_norm=cap)).control(hidden_states).norm(dim=-1)
        for cap in (0.1, inf)
    )
    limit = 0.1 * hidden_states.norm(dim=-1)
    assert (norms <= limit * (1 + 1e-5)).all()
    held = free > limit * (1 + 1e-5)
    assert 5 < held.sum() < 35  # some rows are held back and some are not, or little is shown
    if num_steps == 1:
        torch.testing.assert_close(norms, torch.minimum(free, limit))
    assert norms[7] == 0  # h = 0 may not move, and does not become NaN


def test_the_bound_on_the_norm_keeps_the_direction():
    head, hidden_states = tiny_head(), torch.randn(10, 16)
    u = Controller(head, ControlConfig(5.0, 1, max_relative_norm=0.01)).control(hidden_states)
    gradient = head.gradient(hidden_states)
    torch.testing.assert_close(torch.cosine_similarity(u, gradient), torch.ones(10))


def test_the_bound_on_the_norm_holds_a_step_of_any_size():
    u = Controller(tiny_head(), ControlConfig(1e30, 1, max_relative_norm=0.1)).control(torch.ones(1, 16))
    torch.testing.assert_close(u.norm(dim=-1), torch.tensor([0.4]))  # not 0: ‖u‖² is infinite in float32


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_an_infinite_bound_is_none_bit_for_bit(layers):
    head, hidden_states = tiny_head(num_hidden_layers=layers), torch.randn(10, 16)
    head.config.control.max_relative_norm = 0.01
    expected = Controller(tiny_head(num_hidden_layers=layers), ControlConfig(0.3, 5))(hidden_states)
    actual = Controller(head, ControlConfig(0.3, 5, max_relative_norm=inf))(hidden_states)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_with_a_penalty_the_ascent_ends_where_the_gradient_is_twice_lambda_u(layers):
    head = tiny_head(num_hidden_layers=layers, hidden_act="tanh").double()
    hidden_states = torch.randn(20, 16, dtype=torch.float64)
    lengths = []
    for penalty in (1.0, 4.0):
        u = Controller(head, ControlConfig(0.1, 1000, regularization=penalty)).control(hidden_states)
        torch.testing.assert_close(head.gradient(hidden_states + u), 2 * penalty * u, rtol=0, atol=1e-9)
        lengths.append(u.norm(dim=-1))
    assert (lengths[1] < lengths[0]).all()
    assert lengths[1].min() > 1e-3


# The strength

TABLE = [[0.02, 0.1], [0.1, 0.3], [0.4, 2.0]]


def calibrated(seed=0, *, table=TABLE, num_steps=30, calibrated_at=None, **config):
    head = tiny_head(seed, **config)
    head.config.control = ControlDefaults(num_steps=num_steps, calibration=table, calibration_num_steps=calibrated_at)
    return head


@pytest.mark.parametrize(
    ("strength", "step_size"),
    [
        (0.02, 0.1),
        (0.1, 0.3),
        (0.4, 2.0),
        (math.sqrt(0.02 * 0.1), math.sqrt(0.1 * 0.3)),
        (0.1 * 4**0.25, 0.3 * (2.0 / 0.3) ** 0.25),
        (0.02 / 4, 0.1 / 2),
        (0.02 / 100, 0.1 / 10),
    ],
)
def test_a_strength_is_read_from_the_table_in_logarithms_and_below_it_by_the_square_root(strength, step_size):
    assert step_size_for(strength, ControlDefaults(calibration=TABLE), 30) == pytest.approx(step_size, rel=1e-12)


def test_more_strength_is_a_longer_step_without_a_jump():
    table = ControlDefaults(calibration=TABLE)
    steps = [step_size_for(float(strength), table, 30) for strength in np.geomspace(1e-4, 0.4, 500)]
    assert all(1 < later / step < 1.05 for step, later in pairwise(steps))


@pytest.mark.parametrize("num_steps", [1, 15, 30, 45])
def test_another_number_of_steps_keeps_their_product_with_the_step_size(num_steps):
    table = ControlDefaults(calibration=TABLE, num_steps=30)
    for strength in (0.01, 0.05, 0.1, 0.4):
        product = num_steps * step_size_for(strength, table, num_steps)
        assert product == pytest.approx(30 * step_size_for(strength, table, 30), rel=1e-12)


def test_a_calibration_keeps_the_number_of_steps_that_it_was_made_at():
    made_at_ten = ControlDefaults(calibration=TABLE, calibration_num_steps=10, num_steps=30)
    assert 30 * step_size_for(0.1, made_at_ten, 30) == pytest.approx(10 * 0.3)
    head = calibrated(calibrated_at=10)
    assert Controller(head, ControlConfig(strength=0.1)).step_size == pytest.approx(0.1)
    assert Controller(head, ControlConfig(strength=0.1, num_steps=5)).step_size == pytest.approx(0.6)


def test_a_table_of_one_entry_is_enough_below_it():
    table = ControlDefaults(calibration=[[0.1, 0.3]])
    assert step_size_for(0.1, table, 30) == pytest.approx(0.3)
    assert step_size_for(0.025, table, 30) == pytest.approx(0.15)


def test_a_strength_beyond_the_table_is_refused_with_the_limit_named():
    with pytest.raises(ValueError, match=r"strength is 0\.41, .* up to 0\.4 nats"):
        Controller(calibrated(), ControlConfig(strength=0.41))


def test_a_strength_without_a_table_says_how_to_calibrate():
    with pytest.raises(ValueError, match=r"not calibrated.*hf-recontrol tune .* --calibrate.*give a step_size"):
        Controller(tiny_head(), ControlConfig(strength=0.1))
    with pytest.raises(ValueError, match="not calibrated"):
        Controller({calibrated(): 1.0, tiny_head(1): 1.0}, ControlConfig(strength=0.1))


def test_a_strength_is_its_step_size():
    head, hidden_states = calibrated(), torch.randn(5, 16)
    expected = Controller(head, ControlConfig(step_size=step_size_for(0.05, head.config.control, 10), num_steps=10))
    steer = Controller(head, ControlConfig(strength=0.05, num_steps=10))
    torch.testing.assert_close(steer(hidden_states), expected(hidden_states), rtol=0, atol=0)
    assert Controller(head, ControlConfig(strength=0.05, num_steps=0)).is_identity


def test_each_of_several_heads_has_the_step_size_of_its_own_table():
    one = calibrated(1, num_hidden_layers=0).double()
    other = calibrated(2, num_hidden_layers=0, table=[[0.02, 1.0], [0.4, 30.0]], num_steps=10).double()
    steps = [step_size_for(0.07, head.config.control, 5) for head in (one, other)]
    steer = Controller({one: 1.0, other: -0.5}, ControlConfig(strength=0.07, num_steps=5))
    h = torch.randn(4, 16, dtype=torch.float64)
    expected = 5 * (steps[0] * one.gradient(h) - 0.5 * steps[1] * other.gradient(h))
    torch.testing.assert_close(steer.control(h), expected, rtol=0, atol=1e-12)
    assert steps[1] > 5 * steps[0]
    assert steer.step_size == pytest.approx(sum(steps) / 2)


def test_a_strength_brings_a_bound_of_four_times_itself_unless_the_call_or_the_head_has_one():
    head = calibrated()
    assert Controller(head, ControlConfig(strength=0.1)).max_kl == pytest.approx(0.4)
    assert Controller(head, ControlConfig(strength=0.1, max_kl=0.2)).max_kl == 0.2
    assert Controller(head, ControlConfig(strength=0.1, max_kl=inf)).max_kl is None
    assert Controller(head, ControlConfig(step_size=0.1)).max_kl is None
    head.config.control.max_kl = 0.7
    assert Controller(head, ControlConfig(strength=0.1)).max_kl == 0.7
    assert Controller(head, ControlConfig(step_size=0.1)).max_kl == 0.7


def test_the_heads_own_strength_counts_and_a_step_size_of_the_call_hides_it_and_its_bound():
    head = calibrated()
    head.config.control.strength = 0.1
    own, other = Controller(head), Controller(head, ControlConfig(step_size=0.7))
    assert (own.step_size, own.max_kl) == (pytest.approx(0.3), pytest.approx(0.4))
    assert (other.step_size, other.max_kl) == (0.7, None)


# What a config may say

WRONG = {
    "step_size": [-1e-9, -inf],
    "strength": [0, 0.0, -0.1, -inf],
    "max_kl": [0, 0.0, -0.1, -inf],
    "max_relative_norm": [0, 0.0, -0.1, -inf],
    "regularization": [-1e-9, -inf],
    "target_value": [-inf],
}
NO_NUMBERS = [True, False, "1", "", nan, 1j, [1.0], (), torch.tensor(1.0), np.array(1.0), 10**400]
INFINITE = ("max_kl", "max_relative_norm")  # of these, inf is no bound


@pytest.mark.parametrize("name", WRONG)
def test_an_option_out_of_bounds_or_of_another_kind_is_refused_by_its_name(name):
    for value in [*WRONG[name], *NO_NUMBERS, *([] if name in INFINITE else [inf])]:
        with pytest.raises(ValueError, match=f"^{name} is .*; it must be a "):
            ControlConfig(**{name: value})


@pytest.mark.parametrize("value", [True, "3", 3.0, nan, inf, -1, 1025, 10**400])
def test_a_number_of_steps_is_an_integer(value):
    with pytest.raises(ValueError, match=r"^num_steps is "):
        ControlConfig(num_steps=value)


def test_the_ends_of_each_range_are_allowed():
    ControlConfig(step_size=0, num_steps=1024, max_kl=inf, max_relative_norm=inf, regularization=0, target_value=-3)
    ControlConfig(strength=1e-9, num_steps=0, max_kl=1e-9)


def test_numpys_numbers_are_numbers_in_every_option():
    head, hidden_states = tiny_head(), torch.randn(4, 16)
    options = {"step_size": 0.5, "regularization": 0.25, "max_relative_norm": 0.125, "target_value": 2.0}
    expected = Controller(head, ControlConfig(num_steps=3, **options))(hidden_states)
    for kind in (np.float32, np.float64):
        config = ControlConfig(num_steps=np.int32(3), **{name: kind(value) for name, value in options.items()})
        torch.testing.assert_close(Controller(head, config)(hidden_states), expected, rtol=0, atol=0)


def test_a_step_size_and_a_strength_together_are_refused():
    with pytest.raises(ValueError, match=r"step_size is 0\.3 and strength 0\.1.*Give one of the two"):
        ControlConfig(step_size=0.3, strength=0.1)
    with pytest.raises(ValueError, match="Give one of the two"):
        ControlConfig.of({"step_size": 0, "strength": 0.1})


def test_a_config_may_be_a_dict_of_known_fields():
    config = ControlConfig(0.3, 5)
    assert ControlConfig.of({"step_size": 0.3, "num_steps": 5}) == config
    assert ControlConfig.of(config) is config
    with pytest.raises(ValueError, match=r"unknown fields \['alpha'\]; allowed are step_size, "):
        ControlConfig.of({"alpha": 0.3})
    with pytest.raises(TypeError, match="is a list; pass a ControlConfig or a dict"):
        ControlConfig.of([0.3])


def test_a_layer_is_filled_up_from_the_one_below():
    lower = ControlConfig(0.3, 5, max_kl=0.1, regularization=0.2, target_value=1.0)
    assert ControlConfig().over(lower) == lower
    assert ControlConfig(num_steps=0, max_kl=inf).over(lower) == ControlConfig(
        0.3, 0, max_kl=inf, regularization=0.2, target_value=1.0
    )
    assert lower.over(ControlConfig(9.0, 9, regularization=9.0, max_relative_norm=9.0)) == ControlConfig(
        0.3, 5, max_kl=0.1, regularization=0.2, target_value=1.0, max_relative_norm=9.0
    )


def test_a_step_size_hides_a_strength_below_it_and_the_other_way_round():
    assert ControlConfig(step_size=0.0).over(ControlConfig(strength=0.1)) == ControlConfig(step_size=0.0)
    assert ControlConfig(strength=0.1).over(ControlConfig(step_size=0.3)) == ControlConfig(strength=0.1)
    assert ControlConfig().over(ControlConfig(strength=0.1)) == ControlConfig(strength=0.1)
    three = ControlConfig(num_steps=3).over(ControlConfig(strength=0.1)).over(ControlConfig(0.3, 9))
    assert three == ControlConfig(strength=0.1, num_steps=3)


# A head's own control, in its config.json


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("strength", "max_kl", "max_relative_norm") for value in (0, -0.1, inf, nan, "1")),
        *(
            (name, value)
            for name in ("strength", "max_kl", "max_relative_norm", "target_value")
            for value in (True, [])
        ),
        *(("regularization", value) for value in (-0.1, inf, nan, "1", True, None)),
        *(("target_value", value) for value in (inf, nan, "1", 10**400)),
        *(("calibration_num_steps", value) for value in (0, -1, 1025, 1.0, "3", True)),
        *(("calibration", value) for value in (None, {}, "table", 3, [0.1, 0.2], [[0.1]], [[0.1, 0.2, 0.3]])),
        *(("calibration", value) for value in ([["0.1", 0.2]], [[True, 0.2]], [[0.1, None]], [[[], []]])),
        *(("calibration", value) for value in ([[0, 0.1]], [[0.1, 0]], [[-0.1, 0.1]], [[nan, 0.1]], [[0.1, inf]])),
        ("calibration", [[0.1, 0.2], [0.1, 0.3]]),
        ("calibration", [[0.1, 0.2], [0.2, 0.2]]),
        ("calibration", [[0.1, 0.2], [0.2, 0.1]]),
        ("calibration", [[0.2, 0.1], [0.1, 0.2]]),
        ("calibration", [[float(i), float(i)] for i in range(1, 34)]),
    ],
)
def test_a_heads_own_control_is_checked_field_by_field(name, value):
    with pytest.raises(HeadError, match=rf"control\.{name}"):
        ValueHeadConfig.from_dict({"hidden_size": 8, "control": {"calibration": TABLE, name: value}})


def test_a_heads_own_strength_needs_a_calibration():
    with pytest.raises(HeadError, match=r"control\.strength = 0\.1.*no calibration"):
        ValueHeadConfig.from_dict({"hidden_size": 8, "control": {"strength": 0.1}})
    ValueHeadConfig.from_dict({"hidden_size": 8, "control": {"strength": 0.1, "calibration": TABLE}})


def test_a_calibration_is_of_some_steps():
    """n · α is kept, and 0 · α is nothing: a strength with num_steps in the call would steer by 0 in silence."""
    with pytest.raises(HeadError, match=r"control\.calibration.*num_steps = 0"):
        ValueHeadConfig.from_dict({"hidden_size": 8, "control": {"calibration": TABLE, "num_steps": 0}})


def test_a_calibration_has_at_most_32_entries():
    table = [[float(i), float(i)] for i in range(1, 33)]
    ValueHeadConfig.from_dict({"hidden_size": 8, "control": {"calibration": table}})


def test_a_heads_own_control_is_saved_and_loaded(tmp_path):
    head = tiny_head()
    head.config.control = ControlDefaults(
        step_size=0.7,
        num_steps=11,
        strength=0.1,
        max_kl=0.5,
        max_relative_norm=0.25,
        regularization=0.125,
        target_value=-2.0,
        calibration=TABLE,
        calibration_num_steps=7,
    )
    head.save_pretrained(tmp_path)
    loaded = ValueHead.from_pretrained(tmp_path)
    assert loaded.config.control == head.config.control
    hidden_states = torch.randn(4, 16)
    torch.testing.assert_close(Controller(loaded)(hidden_states), Controller(head)(hidden_states), rtol=0, atol=0)


def test_a_head_that_was_saved_before_these_fields_existed_loads(tmp_path):
    head = tiny_head()
    head.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["control"] = {"step_size": 0.7, "num_steps": 11}
    (tmp_path / "config.json").write_text(json.dumps(config))
    control = ValueHead.from_pretrained(tmp_path).config.control
    assert control == ControlDefaults(step_size=0.7, num_steps=11)
    assert (control.strength, control.max_kl, control.regularization, control.calibration) == (None, None, 0.0, [])
