"""A card says what is known, as text that nothing in a name can break out of."""

import ast
import re

import pytest
import yaml

from hf_recontrol.model_card import CardFacts, card

INFO = {
    "training": {"answers": 6000, "tokens": 240000, "td_lambda": 1.0, "recipe": None},
    "evaluation": {
        "explained_variance": 0.05,
        "explained_variance_interval": [0.03, 0.07],
        "explained_variance_linear": 0.03,
        "rank_correlation": [0.1, 0.2, 0.3, 0.4],
        "answers": 600,
    },
    "tuning": {
        "objective": "reward",
        "max_perplexity_ratio": 1.2,
        "against": "perplexity",
        "trials": 20,
        "prompts": 100,
        "chosen": {"strength": 0.123456, "reward": 0.75, "perplexity": 12.3456, "diversity": 0.5},
        "front": [
            {"step_size": 0.0, "reward": 0.25, "perplexity": 10.0, "diversity": 0.5},
            {"strength": 0.123456, "reward": 0.75, "perplexity": 12.3456, "diversity": 0.5},
            {"step_size": 2.5, "num_steps": 8, "reward": 1.5, "perplexity": 80},
        ],
    },
    "data": "user/prompts",
    "data_license": "odc-by",
    "license": "cc-by-4.0",
    "language": "en",
}
FULL = CardFacts(
    repo_id="user/head",
    base_model="user/base",
    base_model_revision="abc123",
    reward="politeness",
    reward_mean=0.25,
    reward_std=1.5,
    head="8 inputs, 1 hidden layers of 8, relu",
    step_size=0.5,
    num_steps=30,
    info=INFO,
)
INJECTIONS = [
    "a\n---\nlicense: mit\n---\n# Owned",
    "a\r\nb",
    "a\x85b\u2028c\x0bd",
    "<script>alert(1)</script>",
    "![x](http://evil) [y](javascript:1)",
    "`code` ``` ```",
    "| a | b |",
    "{{ 7*7 }} {% raw %}",
    "x: y # z",
    "\u202egnp.exe",
    "\ud800",
    "a" * 5000,
    "!!python/object/apply:os.system ['true']",
    "**bold** _it_ ~~s~~ # h $x$ @user",
]


def split(text):
    """The YAML as values and the body as text, without the last line, by which an edited card is known."""
    _, front, body = re.split(r"^---\n", text, maxsplit=2, flags=re.MULTILINE)
    body, seal = body.rsplit("\n\n", 1)
    assert re.fullmatch(r"<!-- Written by hf-recontrol[^<>]*: [0-9a-f]{32} -->\n", seal)
    return yaml.safe_load(front), body + "\n"


def test_the_hub_finds_the_library_the_base_model_and_the_figures():
    data, _ = split(card(FULL))
    assert data["library_name"] == "hf-recontrol"
    assert data["pipeline_tag"] == "text-generation"
    assert (data["base_model"], data["base_model_relation"]) == ("user/base", "adapter")
    tags = ["recontrol", "value-head", "test-time-alignment", "representation-editing", "reward:politeness"]
    assert data["tags"] == tags
    assert (data["license"], data["language"], data["datasets"]) == ("cc-by-4.0", "en", "user/prompts")
    (result,) = data["model-index"][0]["results"]
    assert len(result["metrics"]) == 6
    assert result["metrics"][0]["value"] == 0.05
    assert result["metrics"][0]["args"] == {"n": 600, "interval": [0.03, 0.07]}


def test_the_body_says_what_is_known():
    _, body = split(card(FULL))
    for words in ("politeness", "abc123", "user/base", "0.05 [0.03, 0.07]", "600 held-out", "6000", "α = 0.5"):
        assert words in body
    assert "- Data: `user/prompts`, licence `odc-by`\n" in body
    assert "None" not in card(FULL)
    assert "Recipe" not in body


def test_the_curves_of_the_run_are_shown_point_by_point():
    points = [[step, 1 / step] for step in range(1, 100)]
    _, body = split(card(CardFacts(info={"curves": {"eval_loss": [[50, 0.98765], [100, 0.5]], "long": points}})))
    assert "| `eval_loss` | 50: 0.9877, 100: 0.5 |" in body
    assert "24: 0.04167 |" in body
    assert "| while training |" not in split(card(CardFacts()))[1]


def test_a_search_of_the_control_is_shown_with_its_front():
    _, body = split(card(FULL))
    section = body[body.index("## Tuning") : body.index("## Limits")].splitlines()
    assert "of 20 settings by the reward at a perplexity of at most 1.2 × that without control" in section[2]
    assert "on 100 validation prompts" in section[2]
    assert "none had a higher reward at as low a perplexity" in section[2]
    assert section[4:] == [
        "| control | reward | perplexity | diversity |",
        "|---|---|---|---|",
        "| none | 0.25 | 10 | 0.5 |",
        "| strength 0.1235, chosen | 0.75 | 12.35 | 0.5 |",
        "| α = 2.5, n = 8 | 1.5 | 80 |  |",
        "",
    ]


