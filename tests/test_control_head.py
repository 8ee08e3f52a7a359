"""u = f(h) and the Controller of it, alone and with a value head, and what is refused; by formulas written out here."""

from math import inf, nan

import pytest
import torch
from steered import TABLE, asked, calibrated, named
from test_generation import NoToken
from tiny import CONTROL_SHAPES, prompts, tiny_control_head, tiny_head, tiny_model
from torch.nn import functional

from hf_recontrol import (
    ControlConfig,
    ControlHead,
    ControlHeadConfig,
    Controller,
    HeadMismatch,
    RewardScale,
    enable_recontrol,
    register_value_heads,
)

DOUBLE = torch.float64

OF_X = {
    "constant": lambda x, t: torch.zeros_like(x),
    "linear": lambda x, t: x @ t["layers.0.weight"].T,
    "low rank": lambda x, t: x @ (t["layers.1.weight"] @ t["layers.0.weight"]).T,
    "one hidden layer": lambda x, t: (
        torch.relu(x @ t["layers.0.weight"].T + t["layers.0.bias"]) @ t["layers.1.weight"].T
    ),
    "two hidden layers": lambda x, t: (
        functional.gelu(
            functional.gelu(x @ t["layers.0.weight"].T + t["layers.0.bias"]) @ t["layers.1.weight"].T
            + t["layers.1.bias"]
        )
        @ t["layers.2.weight"].T
    ),
}
SHAPES = list(OF_X)


def by_hand(shape, head, h):
    """f(h) from the tensors' names."""
    t = head.state_dict()
    return t["output_scale"] * (t["bias"] + OF_X[shape]((h - t["input_mean"]) / t["input_std"], t))


def made(shape, seed=0, **config):
    return tiny_control_head(seed, **CONTROL_SHAPES[shape], **config)


def in_double(*shape, seed=0):
    return torch.randn(*shape, 16, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def exactly(actual, expected, atol=0.0):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def calibrated_control_head(seed=0, table=TABLE, **config):
    head = tiny_control_head(seed, **config)
    head.config.control.calibration = table
    return head


# f


@pytest.mark.parametrize("shape", SHAPES)
def test_f_is_its_formula(shape):
    head = made(shape).double()
    for rows in ((), (1,), (3, 2), (0,)):
        h = in_double(*rows) * 3
        exactly(head(h), by_hand(shape, head, h), 1e-12)
    assert head(in_double(20)).norm(dim=-1).min() > 0.1


@pytest.mark.parametrize("activation", ["silu", "tanh"])
def test_the_activation_is_the_configs(activation):
    head, h = tiny_control_head(hidden_act=activation).double(), in_double(4)
    t, sigma = head.state_dict(), {"silu": functional.silu, "tanh": torch.tanh}[activation]
    x = (h - t["input_mean"]) / t["input_std"]
    hidden = sigma(x @ t["layers.0.weight"].T + t["layers.0.bias"])
    exactly(head(h), t["output_scale"] * (t["bias"] + hidden @ t["layers.1.weight"].T), 1e-12)


def test_a_constant_control_is_the_same_vector_everywhere():
    head = made("constant")
    u = head(torch.randn(7, 2, 16) * 100)
    assert u.shape == (7, 2, 16)
    exactly(u, (head.output_scale * head.bias).expand(7, 2, 16))


@pytest.mark.parametrize(("shape", "rank"), [("constant", 0), ("low rank", 3), ("linear", 16)])
def test_a_control_without_a_hidden_layer_is_affine_and_of_its_rank(shape, rank):
    head, h = made(shape).double(), in_double(40)
    u = head(h)
    exactly(head(0.25 * h[:20] + 0.75 * h[20:]), 0.25 * u[:20] + 0.75 * u[20:], 1e-12)
    assert torch.linalg.matrix_rank(u - u.mean(0), atol=1e-9) == rank


@pytest.mark.parametrize("shape", SHAPES)
def test_a_fresh_head_steers_by_exactly_nothing_and_can_learn(shape):
    config = {"hidden_size": 16, "intermediate_size": 24} | CONTROL_SHAPES[shape]
    head = ControlHead(ControlHeadConfig(**config))
    h = torch.randn(5, 16)
    exactly(head(h), torch.zeros(5, 16))
    (head(h) * torch.randn(5, 16)).sum().backward()
    last = {f"layers.{len(head.layers) - 1}.weight"} - {"layers.-1.weight"}
    assert {name for name, p in head.named_parameters() if p.grad.abs().max() > 0} == {"bias", *last}


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_flow_to_every_parameter_and_to_no_statistic(shape):
    head = made(shape)
    (head(torch.randn(50, 16)) * torch.randn(50, 16)).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 1e-3 for p in head.parameters())
    assert {name for name, _ in head.named_buffers()} == {"input_mean", "input_std", "output_scale"}


