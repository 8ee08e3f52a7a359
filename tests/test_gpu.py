"""What an accelerator gives is what the CPU gives: `pytest -m gpu`. Without one both sides are the CPU."""

import copy

import pytest
import torch
from test_control_training import PROMPTS, two_words
from tiny import prompts, tiny_control_head, tiny_head, tiny_model, tiny_tokenizer

from hf_recontrol import (
    ControlConfig,
    ControlHead,
    ControlHeadConfig,
    Controller,
    RecontrolTrainer,
    RecontrolTrainingArguments,
    ValueHead,
    ValueHeadConfig,
    calibrate,
    collect_rollouts,
    enable_recontrol,
    fit_constant_control,
    sample_states,
)
from hf_recontrol.calibration import mean_kl

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GREEDY = {"do_sample": False, "max_new_tokens": 8}
HEADS = {
    "ReLU": (tiny_head, {"intermediate_size": 600}, {"recontrol_step_size": 0.5, "recontrol_num_steps": 30}),
    "two layers": (tiny_head, {"num_hidden_layers": 2}, {"recontrol_step_size": 0.5, "recontrol_num_steps": 5}),
    "linear": (tiny_head, {"num_hidden_layers": 0}, {"recontrol_step_size": 0.5, "recontrol_num_steps": 5}),
    "control": (tiny_control_head, {}, {"recontrol_scale": 0.5}),
}
MODES = {
    "greedy": {},
    "max_kl": {"recontrol_max_kl": 0.05},
    "beams": {"num_beams": 3, "recontrol_max_kl": 0.05},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "static cache": {"cache_implementation": "static"},  # on an accelerator its forward is compiled
}


def tokens(device, name, mode):
    make, config, steer = HEADS[name]
    model = enable_recontrol(tiny_model().to(device))
    inputs = {key: tensor[:1] if "lookup" in mode else tensor for key, tensor in prompts().items()}
    inputs = {key: tensor.to(device) for key, tensor in inputs.items()}
    return model.generate(**inputs, **GREEDY, **MODES[mode], **steer, recontrol_value_head=make(**config)).tolist()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", HEADS)
def test_steered_tokens_are_those_of_the_cpu(name, mode):
    assert tokens(DEVICE, name, mode) == tokens("cpu", name, mode)


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU is never waited for")
@pytest.mark.parametrize("name", HEADS)
def test_an_edit_does_not_wait_for_the_device(name):
    make, config, steer = HEADS[name]
    named = {key.removeprefix("recontrol_"): value for key, value in steer.items()}
    controller = Controller(make(**config), ControlConfig(**named, max_kl=0.1))
    states = torch.randn(3, 1, 16, device=DEVICE)
    controller.edit(states)  # makes the Gram matrix and records the graph
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        edited, sound = controller.edit(states)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert sound.all()
    assert not torch.equal(edited, states)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def collected(request, tmp_path_factory):
    """A model on the device, and rollouts that it made there."""
    model = tiny_model().to(DEVICE, request.param)
    folder = tmp_path_factory.mktemp("rollouts")
    options = {"num_return_sequences": 8, "max_new_tokens": 8, "progress": False}
    return model, collect_rollouts(model, tiny_tokenizer(), PROMPTS, two_words, folder, **options).split(0.3)


def trained(head, collected, folder, use_cpu):
    """The head, fitted on the device or on the CPU, by the same batches."""
    model, (train, held_out) = collected
    use_cpu = use_cpu or DEVICE == "cpu"
    base = copy.deepcopy(model).cpu() if use_cpu else model
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": use_cpu}
    recipe = "control" if isinstance(head, ControlHead) else None
    args = RecontrolTrainingArguments(str(folder), recipe=recipe, num_train_epochs=1.0, **quiet)
    RecontrolTrainer(head, args, train_dataset=train, eval_dataset=held_out, base_model=base).train()
    return head.cpu().eval()


def new_head(kind):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16}
    return ControlHead(ControlHeadConfig(**shape)) if kind == "control" else ValueHead(ValueHeadConfig(**shape))


@pytest.mark.parametrize("kind", ["value", "control"])
def test_a_head_is_fitted_and_calibrated_as_on_the_cpu(kind, collected, tmp_path):
    here, there = (trained(new_head(kind), collected, tmp_path, use_cpu) for use_cpu in (False, True))
    states = sample_states(collected[1][1]).float()
    for output in (lambda head: head(states), lambda head: torch.tensor(head.config.control.calibration)):
        torch.testing.assert_close(output(here), output(there), rtol=0.02, atol=0.02)
    assert here.config.info["evaluation"]["answers"] == len(collected[1][1])


def test_a_constant_control_is_that_of_the_cpu_and_spends_what_it_is_calibrated_for(collected):
    model, (train, held_out) = collected
    here, there = fit_constant_control(train, model), fit_constant_control(train, copy.deepcopy(model).cpu())
    states = sample_states(held_out).float()
    torch.testing.assert_close(here.cpu()(states), there(states), rtol=0.02, atol=0.02)
    states = sample_states(held_out)
    calibrate(here, model, states)
    controller = Controller(here, ControlConfig(strength=0.1))
    assert mean_kl(controller, model, states, cap=0.4) == pytest.approx(0.1, rel=0.05)
