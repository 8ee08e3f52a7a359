"""recontrol_start and recontrol_start_token_id: which tokens stay plain, against a decoding loop without hooks."""

import warnings

import pytest
import torch
from steered import GREEDY, STEER, STEERING, named, tokens
from tiny import prompts, tiny_head, tiny_model
from transformers import CompileConfig, T5Config, T5ForConditionalGeneration

from hf_recontrol import Controller, SteeringNotApplied, enable_recontrol, register_value_heads
from hf_recontrol.generation import disable_recontrol
from hf_recontrol.start import Start

pytestmark = pytest.mark.versions


@pytest.fixture
def model():
    return enable_recontrol(tiny_model())


@pytest.fixture
def head():
    return tiny_head()


@torch.no_grad()
def by_hand(model, head, begins, steps=8, **kwargs):
    """Greedy ids of a loop that edits row i's state for new token t where begins(t, new ids of the row)."""
    ids = prompts(**kwargs)["input_ids"]
    length, steer = ids.shape[1], Controller(head, STEERING)
    for t in range(steps):
        h = model.model(input_ids=ids).last_hidden_state[:, -1]
        on = torch.tensor([begins(t, row[length:].tolist()) for row in ids])
        logits = model.lm_head(torch.where(on[:, None], steer(h), h))
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], -1)
    return ids.tolist()


@pytest.mark.parametrize("first", [0, 1, 3, 7])
@pytest.mark.parametrize(
    "mode", [{}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}], ids=str
)
def test_the_first_tokens_stay_plain(model, head, first, mode):
    actual = tokens(model, recontrol_value_head=head, recontrol_start=first, **STEER, **mode)
    assert actual == by_hand(model, head, lambda t, new: t >= first)
    plain, whole = tokens(model), tokens(model, recontrol_value_head=head, **STEER)
    assert [row[: 5 + first] for row in actual] == [row[: 5 + first] for row in plain]
    assert (actual == whole) == (first < 3)  # the first two tokens are the same here, steered or not


def a_token_of(rows):
    """One that some rows have among their first new tokens, and others not."""
    for token in range(64):
        having = sum(token in row[5:9] for row in rows)
        if 0 < having < len(rows):
            return token
    raise AssertionError("choose another seed")