def test_f_is_computed_in_float32_of_states_in_any_dtype():
    head, h = tiny_control_head(), torch.randn(4, 16).bfloat16()
    exactly(head(h), head(h.float()))
    assert head(h).dtype == torch.float32
    with pytest.raises(HeadMismatch, match=r"The control head reads hidden states 16 wide .* 32 wide"):
        head(torch.randn(1, 32))
    with pytest.raises(ValueError, match=r"The control head is torch.bfloat16.*head\.float\(\)"):
        Controller({tiny_head(): 1.0, head.bfloat16(): 1.0})


# The Controller, of control heads only


@pytest.mark.parametrize("shape", SHAPES)
def test_the_control_is_scale_times_weight_times_f(shape):
    head, h = made(shape).double(), in_double(3, 2)
    for heads, scale, factor in (
        (head, 0.7, 0.7),
        ({head: 1.0}, 0.7, 0.7),
        ({head: 2.5}, 0.4, 1.0),
        ({head: -1.5}, 2, -3.0),
    ):
        steer = Controller(heads, ControlConfig(scale=scale))
        exactly(steer.control(h), factor * by_hand(shape, head, h), 1e-12)
        exactly(steer(h), h + factor * by_hand(shape, head, h), 1e-12)
        assert (steer.num_steps, steer.step_size, steer.max_kl) == (0, 0.0, None)


def test_none_means_the_heads_own_scale_which_is_one_at_first():
    head, h = tiny_control_head().double(), in_double(4)
    exactly(Controller(head).control(h), by_hand("one hidden layer", head, h), 1e-12)
    head.config.control.scale = 2.5
    exactly(Controller(head).control(h), 2.5 * by_hand("one hidden layer", head, h), 1e-12)


