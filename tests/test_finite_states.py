"""An answer with hidden states that are not finite costs itself, not its batch and not the run."""

import json

import pytest
import torch
from tiny import Length, tiny_model, tiny_tokenizer

from hf_recontrol.errors import CollectError
from hf_recontrol.finite_states import check_share, without_bad_states
from hf_recontrol.rollout_dataset import RolloutDataset
from hf_recontrol.rollouts import collect_rollouts

POISON = 50  # a token whose embedding is not a number in the poisoned model
PROMPTS = [*(f"w{i}" for i in range(10, 30)), f"w20 w{POISON} w21", "w30 w31"]


def poisoned(value=torch.nan):
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[POISON] = value
    return model


def collect(folder, model, reward=None, prompts=PROMPTS, **options):
    settings = {"block_size": 11, "max_new_tokens": 5, "progress": False} | options
    settings["generation_kwargs"] = {"suppress_tokens": [POISON], "eos_token_id": [2, 5, 9]}  # −∞ in every logit row
    return collect_rollouts(model, tiny_tokenizer(), prompts, reward or Length(), folder, **settings)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_bad_answer_loses_its_states_and_the_others_are_bit_for_bit_as_without_it(tmp_path, value, temperature):
    sound = collect(tmp_path / "sound", tiny_model(), temperature=temperature)
    with pytest.warns(UserWarning, match=r'1 of 22 answers in .* not finite.* "finite": false'):
        dataset = collect(tmp_path / "bad", poisoned(value), temperature=temperature)
    rows = list(dataset.rows())
    assert [row["prompt_id"] for row in rows if not row["finite"]] == [20]
    assert rows[20]["finish_reason"] in {"eos", "length", "empty"}
    assert rows[20]["reward"] == Length()([rows[20]["completion"]])[0]  # the row is whole
    others = [item for item in sound if item["prompt_id"] != 20]
    assert [item["prompt_id"] for item in dataset] == [item["prompt_id"] for item in others]
    for item, other in zip(dataset, others, strict=True):
        assert item["finish_reason"] == other["finish_reason"]
        for name in ("hidden_states", "token_ids", "reward"):
            torch.testing.assert_close(item[name], other[name], rtol=0, atol=0)


def test_a_resumed_run_has_the_same_and_warns_again(tmp_path):
    with pytest.warns(UserWarning, match="1 of 22"):
        collect(tmp_path / "unbroken", poisoned())
    calls = iter(range(2))

    def interrupt():
        if next(calls):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(tmp_path / "broken", poisoned(), Length(interrupt))
    for _ in range(2):
        with pytest.warns(UserWarning, match="1 of 22"):
            collect(tmp_path / "broken", poisoned())
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("broken", "unbroken")]
    assert files[0] == files[1]
    lines = [json.loads(line) for line in files[0]["manifest.jsonl"].splitlines()[1:]]
    assert [line["not_finite"] for line in lines] == [0, 1]


def test_a_model_that_overflows_is_an_error_and_what_was_committed_is_kept(tmp_path):
    prompts = [*PROMPTS[:11], *(f"w{POISON} w{i}" for i in range(10, 21))]
    with pytest.raises(CollectError, match=r"11 of 22 answers have hidden states that are not finite; more than 5%"):
        collect(tmp_path, poisoned(), prompts=prompts)
    dataset = RolloutDataset(tmp_path)
    assert {row["prompt_id"] for row in dataset.rows()} == set(range(11))


def test_the_share_is_that_of_the_whole_run_also_when_it_is_resumed(tmp_path):
    bad = [f"w{POISON} w{i}" for i in range(10, 12)]
    prompts = [*PROMPTS[:20], bad[0], *PROMPTS[:9], bad[1]]
    for _ in range(2):
        with pytest.raises(CollectError, match="2 of 31 answers"):
            collect(tmp_path, poisoned(), prompts=prompts, block_size=10)
        assert len(list(RolloutDataset(tmp_path).rows())) == 30


def test_more_than_5_percent_is_too_much_and_one_never(tmp_path):
    for answers, not_finite in ((1, 1), (20, 1), (40, 2), (1000, 50)):
        check_share(answers, not_finite)
    for answers, not_finite in ((2, 2), (39, 2), (1000, 51)):
        with pytest.raises(CollectError, match=f"{not_finite} of {answers} answers"):
            check_share(answers, not_finite)


def test_a_sound_block_is_passed_on_as_it_is():
    contents = (torch.ones(3, 2), torch.tensor([0, 1, 1, 3]), torch.ones(3), torch.arange(3), [{"finite": True}] * 3)
    assert without_bad_states(contents) is contents


def test_states_offsets_and_token_ids_shrink_together():
    states = torch.arange(12.0).reshape(6, 2)
    states[2, 1] = -torch.inf
    contents = (states, torch.tensor([0, 1, 1, 4, 6]), torch.ones(4), torch.arange(6), [{"id": i} for i in range(4)])
    states, offsets, rewards, token_ids, rows = without_bad_states(contents)
    assert offsets.tolist() == [0, 1, 1, 1, 3]
    assert token_ids.tolist() == [0, 4, 5]
    assert states.tolist() == [[0, 1], [8, 9], [10, 11]]
    assert [row["finite"] for row in rows] == [True, True, False, True]
    assert len(rewards) == 4
