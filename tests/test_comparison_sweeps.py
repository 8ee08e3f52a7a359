"""Sweeps keep what they made; times are medians of rounds in which all take turns."""

import pytest
import torch
from tiny import Length, tiny_head, tiny_model, tiny_tokenizer

from hf_recontrol import comparison_sweeps
from hf_recontrol.baselines import Base, Prompted
from hf_recontrol.comparison import Comparison
from hf_recontrol.comparison_sweeps import close_up, sweep_rows, time_rows
from hf_recontrol.forwards import hidden_states_of
from hf_recontrol.generation import RecontrolGenerationMixin
from hf_recontrol.landscape import value_landscape
from hf_recontrol.rewards import Rewards
from hf_recontrol.sampling import Sampler

PROMPTS = [f"w{i} w{i + 1}" for i in range(5, 13)]


@pytest.fixture
def sampler():
    return Sampler(tiny_model(), tiny_tokenizer(), max_new_tokens=5, batch_size=8)


def test_more_alpha_spends_more_and_one_step_less_exactly(sampler, tmp_path):
    head = tiny_head()
    head.config.control.step_size, head.config.control.num_steps = 0.2, 10
    comparison = Comparison(sampler, PROMPTS, tmp_path)
    options = {"step_sizes": (0.5, 4.0), "num_steps": (1, 10)}
    rows = sweep_rows(comparison, head, "RE-Control", {"reward": Rewards(Length())}, **options)
    assert [(row["method"], row["num_steps"], row["step_size"]) for row in rows] == [
        ("RE-Control", 1, 1.0),
        ("RE-Control", 1, 8.0),
        ("RE-Control", 10, 0.1),
        ("RE-Control", 10, 0.8),
    ]
    assert rows[0]["kl_per_answer"] < rows[1]["kl_per_answer"]
    assert rows[2]["kl_per_answer"] < rows[3]["kl_per_answer"]
    made = {path: path.stat().st_mtime_ns for path in comparison.folder.iterdir()}
    assert len(made) == 5
    assert sweep_rows(comparison, head, "RE-Control", {"reward": Rewards(Length())}, **options) == rows
    assert {path: path.stat().st_mtime_ns for path in comparison.folder.iterdir()} == made


def test_a_strength_of_the_head_does_not_hold_a_sweep_back(sampler, tmp_path):
    head = tiny_head()
    head.config.control.max_kl = 1e-4
    comparison = Comparison(sampler, PROMPTS, tmp_path)
    (row,) = sweep_rows(comparison, head, "x", {"reward": Rewards(Length())}, step_sizes=(50.0,), num_steps=(30,))
    assert row["kl_per_answer"] > 0.1


def test_methods_take_turns_and_the_first_round_does_not_count(sampler, monkeypatch):
    order = []
    clock = iter([0.0, 100.0] * 4 + [0.0, 4.0] * 4 + [0.0, 1.0] * 4 + [0.0, 2.0] * 4)
    monkeypatch.setattr(comparison_sweeps.time, "perf_counter", lambda: next(clock))
    stock = Base.answer
    monkeypatch.setattr(Base, "answer", lambda *a: order.append(len(a[2])) or stock(*a))
    rows = time_rows(sampler, PROMPTS, [Base(), Prompted(Base())], [1, 4])
    assert order == [1, 1, 4, 4] * 4
    assert [(row["method"], row["batch_size"]) for row in rows] == [
        ("base", 1), ("prompting", 1), ("base", 4), ("prompting", 4),
    ]  # fmt: skip
    assert [row["seconds_per_token"] for row in rows] == [2 / 5, 2 / 5, 2 / 20, 2 / 20]


def test_more_prompts_are_asked_for_than_there_are(sampler):
    with pytest.raises(ValueError, match="8 prompts for a batch of 16"):
        time_rows(sampler, PROMPTS, [Base()], [1, 16])


def test_the_close_up_is_of_the_state_at_the_end_of_the_prompt_and_of_a_steered_answer(sampler):
    head = tiny_head()
    landscape, trace = close_up(sampler, PROMPTS[0], head)
    ids = torch.tensor([sampler.tokenizer(PROMPTS[0])["input_ids"]])
    state = hidden_states_of(sampler.model, input_ids=ids)[0, -1]
    torch.testing.assert_close(landscape.path_values, value_landscape(head, state).path_values)
    assert trace.lengths.tolist() == [5]
    again = close_up(sampler, PROMPTS[0], head)[1]
    assert torch.equal(again.values, trace.values)
    assert bool((trace.control_norms > 0).all())
    assert not isinstance(sampler.model, RecontrolGenerationMixin)