def test_several_control_heads_add_up():
    heads = {made(shape, i).double(): (-1) ** i * (0.5 + i) for i, shape in enumerate(SHAPES)}
    h = in_double(5)
    expected = sum(
        0.3 * weight * by_hand(shape, head, h) for shape, (head, weight) in zip(SHAPES, heads.items(), strict=True)
    )
    exactly(Controller(heads, ControlConfig(scale=0.3)).control(h), expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_scale_of_zero_leaves_the_hidden_states_bit_for_bit(dtype):
    h, heads = torch.randn(3, 2, 16).to(dtype), {tiny_control_head(): 1.0, made("constant", 1): -2.0}
    for scale in (0, 0.0):
        steer = Controller(heads, ControlConfig(scale=scale))
        assert steer.is_identity
        assert steer(h) is h
    assert not Controller(heads, ControlConfig(scale=1e-9)).is_identity


def test_states_in_bfloat16_are_steered_in_float32_and_rounded_once():
    head, h = tiny_control_head(), torch.randn(40, 16).bfloat16()
    expected = (h.float() + 1e-2 * by_hand("one hidden layer", head, h.float())).bfloat16()
    steer = Controller(head, ControlConfig(scale=1e-2))
    exactly(steer(h), expected)
    with torch.autocast("cpu", torch.bfloat16):
        exactly(steer(h), expected)
    assert (expected != h).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_does_not_depend_on_its_neighbours(shape):
    steer, h = Controller(made(shape).double(), ControlConfig(scale=2, max_relative_norm=0.5)), in_double(6)
    exactly(steer(h), torch.cat([steer(row[None]) for row in h]), 1e-12)


@pytest.mark.parametrize("poison", [nan, inf, -inf])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_that_is_not_finite_passes_through_and_its_neighbours_are_edited(shape, poison):
    steer, h = Controller(made(shape)), torch.randn(4, 16)
    expected = steer(h)
    h[2, 5] = poison
    edited, sound = steer.edit(h)
    assert sound.squeeze(-1).tolist() == [True, True, False, True]
    torch.testing.assert_close(edited[2], h[2], rtol=0, atol=0, equal_nan=True)
    exactly(edited[[0, 1, 3]], expected[[0, 1, 3]], 1e-6)


def test_a_control_that_overflows_leaves_the_row_as_it_came():
    h = torch.randn(2, 16).half()
    edited, sound = Controller(tiny_control_head(), ControlConfig(scale=1e9)).edit(h)
    assert not sound.any()
    exactly(edited, h)


def test_the_bound_on_the_norm_cuts_the_sum_of_the_controls_and_keeps_its_direction():
    heads = {tiny_control_head().double(): 1.0, made("constant", 1).double(): -0.5}
    h = in_double(40) * torch.logspace(-3, 3, 40, dtype=DOUBLE)[:, None]
    h[7] = 0.0
    free, held = (Controller(heads, ControlConfig(scale=0.7, max_relative_norm=r)).control(h) for r in (inf, 2.0))
    limit = 2.0 * h.norm(dim=-1)
    exactly(held.norm(dim=-1), torch.minimum(free.norm(dim=-1), limit), 1e-9)
    others = [row for row in range(40) if row != 7]
    exactly(torch.cosine_similarity(held[others], free[others]), torch.ones(39, dtype=DOUBLE), 1e-9)
    assert 5 < (free.norm(dim=-1) > limit).sum() < 35
    assert (held[7] == 0).all()


# With a value head


def ascended(u, head, h, step_size, num_steps, *, penalty=0.0, cap=inf):
    """u after steps of ascent on V(h + u) − λ‖u‖² by autograd, and each time cut to ‖u‖ ≤ r‖h‖."""

    def cut(u):
        return u * (cap * h.norm(dim=-1, keepdim=True) / u.norm(dim=-1, keepdim=True)).clamp(max=1)

    u = cut(u)
    for _ in range(num_steps):
        u = u.detach().requires_grad_()
        (gradient,) = torch.autograd.grad((head(h + u) - penalty * u.square().sum(-1)).sum(), u)
        u = cut(u.detach() + step_size * gradient)
    return u


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"penalty": 0.3}, {"cap": 0.2}, {"penalty": 0.3, "cap": 0.2}], ids=str)
def test_with_a_value_head_the_ascent_starts_from_the_control_heads_u(layers, options):
    value, control, other = tiny_head(num_hidden_layers=layers).double(), made("linear").double(), made("constant", 1)
    h = in_double(8) * torch.logspace(-1, 1, 8, dtype=DOUBLE)[:, None]
    names = {"penalty": "regularization", "cap": "max_relative_norm"}
    config = ControlConfig(0.4, 6, scale=0.5, **{names[name]: number for name, number in options.items()})
    start = 0.5 * (2.0 * by_hand("linear", control, h) - by_hand("constant", other.double(), h))
    actual = Controller({control: 2.0, value: 1.0, other: -1.0}, config).control(h)
    exactly(actual, ascended(start, value, h, 0.4, 6, **options), 1e-9)
    from_zero = ascended(torch.zeros_like(h) + 1e-300, value, h, 0.4, 6, **options)
    assert (actual - from_zero).norm(dim=-1).max() > 1e-2


