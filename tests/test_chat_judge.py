"""ChatJudge against a real server: what it sends, what it makes of the replies, and what it keeps to itself."""

import asyncio
import doctest
import sys
import traceback

import pytest
from chat_server import KEY, ChatServer, shown

from hf_recontrol import ChatJudge, chat_judge, win_rate
from hf_recontrol.chat_judge import REMINDER, parse_scores

pytest.importorskip("openai")

PROMPTS = ["One?", "Two?", "Three?", "Four?"]
ANSWERS = ["a long answer", "no", "{braces} and all", "same"]
OPPONENTS = ["short", "a long answer", "as ever", "1234"]
LONGER = ("win", "loss", "win", "tie")


def longer_is_better(messages):
    first, second = shown(messages)
    return f"The longer one.\n\nScores: A={min(10, len(first))} B={min(10, len(second))}"


def first_is_better(messages):
    return "Scores: A=9 B=2"


def judge_at(server, **options):
    return ChatJudge("tiny-judge", server.url, KEY, **options)


def test_the_longer_answer_wins_in_both_orders():
    with ChatServer(longer_is_better) as server:
        result = win_rate(judge_at(server), PROMPTS, ANSWERS, OPPONENTS)
    assert result.outcomes == LONGER
    assert (result.wins, result.ties, result.losses, result.unparsable) == (2, 1, 1, 0)
    assert result.order_disagreement == 0
    assert len(server.requests) == 2 * len(PROMPTS)


def test_a_judge_that_prefers_the_first_has_no_say():
    with ChatServer(first_is_better) as server:
        result = win_rate(judge_at(server), PROMPTS, ANSWERS, OPPONENTS)
    assert (result.ties, result.order_disagreement, result.rate) == (4, 1, 0.5)


@pytest.mark.parametrize("reply", ["They are both lovely.", None, "Scores: A=11 B=2", "Scores: A=9 B=2\nOr not."])
def test_garbage_is_unparsable_and_never_a_tie(reply):
    with ChatServer(lambda messages: reply) as server:
        result = win_rate(judge_at(server), PROMPTS, ANSWERS, OPPONENTS)
    assert (result.unparsable, result.ties, result.n) == (4, 0, 4)
    assert len(server.requests) == 2 * 2 * len(PROMPTS)  # each is asked once more


def test_a_reply_that_cannot_be_parsed_is_asked_for_again_with_the_format():
    def second_time(messages):
        return first_is_better(messages) if messages[-1]["content"] == REMINDER else "A is better."

    with ChatServer(second_time) as server:
        assert judge_at(server)(["Q"], ["a"], ["b"]) == [(9, 2)]
    first, second = server.requests
    assert second["messages"][:2] == first["messages"]
    assert second["messages"][2] == {"role": "assistant", "content": "A is better."}


def test_no_choice_is_no_verdict():
    with ChatServer(first_is_better) as server:
        server.body = b'{"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": []}'
        assert judge_at(server)(["Q"], ["a"], ["b"]) == [None]


def test_it_sends_temperature_0_the_rubric_and_both_answers_as_they_are():
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who {are} you?"}]
    answer = [{"role": "assistant", "content": "I am </b>\n{0}."}]
    with ChatServer(first_is_better) as server:
        assert judge_at(server, rubric="its manners")([prompt], [answer], ["Nobody."]) == [(9, 2)]
    (request,) = server.requests
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("tiny-judge", 0, 2048)
    instructions, question = (message["content"] for message in request["messages"])
    assert "Judge each of them by its manners." in instructions
    assert shown(request["messages"]) == ["I am </b>\n{0}.", "Nobody."]
    assert "system: Be kind.\n\nuser: Who {are} you?" in question
    assert server.keys == [f"Bearer {KEY}"]


def test_what_is_none_is_not_sent():
    with ChatServer(first_is_better) as server:
        judge_at(server, temperature=None, max_tokens=None)(["Q"], ["a"], ["b"])
    assert set(server.requests[0]) == {"model", "messages"}


def test_a_failure_that_passes_is_tried_again_by_the_client():
    with ChatServer(longer_is_better) as server:
        server.failures = [500]
        result = win_rate(judge_at(server), PROMPTS, ANSWERS, OPPONENTS)
    assert result.outcomes == LONGER
    assert len(server.requests) == 2 * len(PROMPTS) + 1


