"""Metrics are pure: each is checked against a number worked out by hand, a slow formula, or a law."""

import functools
import math

import pytest
import torch
from steered_answers import ANSWERS, PROMPTS, controller
from tiny import tiny_head, tiny_model, tiny_tokenizer

from hf_recontrol.coherence import Coherence
from hf_recontrol.control import Controller
from hf_recontrol.evaluation import (
    best_of_n,
    best_of_n_kl_bound,
    distinct_n,
    diversity,
    evaluate_answers,
    side_effects,
    words,
)
from hf_recontrol.head_config import RewardScale
from hf_recontrol.rewards import Rewards
from hf_recontrol.token_statistics import token_statistics


@pytest.fixture(scope="module")
def model():
    return tiny_model()


# Texts


def test_words_keep_contractions_and_case_and_count_each_mark():
    assert words("Don’t stop... it's 3.5") == ["Don’t", "stop", ".", ".", ".", "it's", "3", ".", "5"]
    assert words(" \n") == []


def test_diversity_is_the_product_worked_out_by_hand():
    # a b a b a: 2-grams ab ba ab ba, 2 of 4 + 1; 3-grams aba bab aba, 2 of 3 + 1; 4-grams abab baba, 2 of 2 + 1
    assert diversity("a b a b a") == pytest.approx(2 / 5 * 2 / 4 * 2 / 3)


@pytest.mark.parametrize("length", [4, 7, 50])
def test_a_text_without_repeats_scores_one_minus_three_over_its_length(length):
    assert diversity(" ".join(f"w{i}" for i in range(length))) == pytest.approx(1 - 3 / length)


@pytest.mark.parametrize("text", ["", "one", "one two", "one two three"])
def test_fewer_than_four_words_have_no_diversity(text):
    assert diversity(text) == 0


def test_diversity_of_the_first_words_ignores_the_rest():
    text = "a b c d e f g h"
    assert diversity(text + " a b c d" * 9, max_words=8) == diversity(text)


def test_another_tokenizer_can_be_passed():
    assert diversity("abcdef", tokenize=list) == 0.5
    assert distinct_n(["abab"], 2, tokenize=list) == 2 / 3
    nltk = pytest.importorskip("nltk")
    word_tokenize = functools.partial(nltk.word_tokenize, preserve_line=True)
    assert diversity("don't we go", tokenize=word_tokenize) == pytest.approx(1 - 3 / 4)  # do n't we go


def test_distinct_n_pools_the_answers_and_joins_none():
    assert distinct_n(["a b c d", "b c d e"], 3) == 3 / 4  # abc bcd, bcd cde
    assert distinct_n(["a b", "c d"], 3) == 0  # a b c would span two answers
    assert distinct_n(["same old words"] * 10, 3) == pytest.approx(1 / 10)
    assert distinct_n([], 3) == 0


# Best of n


def test_best_of_n_takes_the_first_of_the_highest_among_the_first_n():
    assert best_of_n([[0.0, 2.0, 2.0, 9.0], [-5.0, -7.0, -6.0, 0.0]], 3) == [1, 0]


def test_an_answer_without_a_reward_is_never_the_best():
    assert best_of_n([[None, -3.0], [float("nan"), -1.0], [-1.0, float("nan")]], 2) == [1, 1, 0]
    with pytest.raises(ValueError, match="Prompt 0 has no reward among its first 2"):
        best_of_n([[None, None, 1.0]], 2)


@pytest.mark.parametrize("n", [0, 3])
def test_n_beyond_the_answers_of_a_prompt_is_refused(n):
    with pytest.raises(ValueError, match=f"n is {n}, but prompt 0 has 2 answers"):
        best_of_n([[1.0, 2.0], [1.0, 2.0, 3.0]], n)


def test_the_best_of_n_bound_holds_for_many_answers_and_is_loose_for_few():
    def exact(answers, n):  # a base model that draws uniformly among `answers`, each with another reward
        p = [((k + 1) / answers) ** n - (k / answers) ** n for k in range(answers)]
        return sum(x * math.log(x * answers) for x in p)

    assert best_of_n_kl_bound(1) == 0
    assert exact(100_000, 4) == pytest.approx(best_of_n_kl_bound(4), abs=1e-3)
    assert exact(3, 64) < best_of_n_kl_bound(64) - 1


# A row of the table


def word_count(completions, **kwargs):
    return [float(len(completion.split())) for completion in completions]


def even_only(completion_ids, **kwargs):
    return [1.0 if len(ids) % 2 == 0 else None for ids in completion_ids]


def weighted(completions, weight, **kwargs):
    return [float(w) for w in weight]


def answer_rows():
    tokenizer = tiny_tokenizer()
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in ANSWERS]
    prompts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in PROMPTS]  # encoding puts the <s> back
    return [
        {"prompt": prompt, "completion": text, "token_ids": ids, "weight": i}
        for i, (prompt, text, ids) in enumerate(zip(prompts, texts, ANSWERS, strict=True))
    ]