@pytest.mark.parametrize("layers", [0, 1])
def test_of_two_kinds_no_scale_is_the_value_head_alone_and_no_step_the_control_head_alone(layers):
    value, control, h = tiny_head(num_hidden_layers=layers), tiny_control_head(), torch.randn(5, 16)
    both = {value: 1.0, control: 0.5}
    exactly(Controller(both, ControlConfig(0.3, 4, scale=0))(h), Controller(value, ControlConfig(0.3, 4))(h))
    alone = Controller({control: 0.5}, ControlConfig(scale=2))(h)
    for config in (ControlConfig(0.0, 4, scale=2), ControlConfig(0.3, 0, scale=2)):
        exactly(Controller(both, config)(h), alone)
    assert Controller(both, ControlConfig(0.0, 4, scale=0))(h) is h


def test_of_two_kinds_each_has_its_own_multiplier_unless_the_call_gives_it():
    value, control, h = tiny_head(num_hidden_layers=0).double(), made("linear").double(), in_double(3)
    value.config.control.step_size, value.config.control.num_steps, control.config.control.scale = 0.25, 4, 1.5
    gradient, f = value.gradient(h), by_hand("linear", control, h)
    for config, alpha, scale in (
        (ControlConfig(), 0.25, 1.5),
        (ControlConfig(step_size=2.0), 2.0, 1.5),
        (ControlConfig(scale=0.5), 0.25, 0.5),
        (ControlConfig(2.0, scale=0.5), 2.0, 0.5),
    ):
        steer = Controller({value: -1.0, control: 3.0}, config)
        exactly(steer.control(h), 3.0 * scale * f - 4 * alpha * gradient, 1e-12)
        assert steer.step_size == alpha


@pytest.mark.parametrize("step_size", [50.0, 1e6])
def test_a_target_value_is_reached_from_where_the_control_head_leads(step_size):
    value, control = tiny_head(reward=RewardScale("r", 3.0, 2.5)).double(), tiny_control_head().double()
    h = in_double(100) * 2
    led = 2.5 * value(h + 0.8 * by_hand("one hidden layer", control, h)).detach() + 3.0
    target = float(led.median())
    assert (led - target).abs().median() > 0.1
    steer = Controller({control: 0.4, value: 1.0}, ControlConfig(step_size, 60, scale=2, target_value=target))
    exactly(steer.values(steer(h)), torch.full_like(led, target), 1e-6)
    exactly(steer.values(h), (2.5 * value(h) + 3.0).detach(), 1e-9)
    with pytest.raises(ValueError, match=r"the value heads' weights are \[2\.0\].*Give one head of weight 1"):
        Controller({control: 1.0, value: 2.0}, ControlConfig(target_value=target))


def test_only_a_value_head_knows_values():
    h = torch.randn(2, 3, 16)
    values = Controller({tiny_control_head(): 1.0, made("constant"): 2.0}).values(h)
    assert values.shape == (2, 3)
    assert values.isnan().all()
    value = tiny_head(reward=RewardScale("r", 3.0, 2.5))
    exactly(Controller({tiny_control_head(): -1.0, value: 2.0}).values(h), 2.0 * (2.5 * value(h) + 3.0).detach(), 1e-5)


# The strength


@pytest.mark.parametrize(
    ("strength", "scale"), [(0.02, 1.0), (0.4, 8.0), ((0.02 * 0.4) ** 0.5, 8.0**0.5), (0.02 / 4, 0.5)]
)
def test_a_strength_picks_the_scale_from_the_table_and_a_bound_of_four_times_itself(strength, scale):
    head, h = calibrated_control_head().double(), in_double(3)
    steer = Controller({head: -0.5}, ControlConfig(strength=strength))
    exactly(steer.control(h), -0.5 * scale * by_hand("one hidden layer", head, h), 1e-9)
    assert steer.max_kl == pytest.approx(4 * strength)
    assert Controller(head, ControlConfig(strength=strength, max_kl=inf)).max_kl is None
    head.config.control.max_kl = 0.7
    assert Controller(head, ControlConfig(strength=strength)).max_kl == 0.7