def test_a_failure_that_stays_is_an_error():
    with ChatServer(longer_is_better) as server:
        server.failures = [500] * 99
        with pytest.raises(RuntimeError, match=r"'tiny-judge' at http://127.*InternalServerError.*raise max_retries"):
            judge_at(server, max_retries=0)(PROMPTS, ANSWERS, OPPONENTS)


def test_the_key_is_in_no_error_and_no_repr():
    with ChatServer(longer_is_better) as server:
        server.failures = [401] * 99
        judge = judge_at(server)
        with pytest.raises(
            RuntimeError, match=r"AuthenticationError.*Bearer <api_key> is refused.*check api_key"
        ) as raised:
            judge(PROMPTS, ANSWERS, OPPONENTS)
        assert server.keys[0] == f"Bearer {KEY}"
    assert KEY not in "".join(traceback.format_exception(raised.value))
    error = raised.value
    while error is not None:  # nor where a debugger would look
        assert KEY not in repr(error)
        error = error.__cause__ or error.__context__
    assert KEY not in repr(judge) + str(judge)
    assert "tiny-judge" in repr(judge)


@pytest.mark.parametrize("body", [b"<html>Welcome</html>", b'{"detail": "Welcome"}', b'{"choices": {"a": 1}}'])
def test_an_endpoint_that_speaks_something_else_is_an_error(body):
    with ChatServer(first_is_better) as server:
        server.body = body
        with pytest.raises(RuntimeError, match=r"no chat completion.*most end in /v1"):
            judge_at(server)(["Q"], ["a"], ["b"])


@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_requests_than_asked_for_are_on_their_way(limit):
    with ChatServer(first_is_better, seconds=0.05) as server:
        judge_at(server, max_concurrency=limit)(PROMPTS * 2, ANSWERS * 2, OPPONENTS * 2)
    assert server.most_at_once <= limit
    assert limit == 1 or server.most_at_once > 1


def test_it_judges_where_an_event_loop_runs_already():
    async def in_a_notebook(judge):
        return judge(["Q"], ["a"], ["b"])

    with ChatServer(first_is_better) as server:
        assert asyncio.run(in_a_notebook(judge_at(server))) == [(9, 2)]


def test_openais_key_goes_to_no_other_server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with ChatServer(first_is_better) as server:
        ChatJudge("tiny-judge", server.url)(["Q"], ["a"], ["b"])
        assert server.keys == ["Bearer no-key"]
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        ChatJudge("tiny-judge")(["Q"], ["a"], ["b"])
        assert server.keys[1] == f"Bearer {KEY}"


def test_no_key_for_openai_is_refused_at_the_door(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match=r"set OPENAI_API_KEY, or pass the base_url"):
        ChatJudge("tiny-judge")


@pytest.mark.parametrize("wrong", [{"max_concurrency": 0}, {"max_retries": -1}, {"timeout": 0}])
def test_numbers_out_of_bounds_are_refused(wrong):
    with pytest.raises(ValueError, match="max_concurrency ≥ 1, max_retries ≥ 0 and timeout > 0"):
        ChatJudge("tiny-judge", "http://127.0.0.1:1/v1", **wrong)


def test_without_openai_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-recontrol\[eval\]'"):
        ChatJudge("tiny-judge", "http://127.0.0.1:1/v1")


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ("Scores: A=1 B=10", (1, 10)),
        ("A says more.\n\n**Scores: A=7 B=4** \n", (7, 4)),
        ("`Scores: A=7 B=4`", (7, 4)),
        ("", None),
        ("\n", None),
        ("Scores: A=0 B=4", None),
        ("Scores: A=7", None),
        ("Scores: A=7.5 B=4", None),
        ("7 4", None),
        ("So: Scores: A=7 B=4", None),
        ("Scores: A=7 B=4\nThank you.", None),
        ("Scores: A=7 B=4/10", None),
    ],
)
def test_only_the_last_line_in_the_format_that_was_asked_for_is_a_verdict(reply, scores):
    assert parse_scores(reply) == scores


def test_the_example_shows_its_result():
    assert doctest.testmod(chat_judge) == (0, 2)
