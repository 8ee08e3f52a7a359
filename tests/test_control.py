"""V, its gradient by hand, and the ascent, against autograd and the laws they must obey."""

import numpy as np
import pytest
import torch
from tiny import tiny_head

from hf_recontrol import ControlConfig, Controller, HeadMismatch
from hf_recontrol.control import control_by_autograd
from hf_recontrol.head_config import ACTIVATIONS

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
