"""Replaying: answers that exist get the states, rewards and table that they would have had when they were generated."""

import pytest
import torch
from datasets import Dataset
from tiny import tiny_control_head, tiny_head, tiny_model, tiny_tokenizer
from tokenizers import processors
from transformers import AutoModelForCausalLM, GPT2Config, MambaConfig, RobertaConfig

from hf_recontrol import Controller, RolloutDataset, collect_rollouts, enable_recontrol
from hf_recontrol.control_checks import check_lm_head
from hf_recontrol.errors import CollectError, SteeringNotApplied
from hf_recontrol.fitting import fit_linear_head
from hf_recontrol.forwards import hidden_states_of
from hf_recontrol.prompts import load_prompts

pytestmark = pytest.mark.versions
PROMPTS = ["w10 w11 w12", "w20", "w30 w31 w32 w33 w34", "w40 w41", "w50", "w60 w61 w62"]
EOS = [2, 5, 9, 13, 17, 21, 25, 29, 33, 37]  # many, so that answers of a random model end
GENERATED = {"block_size": 4, "max_new_tokens": 6, "num_return_sequences": 3}
OPTIONS = {"generation_kwargs": {"eos_token_id": EOS}, "progress": False}
CHAT = "{{ '<s>' }}{% for m in messages %} {{ m['content'] }}{% endfor %}{% if add_generation_prompt %} w63{% endif %}"


def length(completions, **kwargs):
    return [float(len(str(completion).split())) for completion in completions]


def generate(folder, prompts=PROMPTS, model=None, tokenizer=None, **options):
    arguments = (model or tiny_model(), tokenizer or tiny_tokenizer(), prompts, length, folder)
    return collect_rollouts(*arguments, **(GENERATED | OPTIONS | options))


def replay(folder, data, reward=None, model=None, tokenizer=None, **options):
    data = data if isinstance(data, Dataset) else Dataset.from_list(data)
    arguments = (model or tiny_model(), tokenizer or tiny_tokenizer(), data, reward, folder)
    return collect_rollouts(*arguments, features_from="dataset", **({"block_size": 4} | OPTIONS | options))


def table(rollouts, *columns):
    """The table's rows, with all columns or these."""
    return [{name: row[name] for name in columns or row} for row in rollouts.rows()]


def assert_same(actual, expected, rtol=1e-5, atol=1e-5):
    assert len(actual) == len(expected) > 0
    for one, other in zip(actual, expected, strict=True):
        assert one["token_ids"].tolist() == other["token_ids"].tolist()
        assert one["finish_reason"] == other["finish_reason"]
        torch.testing.assert_close(one["hidden_states"], other["hidden_states"], rtol=rtol, atol=atol)
    torch.testing.assert_close(actual.rewards, expected.rewards, rtol=0, atol=0)
    torch.testing.assert_close(actual.lengths, expected.lengths, rtol=0, atol=0)


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    rollouts = generate(tmp_path_factory.mktemp("generated"))
    reasons = {row["finish_reason"] for row in rollouts.rows()}
    assert reasons == {"eos", "length", "empty"}, "the tests say too little"
    return rollouts


@pytest.mark.parametrize("side", ["left", "right"])
def test_replayed_rollouts_are_those_that_were_generated(tmp_path, generated, side):
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    rollouts = replay(tmp_path, table(generated), tokenizer=tokenizer)
    assert_same(rollouts, generated)
    own = ("prompt", "completion", "prompt_token_ids", "token_ids", "reward", "finish_reason", "length")
    assert table(rollouts, *own) == table(generated, *own)
    assert [row["prompt_id"] for row in rollouts.rows()] == list(range(18))  # of the table's rows, that is


