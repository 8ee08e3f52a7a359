"""What the page answers, without a page: laws of the answers, of their control, and of what is refused."""

import threading
import time

import pytest
import torch
from test_plots import make_trace
from tiny import tiny_control_head, tiny_head, tiny_model, tiny_tokenizer

from hf_recontrol import HeadMismatch, RewardScale, ScaleDefaults
from hf_recontrol.page_answers import Answerer, Asked, curves, side_by_side


@pytest.fixture(scope="module")
def answerer():
    control = tiny_control_head(2, reward=RewardScale("kind", 0.0, 1.0))
    control.config.control = ScaleDefaults(scale=1.0, calibration=[[0.1, 0.5], [0.4, 1.0]])
    value = tiny_head(1, reward=RewardScale("kind", 3.0, 2.5))
    other = tiny_control_head(3, reward=RewardScale("length", 0.0, 1.0))
    other.config.control = ScaleDefaults(scale=1.0)
    return Answerer(tiny_model(), tiny_tokenizer(), {"control": control, "value": value, "other": other})


def asked(head="control", **fields):
    return Asked(**{"prompt": "w5 w6 w7", "head": head, "max_new_tokens": 12} | fields)


def whole(answerer, question):
    *_, trace = answerer.answer(question)
    return trace


def test_an_answer_grows_token_by_token(answerer):
    parts = list(answerer.answer(asked()))
    ids = parts[-1].token_ids[0].tolist()
    assert len(ids) == 12
    assert len(parts) > 1
    assert all(part.token_ids[0].tolist() == ids[: part.token_ids.shape[1]] for part in parts)


@pytest.mark.parametrize("temperature", [0, 0.7, 1])
def test_the_answer_is_that_of_generate(answerer, temperature):
    trace = whole(answerer, asked("value", multiplier="2", num_steps="3", seed=4, temperature=temperature))
    inputs = answerer.tokenizer("w5 w6 w7", return_tensors="pt")
    sampling = {"do_sample": True, "temperature": float(temperature)} if temperature else {"do_sample": False}
    torch.manual_seed(4)
    output = answerer.model.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=12,
        eos_token_id=2,
        **sampling,
        recontrol_value_head=answerer.heads["value"],
        recontrol_step_size=2.0,
        recontrol_num_steps=3,
        recontrol_trace=True,
        return_dict_in_generate=True,
    )
    assert trace.token_ids.tolist() == output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    for name in ("values", "steered_values", "control_norms", "kl", "base_token_ids"):
        torch.testing.assert_close(getattr(trace, name), getattr(output.recontrol_trace, name))


@pytest.mark.parametrize("off", [{"strength": 0}, {"multiplier": "0"}])
def test_off_is_the_base_models_answer_and_costs_nothing(answerer, off):
    question = asked(seed=1, **off)
    plain, steered = whole(answerer, answerer.plain(question)), whole(answerer, question)
    assert steered.token_ids.tolist() == plain.token_ids.tolist()
    assert not steered.kl.any()
    assert whole(answerer, asked(seed=1, multiplier="3")).kl.sum() > 0


def test_the_base_answer_is_asked_for_once_whatever_the_control(answerer):
    assert answerer.plain(asked(strength=0.2)) == answerer.plain(asked(multiplier="3", max_kl="0.1"))
    assert answerer.plain(asked()) == answerer.plain(asked("value"))
    assert answerer.plain(asked()) != answerer.plain(asked(seed=1))


def test_a_control_head_is_watched_by_a_value_head_of_its_reward(answerer):
    assert answerer.watching("control") is answerer.heads["value"]
    assert answerer.watching("other") is answerer.heads["other"]
    assert not whole(answerer, asked("control")).values.isnan().any()
    assert whole(answerer, asked("other", multiplier="1")).values.isnan().all()


def test_the_random_state_is_left_alone(answerer):
    state = torch.get_rng_state()
    whole(answerer, asked())
    assert torch.equal(torch.get_rng_state(), state)


def test_an_answer_that_is_stopped_ends_as_if_whole(answerer):
    stop = threading.Event()
    hook = answerer.model.register_forward_pre_hook(lambda *_: time.sleep(0.01))
    for trace in answerer.answer(asked(max_new_tokens=120), stop):  # noqa: B007
        stop.set()
    hook.remove()
    assert 0 < trace.token_ids.shape[1] < 60


