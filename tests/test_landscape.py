"""The value about one hidden state is the head's own, and the path on it the control's."""

import math

import pytest
import torch
from test_plots import drawn_inside, lines
from tiny import tiny_head

from hf_recontrol import ControlConfig, ControlDefaults, Controller, HeadMismatch, RewardScale
from hf_recontrol.landscape import value_landscape
from hf_recontrol.plots import landscape_figure

STEPS = ControlConfig(step_size=0.5, num_steps=6)


@pytest.fixture
def head():
    return tiny_head(reward=RewardScale("r", 3.0, 2.5)).double()


@pytest.fixture
def hidden_state():
    return torch.randn(16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_the_grid_is_the_heads_value_in_units_of_the_reward(head, hidden_state):
    landscape = value_landscape(head, hidden_state, STEPS, extent=1.5, resolution=5)
    expected = torch.linspace(-1.5, 1.5, 5, dtype=torch.float64)
    torch.testing.assert_close(landscape.axis, expected)
    along, across = landscape.control_norm * landscape.directions
    for i, y in enumerate(expected):
        for j, x in enumerate(expected):
            value = 2.5 * head(hidden_state + x * along + y * across) + 3.0
            torch.testing.assert_close(landscape.values[i, j], value.detach())


def test_the_directions_are_the_controls_and_one_at_right_angles(head, hidden_state):
    landscape = value_landscape(head, hidden_state, STEPS)
    u = Controller(head, STEPS).control(hidden_state)
    torch.testing.assert_close(landscape.directions[0] * landscape.control_norm, u)
    torch.testing.assert_close(landscape.directions @ landscape.directions.T, torch.eye(2, dtype=torch.float64))


def test_the_path_leads_from_no_control_to_the_edited_state(head, hidden_state):
    landscape = value_landscape(head, hidden_state, STEPS, extent=2.0, resolution=9)
    assert landscape.path.shape == (7, 2)
    assert landscape.path[0].tolist() == [0.0, 0.0]
    torch.testing.assert_close(landscape.path[-1], torch.tensor([1.0, 0.0], dtype=torch.float64))
    controller = Controller(head, STEPS)
    edited = controller.values(controller(hidden_state))
    torch.testing.assert_close(landscape.path_values[0], controller.values(hidden_state))
    torch.testing.assert_close(landscape.path_values[-1], edited)
    torch.testing.assert_close(landscape.values[4, 6], edited)  # y is 0 and x is 1
    torch.testing.assert_close(landscape.values[4, 4], landscape.path_values[0])
    assert (landscape.path_values.diff() > 0).all()


def test_each_point_of_the_path_is_the_control_after_so_many_steps(head, hidden_state):
    config = ControlConfig(step_size=0.5, num_steps=4, regularization=0.2, max_relative_norm=0.3)
    landscape = value_landscape(head, hidden_state, config)
    for k in range(5):
        after = ControlConfig(step_size=0.5, num_steps=k, regularization=0.2, max_relative_norm=0.3)
        u = Controller(head, after).control(hidden_state)
        torch.testing.assert_close(landscape.path[k], landscape.directions @ u / landscape.control_norm)


def test_a_strength_keeps_its_step_size_along_the_path(head, hidden_state):
    head.config.control = ControlDefaults(num_steps=4, calibration=[[0.02, 0.1], [0.4, 1.0]])
    config = ControlConfig(strength=0.1)
    alpha = Controller(head, config).step_size
    by_strength = value_landscape(head, hidden_state, config)
    by_step_size = value_landscape(head, hidden_state, ControlConfig(step_size=alpha, num_steps=4))
    torch.testing.assert_close(by_strength.path, by_step_size.path)
    torch.testing.assert_close(by_strength.path_values, by_step_size.path_values)


def test_the_seed_chooses_the_random_direction_alone(head, hidden_state):
    one, same, other = (value_landscape(head, hidden_state, STEPS, seed=seed) for seed in (1, 1, 2))
    torch.testing.assert_close(one.directions, same.directions, rtol=0, atol=0)
    torch.testing.assert_close(one.directions[0], other.directions[0], rtol=0, atol=0)
    assert abs(float(one.directions[1] @ other.directions[1])) < 0.9


def test_a_bfloat16_state_is_taken_at_the_heads_precision(hidden_state):
    head, state = tiny_head(), hidden_state.bfloat16()
    torch.testing.assert_close(
        value_landscape(head, state, STEPS).values, value_landscape(head, state.float(), STEPS).values
    )


@pytest.mark.parametrize("config", [ControlConfig(0.5, 0), ControlConfig(0.0, 5)])
def test_without_a_control_there_is_no_direction_to_draw_along(head, hidden_state, config):
    with pytest.raises(
        ValueError, match=r"‖u‖ is 0.0 .* along u. Pass a config= whose step_size and num_steps are above 0"
    ):
        value_landscape(head, hidden_state, config)


def test_a_state_that_is_not_finite_is_refused(head, hidden_state):
    hidden_state[3] = math.nan
    with pytest.raises(ValueError, match="hidden state is not finite, so it is not steered"):
        value_landscape(head, hidden_state, STEPS)


def test_several_states_and_another_width_are_refused(head, hidden_state):
    with pytest.raises(ValueError, match=r"shape \(2, 16\), but .* \(hidden_size,\). Pass hidden_states\[row, token\]"):
        value_landscape(head, hidden_state.repeat(2, 1), STEPS)
    with pytest.raises(HeadMismatch, match="32"):
        value_landscape(head, hidden_state.repeat(2), STEPS)


@pytest.mark.parametrize("wrong", [{"extent": 0.0}, {"extent": math.nan}, {"resolution": 1}])
def test_a_grid_without_points_is_refused(head, hidden_state, wrong):
    with pytest.raises(ValueError, match=r"extent is .* resolution .* Leave them out for 2.0 and 81"):
        value_landscape(head, hidden_state, STEPS, **wrong)


def test_the_figure_draws_the_values_and_the_path(head, hidden_state):
    pytest.importorskip("matplotlib.figure")
    landscape = value_landscape(head, hidden_state, STEPS, resolution=9)
    figure = landscape_figure(landscape)
    assert drawn_inside(figure)
    axis, bar = figure.axes
    drawn = lines(axis)
    assert drawn["path of the control, n = 6"] == tuple(landscape.path.T.tolist())
    assert drawn["h, before"] == ([0.0], [0.0])
    assert drawn["h + u, after"] == tuple(landscape.path[-1:].T.tolist())
    (surface,) = (part for part in axis.collections if hasattr(part, "levels"))
    assert surface.levels[0] <= landscape.values.min() <= landscape.values.max() <= surface.levels[-1]
    assert surface.zmax == pytest.approx(float(landscape.values.max()))
    highest = landscape.values.flatten().argmax()  # the highest band lies where the value is highest
    x, y = landscape.axis[highest % 9], landscape.axis[highest // 9]
    top = [path for path in surface.get_paths() if len(path.vertices)][-1].vertices
    assert abs(top - torch.tensor([x, y]).numpy()).max(-1).min() < 1e-6
    assert f"{landscape.control_norm:.3g}" in axis.get_xlabel()
    assert "units of ‖u‖" in axis.get_ylabel()
    assert bar.get_ylabel() == "value V (units of the reward)"
