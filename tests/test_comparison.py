"""Answers are made once, measured and kept; what the folder holds is read, and nothing else is taken for it."""

import dataclasses
import json
import math

import pytest
import torch
from tiny import Length, tiny_head, tiny_model, tiny_tokenizer

from hf_recontrol import ControlConfig, Controller
from hf_recontrol.baselines import ARGS, Base, BestOfN, Blockwise, Checkpoint, Prompted, Steered
from hf_recontrol.comparison import Comparison, Entry, figures
from hf_recontrol.errors import CollectError
from hf_recontrol.rewards import Rewards
from hf_recontrol.sampling import Sampler
from hf_recontrol.token_statistics import token_statistics

PROMPTS = [f"w{i} w{i + 1}" for i in range(5, 17)]
CONFIG = ControlConfig(step_size=3.0, num_steps=2)


@pytest.fixture
def sampler():
    return Sampler(tiny_model(), tiny_tokenizer(), max_new_tokens=6, batch_size=5)


@pytest.fixture
def comparison(sampler, tmp_path):
    return Comparison(sampler, PROMPTS, tmp_path, answers=2)


def rows_of(answered):
    return [row for rows in answered.answers for row in rows]


def test_what_is_in_the_folder_is_not_made_again(comparison, monkeypatch):
    entry = Entry(Steered("RE-Control", tiny_head(), CONFIG))
    first = comparison.answered(entry)
    monkeypatch.setattr(Steered, "answer", lambda *_: pytest.fail("made again"))
    again = comparison.answered(entry)
    assert again == first
    assert len(first.answers) == len(PROMPTS)
    assert all(len(rows) == 2 for rows in first.answers)


