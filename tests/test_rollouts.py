"""Collecting: each stored state is the one that predicted its token, and an interrupted run ends as an unbroken one."""

import json
import multiprocessing
import os
import signal
import time

import pytest
import torch
from datasets import Dataset
from tiny import tiny_head, tiny_model, tiny_tokenizer
from tokenizers import processors
from transformers.utils import logging

from hf_recontrol import enable_recontrol
from hf_recontrol.errors import CollectError
from hf_recontrol.rewards import Rewards
from hf_recontrol.rollout_dataset import RolloutDataset
from hf_recontrol.rollouts import collect_rollouts

PROMPTS = ["w10 w11 w12", "w20", "w30 w31 w32 w33 w34", "w40 w41", "w50", "w60 w61 w62"]
EOS = [2, 5, 9, 13, 17, 21, 25, 29, 33, 37]  # many, so that answers of a random model end
OPTIONS = {"block_size": 2, "max_new_tokens": 6, "generation_kwargs": {"eos_token_id": EOS}, "progress": False}


def length(completions, **kwargs):
    return [float(len(completion.split())) for completion in completions]


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def other_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "w3"
    return tokenizer


def collect(folder, prompts=PROMPTS, reward=length, model=None, tokenizer=None, **options):
    model, tokenizer = model or tiny_model(), tokenizer or tiny_tokenizer()
    return collect_rollouts(model, tokenizer, prompts, reward, folder, **(OPTIONS | options))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".tmp"}


def rows(folder):
    return list(RolloutDataset(folder).rows())


def test_each_state_is_the_one_that_predicts_its_token(tmp_path, model, tokenizer):
    dataset = collect(tmp_path, num_return_sequences=3, block_size=4)
    assert {row["finish_reason"] for row in dataset.rows()} == {"eos", "length", "empty"}, "the test says too little"
    answers = [row for row in dataset.rows() if row["length"]]
    assert len(dataset) == len(answers)
    for item, row in zip(dataset, answers, strict=True):
        assert item["token_ids"].tolist() == row["token_ids"]
        prompt = tokenizer(row["prompt"])["input_ids"]
        with torch.no_grad():  # one answer at a time, with no padding and no cache
            states = model.model(torch.tensor([prompt + row["token_ids"]])).last_hidden_state[0]
        torch.testing.assert_close(item["hidden_states"], states[len(prompt) - 1 : -1], rtol=1e-4, atol=1e-5)


def test_an_answer_ended_by_eos_keeps_it_and_its_state_as_the_last(tmp_path):
    dataset = collect(tmp_path, num_return_sequences=3)
    for item in dataset:
        *before, last = item["token_ids"].tolist()
        assert not set(before) & set(EOS)
        assert (last in EOS) == (item["finish_reason"] == "eos")
        if item["finish_reason"] == "length":
            assert len(before) + 1 == 6
    for row in dataset.rows():
        assert row["length"] == len(row["token_ids"])
        if row["finish_reason"] == "empty":
            assert (row["token_ids"], row["length"]) == ([], 0)


def test_rewards_and_texts_are_those_of_the_answers(tmp_path, tokenizer):
    seen = []

    def reward(prompts, completions, completion_ids, **kwargs):
        seen.extend(zip(prompts, completions, completion_ids, strict=True))
        return [None if completion == seen[0][1] else float(len(completion)) for completion in completions]

    dataset = collect(tmp_path, reward=reward, num_return_sequences=2)
    for (prompt, completion, ids), row in zip(seen, dataset.rows(), strict=True):
        assert (row["prompt"], row["completion"]) == (prompt, completion)
        assert completion == tokenizer.decode(ids, skip_special_tokens=True)
        assert ids[: row["length"]] == row["token_ids"]
        assert len(ids) == max(row["length"], 1)  # as in TRL, EOS is among them, and no padding
        assert row["reward"] == row["rewards"]["reward"] == (None if completion == seen[0][1] else len(completion))
    scored = [row["reward"] for row in dataset.rows() if row["reward"] is not None and row["length"]]
    assert dataset.rewards.tolist() == scored


