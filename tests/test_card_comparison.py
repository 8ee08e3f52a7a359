"""What a card says of a comparison: the head's own rows, what costs no strength, placebos; and nothing hostile."""

import math
import re

import pytest
import yaml
from tiny import tiny_head

from hf_recontrol.card_comparison import comparison_gains, comparison_info, comparison_lines


def row(method, setting=None, **changes):
    gain = {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 40}
    made = {"method": method, "setting": setting, "placebo": False, "kl_is_bound": False, "kl_per_answer": 1.234}
    return made | {"judge": gain, "reward": gain, "perplexity_ratio": 1.5, "more": "not kept"} | changes


ROWS = [
    row("base"),
    row("best-of-4", kl_is_bound=True, kl_per_answer=0.64),
    row("mine", 1.0),
    row("mine", 4.0),
    row("another", 4.0),
    row("random direction", 1.0, placebo=True),
    row("random direction", 4.0, placebo=True, perplexity_ratio=math.nan),
]
FACTS = {"dataset": "user/prompts, test", "judges": "classifier", "seed": 3, "more": ["not", "kept"]}
INFO = {"comparison": comparison_info("mine", ROWS, ["judge", "reward"], FACTS)}


def cells(lines):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


def test_the_table_has_the_heads_rows_and_what_they_are_measured_by():
    title, *rows = cells(comparison_lines(INFO))
    assert title == ["method", "judge", "reward", "nats an answer", "perplexity"]
    assert [line[0] for line in rows] == ["mine, 1 nats", "mine, 4 nats", "best-of-4", "random direction, 4 nats †"]
    assert rows[2][1:] == ["+0.50 [+0.25, +0.75]"] * 2 + ["≤ 0.64", "1.500 ×"]
    assert rows[-1][-1] == ""  # not a number
    assert "over 40 prompts of `user/prompts, test`" in comparison_lines(INFO)[0]


def test_prompts_of_another_kind_have_a_table_of_their_own():
    others = [row("mine", 4.0, reference_kl=0.0123, reference_perplexity=1.02)]
    other = comparison_info("mine", others, ["judge"], {"dataset": "others.jsonl"})
    lines = comparison_lines({"comparison": INFO["comparison"] | {"other": other}})
    title, *rows = cells(lines[lines.index("With the same strengths on prompts of another kind:") :])
    assert title[-2:] == ["KL on given texts, nats a token", "perplexity of given texts"]
    assert rows[0][-2:] == ["0.012", "1.020 ×"]


def test_the_hub_is_told_the_heads_own_gains():
    head = tiny_head()
    head.config.info |= INFO
    front = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", head.model_card(), re.DOTALL)[1])
    results = front["model-index"][0]["results"]
    metrics = [metric for result in results for metric in result["metrics"]]
    assert {metric["type"] for metric in metrics} == {"judge gain", "reward gain"}
    assert len(metrics) == 4
    assert all(metric["args"] == {"n": 40, "seed": 3, "interval": [0.25, 0.75]} for metric in metrics)
    assert "at 4 nats an answer" in metrics[-1]["name"]
    assert {result["dataset"]["name"] for result in results} == {"user/prompts, test"}


HOSTILE = "]\n---\n# <script>alert(1)</script> | [x](http://evil) `"


@pytest.mark.parametrize(
    "noted",
    [
        None,
        "text",
        {"rows": "text", "judges": ["judge"]},
        {"rows": [1, None], "judges": ["judge"]},
        {"rows": ROWS, "judges": "judge"},
        {"rows": [row("mine", "4", judge=[1], kl_per_answer=True)], "judges": ["judge"], "facts": 3, "other": []},
        {"rows": [row(HOSTILE, 1e400)], "judges": [HOSTILE, 3], "facts": {"dataset": HOSTILE, "judges": HOSTILE}},
        {"rows": [row(HOSTILE, 1.0)], "method": HOSTILE, "judges": ["judge"], "facts": {"dataset": HOSTILE}},
        {"rows": ROWS * 100, "judges": ["judge"] * 100},
    ],
)
def test_what_a_stranger_wrote_breaks_no_card(noted):
    head = tiny_head()
    plain = head.model_card()
    head.config.info["comparison"] = noted
    comparison_gains(head.config.info)
    text = head.model_card()
    front = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])
    assert front["library_name"] == "hf-recontrol"
    assert text.count("\n# ") == plain.count("\n# ")
    assert "<script>" not in re.sub(r"`[^`]*`", "", text.partition("\n---\n")[2])
    assert len(text) < len(plain) + 20_000