def test_a_run_that_was_cut_off_leaves_nothing_half_done(comparison, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_recontrol.disk.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        comparison.answered(Entry(Base()))
    assert not list(comparison.folder.glob("*.jsonl"))
    monkeypatch.undo()
    assert len(comparison.answered(Entry(Base())).answers) == len(PROMPTS)


def test_other_heads_settings_prompts_and_seeds_are_refused(comparison, sampler, tmp_path):
    head = tiny_head()
    comparison.answered(Entry(Steered("RE-Control", head, CONFIG)))
    for changed, entry, names in (
        (comparison, Entry(Steered("RE-Control", tiny_head(1), CONFIG)), "method"),
        (comparison, Entry(Steered("RE-Control", head, ControlConfig(step_size=1.0))), "method"),
        (Comparison(sampler, PROMPTS[:-1], tmp_path, answers=2), None, "prompts_sha256"),
        (Comparison(dataclasses.replace(sampler, seed=1), PROMPTS, tmp_path, answers=2), None, "sampling"),
        (Comparison(dataclasses.replace(sampler, model=tiny_model(1)), PROMPTS, tmp_path, answers=2), None, "weights"),
    ):
        with pytest.raises(CollectError, match=f"(?s)another comparison: .*{names}.* differ"):
            changed.answered(entry or Entry(Steered("RE-Control", head, CONFIG)))


def test_a_damaged_file_is_said_to_be_damaged(comparison):
    comparison.answered(Entry(Base()))
    (file,) = comparison.folder.glob("*.jsonl")
    whole = file.read_text()
    file.write_text(whole.rpartition('{"prompt"')[0].rpartition("\n")[0] + "\n")  # a line is gone
    with pytest.raises(CollectError, match=r"answers to 11 of 12 prompts\. Delete it"):
        comparison.answered(Entry(Base()))
    file.write_text(whole[:-30])
    with pytest.raises(CollectError, match=r"is damaged .* Delete it"):
        comparison.answered(Entry(Base()))


def test_heads_instructions_and_checkpoints_are_measured_against_the_plain_model(comparison, sampler):
    head, other = tiny_head(), tiny_model(1)
    for method, steered in (
        (Steered("RE-Control", head, CONFIG), {"controller": Controller(head, CONFIG)}),
        (Prompted(Base(), "w30 w31 "), {"prefix": "w30 w31 "}),
        (Checkpoint("DPO", other), {"steered_model": other}),
        (
            Prompted(Steered("RE-Control", head, CONFIG), "w30 "),
            {"controller": Controller(head, CONFIG), "prefix": "w30 "},
        ),
    ):
        rows = rows_of(comparison.answered(Entry(method)))
        read = [sampler.tokenizer(steered.get("prefix", "") + row["prompt"])["input_ids"] for row in rows]
        plain = [sampler.tokenizer(row["prompt"])["input_ids"] for row in rows]
        options = {name: value for name, value in steered.items() if name != "prefix"}
        ids = [row["token_ids"] for row in rows]
        expected = token_statistics(sampler.model, plain, ids, steered_prompt_ids=read, **options)
        assert [row["kl"] for row in rows] == pytest.approx([float(kl.sum()) for kl in expected.kl], rel=1e-4)
        assert [row["log_prob"] for row in rows] == pytest.approx(
            [float(p.sum()) for p in expected.log_probs], rel=1e-4
        )
        assert min(row["kl"] for row in rows) > 0


def test_the_kl_of_what_is_selected_is_a_bound(comparison):
    best = comparison.answered(Entry(BestOfN(Rewards(Length()), 4)))
    assert best.kl_is_bound
    assert {row["kl"] for row in rows_of(best)} == {math.log(4) - 3 / 4}
    blocks = comparison.answered(Entry(Blockwise(tiny_head(), size=4, block=4)))
    assert all(row["kl"] == math.ceil(len(row["token_ids"]) / 4) * (math.log(4) - 3 / 4) for row in rows_of(blocks))
    prompted = comparison.answered(Entry(Prompted(BestOfN(Rewards(Length()), 4), "w30 ")))
    assert {row["kl"] for row in rows_of(prompted)} == {None}  # the bound is from the instructed model
    assert not comparison.answered(Entry(Base())).kl_is_bound


def test_a_processors_own_kl_is_summed(comparison, sampler):
    method = ARGS(Rewards(Length()), weight=1.0, top_k=3)
    rows = rows_of(comparison.answered(Entry(method)))
    again = [row for rows in method.answer(sampler, PROMPTS, 2) for row in rows]
    assert [row["kl"] for row in rows] == pytest.approx([math.fsum(row["kl"]) for row in again])


def test_the_figures_of_a_method(comparison, sampler):
    judges = {
        "judge": Rewards(Length()),
        "reward": Rewards(lambda completion_ids, **_: [float(sum(i)) for i in completion_ids]),
    }
    base = comparison.answered(Entry(Base()))
    steered = comparison.answered(Entry(Steered("RE-Control", tiny_head(), CONFIG), setting=2.0))
    row = figures(steered, base, judges)
    texts = [[len(answer["completion"].split()) for answer in rows] for rows in steered.answers]
    plain = torch.tensor([[len(answer["completion"].split()) for answer in rows] for rows in base.answers]).double()
    gain = (torch.tensor(texts).double().mean() - plain.mean()) / plain.std()
    assert row["judge"]["mean"] == pytest.approx(float(gain))
    assert row["judge"]["low"] <= row["judge"]["mean"] <= row["judge"]["high"]
    assert row["judge"]["n"] == len(PROMPTS)
    assert row["kl_per_answer"] == pytest.approx(sum(r["kl"] for r in rows_of(steered)) / len(rows_of(steered)))
    ratio = [
        math.exp(-sum(r["log_prob"] for r in rows_of(one)) / sum(len(r["token_ids"]) for r in rows_of(one)))
        for one in (steered, base)
    ]
    assert row["perplexity_ratio"] == pytest.approx(ratio[0] / ratio[1])
    tokens = sum(len(r["token_ids"]) for r in rows_of(steered))
    assert row["seconds_per_token"] == steered.seconds / tokens
    assert (row["method"], row["setting"], row["placebo"], row["forwards_per_token"]) == ("RE-Control", 2.0, False, 1)
    assert row["answers_cut"] == sum(
        len(answer["token_ids"]) == 6 and answer["token_ids"][-1] != 2 for answer in rows_of(steered)
    )
    assert figures(base, base, judges)["judge"]["mean"] == 0
    json.dumps(row)


def test_one_prompt_is_refused(sampler, tmp_path):
    with pytest.raises(ValueError, match=r"There are 1 prompts .* two prompts or more"):
        Comparison(sampler, PROMPTS[:1], tmp_path)


def test_answers_that_are_cut_or_empty_are_counted(sampler, tmp_path):
    """Of a model that ends at any of many tokens."""
    ending = dataclasses.replace(sampler, generation={"do_sample": True, "eos_token_id": list(range(2, 40))})
    base = Comparison(ending, PROMPTS, tmp_path).answered(Entry(Base()))
    row = figures(base, base, {"judge": Rewards(lambda completion_ids, **_: [float(ids[0]) for ids in completion_ids])})
    lengths = [len(answer["token_ids"]) for answer in rows_of(base)]
    assert row["answers_empty"] == lengths.count(1) > 0
    assert row["answers_cut"] + row["answers_empty"] < len(lengths)


def test_answers_with_any_sign_that_ends_a_line_are_read_back(comparison, monkeypatch):
    ends = "a\u2028b\x85c\x0cd\re\nf"
    monkeypatch.setattr(Sampler, "row", lambda self, prompt, ids: ROW | {"prompt": prompt, "completion": ends})
    assert {row["completion"] for row in rows_of(comparison.answered(Entry(Base())))} == {ends}


ROW = {"token_ids": [5, 6], "finish_reason": "length"}


def test_a_judge_without_a_number_for_an_answer_is_named(comparison):
    base = comparison.answered(Entry(Base()))
    with pytest.raises(ValueError, match="The judge, silent, gave no number for 24 answers of base"):
        figures(base, base, {"judge": Rewards(silent)})


def silent(prompts, **_):
    return [None] * len(prompts)
