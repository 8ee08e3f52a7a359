"""What an accelerator asks for, as far as a machine without one can tell.

Tensors on the meta device have a shape and no numbers: what waits for a number from the device raises, and so does
what adds or multiplies tensors of two devices. `record` alone, which makes a CUDA graph, needs the device itself.
"""

import contextlib
import copy
import threading

import pytest
import torch
from tiny import tiny_control_head, tiny_head

from hf_recontrol import ControlConfig, Controller, calls, cuda_graph
from hf_recontrol.ascent import FlippedColumns, Steps, gram_matrix, in_z
from hf_recontrol.calls import Call
from hf_recontrol.control import on_device
from hf_recontrol.cuda_graph import CudaGraphs


@pytest.fixture
def meta(monkeypatch):
    """The meta device, on which autocast alone does not know what to do."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    return torch.device("meta")


HEADS = {
    "ReLU": [(tiny_head, {})],
    "two layers": [(tiny_head, {"num_hidden_layers": 2})],
    "GELU": [(tiny_head, {"hidden_act": "gelu"})],
    "linear": [(tiny_head, {"num_hidden_layers": 0})],
    "wide": [(tiny_head, {"intermediate_size": 100})],
    "two heads": [(tiny_head, {}), (tiny_head, {"num_hidden_layers": 2})],
    "control head": [(tiny_control_head, {})],
    "both kinds": [(tiny_head, {}), (tiny_control_head, {})],
}
OPTIONS = {
    "plain": {},
    "norm": {"max_relative_norm": 0.3},
    "all": {"max_relative_norm": 0.3, "regularization": 0.2, "target_value": 1.0},
}


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("options", OPTIONS)
def test_an_edit_neither_leaves_the_device_nor_waits_for_it(heads, options, meta):
    made = {make(i, **config).to(meta): 1.0 for i, (make, config) in enumerate(HEADS[heads])}
    ascent, chosen = {}, dict(OPTIONS[options])
    if values := [head for head in made if head.config.kind == "value"]:
        ascent = {"step_size": 0.3, "num_steps": 5}
    if len(values) != 1:
        chosen = {name: x for name, x in chosen.items() if name == "max_relative_norm"}
    call = Call(Controller(made, ControlConfig(**ascent, **chosen)).edit, max_kl=0.1)
    for _ in range(2):  # at the first the Gram matrix is made
        both = call.at_head(torch.randn(3, 1, 16, device=meta, dtype=torch.bfloat16))
        logits = call.after_forward(both @ torch.randn(16, 50, device=meta, dtype=torch.bfloat16))
    assert (both.shape, both.device.type, both.dtype) == ((6, 1, 16), "meta", torch.bfloat16)
    assert (logits.shape, logits.device.type, logits.dtype) == ((3, 1, 50), "meta", torch.float32)


def test_a_wait_for_the_device_and_a_tensor_elsewhere_would_be_noticed(meta):
    head = tiny_head()
    elsewhere = gram_matrix([head])
    head.to(meta)
    h, gram = torch.randn(3, 16, device=meta), gram_matrix([head])
    in_z([(head, 0.3)], h, Steps(5), lambda s: s @ gram)
    with pytest.raises((RuntimeError, TypeError)):  # it asks which gates flipped
        in_z([(head, 0.3)], h, Steps(5), FlippedColumns(gram))
    with pytest.raises(RuntimeError, match="device"):
        in_z([(head, 0.3)], h, Steps(5), lambda s: s + elsewhere[0])


def test_the_heads_go_to_the_device_of_the_hidden_states_by_themselves(meta):
    heads = {tiny_head(): 1.0, tiny_control_head(): 0.5}
    u = Controller(heads, ControlConfig(step_size=0.3, num_steps=5, scale=1.0)).control(torch.randn(3, 16).to(meta))
    assert u.device.type == "meta"
    assert {head.input_std.device.type for head in heads} == {"cpu"}


def test_the_copy_on_the_device_is_kept_for_the_next_controller_until_the_head_changes(meta):
    head = tiny_head()
    first, again = on_device(head, meta), on_device(head, meta)
    assert first is again
    assert gram_matrix([first]) is gram_matrix([again])
    assert copy.deepcopy(head).kept_copies == {}
    head.first_weight.data.mul_(2.0)  # leaves no sign but itself
    assert on_device(head, meta) is not first


# CUDA graphs, recorded by a stand-in that runs the function again on the same memory


@pytest.fixture
def records(monkeypatch):
    """A record of what was recorded; every tensor counts as on a GPU."""
    made = []

    def record(function, rows):
        results = function(*rows)
        made.append(len(rows[0]))

        def replay():
            for kept, each in zip(results, function(*rows), strict=True):
                kept.copy_(each)

        return replay, results

    monkeypatch.setattr(cuda_graph, "record", record)
    monkeypatch.setattr(cuda_graph, "stream_of", lambda tensor: None)
    monkeypatch.setattr(CudaGraphs, "can_take", staticmethod(lambda rows: rows[..., 0].numel() in range(1, 65)))
    return made


def test_one_graph_serves_every_batch_up_to_its_power_of_two(records):
    head = tiny_head()
    steer = Controller(head, ControlConfig(0.3, 9))
    for shape in [(1, 1, 16), (3, 1, 16), (4, 16), (2, 2, 16), (7, 16), (16,), (5, 16), (65, 16)]:
        h = torch.randn(shape)
        torch.testing.assert_close(steer.control(h), steer._control(h))
    assert records == [1, 4, 8]


def test_what_a_graph_returned_stays_when_it_is_replayed(records):
    steer = Controller(tiny_head(), ControlConfig(0.3, 9))
    first, other = torch.randn(3, 16), torch.randn(3, 16)
    u = steer.control(first)
    kept = u.clone()
    steer.control(other)
    torch.testing.assert_close(u, kept, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["weight", "bias", "input_mean"])
def test_a_graph_is_recorded_again_when_a_weight_was_written_or_replaced(records, name):
    head = tiny_head()
    steer = Controller(head, ControlConfig(0.3, 9))
    h = torch.randn(3, 16)
    steer.control(h)
    tensor = head.input_mean if name == "input_mean" else getattr(head.layers[0], name)
    with torch.no_grad():
        tensor.mul_(1.5)
    torch.testing.assert_close(steer.control(h), steer._control(h))
    tensor.data = tensor.data.clone()
    torch.testing.assert_close(steer.control(h), steer._control(h))
    assert len(records) == 3


def test_threads_and_dtypes_have_graphs_of_their_own(records):
    steer, h = Controller(tiny_head(), ControlConfig(0.3, 9)), torch.randn(2, 16)
    thread = threading.Thread(target=steer.control, args=(h,))
    steer.control(h)
    steer.control(h.bfloat16())
    thread.start()
    thread.join()
    assert len(records) == 3


def test_a_graph_made_in_inference_mode_is_replayed_outside_of_it(records):
    steer, h = Controller(tiny_head(), ControlConfig(0.3, 9)), torch.randn(2, 16)
    with torch.inference_mode():
        inside = steer.control(h)
    torch.testing.assert_close(steer.control(h), inside)
    with torch.inference_mode():
        torch.testing.assert_close(steer.control(torch.ones(2, 16)), steer._control(torch.ones(2, 16)))
    assert len(records) == 1


def test_a_bound_on_the_kl_is_one_graph_too(records, monkeypatch):
    torch.manual_seed(0)
    call = Call(lambda h: (h, torch.ones_like(h[..., :1])), max_kl=0.05)
    for _ in range(3):
        logits = 3 * torch.randn(6, 1, 40)
        base, edited = logits.chunk(2)
        merged, _ = calls.bounded(base, edited, 0.05)
        torch.testing.assert_close(call.after_forward(logits), merged)
    assert records == [4]


def test_nothing_is_recorded_where_no_ascent_is_made(records):
    Controller(tiny_control_head())(torch.randn(2, 16))
    Controller(tiny_head(), ControlConfig(0.3, 0))(torch.randn(2, 16))
    assert records == []


def test_on_a_cpu_no_graph_is_used():
    assert not CudaGraphs.can_take(torch.randn(2, 16))