def test_the_heads_own_strength_counts_and_a_scale_of_the_call_hides_it_and_its_bound():
    head, h = calibrated_control_head().double(), in_double(3)
    head.config.control.strength, head.config.control.scale = 0.02, 5.0
    f = by_hand("one hidden layer", head, h)
    own, told = Controller(head), Controller(head, ControlConfig(scale=0.7))
    exactly(own.control(h), 1.0 * f, 1e-9)
    exactly(told.control(h), 0.7 * f, 1e-9)
    assert (own.max_kl, told.max_kl) == (pytest.approx(0.08), None)


def test_under_a_strength_each_of_two_kinds_has_the_multiplier_of_its_own_table():
    value, control = tiny_head(num_hidden_layers=0).double(), calibrated_control_head(**CONTROL_SHAPES["linear"])
    value.config.control.calibration, value.config.control.calibration_num_steps = [[0.02, 0.1], [0.4, 2.0]], 10
    h, control = in_double(3), control.double()
    steer = Controller({value: -1.0, control: 0.5}, ControlConfig(strength=0.4, num_steps=5))
    expected = 0.5 * 8.0 * by_hand("linear", control, h) - 5 * (10 / 5 * 2.0) * value.gradient(h)
    exactly(steer.control(h), expected, 1e-9)
    assert (steer.max_kl, steer.step_size) == (pytest.approx(1.6), pytest.approx(4.0))


def test_a_strength_without_a_table_or_beyond_it_is_refused():
    words = r"not calibrated.*hf-recontrol tune .* --calibrate.*of a control head a scale"
    for heads in (tiny_control_head(), {calibrated(): 1.0, tiny_control_head(): 1.0}):
        with pytest.raises(ValueError, match=words):
            Controller(heads, ControlConfig(strength=0.1))
    with pytest.raises(ValueError, match=r"strength is 0\.41, .* up to 0\.4 nats.*of a control head a scale"):
        Controller(calibrated_control_head(), ControlConfig(strength=0.41))


def test_a_scale_and_a_strength_hide_each_other_across_the_layers_and_are_refused_in_one():
    assert ControlConfig(scale=0).over(ControlConfig(strength=0.1)) == ControlConfig(scale=0)
    assert ControlConfig(strength=0.1).over(ControlConfig(0.3, scale=2)) == ControlConfig(strength=0.1)
    assert ControlConfig(0.3).over(ControlConfig(scale=2)) == ControlConfig(0.3, scale=2)
    with pytest.raises(ValueError, match=r"scale is 0 and strength 0\.1, .*Give one of the two"):
        ControlConfig(scale=0, strength=0.1)


# What is refused


@pytest.mark.parametrize("value", [-1e-9, -inf, inf, nan, True, "1", 10**400, torch.tensor(1.0)])
def test_a_scale_that_is_no_finite_number_from_zero_is_refused(value):
    with pytest.raises(ValueError, match=r"^scale is .*; it must be a finite number ≥ 0"):
        ControlConfig(scale=value)
    head = tiny_control_head()
    head.config.control.scale = value
    with pytest.raises(ValueError, match=r"^scale is "):
        Controller(head)


OF_AN_ASCENT = [("step_size", 2.0), ("step_size", 0), ("num_steps", 3), ("num_steps", 0), ("regularization", 0.0)]
OF_AN_ASCENT += [("target_value", 1.5), ("target_value", 0)]


@pytest.mark.versions
@pytest.mark.parametrize(("name", "value"), OF_AN_ASCENT)
def test_what_only_an_ascent_has_is_refused_of_control_heads_however_it_is_said(name, value):
    model, head = enable_recontrol(tiny_model()), tiny_control_head()
    words = rf"^{name} is {value}, .*value head.*control head"
    register_value_heads({"polite": head})
    for heads in (head, {head: 0.5, made("constant"): 1.0}):
        for said in ({f"recontrol_{name}": value}, {"recontrol_config": {name: value}}):
            with pytest.raises(ValueError, match=words):
                model.generate(**prompts(), streamer=NoToken(), recontrol_value_head=heads, **said)
        with pytest.raises(ValueError, match=words):
            model.set_recontrol_defaults(heads, **{name: value})
    with pytest.raises(ValueError, match=words):
        model.generate(**prompts(), streamer=NoToken(), generation_config=named(**{name: value}))
    assert vars(model.generation_config).keys().isdisjoint({"recontrol_value_head", f"recontrol_{name}"})
    asked(model, recontrol_value_head={head: 1.0, tiny_head(): 1.0}, **{f"recontrol_{name}": value})


