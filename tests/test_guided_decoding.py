"""ARGS and the prefix scorer choose as a slow loop over their formulas does, row by row and without any cache."""

import pytest
import torch
from tiny import Length, tiny_head, tiny_model, tiny_tokenizer
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from hf_recontrol import ARGSLogitsProcessor, PrefixScorerLogitsProcessor, enable_recontrol
from hf_recontrol.errors import HeadMismatch
from hf_recontrol.forwards import hidden_states_of
from hf_recontrol.rewards import Rewards

PROMPTS = ["w5 w6 w7 w8", "w9", "w10 w11"]
SMALL = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.3}


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=128, **SMALL)).eval()


def gemma2():
    """Its window of four tokens is shorter than the texts, and it caps its logits."""
    torch.manual_seed(0)
    config = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}
    return Gemma2ForCausalLM(Gemma2Config(**config, **SMALL)).eval()


MODELS = {"llama": tiny_model, "gpt2": gpt2, "gemma2": gemma2}


def batch():
    return tiny_tokenizer()(PROMPTS, return_tensors="pt", padding=True, padding_side="left")


def slowly(model, bonus, *, top_k, weight, tokens=6):
    """The greedy answer to each prompt: each alone, without padding or cache, each candidate by itself."""
    answers = []
    for prompt in PROMPTS:
        start = tiny_tokenizer()(prompt)["input_ids"]
        ids = list(start)
        for _ in range(tokens):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            candidates = logits.argsort(descending=True)[:top_k].tolist()
            scores = [float(logits[v]) + weight * bonus(prompt, ids, ids[len(start) :], v) for v in candidates]
            ids.append(candidates[scores.index(max(scores))])
            if ids[-1] == 2:
                break
        answers.append(ids[len(start) :])
    return answers


def new_tokens(sequences):
    """Without what follows EOS."""
    found = sequences[:, batch()["input_ids"].shape[1] :].tolist()
    return [ids[: ids.index(2) + 1] if 2 in ids else ids for ids in found]


def letters(prompts, completions, completion_ids, **_):
    """Looks at all that it is given."""
    given = zip(prompts, completions, completion_ids, strict=True)
    return [((7 * len(p) + 3 * sum(map(ord, c)) + sum(ids)) % 11) / 3 for p, c, ids in given]


@pytest.mark.versions
@pytest.mark.parametrize("weight", [0.0, 1.5])
@pytest.mark.parametrize("architecture", MODELS)
def test_args_chooses_as_a_slow_loop_does(architecture, weight):
    model, inputs = MODELS[architecture](), batch()

    def bonus(prompt, ids, new, token):
        text = tiny_tokenizer().decode([*new, token], skip_special_tokens=True)
        return letters([prompt], [text], [[*new, token]])[0]

    processor = ARGSLogitsProcessor(letters, tiny_tokenizer(), PROMPTS, inputs["input_ids"].shape[1], weight=weight)
    sequences = model.generate(
        **inputs, max_new_tokens=6, do_sample=False, logits_processor=[processor], eos_token_id=2, pad_token_id=0
    )
    assert new_tokens(sequences) == slowly(model, bonus, top_k=10, weight=weight)


@pytest.mark.versions
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("weight", [0.0, 4.0])
@pytest.mark.parametrize("architecture", MODELS)
def test_the_prefix_scorer_chooses_as_a_slow_loop_does(architecture, weight, use_cache):
    model, inputs, head = MODELS[architecture](), batch(), tiny_head()

    def bonus(prompt, ids, new, token):
        read = ids if token == 2 else [*ids, token]
        return head(hidden_states_of(model, input_ids=torch.tensor([read]))[0, -1]).item()

    settings = {"top_k": 5, "weight": weight, "eos_token_id": 2, "use_cache": use_cache}
    processor = PrefixScorerLogitsProcessor(model, head, inputs["attention_mask"], **settings)
    sequences = model.generate(
        **inputs, max_new_tokens=6, do_sample=False, logits_processor=[processor], eos_token_id=2, pad_token_id=0
    )
    assert new_tokens(sequences) == slowly(model, bonus, top_k=5, weight=weight)


def test_the_formulas_matter_to_what_is_chosen():
    """Else the tests above would compare plain decoding with itself."""
    model, inputs = tiny_model(), batch()
    plain = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    args = ARGSLogitsProcessor(letters, tiny_tokenizer(), PROMPTS, inputs["input_ids"].shape[1], weight=1.5)
    scorer = PrefixScorerLogitsProcessor(model, tiny_head(), inputs["attention_mask"], top_k=5, weight=4.0)
    for processor in (args, scorer):
        steered = model.generate(**inputs, max_new_tokens=6, do_sample=False, logits_processor=[processor])
        assert not torch.equal(steered, plain)


@pytest.mark.parametrize("use_cache", [True, False])
def test_beams_that_change_places_are_read_again(use_cache):
    model, inputs, head = tiny_model(), batch(), tiny_head()
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    mask = inputs["attention_mask"]
    processor = PrefixScorerLogitsProcessor(model, head, mask, top_k=5, weight=4.0, use_cache=use_cache)
    found = model.generate(**inputs, **options, logits_processor=[processor])
    fresh = lambda ids, scores: PrefixScorerLogitsProcessor(model, head, mask, top_k=5, weight=4.0)(ids, scores)  # noqa: E731
    assert torch.equal(found, model.generate(**inputs, **options, logits_processor=[fresh]))


