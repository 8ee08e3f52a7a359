"""vLLM, steered: the same tokens as generate() in float32. Runs where vLLM is installed, see .ci/vllm."""

import random

import pytest
import torch
from tiny import VOCABULARY, tiny_control_head, tiny_head, tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from hf_recontrol import ControlDefaults, enable_recontrol

pytest.importorskip("vllm", reason="vLLM is not installed")
from vllm_engine import run_engine

pytestmark = pytest.mark.vllm
WIDTH = 64  # the CPU's attention takes heads of 32, not of 16
LLAMA = {"hidden_size": WIDTH, "num_attention_heads": 2, "num_key_value_heads": 2}
ASKED = [
    None,
    {"recontrol_value_head": "polite"},
    {"recontrol_value_head": "rude", "recontrol_scale": 1.5},
    {"recontrol_value_head": "polite", "recontrol_step_size": 1.0, "recontrol_num_steps": 7},
    {"recontrol_value_head": "polite", "recontrol_max_kl": 0.2},
    {"recontrol_value_head": {"polite": 1.0, "rude": -0.5}, "recontrol_step_size": 1.0, "recontrol_scale": 0.5},
    {"recontrol_value_head": "calibrated", "recontrol_strength": 0.3},
    {"recontrol_value_head": False, "recontrol_max_kl": 0.2},
]


def heads():
    """Of either kind; each carries what it needs to steer by itself."""
    polite, rude, calibrated = (
        tiny_head(1, hidden_size=WIDTH),
        tiny_control_head(2, hidden_size=WIDTH),
        tiny_head(3, hidden_size=WIDTH, num_hidden_layers=2),
    )
    polite.config.control = ControlDefaults(step_size=2.0, num_steps=3)
    table = [[0.1, 2.0], [1.0, 8.0]]
    calibrated.config.control = ControlDefaults(step_size=2.0, num_steps=4, calibration=table, calibration_num_steps=4)
    return {"polite": polite, "rude": rude, "calibrated": calibrated}


def save(model, folder):
    """The model, a tokenizer and the heads; the heads' folders by name."""
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for name, head in heads().items():
        head.save_pretrained(folder / name)
    return {name: str(folder / name) for name in heads()}


def prompt(length, seed):
    return [1, *random.Random(seed).choices(range(3, VOCABULARY), k=length - 1)]


def request(length, asked, max_tokens=20, seed=0, **more):
    return {"prompt_token_ids": prompt(length, seed), "max_tokens": max_tokens, "extra_args": asked, **more}


def generated(model, request, **more):
    """generate()'s answer to a request: all that it returns."""
    of, asked = heads(), dict(request["extra_args"] or {})
    named = asked.get("recontrol_value_head")
    if isinstance(named, dict):
        asked["recontrol_value_head"] = {of[name]: weight for name, weight in named.items()}
    elif named:
        asked["recontrol_value_head"] = of[named]
    ids = torch.tensor([request["prompt_token_ids"]])
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=request["max_tokens"],
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        **asked,
        **more,
    )


def tokens(model, request):
    return generated(model, request).sequences[0, len(request["prompt_token_ids"]) :].tolist()