def assert_same_from_texts(folder, rollouts, **options):
    rows = [row for row in rollouts.rows() if not {0, 1} & set(row["token_ids"])]
    assert len(rows) > 9
    columns = ("prompt", "completion", "finish_reason", "reward")
    replayed = replay(folder, [{name: row[name] for name in columns} for row in rows], **options)
    names = ("completion", "prompt_token_ids", "token_ids", "finish_reason")
    assert table(replayed, *names) == [{name: row[name] for name in names} for row in rows]
    expected = [answer for answer in rollouts if not {0, 1} & set(answer["token_ids"].tolist())]
    for one, other in zip(replayed, expected, strict=True):
        torch.testing.assert_close(one["hidden_states"], other["hidden_states"], rtol=1e-5, atol=1e-5)


def test_texts_are_enough_where_they_have_all_the_tokens(tmp_path, generated):
    assert_same_from_texts(tmp_path, generated)  # a random model also writes <pad> and <s>, which no text shows


def test_token_ids_are_enough(tmp_path, generated):
    assert_same(replay(tmp_path, table(generated, "prompt", "token_ids", "reward")), generated)


def test_completion_ids_is_trls_name_of_the_token_ids(tmp_path, generated):
    data = Dataset.from_list(table(generated, "prompt", "token_ids", "reward"))
    assert_same(replay(tmp_path, data.rename_column("token_ids", "completion_ids")), generated)


def test_a_head_fitted_to_either_is_the_same(tmp_path, generated):
    one, other = fit_linear_head(replay(tmp_path, table(generated))), fit_linear_head(generated)
    states = torch.cat([answer["hidden_states"] for answer in generated])
    torch.testing.assert_close(one(states), other(states), rtol=1e-3, atol=1e-3)