@pytest.mark.parametrize("pad", ["none", "eos"])
def test_eos_is_not_taken_for_padding_where_they_are_one_token(tmp_path, pad):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None if pad == "none" else "</s>"
    expected = collect(tmp_path / "pad", num_return_sequences=2)
    dataset = collect(tmp_path / "eos", num_return_sequences=2, tokenizer=tokenizer)
    assert list(dataset.rows()) == list(expected.rows())
    for one, other in zip(dataset, expected, strict=True):
        torch.testing.assert_close(one["hidden_states"], other["hidden_states"], rtol=0, atol=0)


def test_an_encoder_decoder_is_refused_at_the_door(tmp_path, model, tokenizer):
    model.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="LlamaForCausalLM is an encoder-decoder"):
        collect(tmp_path, model=model, tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


def test_nothing_of_the_callers_is_changed(tmp_path):
    model, tokenizer = tiny_model(attention_dropout=0.5).train(), tiny_tokenizer()
    model.model.layers[1].train(False)
    tokenizer.pad_token = None
    before = (
        [module.training for module in model.modules()],
        type(model),
        model.generation_config.to_dict(),
        tokenizer.padding_side,
        tokenizer.special_tokens_map,
        torch.get_rng_state().tolist(),
        logging.is_progress_bar_enabled(),
    )
    collect(tmp_path, model=model, tokenizer=tokenizer)
    assert before == (
        [module.training for module in model.modules()],
        type(model),
        model.generation_config.to_dict(),
        tokenizer.padding_side,
        tokenizer.special_tokens_map,
        torch.get_rng_state().tolist(),
        logging.is_progress_bar_enabled(),
    )


def test_the_callers_random_state_does_not_matter(tmp_path):
    collect(tmp_path / "a")
    torch.manual_seed(99)
    collect(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_seeds_and_blocks_sample_differently(tmp_path):
    same = ["w10 w11"] * 4
    texts = [row["completion"] for row in collect(tmp_path / "a", same, num_return_sequences=4).rows()]
    other = [row["completion"] for row in collect(tmp_path / "b", same, num_return_sequences=4, seed=1).rows()]
    assert texts != other
    assert texts[:8] != texts[8:]


class Interrupt:
    """A reward function that is interrupted at its n-th call."""

    def __init__(self, at):
        self.at = at
        self.__name__ = "length"

    def __call__(self, completions, **kwargs):
        self.at -= 1
        if self.at < 0:
            raise KeyboardInterrupt
        return length(completions)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_interrupted_run_is_resumed_bit_for_bit(tmp_path, at):
    collect(tmp_path / "unbroken", reward=Interrupt(3))
    with pytest.raises(KeyboardInterrupt):
        collect(tmp_path / "broken", reward=Interrupt(at))
    if at:
        assert RolloutDataset(tmp_path / "broken").rewards.numel() <= 2 * at
    counted = Interrupt(3 - at)  # enough for what is left, and for no more
    collect(tmp_path / "broken", reward=counted)
    assert contents(tmp_path / "broken") == contents(tmp_path / "unbroken")
    assert counted.at == 0


def slow_length(completions, **kwargs):
    time.sleep(0.1)
    return length(completions)


def _collect_slowly(folder):
    torch.set_num_threads(1)
    collect(folder, PROMPTS * 3, reward=slow_length)


def test_kill_9_costs_the_block_in_flight_and_nothing_else(tmp_path):
    collect(tmp_path / "unbroken", PROMPTS * 3, reward=slow_length)
    process = multiprocessing.get_context("fork").Process(target=_collect_slowly, args=(tmp_path / "killed",))
    process.start()
    deadline = time.monotonic() + 30
    while not (tmp_path / "killed" / "block-00002.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    kept = (tmp_path / "killed" / "manifest.jsonl").read_bytes()
    assert 2 <= kept.count(b"\n") - 1 < 9
    collect(tmp_path / "killed", PROMPTS * 3, reward=slow_length)
    assert contents(tmp_path / "killed") == contents(tmp_path / "unbroken")


def test_a_complete_folder_is_returned_without_generating(tmp_path, monkeypatch):
    before = collect(tmp_path)
    monkeypatch.setattr("hf_recontrol.rollout_blocks.generate_with_hidden_states", None)
    assert len(collect(tmp_path)) == len(before)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"temperature": 0.5}, r"generation.temperature is 1.0 there and 0.5 here"),
        ({"max_new_tokens": 7}, r"generation.max_new_tokens is 6 there and 7 here"),
        ({"stop_strings": "w3"}, r"generation.stop_strings"),
        ({"block_size": 3}, "block_size is 2 there and 3 here"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"drop_truncated": True}, "drop_truncated"),
        ({"prompts": [*PROMPTS[:-1], "w3"]}, "prompts_sha256"),
        ({"prompts": PROMPTS[:-1]}, "prompts is 6 there and 5 here"),
        ({"columns": {"answer": [1] * 6}}, "prompts_sha256"),
        ({"reward_weights": [2.0]}, r"rewards.length is 1.0 there and 2.0 here"),
        ({"reward": lambda completions, **kwargs: length(completions)}, "rewards"),
        ({"model": tiny_model(seed=1)}, "weights_sample_sha256"),
        ({"model": tiny_model(rms_norm_eps=0.1)}, "config_sha256"),
        ({"tokenizer": other_tokenizer()}, "tokenizer_sha256"),
        ({"model": tiny_model().bfloat16()}, "dtype is 'float32' there and 'bfloat16' here"),
    ],
)
def test_a_folder_begun_with_other_settings_is_refused_with_the_field_named(tmp_path, complete, change, field):
    before = contents(complete)
    with pytest.raises(CollectError, match=field):
        collect(complete, **change)
    assert contents(complete) == before


