"""recontrol_value_head=[…], a head for each prompt: each row is what its head alone makes of it."""

import pytest
import torch
from steered import GREEDY, STEER, calibrated, tokens
from tiny import prompts, tiny_control_head, tiny_head, tiny_model
from transformers import CompileConfig

from hf_recontrol import Controller, enable_recontrol, register_value_heads
from hf_recontrol.kl_bound import bounded, kl_divergence
from hf_recontrol.row_control import RowController

pytestmark = pytest.mark.versions


@pytest.fixture
def model():
    return enable_recontrol(tiny_model())


@pytest.fixture
def heads():
    return [tiny_head(1), None, tiny_head(2, num_hidden_layers=2)]


def each_alone(model, heads, **keywords):
    """Of every row what generate() gives when its head steers all of them."""
    whole = [tokens(model, **keywords, **({"recontrol_value_head": head} | STEER if head else {})) for head in heads]
    each = len(whole[0]) // len(heads)
    return [rows[i * each + j] for i, rows in enumerate(whole) for j in range(each)]


MODES = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "beams": {"num_beams": 3},
    "beams, two returned": {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.mark.parametrize("mode", MODES)
def test_every_prompt_is_steered_by_its_own_head(model, heads, mode):
    expected = each_alone(model, heads, **MODES[mode])
    assert tokens(model, recontrol_value_head=heads, **STEER, **MODES[mode]) == expected
    assert expected not in (tokens(model, **MODES[mode]), each_alone(model, [heads[0]] * 3, **MODES[mode]))


def test_returned_sequences_follow_their_prompt(model, heads):
    def sampled(**keywords):
        torch.manual_seed(0)
        options = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 8}
        return model.generate(**prompts(), **options, **keywords).tolist()

    whole = [sampled(**({"recontrol_value_head": head} | STEER if head else {})) for head in heads]
    actual = sampled(recontrol_value_head=heads, **STEER)
    first = [row[5] for row in actual]  # later tokens depend on the draws of the rows before
    assert first == [whole[i][2 * i + j][5] for i in range(3) for j in range(2)]