def other_model(kind):
    torch.manual_seed(0)
    bert = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    sizes = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    config = {
        "gpt2": lambda: GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3, **sizes),
        "roberta": lambda: RobertaConfig(is_decoder=True, initializer_range=0.3, **bert, **sizes),
        "mamba": lambda: MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, **sizes),
    }[kind]()
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_model_that_looks_ahead_is_refused_at_the_door(tmp_path):
    model = tiny_model()
    forward = model.model.forward

    def looking_ahead(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        outputs.last_hidden_state = outputs.last_hidden_state + outputs.last_hidden_state[:, -1:]
        return outputs

    model.model.forward = looking_ahead
    data = [{"prompt": "w10 w11", "completion": "w40 w41 w42", "reward": 1.0}]
    with pytest.raises(SteeringNotApplied, match=r"gives other hidden states than generating it, .* of their length"):
        replay(tmp_path, data, model=model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["gpt2", "roberta", "mamba"])
def test_padding_reaches_no_state_of_a_model_with_learnt_positions_or_a_recurrent_one(tmp_path, generated, kind):
    data = table(generated, "prompt", "token_ids", "reward")
    together = replay(tmp_path / "together", data, model=other_model(kind), block_size=18)
    alone = replay(tmp_path / "alone", data, model=other_model(kind), block_size=1)
    assert_same(together, alone)
    rollouts = generate(tmp_path / "generated", PROMPTS[1:2] * 6, model=other_model(kind))  # of one length: no padding
    assert_same(replay(tmp_path / "replayed", table(rollouts), model=other_model(kind)), rollouts)


def test_a_bfloat16_model_gives_bfloat16_states(tmp_path):
    model = tiny_model().bfloat16()
    rollouts = generate(tmp_path / "a", model=model)
    replayed = replay(tmp_path / "b", table(rollouts), model=model)
    assert replayed.dtype == torch.bfloat16
    assert_same(replayed, rollouts, rtol=0.1, atol=0.1)


def test_eos_stands_behind_a_completion_unless_it_was_cut(tmp_path):
    answers = [("w40 w41", None), ("w40 w41", "eos"), ("w40 w41", "length"), ("w40 w41", "stop"), ("", None)]
    data = [{"prompt": "w10", "completion": text, "finish_reason": end, "reward": 1.0} for text, end in answers]
    rows = list(replay(tmp_path, data, generation_kwargs=None).rows())
    assert [row["token_ids"] for row in rows] == [[40, 41, 2], [40, 41, 2], [40, 41], [40, 41], []]
    assert [row["finish_reason"] for row in rows] == ["eos", "eos", "length", "stop", "empty"]
    assert [row["completion"] for row in rows] == [text for text, _ in answers]
    assert len(RolloutDataset(tmp_path)) == 4


def test_given_token_ids_are_taken_as_they_are(tmp_path):
    ids = [[40, 41], [40, 2], [2], [], [40, 2, 41]]
    data = [{"prompt": "w10", "prompt_token_ids": [1, 7, 10], "completion_ids": i, "reward": 1.0} for i in ids]
    rows = list(replay(tmp_path, data, generation_kwargs=None).rows())
    assert [row["token_ids"] for row in rows] == [[40, 41], [40, 2], [], [], [40, 2, 41]]
    assert [row["finish_reason"] for row in rows] == ["length", "eos", "empty", "empty", "length"]
    assert [row["completion"] for row in rows] == ["w40 w41", "w40", "", "", "w40 w41"]
    assert {tuple(row["prompt_token_ids"]) for row in rows} == {(1, 7, 10)}


def test_of_several_eos_tokens_the_tokenizers_own_is_put(tmp_path):
    data = [{"prompt": "w10", "completion": "w40", "reward": 1.0}]
    own = replay(tmp_path / "a", data, generation_kwargs={"eos_token_id": [9, 2]})
    other = replay(tmp_path / "b", data, generation_kwargs={"eos_token_id": [9, 8]})
    assert [own[0]["token_ids"].tolist(), other[0]["token_ids"].tolist()] == [[40, 2], [40, 9]]
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(
        CollectError, match=r"Answer 0 is finished, but neither .* has an EOS token\. Set tokenizer\.eos"
    ):
        replay(tmp_path / "c", data, tokenizer=tokenizer, generation_kwargs=None)


def test_message_lists_go_through_the_chat_template(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
    rollouts = generate(tmp_path / "a", prompts, tokenizer=tokenizer)
    assert_same_from_texts(tmp_path / "texts", rollouts, tokenizer=tokenizer)
    replayed = replay(tmp_path / "ids", table(rollouts, "prompt", "reward", "token_ids"), tokenizer=tokenizer)
    assert_same(replayed, rollouts)
    for one, other in zip(replayed.rows(), rollouts.rows(), strict=True):
        assert one["prompt_token_ids"] == other["prompt_token_ids"]
        assert one["completion"] == other["completion"] or one["finish_reason"] == "empty"


def test_reward_functions_see_what_they_see_when_answers_are_generated(tmp_path, generated):
    seen = []

    def reward(prompts, completions, completion_ids, level, **kwargs):
        seen.extend(zip(prompts, completions, completion_ids, level, strict=True))
        return length(completions)

    data = Dataset.from_list(table(generated)).remove_columns("reward").add_column("level", list(range(18)))
    rollouts = replay(tmp_path, data, reward)
    assert rollouts.rewards.tolist() == generated.rewards.tolist()
    assert seen == [(r["prompt"], r["completion"], r["token_ids"], i) for i, r in enumerate(generated.rows())]


def test_an_answer_without_a_reward_is_in_the_table_only(tmp_path):
    data = [{"prompt": "w10", "completion": "w40", "reward": reward} for reward in (1.0, None, 2.5)]
    rollouts = replay(tmp_path, data)
    assert rollouts.rewards.tolist() == [1.0, 2.5]
    assert [row["reward"] for row in rollouts.rows()] == [1.0, None, 2.5]
    assert rollouts.fingerprint["rewards"] == {"reward": 1.0}


def test_what_does_not_fit_the_context_is_skipped_and_counted(tmp_path, caplog):
    lengths = [(100, 26), (100, 27), (120, 7), (120, 8)]  # with <s> and EOS: 128, 129, 129, 130 of 128
    data = [{"prompt": "w10 " * n, "completion": "w40 " * m, "reward": 1.0} for n, m in lengths]
    rollouts = replay(tmp_path, data)
    assert [row["prompt_id"] for row in rollouts.rows()] == [0]
    assert rollouts[0]["hidden_states"].shape == (27, 16)
    assert rollouts.fingerprint["skipped_prompts"] == 3
    assert "3 of 4 prompts are too long" in caplog.text
    short = replay(tmp_path / "short", data, max_prompt_tokens=101, drop_truncated=True)
    assert len(short) == 1
    with pytest.raises(CollectError, match="4 of 4 prompts are too long"):
        replay(tmp_path / "none", data, max_prompt_tokens=100)


def test_drop_truncated_keeps_no_states_of_cut_answers(tmp_path, generated):
    rollouts = replay(tmp_path, table(generated), drop_truncated=True)
    assert {answer["finish_reason"] for answer in rollouts} == {"eos"}
    assert len(list(rollouts.rows())) == 18


def test_an_interrupted_replay_is_resumed_bit_for_bit(tmp_path, generated, monkeypatch):
    data = table(generated)
    replay(tmp_path / "unbroken", data)
    calls = iter(range(11))

    def interrupted(*args, **kwargs):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return hidden_states_of(*args, **kwargs)

    monkeypatch.setattr("hf_recontrol.replay.hidden_states_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replay(tmp_path / "broken", data)
    replay(tmp_path / "broken", data)
    assert next(calls) == 8  # 5 blocks, one of them twice, and the check at the door of each call
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("broken", "unbroken")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"completion": "w41"}, "prompt_token_ids_sha256"),
        ({"finish_reason": "length"}, "prompt_token_ids_sha256"),
        ({"reward": 2.0}, "prompts_sha256"),
        ({"prompt": "w11"}, "prompt_token_ids_sha256"),
    ],
)
def test_a_folder_of_other_answers_is_refused(tmp_path, change, field):
    data = {"prompt": "w10", "completion": "w40", "finish_reason": "eos", "reward": 1.0}
    replay(tmp_path, [data])
    with pytest.raises(CollectError, match=field):
        replay(tmp_path, [data | change])
    with pytest.raises(CollectError, match=r"generation\.sampling is None there and 'own softmax' here"):
        replay(tmp_path, [data], sampling="own softmax")