def test_a_row_of_the_table_holds_each_metric_once(model):
    row = evaluate_answers(
        answer_rows(),
        [word_count, even_only, weighted],
        model=model,
        tokenizer=tiny_tokenizer(),
        controller=controller(),
        seconds=3.5,
        forwards_per_token=1.0,
    )
    statistics = token_statistics(model, PROMPTS, ANSWERS, controller())
    assert row == pytest.approx(
        {
            "n": 4,
            "reward/word_count": 8 / 4,
            "reward/even_only": 1.0,  # the answers of odd length are left out, not counted as 0
            "reward/weighted": 6 / 4,
            "perplexity": statistics.perplexity,
            "kl_per_answer": statistics.kl_per_answer,
            "kl_per_token": statistics.kl_per_token,
            "diversity": (1 - 3 / 5) / 4,  # of w11 w60 w4 w9 w17; the other answers are shorter than four words
            "diversity_20": (1 - 3 / 5) / 4,
            "distinct_3": 1.0,
            "length": 10 / 4,
            "seconds": 3.5,
            "forwards_per_token": 1.0,
        }
    )


def test_without_a_model_or_rewards_the_row_has_the_texts_metrics_only():
    row = evaluate_answers(answer_rows())
    assert set(row) == {"n", "diversity", "diversity_20", "distinct_3", "length"}


def test_rewards_made_once_serve_every_row():
    rewards = Rewards(word_count)
    rows = answer_rows()
    assert evaluate_answers(rows[:2], rewards)["reward/word_count"] == 1.5
    assert evaluate_answers(rows[2:], rewards)["reward/word_count"] == 2.5


def test_message_lists_are_measured_by_the_answers_text():
    text = "one two three four five six"
    message = [{"role": "assistant", "content": text}]
    row = {"prompt": [{"role": "user", "content": "Count."}], "completion": message, "token_ids": [5]}
    assert evaluate_answers([row])["diversity"] == 0.5


def test_a_row_without_a_column_is_refused_by_its_number():
    rows = answer_rows()
    del rows[2]["weight"]
    with pytest.raises(ValueError, match=r"Row 2 lacks \['weight'\]"):
        evaluate_answers(rows)
    with pytest.raises(ValueError, match=r"Row 0 lacks \['token_ids'\]"):
        evaluate_answers([{"prompt": "a", "completion": "b"}])


def test_a_model_without_its_tokenizer_is_refused(model):
    with pytest.raises(ValueError, match="with model its tokenizer"):
        evaluate_answers(answer_rows(), model=model)
    with pytest.raises(ValueError, match="0 rows"):
        evaluate_answers([])


def test_coherence_is_a_figure_where_it_is_asked_for():
    rows = answer_rows()
    letters = Coherence(lambda texts: torch.tensor([[float(text.count("1")), 1.0] for text in texts]))
    expected = letters([row["prompt"] for row in rows], [row["completion"] for row in rows])
    assert expected[3] == 0  # the empty answer is in the mean
    assert evaluate_answers(rows, coherence=letters)["coherence"] == pytest.approx(sum(expected) / 4)


def test_judges_have_figures_of_their_own():
    row = evaluate_answers(answer_rows(), word_count, judge_funcs=[even_only, weighted])
    assert {name: value for name, value in row.items() if "/" in name} == {
        "reward/word_count": 8 / 4,
        "judge/even_only": 1.0,
        "judge/weighted": 6 / 4,
    }


def test_the_reward_that_trained_the_head_is_warned_of_as_a_judge_and_not_as_a_reward():
    control = Controller(tiny_head(reward=RewardScale(name="even_only + 2 · word_count")))
    evaluate_answers(answer_rows(), [word_count], judge_funcs=[weighted], controller=control)
    with pytest.warns(UserWarning, match="The judge 'word_count'") as caught:
        evaluate_answers(answer_rows(), judge_funcs=[word_count, weighted], controller=control)
    assert len(caught) == 1
    assert caught[0].filename == __file__


# Side effects


def test_side_effects_are_the_statistics_of_the_references_after_their_prompts(model):
    tokenizer = tiny_tokenizer()
    prompts, references = ["w9 w30", "w5", "w7"], ["w12 w33 w40", "w11", ""]
    found = side_effects(model, tokenizer, prompts, references, controller(), batch_size=1)
    statistics = token_statistics(model, [[1, 9, 30], [1, 5], [1, 7]], [[12, 33, 40], [11], []], controller())
    assert found == pytest.approx(
        {
            "n": 3,
            "kl_per_token": statistics.kl_per_token,
            "perplexity": statistics.perplexity,
            "steered_perplexity": statistics.steered_perplexity,
        },
        rel=1e-3,  # other batches than here
    )
    assert found["perplexity"] != pytest.approx(found["steered_perplexity"], rel=1e-3)


def test_no_control_has_no_side_effects(model):
    found = side_effects(model, tiny_tokenizer(), ["w9 w30"], ["w12"], None)
    assert found["kl_per_token"] == 0
    assert found["perplexity"] == found["steered_perplexity"]


def test_references_may_be_message_lists(model):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "<s>{% for message in messages %} {{ message['content'] }}{% endfor %} w63"
    asked, said = [{"role": "user", "content": "w9"}], [{"role": "assistant", "content": "w12 w33"}]
    found = side_effects(model, tokenizer, [asked], [said], controller())
    ids = tokenizer.apply_chat_template(asked, return_dict=False)
    assert found["kl_per_token"] == pytest.approx(token_statistics(model, [ids], [[12, 33]], controller()).kl_per_token)


def test_references_that_do_not_pair_are_refused(model):
    with pytest.raises(ValueError, match="2 prompts and 1 completions"):
        side_effects(model, tiny_tokenizer(), ["w9", "w8"], ["w12"], None)