def test_rows_of_one_prompt_have_its_text():
    seen = []

    def reward(prompts, completions, **_):
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(prompts)

    inputs = batch()
    processor = ARGSLogitsProcessor(reward, tiny_tokenizer(), PROMPTS, inputs["input_ids"].shape[1], top_k=2)
    processor(inputs["input_ids"].repeat_interleave(2, 0), torch.arange(64.0).expand(6, 64))
    assert [prompt for prompt, _ in seen] == [prompt for prompt in PROMPTS for _ in range(4)]
    assert [text for _, text in seen] == ["w63", "w62"] * 6


def test_messages_and_columns_go_to_the_reward():
    seen = {}
    messages = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]

    def reward(**columns):
        seen.update(columns)
        return [0.0] * len(columns["prompts"])

    columns = {"topic": ["a", "b", "c"]}
    processor = ARGSLogitsProcessor(reward, tiny_tokenizer(), messages, 1, top_k=1, columns=columns)
    processor(torch.tensor([[1, 5], [1, 6], [1, 7]]), torch.arange(64.0).expand(3, 64))
    assert seen["prompts"] == messages
    assert seen["completions"][0] == [{"role": "assistant", "content": "w5 w63"}]
    assert seen["completion_ids"] == [[5, 63], [6, 63], [7, 63]]
    assert seen["topic"] == ["a", "b", "c"]


def test_answers_that_have_ended_are_not_scored():
    counted = []

    def reward(prompts, **_):
        counted.append(len(prompts))
        return [1.0] * len(prompts)

    processor = ARGSLogitsProcessor(reward, tiny_tokenizer(), PROMPTS, 1, top_k=4)
    scores = torch.zeros(3, 64)
    processed = processor(torch.tensor([[1, 5], [1, 2], [1, 7]]), scores)
    assert counted == [8]
    assert processed.isfinite().sum(-1).tolist() == [4, 4, 4]
    processor(torch.tensor([[1, 2], [1, 2], [1, 2]]), scores)
    assert counted == [8]


def test_bad_settings_and_batches_are_refused():
    model, head, mask = tiny_model(), tiny_head(), batch()["attention_mask"]
    with pytest.raises(ValueError, match="top_k is 0"):
        ARGSLogitsProcessor(Length(), tiny_tokenizer(), PROMPTS, 1, top_k=0)
    with pytest.raises(ValueError, match="weight inf"):
        PrefixScorerLogitsProcessor(model, head, mask, weight=float("inf"))
    with pytest.raises(HeadMismatch, match="8 wide"):
        PrefixScorerLogitsProcessor(model, tiny_head(hidden_size=8), mask)
    processor = PrefixScorerLogitsProcessor(model, head, mask)
    with pytest.raises(ValueError, match="4 rows, but the processor was made for 3 prompts"):
        processor(torch.ones(4, 5, dtype=torch.long), torch.zeros(4, 64))
    unrewarded = ARGSLogitsProcessor(lambda prompts, **_: [None] * len(prompts), tiny_tokenizer(), PROMPTS, 1)
    with pytest.raises(ValueError, match="gave no reward for the candidate"):
        unrewarded(torch.ones(3, 2, dtype=torch.long), torch.zeros(3, 64))


def test_a_cache_that_cannot_be_copied_is_refused(monkeypatch):
    model = tiny_model()
    processor = PrefixScorerLogitsProcessor(model, tiny_head(), batch()["attention_mask"])
    states = torch.zeros(3, 16)
    monkeypatch.setattr("hf_recontrol.guided_decoding.last_hidden_states", lambda *_, **__: (states, None))
    with pytest.raises(ValueError, match="use_cache=False"):
        processor(batch()["input_ids"], torch.zeros(3, 64))


def test_a_steered_generate_of_the_same_model_is_not_disturbed():
    """RE-Control and a prefix scorer together: the scorer's own forwards are neither edited nor counted."""
    model, inputs, head = tiny_model(), batch(), tiny_head()
    enable_recontrol(model)
    kept = []

    class Kept(PrefixScorerLogitsProcessor):
        def _bonus(self, input_ids, candidates):
            kept.append((input_ids, candidates, super()._bonus(input_ids, candidates)))
            return kept[-1][2]

    processor = Kept(model, head, inputs["attention_mask"], top_k=5, weight=1.0)
    model.generate(
        **inputs, max_new_tokens=4, logits_processor=[processor], recontrol_value_head=tiny_head(1), do_sample=False
    )
    again = PrefixScorerLogitsProcessor(model, head, inputs["attention_mask"], top_k=5, weight=1.0)
    assert len(kept) == 4
    for input_ids, candidates, bonus in kept:
        torch.testing.assert_close(again._bonus(input_ids, candidates), bonus)


def test_rewards_made_once_are_used_as_they_are():
    rewards = Rewards(Length())
    assert ARGSLogitsProcessor(rewards, tiny_tokenizer(), PROMPTS, 1).rewards is rewards