def test_a_bound_and_a_strength_are_each_heads_own(model):
    one, other = calibrated(1), calibrated(2)
    heads = [one, other, None]
    actual = model.generate(
        **prompts(), **GREEDY, recontrol_value_head=heads, recontrol_strength=0.02, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    for row, head in enumerate(heads):
        alone = model.generate(
            **prompts(), **GREEDY, return_dict_in_generate=True, output_logits=True,
            **({"recontrol_value_head": head, "recontrol_strength": 0.02} if head else {}),
        )  # fmt: skip
        assert actual.sequences[row].tolist() == alone.sequences[row].tolist()
        torch.testing.assert_close(actual.logits[0][row], alone.logits[0][row], rtol=1e-4, atol=1e-4)
    plain = model.generate(**prompts(), **GREEDY, return_dict_in_generate=True, output_logits=True)
    kl = kl_divergence(actual.logits[0], plain.logits[0])
    assert (kl[:2] > 1e-3).all()
    assert (kl <= 4 * 0.02 + 1e-4).all()
    assert kl[2] < 1e-6


def test_bounds_of_their_own_are_held_by_each_row():
    torch.manual_seed(0)
    base, edited = torch.randn(2, 4, 1, 50)
    edited = base + 2 * edited
    limits = torch.tensor([0.01, 0.2, torch.inf, 0.05]).view(4, 1, 1)
    logits, share = bounded(base, edited, limits)
    for row in range(4):
        alone, alone_share = bounded(base[row : row + 1], edited[row : row + 1], float(limits[row]))
        torch.testing.assert_close(logits[row : row + 1], alone, rtol=0, atol=2e-3)
        torch.testing.assert_close(share[row : row + 1], alone_share, rtol=0, atol=3e-4)
    assert share[2] == 1
    assert (share[[0, 1, 3]] < 1).all()


def test_names_folders_weights_and_both_kinds_may_stand_in_a_list(model, tmp_path):
    control, one, other = tiny_control_head(), calibrated(1), calibrated(2)
    control.config.control.calibration = [[0.02, 1.0], [0.4, 8.0]]
    one.save_pretrained(tmp_path)
    steer = {"recontrol_strength": 0.1}
    rows = [control, tmp_path, {one: 1.0, other: -0.5}]
    actual = tokens(model, recontrol_value_head=rows, **steer)
    for i, head in enumerate(rows):
        assert actual[i] == tokens(model, recontrol_value_head=head, **steer)[i]
    register_value_heads({"polite": one})
    assert tokens(model, recontrol_value_head=[str(tmp_path), False, None], **steer)[1:] == tokens(model)[1:]


def test_a_list_that_is_not_of_the_batchs_length_is_refused(model, heads):
    for wrong in (heads[:2], [*heads, None]):
        with pytest.raises(ValueError, match=rf"list of {len(wrong)}, but 3 prompts were given"):
            tokens(model, recontrol_value_head=wrong, **STEER)
    with pytest.raises(ValueError, match="list of 0"):
        tokens(model, recontrol_value_head=[], **STEER)
    with pytest.raises(ValueError, match="list of 3, but none of inputs"):
        model.generate(max_new_tokens=3, recontrol_value_head=heads, **STEER)


def test_a_bad_head_in_a_list_is_an_error_for_all_and_no_plain_text(model, heads):
    with pytest.raises(Exception, match=r"no/such"):
        tokens(model, recontrol_value_head=[heads[0], None, "./no/such"], **STEER)
    with pytest.raises(ValueError, match="for one head, or several with weights"):
        tokens(model, recontrol_value_head=heads, recontrol_trace=True, return_dict_in_generate=True, **STEER)
    with pytest.raises(ValueError, match='write "id@revision"'):
        tokens(model, recontrol_value_head=heads, recontrol_revision="main", **STEER)
    with pytest.raises(ValueError, match=r"a list, but generate_batch\(\)"):
        model.generate_batch([[1, 2]] * 3, recontrol_value_head=heads, **STEER)


def test_what_is_said_beside_a_list_of_plain_rows_is_checked_too(model):
    with pytest.raises(ValueError, match="strength is -5"):
        tokens(model, recontrol_value_head=[None, None, None], recontrol_strength=-5)
    with pytest.raises(ValueError, match="for one head, or several with weights"):
        tokens(model, recontrol_value_head=[None] * 3, recontrol_trace=True, return_dict_in_generate=True)
    with pytest.raises(TypeError, match="recontrol_value_head is of type list"):
        tokens(model, recontrol_value_head=[[tiny_head()], None, None])


def test_a_list_of_none_is_plain_text(model):
    assert tokens(model, recontrol_value_head=[None, False, None]) == tokens(model)


def test_prompts_as_embeddings_and_a_start_of_their_own(model, heads):
    expected = [row[5:] for row in tokens(model, recontrol_value_head=heads, **STEER)]
    embeds = model.get_input_embeddings()(prompts()["input_ids"])
    assert model.generate(inputs_embeds=embeds, **GREEDY, recontrol_value_head=heads, **STEER).tolist() == expected
    late = tokens(model, recontrol_value_head=heads, recontrol_start=4, **STEER)
    assert [row[5:9] for row in late] == [row[5:9] for row in tokens(model)]


def test_a_compiled_forward_takes_lists_of_heads(heads):
    model = enable_recontrol(tiny_model(num_hidden_layers=1))
    compile_config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compile_config._compile_all_devices = True  # else a CPU is never compiled for
    static = {"cache_implementation": "static", "compile_config": compile_config}
    torch._dynamo.reset()
    for rows in (heads, heads[::-1]):
        expected = tokens(model, recontrol_value_head=rows, **STEER)
        assert tokens(model, recontrol_value_head=rows, **STEER, **static) == expected
    assert "_compiled_call" in vars(model)


def test_rows_that_are_no_multiple_of_the_prompts_are_an_error():
    with pytest.raises(Exception, match="4 rows, which are no multiple"):
        RowController([Controller(tiny_head()), None, None]).edit(torch.randn(4, 1, 16))