@pytest.mark.parametrize("mode", [{}, {"use_cache": False}], ids=str)
def test_each_answer_waits_for_a_token_of_its_own(model, head, mode):
    token = a_token_of(tokens(model))
    steer = {"recontrol_value_head": head, "recontrol_start_token_id": token, **STEER, **mode}
    with pytest.warns(UserWarning, match=r"\d answers .* ended before"):
        actual = tokens(model, **steer)
    assert actual == by_hand(model, head, lambda t, new: token in new)
    assert actual != tokens(model)
    both = by_hand(model, head, lambda t, new: token in new and t >= 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert tokens(model, **steer, recontrol_start=6) == both


def test_any_of_several_tokens_will_do_and_one_in_the_prompt_does_not_count(model, head):
    plain = tokens(model)
    present = next(token for token in plain[0][:5] if all(token not in row[5:] for row in plain))
    steer = {"recontrol_value_head": head, **STEER}
    with pytest.warns(UserWarning, match="3 answers"):
        assert tokens(model, recontrol_start_token_id=present, **steer) == plain
    firsts = sorted({row[5] for row in plain})
    actual = tokens(model, recontrol_start_token_id=[present, *firsts], **steer)
    assert actual == by_hand(model, head, lambda t, new: t >= 1)


def test_an_answer_that_ends_before_its_start_is_told_also_beside_longer_ones(model, head):
    plain = tokens(model)
    eos = next(row[6] for row in plain if sum(row[6] in other[5:] for other in plain) == 1)
    for start in ({"recontrol_start": 4}, {"recontrol_start_token_id": [0, *(row[6] for row in plain)]}):
        with pytest.warns(UserWarning, match="1 answers"):  # <pad> behind it is no token of its own
            rows = tokens(model, recontrol_value_head=head, eos_token_id=eos, pad_token_id=0, **start, **STEER)
        assert sum(row[6] == eos for row in rows) == 1
        assert rows != plain


@pytest.mark.parametrize(
    "mode",
    [
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": True},
        {"recontrol_max_kl": 1e-3},
    ],
    ids=str,
)
def test_in_every_mode_a_start_at_the_end_is_plain_and_one_at_once_is_whole(model, head, mode):
    def run(**keywords):
        torch.manual_seed(0)
        return tokens(model, **(mode | keywords))

    steer = {"recontrol_value_head": head, **STEER}
    plain = run(**({"recontrol_max_kl": None} if "recontrol_max_kl" in mode else {}))
    assert run(**steer, recontrol_start=0) == run(**steer)
    with pytest.warns(UserWarning, match="ended before"):
        assert run(**steer, recontrol_start=100) == plain
    assert run(**steer, recontrol_start=2) != plain or "recontrol_max_kl" in mode


@pytest.mark.filterwarnings("ignore:.*ended before")
def test_beams_that_are_reordered_keep_their_own_tokens(model, head):
    """Against a second model whose LM head edits the rows that have the token, with no hook of ours."""
    twin, inner, so_far = tiny_model(), tiny_model().lm_head, {}
    stock = twin.prepare_inputs_for_generation

    class Editing(torch.nn.Module):
        def forward(self, h):
            on = (so_far["ids"][:, 5:] == so_far["token"]).any(-1)[:, None, None]
            return inner(torch.where(on, Controller(head, STEERING)(h), h))

    twin.prepare_inputs_for_generation = lambda ids, **kwargs: (so_far.update(ids=ids), stock(ids, **kwargs))[1]
    twin.lm_head = Editing()
    plain, changed = tokens(model, num_beams=4), 0
    for token in range(3, 64):  # in some, a beam that has the token makes room for one that has not
        so_far["token"] = token
        steer = {"recontrol_value_head": head, "recontrol_start_token_id": token, **STEER}
        actual = tokens(model, num_beams=4, **steer)
        assert actual == tokens(twin, num_beams=4)
        changed += actual != plain
    assert changed > 5


def test_a_prompt_of_embeddings_and_left_padding_are_counted_right(model, head):
    steer = {"recontrol_value_head": head, "recontrol_start": 3, **STEER}
    expected = [row[5:] for row in tokens(model, **steer)]
    embeds = model.get_input_embeddings()(prompts()["input_ids"])
    assert model.generate(inputs_embeds=embeds, **GREEDY, **steer).tolist() == expected
    ids = torch.cat([torch.zeros(3, 4, dtype=torch.long), prompts()["input_ids"]], -1)
    padded = model.generate(input_ids=ids, attention_mask=(ids != 0).long(), **GREEDY, **steer)
    assert padded[:, 9:].tolist() == expected


def test_an_encoder_decoder_is_counted_from_its_first_new_token(head):
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model = enable_recontrol(T5ForConditionalGeneration(config).eval())
    steer = {"recontrol_value_head": head, "recontrol_step_size": 50.0, "recontrol_num_steps": 3}
    plain, whole = tokens(model), tokens(model, **steer)
    late = tokens(model, **steer, recontrol_start=3)
    assert [row[:4] for row in late] == [row[:4] for row in plain]
    assert late not in (plain, whole)
    assert tokens(model, **steer, recontrol_start=0) == whole


def test_a_compiled_forward_needs_one_graph(head):
    model = enable_recontrol(tiny_model(num_hidden_layers=1))
    compile_config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compile_config._compile_all_devices = True  # else a CPU is never compiled for
    static = {"cache_implementation": "static", "compile_config": compile_config}
    torch._dynamo.reset()
    steer = {"recontrol_value_head": head, **STEER}
    for first in range(1, 8):
        assert tokens(model, **steer, **static, recontrol_start=first) == tokens(model, **steer, recontrol_start=first)
    assert "_compiled_call" in vars(model)


def test_a_class_with_the_mixin_and_a_patched_library_know_it_too(head):
    expected = tokens(enable_recontrol(tiny_model()), recontrol_value_head=head, recontrol_start=3, **STEER)
    enable_recontrol()
    try:
        model = tiny_model()
        assert tokens(model, recontrol_value_head=head, recontrol_start=3, **STEER) == expected
    finally:
        disable_recontrol()


def test_a_config_and_the_defaults_may_say_it(model, head):
    expected = tokens(model, recontrol_value_head=head, recontrol_start=3, **STEER)
    register_value_heads({"polite": head})
    config = named(step_size=2.0, num_steps=3, start=3)
    assert tokens(model, generation_config=config) == expected
    model.set_recontrol_defaults(head, step_size=2.0, num_steps=3, start=3)
    assert tokens(model) == expected
    model.set_recontrol_defaults(head, step_size=2.0, num_steps=3, start_token_id=[1, 2])
    assert model.generation_config.recontrol_start_token_id == [1, 2]


@pytest.mark.parametrize("wrong", [-1, 1.5, True, "3", [1]])
def test_a_start_that_is_no_number_of_tokens_is_refused(model, head, wrong):
    with pytest.raises(ValueError, match=r"recontrol_start is .* integer ≥ 0"):
        tokens(model, recontrol_value_head=head, recontrol_start=wrong)


@pytest.mark.parametrize("wrong", [-1, 1.5, True, "</think>", [], ["</think>"], [3, None]])
def test_a_start_token_that_is_no_id_is_refused(model, head, wrong):
    with pytest.raises(ValueError, match=r"recontrol_start_token_id is .*convert_tokens_to_ids"):
        tokens(model, recontrol_value_head=head, recontrol_start_token_id=wrong)


@pytest.mark.parametrize("mode", [{"prompt_lookup_num_tokens": 2}, {"prefill_chunk_size": 2}], ids=str)
def test_modes_whose_forwards_are_not_one_token_each_are_refused(model, head, mode):
    with pytest.raises(ValueError, match=f"{next(iter(mode))}=2 does not make"):
        tokens(model, recontrol_value_head=head, recontrol_start=3, **mode)
    with pytest.raises(ValueError, match=r"not generate_batch\(\)"):
        model.generate_batch([[1, 2]], recontrol_value_head=head, recontrol_start=3)


def test_a_loop_that_does_not_say_what_is_new_is_an_error_and_no_plain_text(model, head, monkeypatch):
    monkeypatch.setattr(Start, "note", lambda self, ids: None)
    with pytest.raises(SteeringNotApplied, match=r"goes by prepare_inputs_for_generation.*recontrol_start"):
        tokens(model, recontrol_value_head=head, recontrol_start=3, **STEER)