def test_the_lm_head_runs_at_one_position_and_the_model_is_left_as_it_was(tmp_path, generated):
    model, seen = tiny_model(attention_dropout=0.5).train(), []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    before = [module.training for module in model.modules()], type(model)
    assert_same(replay(tmp_path, table(generated), model=model), generated)
    assert {shape[-2] for shape in seen} == {1}
    assert before == ([module.training for module in model.modules()], type(model))
    assert not model.lm_head._forward_pre_hooks


def test_an_enabled_model_with_a_default_head_gives_the_states_before_its_edit(tmp_path, generated):
    model = enable_recontrol(tiny_model())
    model.set_recontrol_defaults(tiny_head(), step_size=1.0)
    assert_same(replay(tmp_path, table(generated), model=model), generated)


def test_a_model_that_shortens_its_states_by_itself_is_refused():
    model = tiny_model()
    forward = model.model.forward

    def shortened(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        outputs.last_hidden_state = outputs.last_hidden_state[:, -1:]
        return outputs

    model.model.forward = shortened
    with pytest.raises(SteeringNotApplied, match=r"read input_ids \(1, 3\) and gave its LM head .*\(1, 1, 16\)"):
        hidden_states_of(model, input_ids=torch.tensor([[1, 10, 11]]))


def test_a_control_is_fitted_to_replayed_answers_only_where_someone_vouches_for_them(tmp_path, generated):
    unknown = replay(tmp_path / "unknown", table(generated))
    with pytest.raises(ValueError, match=r'nothing says how they were sampled.*sampling="own softmax"'):
        check_lm_head(tiny_model(), unknown)
    vouched = replay(tmp_path / "vouched", table(generated), sampling="own softmax")
    check_lm_head(tiny_model(), vouched)
    with pytest.raises(ValueError, match="collected under no control"):
        check_lm_head(tiny_model(), vouched, Controller(tiny_control_head()))
    with pytest.raises(ValueError, match=r"nats apart"):
        check_lm_head(tiny_model(seed=1), vouched)


ROW = {"prompt": "w10", "completion": "w40", "reward": 1.0}


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([ROW], {"reward": length}, r"a column 'reward' and reward_funcs; expected is one of the two"),
        ([{"prompt": "w10", "completion": "w40"}], {}, r"neither a column 'reward' nor reward_funcs"),
        ([{"prompt": "w10", "reward": 1.0}], {}, r"with the columns \['prompt', 'reward'\]"),
        ([{"completion": "w10", "reward": 1.0}], {}, "must have one called 'prompt'"),
        ([ROW], {"sampling": "softmax"}, r"sampling is 'softmax'; expected is 'own softmax'"),
        ([ROW], {"temperature": 0.5, "max_new_tokens": 7}, r"\['max_new_tokens', 'temperature'\] were given"),
        ([ROW], {"controller": Controller(tiny_head())}, r"\['controller'\] were given"),
        ([ROW | {"finish_reason": "done"}], {}, "finish_reason of answer 0 is 'done'"),
        ([ROW | {"completion": [{"role": "assistant", "content": "w40"}]}], {}, "expected is a text, of the prompt's"),
        ([ROW | {"completion_ids": [40, 64]}], {}, r"completion_ids of answer 0 is \[40, 64\].* from 0 to 63"),
        ([ROW | {"completion_ids": [-1]}], {}, r"completion_ids of answer 0 is \[-1\]"),
        ([ROW | {"prompt_token_ids": ["w10"]}], {}, r"prompt_token_ids of answer 0 is \['w10'\]"),
        ([ROW | {"completion": None}], {}, "Completion 0 is None; expected is a text"),
    ],
)
def test_what_cannot_be_replayed_is_refused_at_the_door(tmp_path, monkeypatch, rows, options, words):
    monkeypatch.setattr("hf_recontrol.replay.hidden_states_of", None)
    with pytest.raises((ValueError, CollectError), match=words):
        replay(tmp_path, rows, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "completion",
    ["w40", [], [{"role": "user", "content": "w40"}], [{"role": "assistant", "content": None}], [ROW, ROW]],
    ids=str,
)
def test_a_conversational_answer_is_one_turn_of_the_assistant(tmp_path, completion):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    data = [{"prompt": [{"role": "user", "content": "w10"}], "completion": completion, "reward": 1.0}]
    with pytest.raises(CollectError, match=r'expected is \[\{"role": "assistant", "content": "…"\}\]'):
        replay(tmp_path, data, tokenizer=tokenizer)


