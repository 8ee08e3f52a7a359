"""Win rates over the base model: by a reward from its scores, by a chat model once."""

import json

import pytest
from chat_server import KEY, ChatServer, shown

from hf_recontrol import ChatJudge
from hf_recontrol.baselines import Base
from hf_recontrol.comparison import Answered, Entry
from hf_recontrol.comparison_verdicts import win_rate_over
from hf_recontrol.errors import CollectError
from hf_recontrol.rewards import Rewards


def answered(*completions, name="base"):
    rows = [
        [{"prompt": f"p{i}", "completion": text, "token_ids": [i] * len(text)}] for i, text in enumerate(completions)
    ]
    return Answered(Entry(Base(name=name)), rows, 1.0, None, False)


BASE = answered("aa", "a", "aaa", "aa")
OTHER = answered("aaa", "aa", "a", "aa", name="other")


def length(completions, **_):
    return [float(len(text)) for text in completions]


def tokens(completion_ids, **_):
    return [float(len(ids)) for ids in completion_ids]


@pytest.mark.parametrize("function", [length, tokens])
def test_a_reward_counts_wins_and_half_of_ties(function, tmp_path):
    cell = win_rate_over(OTHER, BASE, Rewards(function), tmp_path)
    assert cell["mean"] == (2 + 0.5) / 4
    assert (cell["n"], cell["ties"], cell["unparsable"]) == (4, 1, 0)
    assert 0 <= cell["low"] < cell["mean"] < cell["high"] <= 1
    assert not list(tmp_path.iterdir())


def test_an_answer_that_a_reward_does_not_score_is_counted_apart(tmp_path):
    cell = win_rate_over(OTHER, BASE, Rewards(lambda completions, **_: [None, *length(completions[1:])]), tmp_path)
    assert (cell["n"], cell["unparsable"], cell["mean"]) == (3, 1, 0.5)


def longer(messages):
    first, second = shown(messages)
    return f"Scores: A={len(first)} B={len(second)}"


def test_a_chat_model_is_asked_once_for_the_same_texts(tmp_path):
    pytest.importorskip("openai")
    with ChatServer(longer) as server:
        judge = ChatJudge("m", server.url, KEY)
        cell = win_rate_over(OTHER, BASE, judge, tmp_path)
        assert cell["mean"] == (2 + 0.5) / 4
        assert len(server.requests) == 8
        assert win_rate_over(OTHER, BASE, judge, tmp_path) == cell
        assert len(server.requests) == 8
        (file,) = tmp_path.iterdir()
        assert KEY not in file.read_text()
        assert win_rate_over(OTHER, BASE, ChatJudge("m", server.url, KEY, rubric="length"), tmp_path) == cell
        assert len(server.requests) == 16  # asked for something else
        other = answered("a", "a", "a", "a", name="other")
        assert win_rate_over(other, BASE, judge, tmp_path)["mean"] < 0.5
        assert len(server.requests) == 24


def test_damaged_verdicts_are_an_error(tmp_path):
    pytest.importorskip("openai")
    with ChatServer(longer) as server:
        judge = ChatJudge("m", server.url, KEY)
        win_rate_over(OTHER, BASE, judge, tmp_path)
        (file,) = tmp_path.iterdir()
        for damaged in ("{", json.dumps({"asked": 1}), json.dumps({"asked": 1, "win_rate": {}}), "[]"):
            file.write_text(damaged)
            with pytest.raises(CollectError, match="Delete it, and the judge is asked again"):
                win_rate_over(OTHER, BASE, judge, tmp_path)
