"""A strength is the KL it names: on states, in generated text, for other numbers of steps, for other models."""

import math

import pytest
import torch
from tiny import prompts, tiny_head, tiny_model
from transformers import Gemma2Config, Gemma2ForCausalLM

from hf_recontrol import ControlConfig, Controller, HeadMismatch, ValueHead, calibrate, enable_recontrol, sample_states
from hf_recontrol.calibration import STRENGTHS, mean_kl
from hf_recontrol.forwards import forward_steered, generate_with_hidden_states, logits_of

pytestmark = pytest.mark.versions


def own_states(model, rows=64, tokens=8, seed=0):
    """States of the model's own sampled answers."""
    torch.manual_seed(seed)
    _, states = generate_with_hidden_states(model, **prompts(rows=rows), do_sample=True, max_new_tokens=tokens)
    return states.flatten(0, 1)


def soft_capped_model():
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "head_dim": 8, "num_hidden_layers": 1, "vocab_size": 64}
    config = Gemma2Config(
        **size, num_attention_heads=2, num_key_value_heads=1, final_logit_softcapping=2.0, initializer_range=0.5
    )
    return Gemma2ForCausalLM(config).eval()


@pytest.mark.parametrize("make_model", [tiny_model, soft_capped_model])
def test_the_logits_of_recorded_states_are_the_models_own(make_model):
    model = make_model()
    inputs = prompts(rows=2)
    states = model.model(**inputs).last_hidden_state
    torch.testing.assert_close(logits_of(model, states.flatten(0, 1)), model(**inputs).logits.flatten(0, 1))
    assert not model.lm_head._forward_pre_hooks  # left as it was found


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("make_model", [tiny_model, soft_capped_model])
def test_each_step_size_of_the_table_spends_its_nats(make_model, layers):
    model, head = make_model(), tiny_head(num_hidden_layers=layers)
    calibrate(head, model, own_states(model))
    control = head.config.control
    assert [kl for kl, _ in control.calibration] == list(STRENGTHS)
    held_out = own_states(model, seed=1)
    for strength, step_size in control.calibration:
        # an oracle with no hook of ours: the LM head's module, and the soft-cap written out
        base, edited = (
            model.lm_head(h).detach() for h in (held_out, Controller(head, ControlConfig(step_size))(held_out))
        )
        if make_model is soft_capped_model:
            base, edited = (2.0 * torch.tanh(logits / 2.0) for logits in (base, edited))
        p, q = edited.log_softmax(-1), base.log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)
        assert float(kl.clamp(max=4 * strength).mean()) == pytest.approx(strength, rel=0.2)
    assert control.strength == 0.1
    assert control.step_size == dict(control.calibration)[0.1]


@pytest.mark.parametrize("num_steps", [10, 30, 90])  # one step leaves the path: there it is 23 % off
def test_a_strength_is_the_kl_of_generated_text_whatever_the_number_of_steps(num_steps):
    model, head = enable_recontrol(tiny_model()), tiny_head()
    calibrate(head, model, own_states(model, rows=256))
    for strength in (0.03, 0.1):
        config = ControlConfig(strength=strength, num_steps=num_steps)
        torch.manual_seed(3)
        inputs = prompts(rows=256, seed=1)
        sequences = model.generate(
            **inputs, do_sample=True, max_new_tokens=8, recontrol_value_head=head, recontrol_config=config
        )
        with torch.no_grad():
            steered = forward_steered(model, Controller(head, config), input_ids=sequences).logits[:, 4:-1]
            base = model(sequences).logits[:, 4:-1]
        p, q = steered.log_softmax(-1), base.log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)
        assert float(kl.mean()) == pytest.approx(strength, rel=0.2)
        assert float(kl.max()) <= 4 * strength + 1e-4


def test_a_calibrated_head_keeps_its_table_and_steers_by_its_strength_unless_told_otherwise(tmp_path):
    model, head = enable_recontrol(tiny_model()), tiny_head()
    calibrate(head, model, own_states(model))
    head.save_pretrained(tmp_path)
    again = ValueHead.from_pretrained(tmp_path)
    assert again.config.control == head.config.control
    assert "0.1 nats a token" in (tmp_path / "README.md").read_text(encoding="utf-8")
    keywords = {"do_sample": False, "max_new_tokens": 8, "recontrol_value_head": again}
    outputs = [
        model.generate(**prompts(), **keywords, **more, output_logits=True, return_dict_in_generate=True).logits
        for more in ({}, {"recontrol_strength": 0.1}, {"recontrol_strength": 0.4})
    ]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)
    assert not torch.equal(outputs[0][0], outputs[2][0])