@pytest.mark.versions
@pytest.mark.parametrize("scale", [0, 2.0])
def test_a_scale_is_refused_of_value_heads_however_it_is_said(scale):
    model, head = enable_recontrol(tiny_model()), tiny_head()
    words = rf"^scale is {scale}, which multiplies a control head's u, .* value head; its α is step_size"
    register_value_heads({"polite": head})
    for said in ({"recontrol_scale": scale}, {"recontrol_config": {"scale": scale}}):
        with pytest.raises(ValueError, match=words):
            model.generate(**prompts(), streamer=NoToken(), recontrol_value_head={head: 1.0, tiny_head(1): 1}, **said)
    with pytest.raises(ValueError, match=words):
        model.set_recontrol_defaults(head, scale=scale)
    with pytest.raises(ValueError, match=words):
        model.generate(**prompts(), streamer=NoToken(), generation_config=named(scale=scale))
    asked(model, recontrol_value_head={head: 1.0, tiny_control_head(): 1.0}, recontrol_scale=scale)


@pytest.mark.parametrize(
    ("name", "one", "other", "keyword"),
    [
        ("scale", 1.0, 2.0, "recontrol_strength or recontrol_scale"),
        ("strength", None, 0.1, "recontrol_strength or recontrol_scale"),
        ("max_kl", None, 0.3, "recontrol_max_kl"),
        ("max_relative_norm", 0.5, 0.25, "recontrol_max_relative_norm"),
    ],
)
def test_control_heads_that_differ_in_an_option_are_refused_until_the_call_settles_it(name, one, other, keyword):
    heads = {calibrated_control_head(1): 1.0, calibrated_control_head(2): 0.5}
    for head, value in zip(heads, (one, other), strict=True):
        setattr(head.config.control, name, value)
    with pytest.raises(ValueError, match=f"differ in their {name}: .*Pass {keyword} to settle it"):
        Controller(heads)
    assert getattr(Controller(heads, ControlConfig(**{name: other})).config, name) == other


@pytest.mark.versions
def test_a_head_of_another_width_is_refused_before_the_first_token():
    model, head = enable_recontrol(tiny_model()), tiny_control_head(hidden_size=8)
    with pytest.raises(HeadMismatch, match=r"The control head reads hidden states 8 wide .* 16 wide"):
        model.generate(**prompts(), streamer=NoToken(), recontrol_value_head=head)


@pytest.mark.versions
def test_a_control_head_of_another_base_model_is_warned_of_as_such():
    model, head = enable_recontrol(tiny_model()), tiny_control_head(base_model_name_or_path="user/other")
    model.config._name_or_path = "user/base"
    with pytest.warns(UserWarning, match=r"The control head was trained on 'user/other' .* this model is 'user/base'"):
        asked(model, recontrol_value_head=head)
    with pytest.raises(HeadMismatch, match="The control head was trained on 'user/other'"):
        asked(model, recontrol_value_head=head, recontrol_strict=True)


def test_defaults_for_one_kind_of_head_do_not_lock_out_the_other():
    model, value, control = enable_recontrol(tiny_model()), tiny_head(), tiny_control_head()
    model.set_recontrol_defaults(value, step_size=2.0, num_steps=3, max_kl=0.3)
    asked_for = asked(model, recontrol_value_head=control).controller.config
    assert (asked_for.step_size, asked_for.num_steps, asked_for.scale, asked_for.max_kl) == (None, None, 1.0, 0.3)
    model.set_recontrol_defaults(control, scale=2.0)
    assert asked(model, recontrol_value_head=value).controller.config.scale is None
    assert asked(model).controller.config.scale == 2.0
    with pytest.raises(ValueError, match="num_steps is 3, which is of a value head's ascent"):
        asked(model, recontrol_num_steps=3)