def test_other_collecting_code_is_refused_and_another_release_is_not(complete, monkeypatch):
    before = contents(complete)
    monkeypatch.setattr("hf_recontrol.rollout_store.package_version", lambda: "9.9.9")
    collect(complete)
    monkeypatch.setattr("hf_recontrol.rollout_settings.COLLECTOR_VERSION", 99)
    with pytest.raises(CollectError, match="collector_version is 1 there and 99 here"):
        collect(complete)
    assert contents(complete) == before


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    folder = tmp_path_factory.mktemp("complete")
    collect(folder)
    return folder


def test_a_changed_chat_template_is_seen(tmp_path):
    prompts = [[{"role": "user", "content": "w10"}]] * 2
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    reward = count_messages
    collect(tmp_path, prompts, reward, tokenizer=tokenizer)
    tokenizer.chat_template += " w11"
    with pytest.raises(CollectError, match="prompt_token_ids_sha256"):
        collect(tmp_path, prompts, reward, tokenizer=tokenizer)


def count_messages(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def test_greedy_answers_are_those_of_generate(tmp_path, model, tokenizer):
    dataset = collect(tmp_path, temperature=0, generation_kwargs=None)
    for item, prompt in zip(dataset, PROMPTS, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        expected = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0)
        assert item["token_ids"].tolist() == expected[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_models_own_sampling_defaults_do_not_leak_in(tmp_path, temperature):
    expected = collect(tmp_path / "plain", temperature=temperature)
    model = tiny_model()
    model.generation_config.update(do_sample=True, temperature=0.01, top_k=1, top_p=0.1)
    dataset = collect(tmp_path / "defaults", model=model, temperature=temperature)
    assert list(dataset.rows()) == list(expected.rows())


def test_states_are_in_the_models_dtype(tmp_path):
    dataset = collect(tmp_path, model=tiny_model().bfloat16())
    assert dataset.dtype == dataset[0]["hidden_states"].dtype == torch.bfloat16
    assert dataset.hidden_size == dataset.fingerprint["hidden_size"] == 16


def test_a_stop_string_ends_an_answer_and_the_states_after_it_are_dropped(tmp_path, tokenizer):
    plain = collect(tmp_path / "plain", temperature=0, generation_kwargs=None)
    stopping = [" ".join(row["completion"].split()[2:4]) for row in plain.rows()][:2]  # each is two tokens
    dataset = collect(tmp_path / "stop", temperature=0, generation_kwargs=None, stop_strings=stopping)
    for before, row in zip(plain.rows(), dataset.rows(), strict=True):
        found = [before["completion"].find(stop) for stop in stopping if stop in before["completion"]]
        if not found:
            assert row == before
            continue
        assert row["finish_reason"] == "stop"
        assert row["completion"] == before["completion"][: min(found)]
        kept = tokenizer.decode(row["token_ids"])
        assert any(kept.endswith(stop) for stop in stopping)  # the token that completes it is the last
        assert row["token_ids"] == before["token_ids"][: row["length"]]
        index = [r["prompt_id"] for r in dataset.rows()].index(row["prompt_id"])
        states = plain[index]["hidden_states"][: row["length"]]
        torch.testing.assert_close(dataset[index]["hidden_states"], states, rtol=1e-4, atol=1e-5)
    assert [row["finish_reason"] for row in dataset.rows()][:2] == ["stop", "stop"]


def test_padding_behind_a_stop_string_is_not_taken_for_eos(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None  # so that rows which stopped are padded with EOS
    first = next(collect(tmp_path / "plain", temperature=0, generation_kwargs=None).rows())
    stop = first["completion"].split()[1]
    dataset = collect(
        tmp_path / "stop", tokenizer=tokenizer, temperature=0, generation_kwargs=None, stop_strings=stop, block_size=6
    )
    row = next(dataset.rows())
    assert (row["finish_reason"], row["token_ids"]) == ("stop", first["token_ids"][: row["length"]])


def test_truncated_answers_are_kept_or_dropped_as_asked(tmp_path):
    kept = collect(tmp_path / "kept", num_return_sequences=3)
    dropped = collect(tmp_path / "dropped", num_return_sequences=3, drop_truncated=True)
    assert list(kept.rows()) == list(dropped.rows())  # the table has them all the same
    reasons = [item["finish_reason"] for item in kept]
    assert "length" in reasons
    assert [item["finish_reason"] for item in dropped] == [reason for reason in reasons if reason != "length"]


def test_message_lists_go_through_the_chat_template_and_come_back_as_messages(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{{ '<s>' }}{% for m in messages %} {{ m['content'] }}{% endfor %}{% if add_generation_prompt %} w63{% endif %}"
    )
    seen = []

    def reward(prompts, completions, **kwargs):
        seen.extend(completions)
        return [1.0] * len(prompts)

    prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
    begun = [{"role": "user", "content": "w10"}, {"role": "assistant", "content": "w11"}]
    chat = collect(tmp_path / "chat", [*prompts, begun], reward, tokenizer=tokenizer, temperature=0)
    texts = [*(f"{text} w63" for text in PROMPTS), "w10 w11"]
    plain = collect(tmp_path / "plain", texts, temperature=0)  # has one <s> in front, not two
    for one, other in zip(chat.rows(), plain.rows(), strict=True):
        assert one["token_ids"] == other["token_ids"]
        assert one["completion"] == [{"role": "assistant", "content": other["completion"]}]
    assert seen == [row["completion"] for row in chat.rows()]
    assert [row["prompt"] for row in chat.rows()] == [*prompts, begun]


def test_a_datasets_columns_reach_the_reward_functions(tmp_path):
    seen = {}

    def reward(prompts, completions, answer, level, **kwargs):
        assert "prompt" not in kwargs
        assert "completion" not in kwargs
        for prompt, a, b in zip(prompts, answer, level, strict=True):
            seen[prompt] = (a, b)
        return [1.0] * len(prompts)

    data = Dataset.from_dict({"prompt": PROMPTS, "answer": list(range(6)), "completion": ["x"] * 6})
    collect(tmp_path, data, reward, columns={"level": list("abcdef")}, num_return_sequences=2)
    assert seen == {prompt: (i, "abcdef"[i]) for i, prompt in enumerate(PROMPTS)}


def test_what_rewards_log_stands_in_the_table(tmp_path):
    def reward(completions, log_extra, log_metric, **kwargs):
        log_extra("words", [len(completion.split()) for completion in completions])
        log_metric("batch", len(completions))
        return [1.0] * len(completions)

    for row in collect(tmp_path, reward=reward).rows():
        assert (row["words"], row["batch"]) == (len(row["completion"].split()), 2)


def test_a_logged_column_cannot_take_the_place_of_our_own(tmp_path):
    def reward(completions, log_extra, **kwargs):
        log_extra("reward", [5.0] * len(completions))
        return [1.0] * len(completions)

    with pytest.raises(CollectError, match=r"logged \['reward'\], but the table has columns of its own"):
        collect(tmp_path, reward=reward)


def test_several_rewards_are_weighed_and_kept_apart(tmp_path):
    def one(completions, **kwargs):
        return [1.0] * len(completions)

    dataset = collect(tmp_path / "a", reward=[length, one], reward_weights=[0.5, 3.0])
    for row in dataset.rows():
        assert row["reward"] == 0.5 * row["rewards"]["length"] + 3.0
    assert dataset.fingerprint["rewards"] == {"length": 0.5, "one": 3.0}
    collect(tmp_path / "b", reward=Rewards([length, one], [0.5, 3.0]))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_rollouts_are_the_plain_models_also_where_it_is_enabled(tmp_path):
    collect(tmp_path / "stock")
    collect(tmp_path / "enabled", model=enable_recontrol(tiny_model()))
    assert contents(tmp_path / "stock") == contents(tmp_path / "enabled")
    with pytest.raises(ValueError, match="which collect_rollouts sets itself"):
        collect(tmp_path / "steered", generation_kwargs={"recontrol_value_head": tiny_head()})


@pytest.mark.parametrize("at", [0, 3, 5])
def test_a_prompt_without_room_is_skipped_and_counted_and_the_others_keep_their_ids(tmp_path, caplog, at):
    prompts = [*PROMPTS[:at], "w10 " * 122, *PROMPTS[at:]]  # with <s> 123 of 128, and 6 to come
    dataset = collect(tmp_path / "skipped", prompts)
    assert [row["prompt_id"] for row in dataset.rows()] == [i for i in range(7) if i != at]
    without = collect(tmp_path / "without")
    assert [row | {"prompt_id": 0} for row in dataset.rows()] == [row | {"prompt_id": 0} for row in without.rows()]
    for one, other in zip(dataset, without, strict=True):  # and the blocks are the same
        torch.testing.assert_close(one["hidden_states"], other["hidden_states"], rtol=0, atol=0)
    assert (dataset.fingerprint["prompts"], dataset.fingerprint["skipped_prompts"]) == (7, 1)
    assert "skipped_prompts" not in without.fingerprint
    (warning,) = caplog.messages
    assert "1 of 7 prompts are too long, the longest has 123 tokens" in warning
    assert "context of 128 must hold the answer too, here 6 tokens. They are skipped." in warning


def test_prompts_that_just_fit_are_kept(tmp_path, caplog):
    collect(tmp_path / "context", ["w10 " * 121])  # with <s> and 6 to come: 128
    collect(tmp_path / "told", PROMPTS, max_prompt_tokens=6)
    assert not caplog.messages


def test_max_prompt_tokens_skips_longer_prompts_and_an_interrupted_run_is_resumed(tmp_path):
    options = {"max_prompt_tokens": 3}  # <s> and two words
    unbroken = collect(tmp_path / "unbroken", reward=Interrupt(2), **options)
    assert [row["prompt_id"] for row in unbroken.rows()] == [1, 3, 4]
    assert (unbroken.fingerprint["max_prompt_tokens"], unbroken.fingerprint["skipped_prompts"]) == (3, 3)
    with pytest.raises(KeyboardInterrupt):
        collect(tmp_path / "broken", reward=Interrupt(1), **options)
    collect(tmp_path / "broken", reward=Interrupt(1), **options)
    assert contents(tmp_path / "broken") == contents(tmp_path / "unbroken")
    with pytest.raises(CollectError, match=r"max_prompt_tokens is 3 there and 4 here.*skipped_prompts is 3 there"):
        collect(tmp_path / "broken", reward=Interrupt(1), max_prompt_tokens=4)


def test_where_no_prompt_fits_or_one_is_empty_nothing_is_generated(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr("hf_recontrol.rollout_blocks.generate_with_hidden_states", None)
    with pytest.raises(
        CollectError, match=r"6 of 6 prompts are too long, .*max_prompt_tokens is 1.*Shorten the prompts"
    ):
        collect(tmp_path, max_prompt_tokens=1)
    with pytest.raises(ValueError, match="max_prompt_tokens is 0"):
        collect(tmp_path, max_prompt_tokens=0)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])  # no <s> in front
    with pytest.raises(CollectError, match="Prompt 1, ' ', has no tokens"):
        collect(tmp_path, ["w10", " "], tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompts": []}, "expected is a list of one text"),
        ({"prompts": "w10"}, "expected is a list of one text"),
        ({"prompts": ["w10", [{"role": "user", "content": "w11"}]]}, "all of one kind"),
        ({"prompts": [{"prompt": "w10"}]}, "of the kinds"),
        ({"prompts": [[{"role": "user", "content": "w11"}]]}, "no chat template"),
        ({"prompts": Dataset.from_dict({"text": ["w10"]})}, "must have one called 'prompt'"),
        ({"columns": {"answer": [1]}}, "'answer' has 1 values for 6 prompts"),
        ({"columns": {"log_extra": [1] * 6}}, "'log_extra', which reward functions are given by us"),
        ({"temperature": -1.0}, "expected are a temperature ≥ 0"),
        ({"temperature": float("nan")}, "expected are a temperature ≥ 0"),
        ({"top_p": 0.0}, "0 < top_p ≤ 1"),
        ({"top_k": 1.5}, "integer top_k ≥ 0"),
        ({"block_size": 0}, "block_size is 0"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"num_return_sequences": 2, "temperature": 0}, "the same answer 2 times"),
        ({"generation_kwargs": {"do_sample": True}}, r"\['do_sample'\], which collect_rollouts sets itself"),
        ({"generation_kwargs": {"logits_processor": object()}}, "plain JSON"),
        ({"reward": []}, "as many finite weights"),
    ],
)
def test_wrong_arguments_are_refused_at_the_door(tmp_path, monkeypatch, change, words):
    monkeypatch.setattr("hf_recontrol.rollout_blocks.generate_with_hidden_states", None)
    with pytest.raises(ValueError, match=words):
        collect(tmp_path, **change)
    assert not list(tmp_path.iterdir())


