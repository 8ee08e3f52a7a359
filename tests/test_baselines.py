"""Every method of a comparison answers the same prompts in the same batches; each does what its formula says."""

from dataclasses import replace

import pytest
import torch
from tiny import Length, tiny_head, tiny_model, tiny_tokenizer

from hf_recontrol import ControlConfig, enable_recontrol
from hf_recontrol.baselines import (
    ARGS,
    Base,
    BestOfN,
    Blockwise,
    Checkpoint,
    PrefixScorer,
    Prompted,
    Steered,
)
from hf_recontrol.forwards import hidden_states_of
from hf_recontrol.generation import RecontrolGenerationMixin
from hf_recontrol.rewards import Rewards
from hf_recontrol.sampling import Sampler

PROMPTS = ["w5 w6 w7 w8", "w9", "w10 w11", "w12 w13 w14"]
GREEDY = {"do_sample": False, "eos_token_id": [2, 5, 9]}
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"


@pytest.fixture
def sampler():
    return Sampler(
        tiny_model(),
        tiny_tokenizer(),
        max_new_tokens=8,
        batch_size=3,
        generation={"eos_token_id": [2, 5, 9], "do_sample": True},
    )


def by_last_token(completion_ids, **_):
    return [float(ids[-1] % 3) for ids in completion_ids]


def methods():
    head, rewards = tiny_head(), Rewards(Length())
    return [
        Base(),
        Steered("RE-Control", head, ControlConfig(step_size=2.0, num_steps=3)),
        Checkpoint("DPO", tiny_model(seed=1)),
        ARGS(rewards, weight=2.0, top_k=3),
        PrefixScorer(head, weight=2.0, top_k=3),
        BestOfN(rewards, 4),
        Blockwise(head, size=3, block=3),
        Prompted(Base(), "w20 w21 "),
        Prompted(PrefixScorer(head, top_k=3), "w20 w21 "),
    ]


@pytest.mark.parametrize("method", methods(), ids=lambda method: method.name)
def test_a_method_answers_each_prompt_and_the_same_each_time(method, sampler):
    answers = method.answer(sampler, PROMPTS, 2)
    assert [[row["prompt"] for row in rows] for rows in answers] == [[prompt] * 2 for prompt in PROMPTS]
    for row in (row for rows in answers for row in rows):
        assert 1 <= len(row["token_ids"]) <= 8
        assert row["completion"] == sampler.tokenizer.decode(row["token_ids"], skip_special_tokens=True)
        assert not set(row["token_ids"][:-1]) & {2, 5, 9}  # cut where it ends
    again = [[row["token_ids"] for row in rows] for rows in method.answer(sampler, PROMPTS, 2)]
    assert again == [[row["token_ids"] for row in rows] for rows in answers]
    assert not isinstance(sampler.model, RecontrolGenerationMixin)  # left as it was found
    other = method.answer(replace(sampler, seed=1), PROMPTS, 2)
    assert [[row["token_ids"] for row in rows] for rows in other] != again


def test_one_prompt_and_no_prompt_are_answered(sampler):
    for method in methods():
        assert method.answer(sampler, []) == []
        (rows,) = method.answer(sampler, PROMPTS[:1])
        assert len(rows) == 1


def test_the_methods_differ(sampler):
    found = {
        method.name: str([rows[0]["token_ids"] for rows in method.answer(sampler, PROMPTS)]) for method in methods()
    }
    assert len(set(found.values())) == len(found)


def test_base_is_plain_whatever_the_models_defaults_are(sampler):
    plain = Base().answer(sampler, PROMPTS)
    enable_recontrol(sampler.model).set_recontrol_defaults(tiny_head(), step_size=5.0)
    assert Base().answer(sampler, PROMPTS) == plain


def test_a_batch_is_left_padded_and_prompts_do_not_depend_on_their_neighbours(sampler):
    greedy = replace(sampler, generation=GREEDY)
    together = Base().answer(greedy, PROMPTS)
    assert together == [Base().answer(greedy, [prompt])[0] for prompt in PROMPTS]


def test_best_of_n_takes_the_best_of_its_own_candidates(sampler):
    candidates = sampler(PROMPTS, num_return_sequences=6)
    for rows, best in zip(candidates, BestOfN(Rewards(Length()), 3).answer(sampler, PROMPTS, 2), strict=True):
        lengths = [len(row["completion"].split()) for row in rows]
        assert best == [rows[lengths.index(max(lengths[:3]))], rows[3 + lengths[3:].index(max(lengths[3:]))]]


def test_prompting_reads_the_instruction_and_keeps_the_prompt(sampler):
    greedy = replace(sampler, generation=GREEDY)
    prompted = Prompted(Base(), "w20 w21 ").answer(greedy, PROMPTS)
    spelled = Base().answer(greedy, [f"w20 w21 {prompt}" for prompt in PROMPTS])
    assert [rows[0]["token_ids"] for rows in prompted] == [rows[0]["token_ids"] for rows in spelled]
    assert [rows[0]["prompt"] for rows in prompted] == PROMPTS


def test_messages_get_the_instruction_as_a_system_message(sampler):
    sampler.tokenizer.chat_template = TEMPLATE
    prompted = replace(sampler, instruction="w20 w21")
    user = {"role": "user", "content": "w5"}
    words = lambda messages: sampler.tokenizer.convert_ids_to_tokens(prompted.prompt_token_ids(messages))  # noqa: E731
    assert words([user]) == ["w20", "w21", "w5"]
    assert words([{"role": "system", "content": "w6"}, user]) == ["w20", "w21", "w6", "w5"]
    (rows,) = Prompted(Base(), "w20").answer(sampler, [[user]])
    assert rows[0]["prompt"] == [user]
    assert rows[0]["completion"][0]["role"] == "assistant"


