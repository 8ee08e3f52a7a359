"""Metrics are pure: each is checked against a number worked out by hand, a slow formula, or a law."""

import functools
import math

import pytest
import torch
from tiny import tiny_head, tiny_model, tiny_tokenizer
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from hf_recontrol.control import ControlConfig, Controller
from hf_recontrol.evaluation import (
    best_of_n,
    best_of_n_kl_bound,
    crossed_bootstrap,
    distinct_n,
    diversity,
    evaluate_answers,
    paired_bootstrap,
    token_statistics,
    words,
)
from hf_recontrol.rewards import Rewards

PROMPTS = [[1, 9, 30], [1, 5, 8, 41, 7, 22], [1], [1, 50]]
ANSWERS = [[12, 33, 2], [40], [11, 60, 4, 9, 17, 2], []]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def controller(step_size=0.5, num_steps=3):
    return Controller(tiny_head(), ControlConfig(step_size=step_size, num_steps=num_steps))


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


# Teacher forcing


def slow_statistics(model, prompt, answer, control=None):
    """One position at a time, from the definition, by a forward of the prefix alone and the head called by hand."""
    log_probs, kl = [], []
    for t, token in enumerate(answer):
        ids = torch.tensor([prompt + answer[:t]])
        hidden_state = model.model(ids).last_hidden_state[0, -1].detach()
        log_q = model.lm_head(hidden_state).detach().log_softmax(-1)
        log_probs.append(float(log_q[token]))
        if control is not None:
            p = model.lm_head(control(hidden_state)).detach().softmax(-1)
            kl.append(float((p * (p.log() - log_q)).sum()))
    return log_probs, kl


def test_the_numbers_are_those_of_the_definition(model):
    statistics = token_statistics(model, PROMPTS, ANSWERS, controller())
    for i, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        log_probs, kl = slow_statistics(model, prompt, answer, controller())
        torch.testing.assert_close(statistics.log_probs[i], torch.tensor(log_probs))
        torch.testing.assert_close(statistics.kl[i], torch.tensor(kl), rtol=1e-4, atol=1e-6)
    assert statistics.kl_per_token > 1e-3  # else the comparison above says nothing


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()


def gemma2():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, final_logit_softcapping=0.5, initializer_range=0.5)).eval()


