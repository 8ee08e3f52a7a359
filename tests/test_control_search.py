"""A control is chosen on validation prompts: by the objective that is named, and only if it beats no control."""

import copy
import json
import logging
import math
import random
import sys

import pytest
import torch
from tiny import tiny_control_head, tiny_head, tiny_model, tiny_tokenizer

from hf_recontrol import Coherence, ControlConfig, ControlDefaults, Head, HeadMismatch
from hf_recontrol.control_search import search_control
from hf_recontrol.rewards import Rewards
from hf_recontrol.sampling import Sampler
from hf_recontrol.search_results import MAX_TUNING_BYTES, Search, Trial, pareto_front, set_control

optuna = pytest.importorskip("optuna")

PROMPTS = [f"w{i} w{i + 1}" for i in range(5, 29)]
TABLE = [[0.02, 0.5], [0.1, 1.2], [0.4, 2.6]]


def odd(completion_ids, **_):
    return [sum(i % 2 for i in ids) / max(len(ids), 1) for ids in completion_ids]


def letters(texts):
    """An encoder: how often each of the ten digits is in a text."""
    return torch.tensor([[float(text.count(str(digit))) + 0.1 for digit in range(10)] for text in texts])


@pytest.fixture(scope="module")
def sampler():
    return Sampler(tiny_model(), tiny_tokenizer(), max_new_tokens=6, batch_size=24)


@pytest.fixture
def search(sampler):
    def run(head, **options):
        given = {"trials": 6, "coherence": Coherence(letters), **options}
        return search_control(head, sampler, PROMPTS, Rewards(odd), **given)

    return run


@pytest.fixture
def deaf(sampler, monkeypatch):
    monkeypatch.setattr(Sampler, "__call__", lambda *_, **__: pytest.fail("it generated"))


def calibrated(make=tiny_head):
    head = make()
    control = head.config.control
    control.calibration, control.strength = copy.deepcopy(TABLE), 0.1
    return head


HEADS = {
    "value": (tiny_head, {"step_size", "num_steps"}),
    "control": (tiny_control_head, {"scale"}),
    "calibrated value": (calibrated, {"strength"}),
    "calibrated control": (lambda: calibrated(tiny_control_head), {"strength"}),
}


@pytest.mark.parametrize("kind", HEADS)
def test_the_saved_head_steers_by_itself_as_the_best_trial_did(kind, search, sampler, tmp_path):
    make, options = HEADS[kind]
    head = make()
    before = head.config.to_dict()
    found = search(head, objective=lambda figures: figures["kl_per_answer"])
    assert head.config.to_dict() == before
    assert all(set(trial.options) == options for trial in found.trials[1:])
    best = max(found.trials, key=lambda trial: trial.figures["kl_per_answer"])
    assert found.best == best
    found.apply_to(head)
    head.save_pretrained(tmp_path)
    loaded = Head.from_pretrained(tmp_path)
    assert {name: getattr(loaded.config.control, name) for name in options} == best.options
    assert (loaded.config.control, loaded.config.info) == (head.config.control, head.config.info)
    answers = sampler(PROMPTS, head=loaded)
    assert answers == sampler(PROMPTS, head=make(), config=ControlConfig.of(best.options)) != sampler(PROMPTS)
    assert sum(odd([row["token_ids"] for (row,) in answers])) / len(PROMPTS) == pytest.approx(best.figures["reward"])


def test_the_first_trial_is_no_control_and_the_second_the_heads_own(search, sampler):
    head = tiny_head(control=ControlDefaults(step_size=0.7, num_steps=5))
    untouched, own, *others = search(head).trials
    assert untouched.figures["kl_per_answer"] == 0
    assert untouched.figures["perplexity_ratio"] == 1
    answers = [row["token_ids"] for (row,) in sampler(PROMPTS)]
    assert untouched.figures["reward"] == pytest.approx(sum(odd(answers)) / len(answers))
    assert own.options == {"step_size": 0.7, "num_steps": 5}
    for trial in others:
        assert 0.07 <= trial.options["step_size"] <= 7
        assert 1 <= trial.options["num_steps"] <= 64