def test_a_wrong_reward_stops_the_run_and_keeps_what_was_committed(tmp_path):
    calls = iter(range(4))

    def length(completions, **kwargs):
        return [1.0] if next(calls) == 1 else [float(len(completion.split())) for completion in completions]

    with pytest.raises(CollectError, match="'length' returned 1 rewards for 2 completions"):
        collect(tmp_path, reward=length)
    assert [row["prompt_id"] for row in rows(tmp_path)] == [0, 1]
    collect(tmp_path, reward=length)
    assert [row["prompt_id"] for row in rows(tmp_path)] == list(range(6))


def test_the_table_is_plain_json_lines(tmp_path):
    collect(tmp_path, ["w10 é\u2028 \x85 end", "w11"])
    (line, _) = (tmp_path / "block-00000.jsonl").read_bytes().splitlines()
    assert json.loads(line)["prompt"] == "w10 é\u2028 \x85 end"


def test_progress_is_shown_unless_it_is_not_wanted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logging, "_tqdm_active", True)  # conftest turns all bars off
    collect(tmp_path / "a", progress=True)
    assert "6/6" in capsys.readouterr().err
    collect(tmp_path / "b", progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.soak
def test_memory_does_not_grow_with_the_rollouts(tmp_path):
    """10,000 answers, whose states are 160 MB: what is resident after the first thousand stays."""
    resident = []

    def reward(completions, **kwargs):
        with open("/proc/self/statm") as file:
            resident.append(int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE"))
        return length(completions)

    model = tiny_model(hidden_size=256, max_position_embeddings=64)
    prompts = [f"w{3 + i % 60} w{3 + i // 60 % 60}" for i in range(2500)]
    settings = {"num_return_sequences": 4, "block_size": 8, "max_new_tokens": 16, "generation_kwargs": None}
    dataset = collect(tmp_path, prompts, reward, model, **settings)
    bytes_of_states = int(dataset.lengths.sum()) * 256 * 4
    assert bytes_of_states > 100e6, "the test says too little"
    assert max(resident) - max(resident[: len(resident) // 10]) < 20e6