def assert_as_generated(model, batch, answers):
    assert [answer[0]["token_ids"] for answer in answers] == [tokens(model, request) for request in batch]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(model, folder, head folders); the model is the one in the folder."""
    folder, model = tmp_path_factory.mktemp("llama"), tiny_model(**LLAMA)
    named = save(model, folder)
    return enable_recontrol(model), folder, named


def mixed(count=16, seed=0):
    """Requests of all kinds, short and long, that end at different times."""
    return [
        request(4 + 5 * i % 37, ASKED[i % len(ASKED)], max_tokens=6 + 7 * i % 23, seed=seed + i) for i in range(count)
    ]


MOVED = [request(3, None, max_tokens=2, seed=i) for i in range(3)] + [
    request(3, ASKED[i], max_tokens=20, seed=i) for i in (1, 2, 3)
]
"""Once the first three have ended, vLLM moves the rows of the others into their places."""


@pytest.fixture(scope="module")
def mixed_engine(llama):
    """(batches, what run_engine returns) of one engine: with chunked prefill, and fewer rows than requests."""
    _, folder, named = llama
    scored = [request(6, asked, seed=i, logprobs=5, prompt_logprobs=3) for i, asked in enumerate(ASKED)]
    drawn = [request(6, ASKED[1], n=3, temperature=1e-4, seed=5)]
    shared = [request(40, asked, seed=9) for asked in ASKED]
    overflows = {"recontrol_step_size": 1e6, "recontrol_regularization": 1e6, "recontrol_num_steps": 9}
    batches = [mixed(), MOVED, scored, drawn, shared, [request(6, ASKED[1] | overflows)]]
    engine = {"model": str(folder / "model"), "max_num_seqs": 6, "max_num_batched_tokens": 20}
    return batches, run_engine(folder, batches, heads=named, engine=engine)


@pytest.fixture
def answered(mixed_engine):
    """(batches, answers)."""
    batches, result = mixed_engine
    return batches, result["batches"]


def test_mixed_requests_in_one_batch_get_the_tokens_of_generate(llama, answered):
    batches, answers = answered
    assert_as_generated(llama[0], batches[0], answers[0])
    plain = [tokens(llama[0], one | {"extra_args": None}) for one in batches[0]]
    changed = sum(one[0]["token_ids"] != other for one, other in zip(answers[0], plain, strict=True))
    assert changed >= 10  # of 12 that are steered: else nothing would be shown


def test_rows_that_move_keep_their_head(llama, answered):
    batches, answers = answered
    assert_as_generated(llama[0], batches[1], answers[1])


def test_a_router_that_ignores_moves_is_noticed(llama):
    model, folder, named = llama
    engine = {"model": str(folder / "model"), "max_num_seqs": 6, "max_num_batched_tokens": 20}
    (answers,) = run_engine(folder, [MOVED], heads=named, engine=engine, broken="moves")["batches"]
    equal = [answer[0]["token_ids"] == tokens(model, one) for answer, one in zip(answers, MOVED, strict=True)]
    assert equal == [True, True, True, False, False, False]


def test_logprobs_are_of_the_steered_text_and_those_of_the_prompt_are_plain(llama, answered):
    batches, answers = answered
    for one, (answer,) in zip(batches[2], answers[2], strict=True):
        output = generated(llama[0], one, output_logits=True)
        assert answer["token_ids"] == output.sequences[0, 6:].tolist()
        for logits, found in zip(output.logits, answer["logprobs"], strict=True):
            expected = torch.log_softmax(logits[0].float(), -1)
            for token, logprob in found.items():
                assert logprob == pytest.approx(float(expected[int(token)]), abs=2e-4)
        with torch.no_grad():
            plain = torch.log_softmax(llama[0](torch.tensor([one["prompt_token_ids"]])).logits[0], -1)
        for place, found in enumerate(answer["prompt_logprobs"][1:]):
            for token, logprob in found.items():
                assert logprob == pytest.approx(float(plain[place, int(token)]), abs=2e-4)


def test_each_of_several_answers_to_a_prompt_is_steered(llama, answered):
    batches, answers = answered
    ((several,),), (one,) = [answers[3]], batches[3]
    assert [answer["token_ids"] for answer in several] == [tokens(llama[0], one)] * 3


def test_plain_and_steered_requests_share_the_cache_of_a_prompt(llama, mixed_engine):
    batches, result = mixed_engine
    assert_as_generated(llama[0], batches[4], result["batches"][4])
    assert result["cached"][4] >= 32 * 2  # blocks are of 32 tokens; requests of the first turn may not find one yet


def test_a_row_whose_edit_overflows_stays_plain_and_is_warned_of(llama, mixed_engine):
    batches, result = mixed_engine
    plain = [one | {"extra_args": None} for one in batches[5]]
    assert_as_generated(llama[0], plain, result["batches"][5])
    assert "1 hidden states were not finite" in result["log"]


def test_requests_that_were_preempted_get_the_tokens_of_generate(llama):
    model, folder, named = llama
    batch = [request(20, asked, max_tokens=60, seed=i) for i, asked in enumerate(ASKED)]
    engine = {"model": str(folder / "model"), "num_gpu_blocks_override": 10, "enable_prefix_caching": False}
    result = run_engine(folder, [batch], heads=named, engine=engine)
    assert result["preemptions"] > 2
    assert_as_generated(model, batch, result["batches"][0])


def test_two_processes_of_tensor_parallel_give_the_tokens_of_generate(llama):
    model, folder, named = llama
    engine = {"model": str(folder / "model"), "tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    (answers,) = run_engine(folder, [mixed()], heads=named, engine=engine)["batches"]
    assert_as_generated(model, mixed(), answers)


def test_a_compiled_model_gives_the_tokens_of_generate(llama):
    model, folder, named = llama
    engine = {"model": str(folder / "model"), "enforce_eager": False}
    (answers,) = run_engine(folder, [mixed()], heads=named, engine=engine)["batches"]
    assert_as_generated(model, mixed(), answers)


def test_the_default_head_steers_requests_that_name_none(llama):
    model, folder, named = llama
    asked = [None, {"recontrol_num_steps": 6}, {"recontrol_value_head": False}, {"recontrol_value_head": "rude"}]
    batch = [request(5, extra, seed=i) for i, extra in enumerate(asked)]
    engine = {"model": str(folder / "model")}
    (answers,) = run_engine(folder, [batch], heads=named, default="polite", engine=engine)["batches"]
    meant = [{"recontrol_value_head": "polite", **(extra or {})} for extra in asked]
    assert_as_generated(model, [one | {"extra_args": extra} for one, extra in zip(batch, meant, strict=True)], answers)


SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {
    "gpt2": {
        "n_embd": WIDTH,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 128,
        "vocab_size": VOCABULARY,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gemma2": SIZES | {"query_pre_attn_scalar": 32, "final_logit_softcapping": 5.0, "sliding_window": 64},
    "qwen3": SIZES | {"tie_word_embeddings": True},
    "granite": {name: value for name, value in SIZES.items() if name != "head_dim"} | {"logits_scaling": 3.0},
    "transformers": LLAMA,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_architecture_gives_the_tokens_of_generate(name, tmp_path):
    """gemma2 has a soft-cap, granite a scale: a max_kl must be measured behind them."""
    if name == "transformers":
        model = tiny_model(**LLAMA)
    else:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **ARCHITECTURES[name])).eval()
    named = save(model, tmp_path)
    engine = {"model": str(tmp_path / "model"), "model_impl": "transformers" if name == "transformers" else "auto"}
    (answers,) = run_engine(tmp_path, [mixed()], heads=named, engine=engine)["batches"]
    assert_as_generated(enable_recontrol(model), mixed(), answers)