@pytest.mark.parametrize("make", [tiny_model, gpt2, gemma2], ids=["rope", "learned positions", "soft-capped"])
def test_a_batch_gives_what_its_rows_give_alone(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = make()
    together = token_statistics(model, PROMPTS, ANSWERS, controller())
    alone = [token_statistics(model, [p], [a], controller()) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    by_two = token_statistics(model, PROMPTS, ANSWERS, controller(), batch_size=2)
    for i, single in enumerate(alone):
        for batch in (together, by_two):
            torch.testing.assert_close(batch.log_probs[i], single.log_probs[0])
            torch.testing.assert_close(batch.kl[i], single.kl[0], rtol=1e-4, atol=1e-6)


def test_the_log_probabilities_are_those_that_a_left_padded_generate_reports(model):
    tokenizer = tiny_tokenizer()
    prompts = ["w5 w9", "w30 w31 w32 w33 w34 w8"]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    out = model.generate(
        **inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    answers = out.sequences[:, -5:]
    reported = torch.stack(out.logits, 1).log_softmax(-1).gather(-1, answers[..., None]).squeeze(-1)
    statistics = token_statistics(model, [tokenizer(p)["input_ids"] for p in prompts], answers.tolist())
    torch.testing.assert_close(torch.stack(statistics.log_probs), reported)


def test_soft_capped_logits_bound_the_kl_that_is_measured():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = gemma2()
    capped = token_statistics(model, PROMPTS, ANSWERS, controller(step_size=1000.0))
    model.config.final_logit_softcapping = None
    free = token_statistics(model, PROMPTS, ANSWERS, controller(step_size=1000.0))
    # logits in [−½, ½]: a logit changes by 1 at most, so does the normaliser, and log p by 2
    assert 0 < capped.kl_per_token < 2 < free.kl_per_token


def test_no_control_costs_no_kl_and_the_perplexity_is_the_unsteered_one(model):
    plain = token_statistics(model, PROMPTS, ANSWERS)
    still = token_statistics(model, PROMPTS, ANSWERS, controller(num_steps=0))
    steered = token_statistics(model, PROMPTS, ANSWERS, controller())
    assert plain.kl_per_token == plain.kl_per_answer == still.kl_per_answer == 0
    assert steered.kl_per_token > 0
    assert plain.perplexity == still.perplexity == steered.perplexity


def test_the_means_weigh_tokens_and_answers_as_they_say(model):
    statistics = token_statistics(model, PROMPTS, ANSWERS, controller())
    kl = [float(k) for answer in statistics.kl for k in answer]
    log_probs = [float(lp) for answer in statistics.log_probs for lp in answer]
    assert [len(answer) for answer in statistics.kl] == [3, 1, 6, 0]
    assert statistics.kl_per_token == pytest.approx(sum(kl) / 10)
    assert statistics.kl_per_answer == pytest.approx(sum(kl) / 4)  # the empty answer counts
    assert statistics.perplexity == pytest.approx(math.exp(-sum(log_probs) / 10))


def test_the_kl_summed_over_sampled_answers_is_the_kl_of_the_answers():
    # all answers of two tokens, weighted by their probability under control: KL between distributions of answers
    model, control, prompt = tiny_model(vocab_size=16), controller(), [1, 9]
    pairs = [[a, b] for a in range(16) for b in range(16)]
    base = token_statistics(model, [prompt] * len(pairs), pairs, control, batch_size=256)
    log_q = torch.stack(base.log_probs).sum(1)

    def steered_log_probs(ids):
        return model.lm_head(control(model.model(ids).last_hidden_state[:, -1])).detach().log_softmax(-1)

    first = steered_log_probs(torch.tensor([prompt]))[0]
    second = steered_log_probs(torch.tensor([[*prompt, a] for a in range(16)]))
    log_p = (first[:, None] + second).flatten()
    of_answers = (log_p.exp() * (log_p - log_q)).sum()
    per_answer = (log_p.exp() * torch.stack(base.kl).sum(1)).sum()
    torch.testing.assert_close(per_answer, of_answers, rtol=1e-4, atol=1e-6)


def test_only_empty_answers_have_no_perplexity(model):
    statistics = token_statistics(model, [[1], [1]], [[], []], controller())
    assert math.isnan(statistics.perplexity)
    assert statistics.kl_per_answer == 0


def test_a_forbidden_token_does_not_make_the_kl_nan(model):
    bias = torch.zeros(64)
    bias[[0, 3]] = -torch.inf
    handle = model.lm_head.register_forward_hook(lambda module, args, logits: logits + bias)
    try:
        statistics = token_statistics(model, PROMPTS, ANSWERS, controller())
    finally:
        handle.remove()
    assert 0 < statistics.kl_per_token < math.inf


def test_a_bfloat16_model_is_measured_in_float32():
    statistics = token_statistics(tiny_model().to(torch.bfloat16), PROMPTS, ANSWERS, controller())
    assert statistics.kl[0].dtype == statistics.log_probs[0].dtype == torch.float32
    assert statistics.perplexity == pytest.approx(token_statistics(tiny_model(), PROMPTS, ANSWERS).perplexity, rel=0.1)


def test_what_cannot_be_scored_is_refused_with_the_cure(model):
    with pytest.raises(ValueError, match=r"2 prompts and 1 completions.*Repeat a prompt"):
        token_statistics(model, [[1], [1]], [[2]])
    with pytest.raises(ValueError, match="0 completions"):
        token_statistics(model, [], [])
    with pytest.raises(ValueError, match="Begin it with the BOS token"):
        token_statistics(model, [[1], []], [[2], [2]])
    with pytest.raises(ValueError, match=r"Call model\.train\(False\)"):
        token_statistics(tiny_model().train(), [[1]], [[2]])


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


# Paired gains


def scores(n=40, answers=3, seed=0):
    return torch.randn(n, answers, generator=torch.Generator().manual_seed(seed))


def test_equal_answers_gain_nothing():
    gain = paired_bootstrap(scores(), scores())
    assert (gain.mean, gain.low, gain.high, gain.n) == (0, 0, 0, 40)


def test_a_shift_is_the_gain_and_certain():
    gain = paired_bootstrap(scores(), scores() + 0.25)
    assert (gain.mean, gain.low, gain.high) == pytest.approx((0.25, 0.25, 0.25))


def test_swapping_the_sides_mirrors_the_interval():
    there, back = paired_bootstrap(scores(), scores(seed=1)), paired_bootstrap(scores(seed=1), scores())
    assert (back.mean, back.low, back.high) == pytest.approx((-there.mean, -there.high, -there.low))
    assert there.low < there.mean < there.high


def test_prompts_are_drawn_whole_with_their_answers():
    by_prompt = paired_bootstrap(scores().mean(1), scores(seed=1).mean(1))
    repeated = paired_bootstrap(scores().repeat(1, 50), scores(seed=1).repeat(1, 20).tolist())  # no new information
    assert (repeated.low, repeated.high) == pytest.approx((by_prompt.low, by_prompt.high))


def test_pairing_takes_the_differences_of_the_prompts_out():
    hard = 100 * torch.randn(40, 1, generator=torch.Generator().manual_seed(5))
    paired, plain = paired_bootstrap(scores() + hard, scores(seed=1) + hard), paired_bootstrap(scores(), scores(seed=1))
    assert (paired.low, paired.high) == pytest.approx((plain.low, plain.high), abs=1e-4)


def test_gains_in_baseline_sd_do_not_depend_on_the_unit_of_the_reward():
    base, treated = scores().double(), scores(seed=1).double()
    in_sd = paired_bootstrap(7 * base - 3, 7 * treated - 3, in_baseline_sd=True)
    raw = paired_bootstrap(base, treated)
    assert in_sd.mean == pytest.approx(raw.mean / float(base.std()))
    assert in_sd.high == pytest.approx(raw.high / float(base.std()))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for repeat in range(400):
        base = torch.randn(40, 2, generator=generator)
        gain = paired_bootstrap(base, base + 0.3 + torch.randn(40, 2, generator=generator), resamples=400, seed=repeat)
        covered += gain.low <= 0.3 <= gain.high
    assert 0.90 <= covered / 400 <= 0.97


def test_a_seed_gives_the_same_interval_and_the_global_generator_is_left_alone():
    state = torch.random.get_rng_state()
    first, second, third = (paired_bootstrap(scores(), scores(seed=1), seed=seed, resamples=500) for seed in (0, 0, 1))
    assert first == second != third
    assert first.mean == third.mean
    torch.testing.assert_close(torch.random.get_rng_state(), state, rtol=0, atol=0)


def test_more_confidence_is_a_wider_interval():
    narrow, wide = (paired_bootstrap(scores(), scores(seed=1), confidence=c) for c in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_values_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match=r"\(40,\).*\(39,\).*the same two or more prompts"):
        paired_bootstrap(torch.zeros(40), torch.zeros(39))
    with pytest.raises(ValueError, match="two or more prompts"):
        paired_bootstrap([1.0], [2.0])
    with pytest.raises(ValueError, match="NaN or infinite"):
        paired_bootstrap([1.0, float("nan")], [2.0, 3.0])
    with pytest.raises(ValueError, match="sd is 0"):
        paired_bootstrap([1.0, 1.0], [2.0, 3.0], in_baseline_sd=True)


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


@pytest.mark.parametrize("wrong", [{"confidence": 95}, {"confidence": 0.0}, {"resamples": 0}])
def test_a_bootstrap_without_sense_is_refused(wrong):
    with pytest.raises(ValueError, match="0 < confidence < 1"):
        paired_bootstrap([1.0, 2.0], [2.0, 3.0], **wrong)


def test_a_spread_between_runs_widens_the_interval_that_one_between_prompts_leaves_narrow():
    generator = torch.Generator().manual_seed(0)
    prompts_alone = 1 + torch.randn(1, 100, generator=generator).expand(3, -1)
    gain = crossed_bootstrap(prompts_alone)
    pooled = paired_bootstrap(torch.zeros(100), prompts_alone[0])
    assert (gain.mean, gain.n) == (pytest.approx(pooled.mean), 100)
    assert (gain.low, gain.high) == (pytest.approx(pooled.low, abs=0.02), pytest.approx(pooled.high, abs=0.02))
    with_runs = crossed_bootstrap(prompts_alone + torch.tensor([[-1.0], [0.0], [1.0]]))
    assert with_runs.high - with_runs.low > 2 * (gain.high - gain.low)
    assert with_runs == crossed_bootstrap(prompts_alone + torch.tensor([[-1.0], [0.0], [1.0]]))


def test_the_crossed_interval_covers_the_truth_about_as_often_as_it_says():
    """Ten runs, thirty prompts: run, prompt and residual effects. With as few runs it is a little too narrow."""
    generator, covered = torch.Generator().manual_seed(0), 0
    for trial in range(100):
        runs, prompts, rest = (torch.randn(shape, generator=generator) for shape in ((10, 1), (1, 30), (10, 30)))
        gain = crossed_bootstrap(runs + prompts + rest, resamples=300, seed=trial)
        covered += gain.low <= 0 <= gain.high
    assert 84 <= covered <= 100


@pytest.mark.parametrize("gains", [[1.0, 2.0], [[1.0], [2.0]], torch.zeros(0, 3), [[1.0, math.nan]]])
def test_gains_that_are_not_runs_by_prompts_are_refused(gains):
    with pytest.raises(ValueError, match=r"\(runs, prompts\)"):
        crossed_bootstrap(gains)