def test_rewards_do_not_see_the_instruction(sampler):
    seen = []

    def reward(prompts, **_):
        seen.extend(prompts)
        return [0.0] * len(prompts)

    for method in (ARGS(Rewards(reward), top_k=2), BestOfN(Rewards(reward), 2)):
        Prompted(method, "w20 w21 ").answer(sampler, PROMPTS)
    assert set(seen) == set(PROMPTS)


@pytest.mark.parametrize("instruction", ["", "w20 w21 "])
@pytest.mark.parametrize("keep_others", [True, False])
def test_the_kl_of_a_processor_is_from_the_plain_model(sampler, keep_others, instruction):
    """Of its distribution, by hand, token by token and without a cache."""
    method = ARGS(Rewards(by_last_token), weight=2.0, top_k=3, keep_others=keep_others)
    for rows in Prompted(method, instruction).answer(sampler, PROMPTS, 2):
        for row in rows:
            read, plain = (
                sampler.tokenizer(text)["input_ids"] for text in (instruction + row["prompt"], row["prompt"])
            )
            assert row["kl"] == pytest.approx(
                [
                    _kl(sampler, read, plain, row["token_ids"][:step], keep_others)
                    for step in range(len(row["token_ids"]))
                ],
                abs=1e-4,
            )
            assert max(row["kl"]) > 0.01


def _kl(sampler, read, plain, answer, keep_others):
    with torch.no_grad():
        logits, base = (sampler.model(torch.tensor([ids + answer])).logits[0, -1] for ids in (read, plain))
    top = logits.topk(3)
    bonus = torch.tensor([float(v % 3) for v in top.indices])
    guided = logits.clone() if keep_others else torch.full_like(logits, -torch.inf)
    mean = (top.values.softmax(-1) * bonus).sum() if keep_others else 0.0
    guided[top.indices] = top.values + 2.0 * (bonus - mean)
    p = guided.softmax(-1)
    return float((p * (guided.log_softmax(-1) - base.log_softmax(-1)))[p > 0].sum())


def test_a_model_that_samples_otherwise_by_itself_is_sampled_plainly(sampler):
    plain = Base().answer(replace(sampler, generation=Sampler(None, None).generation), PROMPTS)
    sampler.model.generation_config.update(do_sample=True, temperature=0.1, top_p=0.1, top_k=2)
    assert Base().answer(replace(sampler, generation=Sampler(None, None).generation), PROMPTS) == plain


def test_without_meters_the_answers_are_the_same(sampler):
    method = ARGS(Rewards(Length()), 2.0, 3)
    bare = method.answer(replace(sampler, meters=False), PROMPTS)
    assert [[row | {"kl": None} for row in rows] for rows in method.answer(sampler, PROMPTS)] == [
        [row | {"kl": None} for row in rows] for rows in bare
    ]
    assert all("kl" not in row for rows in bare for row in rows)


def test_methods_without_a_processor_have_no_kl_yet(sampler):
    assert all("kl" not in row for rows in Base().answer(sampler, PROMPTS) for row in rows)


def test_weight_0_changes_nothing_where_others_are_kept(sampler):
    plain = Base().answer(sampler, PROMPTS)
    for method in (ARGS(Rewards(Length()), 0.0, 3, True), PrefixScorer(tiny_head(), 0.0, 3, True)):
        answers = method.answer(sampler, PROMPTS)
        assert [row["token_ids"] for (row,) in answers] == [row["token_ids"] for (row,) in plain]
        assert all(kl == 0 for (row,) in answers for kl in row["kl"])


def test_block_wise_keeps_the_continuation_of_the_highest_value(sampler):
    """A slow loop over the same candidates, each scored alone."""
    head, found = tiny_head(), Blockwise(tiny_head(), size=3, block=3).answer(sampler, PROMPTS)
    for number, prompt in enumerate(PROMPTS):
        begun = sampler.prompt_token_ids(prompt)
        answer = []
        for step, left in enumerate((3, 3, 2)):
            candidates = _candidates(sampler, PROMPTS, found, step, left)[number]
            if candidates is None:
                break
            read = [begun + answer + (new[:-1] if new[-1] in (2, 5, 9) else new) for new in candidates]
            values = [
                head(hidden_states_of(sampler.model, input_ids=torch.tensor([ids]))[0, -1]).item() for ids in read
            ]
            answer = answer + candidates[values.index(max(values))]
        assert found[number][0]["token_ids"] == answer


def _candidates(sampler, prompts, found, step, left):
    """What was drawn at a step for each prompt whose answer had not ended; None for the others."""
    before = [rows[0]["token_ids"][: 3 * step] for rows in found]
    open_ = [i for i, ids in enumerate(before) if len(ids) == 3 * step and not set(ids) & {2, 5, 9}]
    texts = [sampler.prompt_token_ids(prompts[i]) + before[i] for i in open_]
    drawn = sampler.continue_ids(texts, seed=f"0:0:{step}", num_return_sequences=3, max_new_tokens=left)
    return [drawn[open_.index(i)] if i in open_ else None for i in range(len(prompts))]


def test_methods_say_what_a_token_costs():
    costs = {method.name: method.forwards_per_token for method in methods()}
    assert costs == {
        "base": 1,
        "RE-Control": 1,
        "DPO": 1,
        "CD (ARGS)": 4,
        "CD prefix": 5,
        "best-of-4": 4,
        "CD prefix, block-wise": 3,
        "prompting": 1,
        "CD prefix + prompting": 5,
    }


def test_a_method_without_what_makes_it_one_is_refused():
    with pytest.raises(TypeError, match="head is a NoneType"):
        Steered("RE-Control", None)
    with pytest.raises(TypeError, match="model is None"):
        Checkpoint("DPO", None)