def test_closing_an_answer_ends_its_generation_and_the_next_one_comes(answerer):
    forwards = []

    def slowly(*_):
        forwards.append(1)
        time.sleep(0.01)

    hook = answerer.model.register_forward_pre_hook(slowly)
    growing = answerer.answer(asked(max_new_tokens=120))
    next(growing)
    growing.close()
    assert len(whole(answerer, asked(max_new_tokens=1)).token_ids[0]) == 1  # comes after the other has ended
    hook.remove()
    assert len(forwards) < 60


def test_those_who_ask_at_once_all_get_their_own_answer(answerer):
    questions = [asked(seed=seed) for seed in range(4)]
    expected = [whole(answerer, question).token_ids.tolist() for question in questions]
    found = {}

    def ask(place):
        found[place] = whole(answerer, questions[place]).token_ids.tolist()

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[place] for place in range(4)] == expected


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"prompt": " \n"}, "The prompt is empty.* Type the beginning"),
        ({"head": "nobody"}, "'nobody', but the heads are 'control', 'value', 'other'"),
        ({"seed": -1}, "seed is -1; it must be an integer from 0"),
        ({"seed": None}, "seed is empty"),
        ({"seed": 1e300}, "seed is 1e\\+300"),
        ({"max_new_tokens": 1.5}, r"max_new_tokens is 1\.5"),
        ({"max_new_tokens": float("inf")}, "max_new_tokens is inf"),
        ({"max_new_tokens": 127}, "has 4 tokens and the answer may have 127, but the model reads 128"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"strength": 3.0}, r"calibrated up to 0\.4"),
        ({"head": "value"}, "the head is not calibrated"),
        ({"multiplier": "much"}, "scale is 'much'; it must be a number, or empty"),
        ({"multiplier": "-1"}, "scale is -1; it must be a finite number ≥ 0"),
        ({"multiplier": "inf"}, "scale is inf; it must be a finite number"),
        ({"num_steps": "3"}, "num_steps is 3, which is of a value head's ascent"),
        ({"head": "value", "multiplier": "1", "num_steps": "2.5"}, r"num_steps is 2\.5; it must be an integer"),
        ({"max_kl": "0"}, "max_kl is 0; it must be a number > 0"),
    ],
    ids=str,
)
def test_what_cannot_be_had_is_refused_in_the_packages_words(answerer, bad, words):
    with pytest.raises(ValueError, match=words):
        answerer.checked(asked(**bad))


def test_a_chat_models_prompt_goes_into_its_template(answerer):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "<s>{% for message in messages %} {{ message['content'] }}{% endfor %} w9"
    chats = Answerer(tiny_model(), tokenizer, answerer.heads)
    assert chats.checked(asked(chat=True))[1] == [1, 5, 6, 7, 9]
    assert chats.checked(asked(chat=False))[1] == [1, 5, 6, 7]


def test_heads_are_checked_with_the_model_at_the_start():
    with pytest.raises(ValueError, match=r"no heads.*--head NAME=HEAD"):
        Answerer(tiny_model(), tiny_tokenizer(), {})
    with pytest.raises(HeadMismatch, match="8 wide"):
        Answerer(tiny_model(), tiny_tokenizer(), {"narrow": tiny_head(hidden_size=8)})


def test_answers_of_any_length_stand_side_by_side_on_one_scale():
    short, long = make_trace([1.0, 2.0]), make_trace([3.0, 4.0, 5.0])
    both = side_by_side([short, long])
    assert both.lengths.tolist() == [2, 3]
    assert both.sound.all()
    assert both.values[1].tolist() == [3.0, 4.0, 5.0]


def test_the_curves_are_of_values_or_where_none_are_known_of_kl():
    base, steered = make_trace([1.0, 2.0]), make_trace([3.0])
    name, points = curves(base, steered)
    assert name == "value (units of the reward)"
    assert points == [
        {"token": 1, "value": 1.0, "answer": "base"},
        {"token": 2, "value": 2.0, "answer": "base"},
        {"token": 1, "value": 3.0, "answer": "steered, before u"},
        {"token": 1, "value": 4.0, "answer": "steered, after u"},
    ]
    unknown = make_trace([float("nan")], kl=[[0.5]], scale=[[1.0]])
    assert curves(unknown, unknown)[1] == [
        {"token": 1, "value": 0.5, "answer": "base"},
        {"token": 1, "value": 0.5, "answer": "steered"},
    ]
