"""Every path of the ascent against autograd, the Gram matrix they keep, and which of them is taken when."""

import copy
import gc
import pickle

import pytest
import torch
from tiny import prompts, tiny_head, tiny_model

from hf_recontrol import ControlConfig, Controller, enable_recontrol
from hf_recontrol import ascent as ascent_module
from hf_recontrol.ascent import FlippedColumns, Steps, ascend, gram_matrix, in_h, in_z
from hf_recontrol.control import control_by_autograd


def closed(heads, h, steps):
    return in_h(heads, h, None, steps)


def dense(heads, h, steps):
    matrix = gram_matrix([head for head, _ in heads])
    return in_z(heads, h, steps, lambda s: s @ matrix)


def flipped(heads, h, steps):
    """Exact for a head of any kind, if wasteful where s is never the same."""
    return in_z(heads, h, steps, FlippedColumns(gram_matrix([head for head, _ in heads])))


PATHS = [closed, dense, flipped]


def by_autograd(heads, h, steps):
    """One row: numbers, or tensors of one."""
    u, n = torch.zeros_like(h), int(steps.num_steps if steps.own_num_steps is None else steps.own_num_steps)
    for _ in range(n):
        with torch.enable_grad():
            u.requires_grad_(True)
            values = [head(h + u) for head, _ in heads]
            parts = [torch.autograd.grad(value.sum(), u, retain_graph=True)[0] for value in values]
        u, step = u.detach(), sum(float(factor) * part for (_, factor), part in zip(heads, parts, strict=True))
        if steps.target is not None:
            gap = float(steps.target) - values[0].detach()
            step = step * (gap / (step * parts[0]).sum(-1)).clamp(-1, 1).unsqueeze(-1)
        u = (1.0 if steps.shrinking is None else float(steps.shrinking)) * u + step
        if steps.limit is not None and u.norm() > steps.limit:
            u = u * steps.limit / u.norm()
    return u


def row_by_row(heads, h, steps):
    def of(x, i):
        return x[i : i + 1] if isinstance(x, torch.Tensor) else x

    rows = []
    for i in range(len(h)):
        own = Steps(
            steps.num_steps,
            of(steps.shrinking, i),
            of(steps.limit, i),
            of(steps.target, i),
            of(steps.own_num_steps, i),
        )
        rows.append(by_autograd([(head, of(factor, i)) for head, factor in heads], h[i : i + 1], own))
    return torch.cat(rows)


OPTIONS = {
    "plain": {},
    "penalty": {"shrinking": 0.8},
    "limit": {"limit": 0.5},
    "target": {"target": 0.1},
    "all": {"shrinking": 0.8, "limit": 0.5, "target": 0.1},
}