def test_a_table_holds_for_the_steps_it_was_made_at_whatever_the_head_says_later():
    model, head = tiny_model(), tiny_head()
    states = own_states(model)
    calibrate(head, model, states)
    head.config.control.num_steps = 10
    controller = Controller(head, ControlConfig(strength=0.1))
    assert (controller.num_steps, mean_kl(controller, model, states, 0.4)) == (10, pytest.approx(0.1, rel=0.05))


def test_a_head_with_a_bound_of_its_own_is_calibrated_under_it():
    model, head = tiny_model(), tiny_head()
    head.config.control.max_kl = 0.5
    states = own_states(model)
    calibrate(head, model, states)
    controller = Controller(head, ControlConfig(strength=0.4))
    assert controller.max_kl == 0.5
    assert mean_kl(controller, model, states, 0.5) == pytest.approx(0.4, rel=0.05)


def test_the_state_of_the_model_and_the_random_numbers_are_left_alone():
    model, head = tiny_model().train(), tiny_head()
    states, random_state = torch.randn(50, 16), torch.get_rng_state()
    calibrate(head, model, states)
    assert model.training
    assert type(model).__mro__[0].__name__ == "LlamaForCausalLM"
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_bfloat16_model_is_calibrated_in_its_own_arithmetic():
    model, head = tiny_model().bfloat16(), tiny_head()
    states = own_states(model)
    assert states.dtype == torch.bfloat16
    calibrate(head, model, states)
    step_size = dict(head.config.control.calibration)[0.2]
    kl = mean_kl(Controller(head, ControlConfig(step_size)), model, own_states(model, seed=2), 0.8)
    assert kl == pytest.approx(0.2, rel=0.2)


def dead_head():
    head = tiny_head()
    with torch.no_grad():
        head.layers[-1].weight.zero_()
    return head


def capped_head():
    head = tiny_head()
    head.config.control.max_relative_norm = 1e-4
    return head


def stepless_head():
    head = tiny_head()
    head.config.control.num_steps = 0
    return head


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (dead_head(), "control has norm 0"),
        (capped_head(), r"spends 0\.02 nats a token"),
        (stepless_head(), "0 steps"),
    ],
)
def test_a_head_that_cannot_be_calibrated_is_refused_and_left_as_it_was(head, words):
    with pytest.raises(ValueError, match=words):
        calibrate(head, tiny_model(), torch.randn(20, 16))
    assert head.config.control.calibration == []
    assert head.config.control.strength is None


def test_states_that_do_not_fit_are_refused():
    with pytest.raises(HeadMismatch, match=r"16 wide .* the states are 8 wide"):
        calibrate(tiny_head(), tiny_model(), torch.randn(20, 8))
    with pytest.raises(HeadMismatch, match="32 wide"):
        calibrate(tiny_head(), tiny_model(hidden_size=32), torch.randn(20, 16))
    with pytest.raises(ValueError, match="0 finite states"):
        calibrate(tiny_head(), tiny_model(), torch.full((3, 16), math.nan))


def test_states_are_drawn_from_many_answers_and_again_the_same():
    answers = [{"hidden_states": torch.full((length, 2), float(i))} for i, length in enumerate([40, 1, 3] * 40)]
    states = sample_states(answers, 200)
    assert states.shape == (200, 2)
    assert len(states[:, 0].unique()) > 20
    torch.testing.assert_close(states, sample_states(answers, 200), rtol=0, atol=0)
    assert not torch.equal(states, sample_states(answers, 200, seed=1))
    with pytest.raises(ValueError, match="no answers"):
        sample_states([])


@pytest.mark.parametrize(("below", "above", "reached"), [(0.985, 1.02, True), (0.7, 1.3, False)])
def test_a_mean_that_jumps_over_a_strength_is_taken_from_nearby(monkeypatch, below, above, reached):
    """As that of few states does where a gate flips."""

    def jumping(controller, model, states, cap):
        alpha = controller.config.step_size
        return 0.02 * alpha**2 * (above if alpha > 1 else below)

    monkeypatch.setattr("hf_recontrol.calibration.mean_kl", jumping)
    head = tiny_head()
    if not reached:
        with pytest.raises(ValueError, match=r"spends 0\.02 nats a token"):
            calibrate(head, tiny_model(), torch.randn(20, 16))
        return
    calibrate(head, tiny_model(), torch.randn(20, 16))
    strength, step_size = head.config.control.calibration[0]
    assert jumping(Controller(head, ControlConfig(step_size)), None, None, None) == pytest.approx(strength, rel=0.05)
