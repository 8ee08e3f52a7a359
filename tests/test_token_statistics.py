"""Teacher forcing, checked against its definition, one position at a time."""

import math

import pytest
import torch
from steered_answers import ANSWERS, PROMPTS, controller
from tiny import tiny_model, tiny_tokenizer
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from hf_recontrol.token_statistics import token_statistics


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def slow_statistics(model, prompt, answer, control=None):
    """One position at a time, from the definition, by a forward of the prefix alone and the head called by hand."""
    log_probs, steered_log_probs, kl = [], [], []
    for t, token in enumerate(answer):
        ids = torch.tensor([prompt + answer[:t]])
        hidden_state = model.model(ids).last_hidden_state[0, -1].detach()
        log_q = model.lm_head(hidden_state).detach().log_softmax(-1)
        log_probs.append(float(log_q[token]))
        if control is not None:
            log_p = model.lm_head(control(hidden_state)).detach().log_softmax(-1)
            steered_log_probs.append(float(log_p[token]))
            kl.append(float((log_p.exp() * (log_p - log_q)).sum()))
    return log_probs, steered_log_probs, kl


def test_the_numbers_are_those_of_the_definition(model):
    statistics = token_statistics(model, PROMPTS, ANSWERS, controller())
    for i, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        log_probs, steered_log_probs, kl = slow_statistics(model, prompt, answer, controller())
        torch.testing.assert_close(statistics.log_probs[i], torch.tensor(log_probs))
        torch.testing.assert_close(statistics.steered_log_probs[i], torch.tensor(steered_log_probs))
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
            torch.testing.assert_close(batch.steered_log_probs[i], single.steered_log_probs[0])
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
    assert plain.perplexity == still.perplexity == steered.perplexity == plain.steered_perplexity
    assert still.steered_perplexity == pytest.approx(still.perplexity)
    for log_q, log_p in zip(plain.log_probs, plain.steered_log_probs, strict=True):
        torch.testing.assert_close(log_p, log_q, rtol=0, atol=0)


def test_the_means_weigh_tokens_and_answers_as_they_say(model):
    statistics = token_statistics(model, PROMPTS, ANSWERS, controller())
    kl = [float(k) for answer in statistics.kl for k in answer]
    log_probs = [float(lp) for answer in statistics.log_probs for lp in answer]
    assert [len(answer) for answer in statistics.kl] == [3, 1, 6, 0]
    assert statistics.kl_per_token == pytest.approx(sum(kl) / 10)
    assert statistics.kl_per_answer == pytest.approx(sum(kl) / 4)  # the empty answer counts
    assert statistics.perplexity == pytest.approx(math.exp(-sum(log_probs) / 10))
    steered = [float(lp) for answer in statistics.steered_log_probs for lp in answer]
    assert statistics.steered_perplexity == pytest.approx(math.exp(-sum(steered) / 10))
    assert abs(statistics.steered_perplexity / statistics.perplexity - 1) > 1e-2


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
    assert math.isnan(statistics.steered_perplexity)
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


def test_another_model_and_another_prompt_are_steering_too():
    """The KL is between the two models, each reading its own prompt, at the answer's tokens."""
    base, other = tiny_model(), tiny_model(seed=1)
    prompts, read, answers = [[1, 5], [1, 6, 7]], [[1, 9, 9, 5], [1, 6]], [[8, 9], [10, 11, 12]]
    found = token_statistics(base, prompts, answers, steered_model=other, steered_prompt_ids=read, batch_size=2)
    for i, (prompt, own, answer) in enumerate(zip(prompts, read, answers, strict=True)):
        with torch.no_grad():
            log_q, log_p = (
                model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
                for model, ids in ((base, prompt), (other, own))
            )
        torch.testing.assert_close(found.kl[i], (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-4, atol=1e-5)
        tokens = torch.tensor(answer)[:, None]
        torch.testing.assert_close(found.steered_log_probs[i], log_p.gather(1, tokens)[:, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.log_probs[i], log_q.gather(1, tokens)[:, 0], rtol=1e-4, atol=1e-5)