def test_lists_and_wrong_words_are_answered_with_the_way_out(tmp_path):
    arguments = (tiny_model(), tiny_tokenizer(), PROMPTS)
    with pytest.raises(ValueError, match=r"prompts is a list with the columns \[\]\. Make one with load_prompts"):
        collect_rollouts(*arguments, length, tmp_path, features_from="dataset")
    with pytest.raises(ValueError, match="features_from is 'file'"):
        collect_rollouts(*arguments, length, tmp_path, features_from="file")
    with pytest.raises(ValueError, match="sampling 'own softmax'; expected is features_from='generation' without"):
        collect_rollouts(*arguments, length, tmp_path, sampling="own softmax")
    with pytest.raises(ValueError, match="reward_funcs is None; answers that are generated need a reward"):
        collect_rollouts(*arguments, None, tmp_path)


def test_what_load_prompts_reads_is_replayed_as_it_is(tmp_path, generated):
    Dataset.from_list(table(generated, "prompt", "token_ids", "reward")).to_parquet(tmp_path / "answers.parquet")
    assert_same(replay(tmp_path / "a", load_prompts(tmp_path / "answers.parquet")), generated)


def test_a_prompts_tokens_do_not_depend_on_the_completion(tmp_path):
    tokenizer = tiny_tokenizer()  # which joins nothing; so a special token in front is what can go wrong
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    row = next(replay(tmp_path, [ROW], tokenizer=tokenizer).rows())
    assert (row["prompt_token_ids"], row["token_ids"]) == (tokenizer("w10")["input_ids"], [40, 2])