def options_of(names, h, per_row):
    options = dict(OPTIONS[names])
    if "limit" in options:
        options["limit"] = options["limit"] * torch.logspace(-1, 0.5, len(h), dtype=h.dtype)[:, None]
    if per_row:
        spread = torch.linspace(0.7, 1.2, len(h), dtype=h.dtype)[:, None]
        options = {name: spread * number if name != "limit" else number for name, number in options.items()}
        options["own_num_steps"] = torch.arange(len(h))[:, None] + 2  # the first row makes two, the last all
    return options


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("per_row", [False, True], ids=["alike", "per row"])
@pytest.mark.parametrize("shape", [(1, "relu"), (1, "gelu"), (2, "relu"), (2, "tanh"), (0, "relu")], ids=str)
def test_every_path_is_autograds_with_every_option_for_all_rows_and_for_each(path, options, per_row, shape):
    layers, activation = shape
    head = tiny_head(num_hidden_layers=layers, hidden_act=activation).double()
    h = torch.randn(8, 16, dtype=torch.float64) * 2
    chosen = options_of(options, h, per_row)
    factor = torch.linspace(0.1, 1.5, 8, dtype=h.dtype)[:, None] if per_row else 0.7
    steps = Steps(9, **chosen)
    actual = path([(head, factor)], h, steps)
    torch.testing.assert_close(actual, row_by_row([(head, factor)], h, steps), rtol=0, atol=1e-9)
    assert actual.norm(dim=-1).max() > 1e-2
    # An option alone matters here, or nothing is shown of it; together, one may leave nothing for another to do.
    for name in (["own_num_steps"] if per_row and not OPTIONS[options] else []) + list(OPTIONS[options])[:1]:
        without = path([(head, factor)], h, Steps(9, **{other: x for other, x in chosen.items() if other != name}))
        assert (actual - without).norm(dim=-1).max() > 1e-3


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("options", ["plain", "penalty", "limit"])
@pytest.mark.parametrize("per_row", [False, True], ids=["alike", "per row"])
def test_heads_of_several_depths_and_widths_are_one(path, options, per_row):
    spread = torch.linspace(0.5, 2.0, 8, dtype=torch.float64)[:, None] if per_row else 1.0
    heads = [
        (tiny_head(1).double(), 0.7 * spread),
        (tiny_head(2, num_hidden_layers=2, intermediate_size=5, hidden_act="silu").double(), -0.4 * spread),
        (tiny_head(3, num_hidden_layers=0).double(), 0.2 * spread),
    ]
    h = torch.randn(8, 16, dtype=torch.float64)
    steps = Steps(9, **options_of(options, h, per_row))
    torch.testing.assert_close(path(heads, h, steps), row_by_row(heads, h, steps), rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layers", [[0], [0, 0], [1], [1, 2]], ids=str)
def test_the_path_that_is_chosen_is_autograds_with_settings_for_each_row(layers, options):
    if "target" in OPTIONS[options] and len(layers) > 1:
        pytest.skip("a target is of one head")
    h = torch.randn(8, 16, dtype=torch.float64)
    factor = torch.linspace(0.1, 1.5, 8, dtype=h.dtype)[:, None]
    heads = [(tiny_head(i, num_hidden_layers=n).double(), factor / (i + 1)) for i, n in enumerate(layers)]
    steps = Steps(9, **options_of(options, h, per_row=True))
    actual = ascend(heads, h, None, steps, lambda: gram_matrix([head for head, _ in heads]))
    torch.testing.assert_close(actual, row_by_row(heads, h, steps), rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", ["plain", "penalty", "limit", "target"])
def test_an_ascent_may_start_anywhere(options):
    """As it does behind a control head."""
    head = tiny_head().double()
    h, start = torch.randn(4, 16, dtype=torch.float64), torch.randn(4, 16, dtype=torch.float64)
    before = start.clone()
    steps = Steps(6, **options_of(options, h, False))
    actual = ascend([(head, 0.5)], h, start, steps, lambda: gram_matrix([head]))
    torch.testing.assert_close(actual, in_h([(head, 0.5)], h, start, steps), rtol=0, atol=1e-12)
    torch.testing.assert_close(start, before, rtol=0, atol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(16,), (1, 16), (3, 2, 16), (0, 16)])
def test_hidden_states_of_any_shape_are_climbed_from(path, shape):
    head, h = tiny_head().double(), torch.randn(shape, dtype=torch.float64)
    expected = control_by_autograd(head, h, 0.3, 7)
    torch.testing.assert_close(path([(head, 0.3)], h, Steps(7)), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("changed", [0, 1, 3, 40])
def test_the_columns_that_changed_are_the_whole_product(rows, changed):
    """None, a few, and so many that the whole product is taken instead; in one row of several, and in all."""
    torch.manual_seed(0)
    rows_of_w = torch.randn(40, 30, dtype=torch.float64)
    gram = rows_of_w @ rows_of_w.T
    product, s = FlippedColumns(gram), torch.randn(rows, 40, dtype=torch.float64)
    for step in range(6):
        torch.testing.assert_close(product(s), s @ gram, rtol=0, atol=1e-11)
        s = s.clone()
        s[step % rows :, torch.randperm(40)[:changed]] += 1.0


def test_few_columns_are_few(monkeypatch):
    """Or nothing would be gained, and no result would tell."""
    taken, stock = [], FlippedColumns._of_columns
    monkeypatch.setattr(
        FlippedColumns, "_of_columns", lambda self, *args: (taken.append(len(args[0])), stock(self, *args))[1]
    )
    head = tiny_head(intermediate_size=512)
    u = Controller(head, ControlConfig(0.02, 60)).control(torch.randn(4, 16))
    assert 10 < len(taken) < 60
    assert max(taken) < 4 * 512 / 20
    assert u.norm(dim=-1).min() > 1e-3


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("num_steps", [30, 100])
def test_float32_is_as_near_to_float64_as_autograd_is(path, num_steps):
    """A gate within rounding of 0 may open a step sooner or later, in autograd too: hence a median and a maximum."""
    torch.manual_seed(0)
    head = tiny_head(hidden_size=256, intermediate_size=256)
    h = torch.randn(32, 256)
    exact = control_by_autograd(copy.deepcopy(head).double(), h.double(), 0.5, num_steps)
    errors = (path([(head, 0.5)], h, Steps(num_steps)) - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert errors.median() <= 1e-5
    assert errors.max() <= 5e-3


@pytest.mark.parametrize("shape", [(1, "relu", 24), (1, "relu", 600), (1, "silu", 24), (2, "relu", 24)], ids=str)
def test_greedy_text_is_that_of_the_path_by_autograd(shape, monkeypatch):
    layers, activation, width = shape
    model = enable_recontrol(tiny_model())
    head = tiny_head(num_hidden_layers=layers, hidden_act=activation, intermediate_size=width)
    steer = {"recontrol_value_head": head, "recontrol_step_size": 0.5, "recontrol_num_steps": 30}
    greedy = {"do_sample": False, "max_new_tokens": 24, **prompts(rows=16)}
    actual = model.generate(**greedy, **steer).tolist()
    assert actual != model.generate(**greedy).tolist()
    monkeypatch.setattr(Controller, "control", lambda self, h: control_by_autograd(head, h, 0.5, 30))
    assert actual == model.generate(**greedy, **steer).tolist()


# Which path


def no_gram():
    pytest.fail("no Gram matrix is of use here")


@pytest.mark.parametrize(
    ("config", "num_steps"),
    [({}, 1), ({"num_hidden_layers": 0}, 9), ({"intermediate_size": 33, "hidden_act": "gelu"}, 9)],
    ids=["one step", "linear", "wide and smooth"],
)
def test_no_gram_matrix_is_made_where_it_would_not_pay(config, num_steps, monkeypatch):
    monkeypatch.setattr(ascent_module, "FEW_ROWS", 24)
    head, h = tiny_head(**config), torch.randn(3, 16)
    u = ascend([(head, 0.3)], h, None, Steps(num_steps), no_gram)
    torch.testing.assert_close(u, control_by_autograd(head, h, 0.3, num_steps))


def test_a_gram_matrix_beyond_the_budget_is_not_made(monkeypatch):
    head, h = tiny_head(), torch.randn(3, 16)
    monkeypatch.setattr(ascent_module, "GRAM_BYTES", 24 * 24 * 4 - 1)
    u = ascend([(head, 0.3)], h, None, Steps(9), no_gram)
    torch.testing.assert_close(u, control_by_autograd(head, h, 0.3, 9))
    monkeypatch.setattr(ascent_module, "GRAM_BYTES", 24 * 24 * 4)
    made = []
    ascend([(head, 0.3)], h, None, Steps(9), lambda: (made.append(1), gram_matrix([head]))[1])
    assert made


@pytest.mark.parametrize("config", [{"hidden_act": "gelu"}, {"num_hidden_layers": 2}, {"intermediate_size": 600}])
def test_the_gram_matrix_is_used_where_it_pays(config):
    asked = []
    ascend([(tiny_head(**config), 0.3)], torch.randn(3, 16), None, Steps(9), lambda: asked.append(1))
    assert asked


# The Gram matrix


def w(head):
    return head.first_weight / head.input_std


def test_the_gram_matrix_is_made_once_and_kept_with_the_head():
    head = tiny_head()
    matrix = gram_matrix([head])
    torch.testing.assert_close(matrix, w(head) @ w(head).T)
    assert gram_matrix([head]) is matrix
    assert gram_matrix([head], closely=True) is matrix
    assert not matrix.requires_grad
    Controller(head, ControlConfig(0.3, 9))(torch.randn(2, 16))
    assert gram_matrix([head]) is matrix


CHANGES = {
    "an optimizer's step": lambda head: torch.optim.SGD(head.parameters(), lr=0.5).step(),
    "a copy": lambda head: head.load_state_dict(tiny_head(5).state_dict()),
    "weight.data": lambda head: head.first_weight.data.mul_(1.5),
    "rows in another order": lambda head: head.first_weight.data.copy_(head.first_weight.data.flip(0)),
    "another standardisation": lambda head: head.input_std.mul_(2.0),
    "float64": lambda head: head.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_weights_is_seen(change):
    head = tiny_head()
    Controller(head, ControlConfig(0.3, 9))(torch.randn(2, 16))
    head(torch.randn(2, 16)).sum().backward()
    CHANGES[change](head)
    h = torch.randn(3, 16, dtype=head.dtype)
    torch.testing.assert_close(
        Controller(head, ControlConfig(0.3, 9)).control(h), control_by_autograd(head, h, 0.3, 9), rtol=1e-4, atol=1e-5
    )


def test_a_change_between_two_calls_of_one_controller_is_seen():
    head, h = tiny_head(), torch.randn(3, 16)
    steer = Controller(head, ControlConfig(0.3, 9))
    steer(h)
    with torch.no_grad():
        head.first_weight.mul_(1.5)
    torch.testing.assert_close(steer.control(h), control_by_autograd(head, h, 0.3, 9), rtol=1e-4, atol=1e-5)


def test_the_gram_matrix_is_not_saved_copied_or_sent(tmp_path):
    head = tiny_head()
    size = len(pickle.dumps(head))
    gram_matrix([head])
    assert len(pickle.dumps(head)) == size
    assert copy.deepcopy(head).kept_gram_matrices == {}
    assert not [name for name in head.state_dict() if "gram" in name]
    h = torch.randn(2, 16)
    torch.testing.assert_close(Controller(pickle.loads(pickle.dumps(head)))(h), Controller(head)(h))


def test_heads_that_are_gone_leave_no_gram_matrix():
    first = tiny_head()
    for seed in range(5):
        gram_matrix([first, tiny_head(seed + 1)])
        gc.collect()
    gram_matrix([first])
    assert len(first.kept_gram_matrices) <= 2


def test_a_head_in_many_mixtures_keeps_the_latest_few_gram_matrices():
    first, others = tiny_head(), [tiny_head(seed) for seed in range(1, 9)]
    made = [gram_matrix([first, other]) for other in others]
    assert len(first.kept_gram_matrices) == 4
    assert gram_matrix([first, others[-1]]) is made[-1]
    torch.testing.assert_close(gram_matrix([first, others[0]]), made[0])


def test_a_head_made_under_inference_mode_steers():
    with torch.inference_mode():
        head, h = tiny_head(), torch.randn(3, 16)
        expected = Controller(head, ControlConfig(0.3, 9))(h)
    torch.testing.assert_close(Controller(head, ControlConfig(0.3, 9))(h), expected, rtol=0, atol=0)


def test_inference_mode_leaves_a_gram_matrix_that_others_can_use():
    head, h = tiny_head(), torch.randn(3, 16)
    with torch.inference_mode():
        expected = Controller(head, ControlConfig(0.3, 9))(h)
    assert not gram_matrix([head]).is_inference()
    torch.testing.assert_close(Controller(head, ControlConfig(0.3, 9))(h), expected, rtol=0, atol=0)


def test_a_bound_on_the_norm_holds_a_step_of_any_size_in_every_path():
    for path in PATHS:
        u = path([(tiny_head(), 1e30)], torch.ones(1, 16), Steps(5, limit=torch.tensor([[0.4]])))
        torch.testing.assert_close(u.norm(dim=-1), torch.tensor([0.4]))
