"""A strength is found by the KL of the answers, for every method with the same effort."""

import math

import pytest
from tiny import tiny_head, tiny_model, tiny_tokenizer

from hf_recontrol import ControlConfig
from hf_recontrol.baselines import ARGS, Base, BestOfN, PrefixScorer
from hf_recontrol.comparison import Comparison
from hf_recontrol.errors import CollectError
from hf_recontrol.rewards import Rewards
from hf_recontrol.sampling import Sampler
from hf_recontrol.tuning import Strengths, kl_per_answer, match_kl, steered_by

PROMPTS = [f"w{i} w{i + 1}" for i in range(5, 45)]


@pytest.fixture
def sampler():
    return Sampler(tiny_model(), tiny_tokenizer(), max_new_tokens=6, batch_size=40)


@pytest.fixture
def kl_of(sampler, tmp_path):
    return kl_per_answer(sampler, PROMPTS, Comparison(sampler, PROMPTS, tmp_path).measure)


def parity(completion_ids, **_):
    return [float(ids[-1] % 2) for ids in completion_ids]


FAMILIES = {
    "value head": steered_by(tiny_head(), "RE-Control", ControlConfig(num_steps=2)),
    "CD": lambda weight: ARGS(Rewards(parity), weight, 20, keep_others=True),
    "CD prefix": lambda weight: PrefixScorer(tiny_head(), weight, 20, keep_others=True),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_method_is_brought_to_each_target(name, kl_of):
    targets = [1.0, 0.25, 0.5]
    found = match_kl(FAMILIES[name], kl_of, targets)
    assert [kl for _, kl in found] == pytest.approx(targets, rel=0.05)
    for multiplier, kl in found:
        assert kl_of(FAMILIES[name](multiplier)) == pytest.approx(kl)  # the same seeds, so the same answers


def test_no_method_gets_more_trials_than_it_is_given():
    """A KL that no multiplier brings within 5 %: it jumps from 0.5 to 2."""
    asked = []

    def jumps(method):
        asked.append(method.weight)
        return 2.0 if method.weight > 1 else 0.5

    found = match_kl(lambda weight: PrefixScorer(tiny_head(), weight), jumps, [1.1], trials=6)
    assert len(asked) == 6
    assert found[0][1] in (0.5, 2.0)


def test_the_nearest_of_all_trials_is_taken():
    quadratic = lambda method: method.weight**2  # noqa: E731
    found = match_kl(lambda weight: PrefixScorer(tiny_head(), weight), quadratic, [4.0, 1.0], start=1.0, trials=1)
    assert found == [(2.0, 4.0), (1.0, 1.0)]


@pytest.mark.parametrize("power", [0.7, 2.0, 4.0])
@pytest.mark.parametrize("start", [0.01, 1.0, 30.0])
def test_targets_above_a_floor_are_reached_after_some_below_it(power, start):
    """As under an instruction, which costs 1.26 nats by itself."""
    asked = []

    def with_floor(method):
        asked.append(method.weight)
        return 1.26 + method.weight**power

    found = match_kl(
        lambda weight: PrefixScorer(tiny_head(), weight), with_floor, [0.5, 1.0, 2.0, 4.0, 8.0], start=start
    )
    assert [kl for _, kl in found[2:]] == pytest.approx([2.0, 4.0, 8.0], rel=0.05)
    assert [kl for _, kl in found[:2]] == pytest.approx([1.26, 1.26], rel=0.05)
    assert len(asked) < 30  # of 40: the floor was seen


def test_targets_that_cannot_be_and_methods_that_spend_nothing_are_refused(kl_of):
    for targets, options in (([], {}), ([0.0], {}), ([math.inf], {}), ([1.0], {"trials": 0}), ([1.0], {"start": 0.0})):
        with pytest.raises(ValueError, match="expected are nats per answer > 0"):
            match_kl(FAMILIES["CD"], kl_of, targets, **options)
    with pytest.raises(ValueError, match="base spends 0"):
        match_kl(lambda _: Base(), kl_of, [1.0])
    assert kl_of(BestOfN(Rewards(parity), 4)) == pytest.approx(math.log(4) - 3 / 4)


def test_a_target_that_is_added_later_is_found_and_the_others_stay(sampler, tmp_path, monkeypatch):
    validation, asked = Comparison(sampler, PROMPTS, tmp_path), []

    def strengths(*targets):
        found = Strengths(validation, tmp_path / "strengths.json", targets)
        monkeypatch.setattr(found, "_kl_of", lambda method: asked.append(method.weight) or method.weight**2)
        return found.of(FAMILIES["CD prefix"])

    before = strengths(1.0, 4.0)
    assert before == [(1.0, 1.0), (2.0, 4.0)]
    asked.clear()
    assert strengths(9.0, 1.0, 4.0) == [(pytest.approx(3.0), pytest.approx(9.0)), *before]
    assert len(asked) == 1  # from what was tried before
    assert strengths(4.0) == before[1:]
    assert len(asked) == 1


@pytest.mark.parametrize("text", ["", "[]", "{", '{"key": {"method": "a", "tried": [[1]], "found": []}}', '{"key": 1}'])
def test_a_damaged_file_of_strengths_is_named(text, sampler, tmp_path):
    file = tmp_path / "strengths.json"
    file.write_text(text)
    with pytest.raises(CollectError, match=r"strengths\.json is damaged .* Delete it, and strengths are found again"):
        Strengths(Comparison(sampler, PROMPTS, tmp_path), file, [1.0]).of(FAMILIES["CD"])