def test_a_seed_makes_the_same_search_and_another_one_another(search):
    one, same, other = (search(tiny_head(), seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one.trials[:2] == other.trials[:2]
    assert one.trials[2:] != other.trials[2:]


@pytest.mark.parametrize("make", [tiny_head, tiny_control_head])
def test_not_to_steer_wins_where_nothing_is_better(make, search, sampler, tmp_path):
    head = make()
    found = search(head, objective=lambda figures: -figures["kl_per_answer"])
    assert found.best.number == 0
    found.apply_to(head)
    head.save_pretrained(tmp_path)
    assert sampler(PROMPTS, head=Head.from_pretrained(tmp_path)) == sampler(PROMPTS)
    assert "| none, chosen |" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_of_equals_the_one_that_does_not_steer_wins(search):
    assert search(tiny_head(), objective=lambda figures: 1.0).best.number == 0


def test_the_reward_is_the_highest_within_the_bound_of_the_perplexity(search):
    head = tiny_head(control=ControlDefaults(step_size=2.0, num_steps=20))
    bounded, free = (search(head, trials=12, max_perplexity_ratio=ratio) for ratio in (1.1, 1e6))
    able = [trial for trial in bounded.trials if trial.figures["perplexity_ratio"] <= 1.1]
    assert 1 < len(able) < 12
    assert bounded.best == max(able, key=lambda trial: trial.figures["reward"])
    assert free.best.figures["reward"] > bounded.best.figures["reward"]
    assert free.best.figures["perplexity_ratio"] > 1.1


def test_the_papers_objective_is_coherence_and_diversity_and_reward(search):
    found = search(tiny_head(), objective="paper")
    sums = [sum(trial.figures[name] for name in ("coherence", "diversity", "reward")) for trial in found.trials]
    assert [trial.score for trial in found.trials] == pytest.approx(sums)
    assert found.best == found.trials[sums.index(max(sums))]


def test_an_objective_of_ones_own_reads_the_figures_and_may_not_change_them(search):
    def shortest(figures):
        return -figures.pop("length") - 0.1 * figures["coherence"]

    found = search(tiny_head(), objective=shortest)
    assert found.objective == "shortest()"
    best = max(found.trials, key=lambda trial: -trial.figures["length"] - 0.1 * trial.figures["coherence"])
    assert found.best == best


def test_the_options_that_are_named_are_searched_within_their_ranges(search):
    head = calibrated()
    for trial in search(head, ranges={"strength": (0.05, 0.2), "num_steps": (2, 4)}).trials[1:]:
        assert 0.05 <= trial.options["strength"] <= 0.2
        assert trial.options["num_steps"] in (2, 3, 4)
    for trial in search(head, ranges={"step_size": (1.0, 1.0)}).trials[1:]:
        assert trial.options == {"step_size": 1.0}


@pytest.mark.parametrize("options", [{"strength": 0.2, "num_steps": 4}, {"num_steps": 4}, {"step_size": 0.3}])
def test_a_calibration_still_means_the_same_when_the_steps_have_changed(options):
    head, untouched = calibrated(), calibrated()
    set_control(head, options)
    head.config.validate()
    control = head.config.control
    assert control.calibration_num_steps == untouched.config.control.num_steps
    strength = None if "step_size" in options else options.get("strength", 0.1)
    assert control.strength == strength
    if strength is not None:
        step_size = {0.2: 1.2 * (2.6 / 1.2) ** 0.5, 0.1: 1.2}[strength]
        assert control.step_size == pytest.approx(step_size * 30 / 4)


def test_a_trial_that_is_not_finite_is_kept_and_cannot_win(search, monkeypatch):
    head = tiny_head(control=ControlDefaults(step_size=20.0, num_steps=64))
    stock = Rewards.__call__
    calls = []

    def second_is_unrewarded(self, prompts, *others, **options):
        calls.append(1)
        result = stock(self, prompts, *others, **options)
        return result if len(calls) != 2 else type(result)([None] * len(prompts), {}, {})

    monkeypatch.setattr(Rewards, "__call__", second_is_unrewarded)
    found = search(head, trials=4, objective=lambda figures: figures["kl_per_answer"])
    bad = found.trials[1]
    assert bad.figures["kl_per_answer"] > max(trial.figures["kl_per_answer"] for trial in found.trials[2:])
    assert len(found.trials) == 4
    assert math.isnan(bad.figures["reward"])
    assert math.isnan(bad.score)
    assert bad not in found.front
    assert found.best != bad
    json.dumps(found.best.options, allow_nan=False)


def test_scores_that_are_not_finite_cannot_win_and_if_all_are_so_nothing_does(search):
    scores = iter([math.nan, math.inf, 2.0, 3.0, -math.inf, 1.0])
    assert search(tiny_head(), objective=lambda figures: next(scores)).best.number == 3
    found = search(tiny_head(), objective=lambda figures: math.nan)
    with pytest.raises(ValueError, match=r"None of the 6 trials has a finite score.*Let the objective return"):
        found.apply_to(tiny_head())


# The front


def trial_of(number, reward, other, **figures):
    return Trial(number, {"step_size": float(number)}, {"reward": reward, "perplexity": other, **figures}, 0.0)


@pytest.mark.parametrize(("against", "sign"), [("perplexity", -1), ("coherence", 1)])
def test_the_front_is_what_no_other_beats(against, sign):
    draw = random.Random(0)
    for _ in range(200):
        points = [(draw.randrange(6), draw.randrange(6)) for _ in range(draw.randrange(1, 12))]
        trials = [Trial(i, {}, {"reward": a, against: b}, 0.0) for i, (a, b) in enumerate(points)]
        better = {
            (a, b)
            for a, b in points
            if not any(c >= a and sign * d >= sign * b and (c, d) != (a, b) for c, d in points)
        }
        front = pareto_front(trials, against)
        assert [(trial.figures["reward"], trial.figures[against]) for trial in front] == sorted(better)
        assert all(trial.number == points.index((trial.figures["reward"], trial.figures[against])) for trial in front)


def test_a_figure_that_is_not_finite_is_on_no_front():
    trials = [trial_of(0, 1.0, 2.0), trial_of(1, math.inf, 1.0), trial_of(2, 9.0, 1.0, coherence=math.nan)]
    assert pareto_front(trials, "perplexity") == trials[:1]


# What is noted


def test_what_is_noted_is_the_choice_and_the_front_of_no_more_than_4_kib():
    figures = {"coherence": 0.123456, "diversity": 0.123456, "kl_per_answer": 12.3456, "length": 6.0}
    trials = [trial_of(i, i / 7, 30 + i / 7, **figures) for i in range(100)]
    long = [Trial(i, {"step_size": 1e-5 / (3 + i), "num_steps": 9}, trial.figures, 0) for i, trial in enumerate(trials)]
    head = tiny_head()
    head.config.info = {"notes": "kept", "tuning": "of before"}
    Search(long, "🎬" * 5000, "perplexity", 24).apply_to(head)
    assert len(json.dumps(head.config.info["tuning"])) <= MAX_TUNING_BYTES
    assert 10 < len(head.config.info["tuning"]["front"]) < 24
    Search(trials, "x" * 5000, "perplexity", 24).apply_to(head)
    noted = head.config.info["tuning"]
    assert len(json.dumps(noted)) <= MAX_TUNING_BYTES
    assert len(noted["front"]) == 24
    assert [row["step_size"] for row in (noted["front"][0], noted["front"][-1])] == [0, 99]  # its ends
    assert noted["front"][-1]["reward"] == 14.14
    assert (noted["trials"], noted["prompts"]) == (100, 24)
    assert head.config.info["notes"] == "kept"
    head.config.info["notes"] = "x" * (16 * 1024 - 1500)
    Search(trials, "mine", "perplexity", 24).apply_to(head)
    assert 2 < len(head.config.info["tuning"]["front"]) < 24


def test_the_card_has_the_front_as_a_table(search):
    head = tiny_head()
    found = search(head, against="coherence", trials=8)
    found.apply_to(head)
    card = head.model_card()
    section = card[card.index("## Tuning") : card.index("## Limits")]
    assert "the best of 8 settings by the reward at a perplexity of at most 1.2 × that without control" in section
    assert "on 24 validation prompts" in section
    for trial in found.front:
        control = "α = {step_size:.4g}, n = {num_steps}".format(**trial.options) if trial.number else "none"
        assert f"| {control}" in section
        assert f" | {trial.figures['reward']:.4g} | {trial.figures['perplexity']:.4g} | " in section
    assert section.count(", chosen |") == 1
    assert section.count("\n| ") == 1 + len({trial.number for trial in [*found.front, found.best]})


# What is refused before anything is generated


@pytest.mark.usefixtures("deaf")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objective": "rewards"}, "The objective is 'rewards'; expected is 'reward' or 'paper', or a callable"),
        ({"objective": "paper", "coherence": None}, "coherence \\+ diversity \\+ reward, but nothing measures.*Pass"),
        ({"against": "coherence", "coherence": None}, "against is 'coherence', but nothing measures"),
        ({"against": "kl"}, "against is 'kl'; expected is 'perplexity' or 'coherence'"),
        ({"trials": 1}, "trials=1; expected are one prompt or more, and two trials"),
        ({"max_perplexity_ratio": 0.9}, "max_perplexity_ratio is 0.9; it must be finite and ≥ 1"),
        ({"max_perplexity_ratio": math.nan}, "max_perplexity_ratio is nan"),
        (
            {"ranges": {}},
            "The options to search are \\[\\]; of a value head they may be strength, step_size, num_steps",
        ),
        ({"ranges": {"scale": (1, 2)}}, "are \\['scale'\\]; of a value head they may be"),
        ({"ranges": {"step_size": (2, 1)}}, "range of step_size is 2 to 1; expected is 0 < lowest"),
        ({"ranges": {"step_size": (0, 1)}}, "range of step_size is 0 to 1"),
        ({"ranges": {"num_steps": (1, 2.5)}}, "range of num_steps is 1 to 2.5; expected are integers from 1 to 1024"),
        ({"ranges": {"num_steps": (1, 2000)}}, "integers from 1 to 1024"),
        ({"ranges": {"strength": (0.1, 0.2)}}, "up to 0.2, but the head is not calibrated.*hf-recontrol tune"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_generated(options, words, search):
    with pytest.raises(ValueError, match=words):
        search(tiny_head(), **options)


@pytest.mark.usefixtures("deaf")
def test_a_strength_beyond_the_calibration_or_beside_its_multiplier_is_refused(search):
    with pytest.raises(ValueError, match=r"searched up to 0.5, but the head is calibrated up to 0.4 nats"):
        search(calibrated(), ranges={"strength": (0.1, 0.5)})
    with pytest.raises(ValueError, match="not strength and step_size together"):
        search(calibrated(), ranges={"strength": (0.1, 0.2), "step_size": (1, 2)})
    with pytest.raises(ValueError, match="There are 0 prompts"):
        search_control(tiny_head(), Sampler(tiny_model(), tiny_tokenizer()), [], Rewards(odd))
    with pytest.raises(HeadMismatch, match="8 wide"):
        search(tiny_head(hidden_size=8))


@pytest.mark.usefixtures("deaf")
def test_without_optuna_the_command_that_installs_it_is_named(search, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-recontrol\[eval\]'"):
        search(tiny_head())


def test_an_objective_without_a_number_ends_the_search_at_once(search, monkeypatch):
    generated = []
    stock = Sampler.__call__
    monkeypatch.setattr(Sampler, "__call__", lambda *a, **k: generated.append(1) or stock(*a, **k))
    with pytest.raises(ValueError, match=r"The objective returned None for .*'reward'.*Return a float"):
        search(tiny_head(), objective=lambda figures: None)
    with pytest.raises(ValueError, match=r"The objective asks for 'fun', but .* are reward, perplexity,.*Take one"):
        search(tiny_head(), objective=lambda figures: figures["fun"])
    assert len(generated) == 2


def test_figures_that_are_not_finite_without_control_end_the_search_at_once(sampler):
    with pytest.raises(ValueError, match=r"Without control the figures are .*'reward': nan.*mend the reward"):
        search_control(
            tiny_head(), sampler, PROMPTS, Rewards(lambda completions, **_: [None] * len(completions)), trials=3
        )


def test_optuna_says_nothing_and_is_left_as_talkative_as_it_was(search, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("optuna"), "propagate", True)
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.INFO)
    try:
        search(tiny_head(), trials=3)
        assert caplog.messages == []
        assert optuna.logging.get_verbosity() == optuna.logging.INFO
    finally:
        optuna.logging.set_verbosity(before)


def test_the_sampler_hears_of_what_cannot_win_as_the_worse_the_further_it_is_off(search, monkeypatch):
    told, stock = [], optuna.study.Study.tell
    monkeypatch.setattr(optuna.study.Study, "tell", lambda *given: told.append(given[2]) or stock(*given))
    found = search(tiny_head(control=ControlDefaults(step_size=2.0, num_steps=20)), trials=12, max_perplexity_ratio=1.1)
    heard = list(zip(found.trials[1:], told, strict=True))
    able = [value for trial, value in heard if trial.can_win]
    unable = sorted((trial.figures["perplexity_ratio"], value) for trial, value in heard if not trial.can_win)
    assert len(able) > 1
    assert len(unable) > 1
    assert able == [trial.score for trial, _ in heard if trial.can_win]
    assert [value for _, value in unable] == sorted((value for _, value in unable), reverse=True)
    assert unable[0][1] < min(able)