def test_the_choice_is_shown_where_it_is_not_on_the_front():
    noted = {"objective": "calm()", "chosen": {"scale": 2, "reward": 0.5}, "front": [{"scale": 1, "reward": 1.0}]}
    _, body = split(card(CardFacts(info={"tuning": noted})))
    assert "is the best by `calm()`, on validation prompts" in body
    assert "| scale 2, chosen | 0.5 |\n| scale 1 | 1 |\n" in body


def test_what_is_not_known_is_left_out():
    data, body = split(card(CardFacts()))
    assert set(data) == {"library_name", "pipeline_tag", "tags"}
    assert "None" not in body
    assert "## Evaluation" not in body
    assert "## Training" not in body
    assert "## Tuning" not in body
    assert "## Limits" in body


@pytest.mark.parametrize("facts", [FULL, CardFacts(), CardFacts(repo_id='a"b\n"', base_model="gpt2")])
def test_the_snippet_is_python(facts):
    (snippet,) = re.findall(r"```python\n(.*?)```", card(facts), flags=re.DOTALL)
    ast.parse(snippet)
    assert "model.generate(" in snippet
    assert "recontrol_value_head=" in snippet
    assert "enable_recontrol" in snippet


@pytest.mark.parametrize("text", INJECTIONS, ids=range(len(INJECTIONS)))
def test_a_name_cannot_break_out_of_the_card(text):
    info = {
        "training": {text: text, "recipe": text},
        "evaluation": {text: 0.5, "explained_variance": 0.1, "answers": text},
        "curves": {text: [[1, 0.5], [text, text]], "b": text},
        "tuning": {
            **dict.fromkeys(("objective", "against", "trials", "prompts", "max_perplexity_ratio"), text),
            "chosen": {text: text, "strength": text, "reward": 1},
            "front": [{"step_size": text, "reward": text, text: 1}, text],
        },
        "data": text,
        "data_license": text,
        "license": text,
        "language": text,
    }
    hostile = CardFacts(
        repo_id=text, base_model=text, base_model_revision=text, reward=text, reward_std=1.0, head=text, info=info
    )
    plain = {"training": {"a": "a", "recipe": "a"}, "evaluation": {"a": 0.5, "explained_variance": 0.1}, "data": "a"}
    plain["curves"] = {"a": [[1, 0.5]]}
    plain["tuning"] = {"objective": "a", "chosen": {"reward": 1}, "front": [{"reward": "a"}]}
    harmless = CardFacts(
        repo_id="x", base_model="x y", base_model_revision="x", reward="x", reward_std=1.0, head="x", info=plain
    )
    data, body = split(card(hostile))
    assert card(hostile).encode()  # no lone surrogate
    assert set(data) <= {"library_name", "pipeline_tag", "tags", "model-index"}
    _, expected = split(card(harmless))
    assert body.count("\n") == expected.count("\n")  # no line of its own
    interpreted = re.sub(r"```.*?```|(?<!\\)`[^`\n]*`", "", body, flags=re.DOTALL)
    for markup in ("<", r"\(http://evil", r"\]\(java", "{{", r"\*\*"):
        assert not re.search(rf"(?<!\\){markup}", interpreted)
    assert all(character.isprintable() or character == "\n" for character in body)


@pytest.mark.parametrize("path", ["/home/me/model", "./model", "../model", "a/b/c", "~/model", "C:\\models\\x", ""])
def test_a_local_path_is_never_named_as_the_base_model(path):
    data, body = split(card(CardFacts(base_model=path)))
    assert "base_model" not in data
    assert "model\\x" not in body
    assert "its base model" in body


@pytest.mark.parametrize(
    "info",
    [
        {"training": "text", "evaluation": [1, 2]},
        {"evaluation": {"explained_variance": "high", "rank_correlation": ["a", None, True]}},
        {"evaluation": {"explained_variance": 0.1, "explained_variance_interval": "wide", "answers": True}},
        {"curves": {"a": 1, "b": [1, [2], [3, None], [True, 1], {}]}},
        {"curves": [1]},
        {"evaluation": {"loss": 10**400}},
        {"tuning": "text"},
        {"tuning": {"chosen": [1], "front": {"a": 1}}},
        {"tuning": {"chosen": {"strength": [1]}, "front": [1, None, {"reward": {}}], "trials": True, "objective": 1}},
        {"tuning": {"chosen": {"scale": 10**400, "reward": 10**400}, "against": ["a"]}},
        {"training": {"nested": {"a": 1}, "list": [1]}, "data": 5, "license": 7, "language": ["en"]},
    ],
    ids=range(11),
)
def test_info_of_another_form_does_no_harm(info):
    data, _ = split(card(CardFacts(info=info)))
    assert "license" not in data
    assert "datasets" not in data
