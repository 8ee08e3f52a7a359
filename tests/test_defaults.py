"""set_recontrol_defaults: what a model does unless told otherwise."""

import copy
import json
import pickle
from math import inf

import numpy as np
import pytest
import torch
from steered import (
    GREEDY,
    STEER,
    STEERING,
    asked,
    calibrated,
    defaults_of,
    named,
    on_the_hub,
    stock_tokens,
    tokens,
)
from test_generation import NoToken
from test_hooks import small_batches
from tiny import prompts, tiny_head, tiny_model, tiny_tokenizer
from transformers import (
    GenerationConfig,
    LlamaForCausalLM,
    pipeline,
)

from hf_recontrol import (
    HeadMismatch,
    HeadUnavailable,
    RewardScale,
    SteeringNotApplied,
    enable_recontrol,
    register_value_heads,
    registry,
)
from hf_recontrol.steering import steered_generate_batch

pytestmark = pytest.mark.versions


@pytest.fixture
def model():
    return enable_recontrol(tiny_model())


@pytest.fixture
def head():
    return tiny_head()


# set_recontrol_defaults


def test_defaults_are_stored_replaced_and_cleared_and_the_rest_of_the_config_stays(model, head):
    model.generation_config.temperature = 0.5
    others, plain = vars(copy.deepcopy(model.generation_config)), tokens(model)
    steered = tokens(model, recontrol_value_head=head, **STEER)
    model.set_recontrol_defaults(head, step_size=2.0, num_steps=3)
    assert tokens(model) == steered != plain
    assert {name.removeprefix("recontrol_") for name in defaults_of(model)} == {"value_head", "step_size", "num_steps"}
    model.set_recontrol_defaults(tiny_head(1), step_size=4.0)
    assert {name.removeprefix("recontrol_") for name in defaults_of(model)} == {"value_head", "step_size"}
    assert tokens(model) == tokens(model, recontrol_value_head=tiny_head(1), recontrol_step_size=4.0)
    model.set_recontrol_defaults(None, num_steps=3)
    assert defaults_of(model) == {"recontrol_num_steps": 3}
    assert tokens(model, recontrol_value_head=head, recontrol_step_size=2.0) == steered
    model.set_recontrol_defaults()
    assert defaults_of(model) == {}
    assert tokens(model) == plain
    after = vars(model.generation_config)
    assert all(after[name] == value for name, value in others.items() if name != "_from_model_config")


@pytest.mark.parametrize(
    ("value_head", "defaults", "error"),
    [
        (tiny_head(), {"strength": 0.1}, "not calibrated"),
        (calibrated(), {"strength": 0.5}, r"up to 0\.4"),
        (calibrated(), {"strength": 0.1, "step_size": 0.1}, "Give one of the two"),
        (tiny_head(), {"step_size": -1}, "step_size is -1"),
        (tiny_head(), {"stepsize": 1.0}, r"no keyword 'stepsize'\. It has value_head, step_size"),
        (tiny_head(), {"config": STEERING}, "no keyword 'config'"),
        (tiny_head(), {"token": "hf_x"}, "no keyword 'token'"),
        (tiny_head(), {"strict": "yes"}, "recontrol_strict is 'yes'"),
        (tiny_head(), {"trace": 1}, "recontrol_trace is 1"),
        (tiny_head(), {"strict": True}, "asks for the same Hub id"),
        (tiny_head(hidden_size=8), {}, r"8 wide .* 16 wide"),
        ({tiny_head(): 0}, {}, "weight is 0"),
        ({}, {}, "has 0 heads"),
        ({tiny_head(1): 1.0, calibrated(2): 1.0}, {}, "differ in their num_steps"),
        (3, {}, "recontrol_value_head is of type int"),
        ("./no/such/folder", {}, "no/such/folder"),
        (None, {"step_size": -1}, "step_size is -1"),
        (None, {"num_step": 1}, "no keyword 'num_step'"),
        (None, {"strict": "yes"}, "recontrol_strict is 'yes'"),
        (None, {"trace": 1}, "recontrol_trace is 1"),
    ],
    ids=str,
)
def test_bad_defaults_are_refused_and_the_old_ones_stay(model, head, value_head, defaults, error):
    model.set_recontrol_defaults(head, max_kl=0.5)
    before, registered = defaults_of(model), dict(registry._REGISTERED)
    with pytest.raises((TypeError, ValueError, HeadUnavailable), match=error):
        model.set_recontrol_defaults(value_head, **defaults)
    assert defaults_of(model) == before
    assert registered == registry._REGISTERED


def test_new_defaults_are_checked_without_the_old_ones(model, head):
    model.set_recontrol_defaults(calibrated(), strength=0.1)
    model.set_recontrol_defaults(head)  # not calibrated, and need not be
    model.set_recontrol_defaults(head, num_steps=3)
    heads = {tiny_head(1): 1.0, calibrated(2): 1.0}
    with pytest.raises(ValueError, match="differ in their num_steps"):  # the num_steps of before will be gone
        model.set_recontrol_defaults(heads)


def test_the_weights_of_one_head_add_up_in_defaults_too(model, head, tmp_path):
    expected = tokens(model, recontrol_value_head={head: 3.0}, **STEER)
    model.set_recontrol_defaults({head: 1.0, copy.deepcopy(head): 2.0}, step_size=2.0, num_steps=3)
    assert tokens(model) == expected
    head.save_pretrained(tmp_path / "head")
    with pytest.raises(ValueError, match=r"weight is 0\.0"):
        model.set_recontrol_defaults({tmp_path / "head": 1.0, f"{tmp_path}/./head": -1.0})
    assert tokens(model) == expected


def test_defaults_in_numpys_numbers_are_saved(model, head, tmp_path):
    model.set_recontrol_defaults({head: np.float32(0.5)}, num_steps=np.int64(3), step_size=np.float32(2.0))
    model.save_pretrained(tmp_path)
    loaded = enable_recontrol(LlamaForCausalLM.from_pretrained(tmp_path))
    assert tokens(loaded) == tokens(model, recontrol_value_head={head: 0.5}, **STEER) != stock_tokens()


def test_defaults_go_with_a_saved_model_and_their_heads_must_be_registered_again(model, head, tmp_path, monkeypatch):
    expected = tokens(model, recontrol_value_head={head: 0.5}, **STEER, recontrol_max_kl=inf)
    model.set_recontrol_defaults({head: 0.5}, step_size=2.0, num_steps=3, max_kl=inf)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(registry, "_REGISTERED", {})  # as in another process
    loaded = enable_recontrol(LlamaForCausalLM.from_pretrained(tmp_path))
    assert defaults_of(loaded) == defaults_of(model)
    (name,) = loaded.generation_config.recontrol_value_head
    with pytest.raises(ValueError, match=f"The model's generation config names the head '{name}', .*registered"):
        loaded.generate(**prompts(), streamer=NoToken())
    register_value_heads({name: head})
    assert tokens(loaded) == expected
    loaded.set_recontrol_defaults()
    loaded.save_pretrained(tmp_path / "plain")
    assert "recontrol" not in (tmp_path / "plain" / "generation_config.json").read_text()


def test_defaults_of_a_stock_model_are_ignored_by_transformers_itself(model, head, tmp_path):
    model.set_recontrol_defaults(head, step_size=2.0)
    model.save_pretrained(tmp_path)
    assert tokens(LlamaForCausalLM.from_pretrained(tmp_path)) == stock_tokens()


def test_copies_keep_the_defaults(model, head):
    model.set_recontrol_defaults(head, step_size=2.0, num_steps=3)
    expected = tokens(model)
    assert expected != stock_tokens()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert tokens(twin) == expected
        twin.set_recontrol_defaults()
        assert tokens(model) == expected  # the copy's are its own


def test_a_pipeline_obeys_the_defaults(model, head):
    tokenizer = tiny_tokenizer()
    inputs = tokenizer("w5 w6 w7", return_tensors="pt")
    model.set_recontrol_defaults(head, step_size=2.0, num_steps=3)
    expected = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **GREEDY)
    text = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (answer,) = text("w5 w6 w7", **GREEDY)
    assert answer["generated_text"] == "w5 w6 w7" + tokenizer.decode(expected[0, inputs["input_ids"].shape[1] :])
    (plain,) = text("w5 w6 w7", **GREEDY, recontrol_value_head=False)
    assert plain["generated_text"] != answer["generated_text"]


def test_a_head_without_a_name_gets_one_from_its_reward_and_weights():
    names = []
    for head in (tiny_head(1), copy.deepcopy(tiny_head(1)), tiny_head(2), tiny_head(1, reward=RewardScale("brevity"))):
        model = enable_recontrol(tiny_model())
        model.set_recontrol_defaults(head)
        names.append(model.generation_config.recontrol_value_head)
    assert names[0] == names[1] != names[2]
    assert names[0].startswith("reward-")
    assert names[3].startswith("brevity-")


@pytest.mark.parametrize("difference", ["activation", "control", "reward"])
def test_heads_that_differ_in_their_config_only_have_names_of_their_own(head, difference):
    other = copy.deepcopy(head)
    if difference == "activation":
        other.config.hidden_act = "tanh"
    elif difference == "control":
        other.config.control.num_steps = 1
    else:
        other.config.reward.std = 9.0
    models = [enable_recontrol(tiny_model()) for _ in range(2)]
    for model, one in zip(models, (head, other), strict=True):
        model.set_recontrol_defaults(one)
    assert [asked(model).controller.heads for model in models] == [[head], [other]]


def test_several_heads_are_defaults_by_folder_id_and_object(model, head, hub, tmp_path):
    one, other = tiny_head(1), tiny_head(2)
    on_the_hub(hub, "user/head", one, tmp_path / "files")
    other.save_pretrained(tmp_path / "folder")
    expected = tokens(model, recontrol_value_head={head: 1.0, one: -0.5, other: 2}, **STEER)
    model.set_recontrol_defaults({head: 1.0, "user/head": -0.5, tmp_path / "folder": 2}, step_size=2.0, num_steps=3)
    assert tokens(model) == expected
    weights = json.loads(model.generation_config.to_json_string())["recontrol_value_head"]
    assert sorted(weights.values()) == [-0.5, 1.0, 2]
    assert {"user/head", str(tmp_path / "folder")} < set(weights)
    hub.reset()
    assert tokens(model) == expected
    assert not hub.log


def repetitive_prompt():
    inputs = prompts(rows=1, length=12)
    inputs["input_ids"][0, 6:] = inputs["input_ids"][0, :6]  # something to look up
    return inputs


@pytest.mark.parametrize("draft", ["stock", "enabled", "with defaults of its own"])
def test_drafts_under_defaults_are_plain_and_the_tokens_the_steered_models_own(model, head, draft):
    model.set_recontrol_defaults(head, step_size=2.0, num_steps=3)
    expected = model.generate(**repetitive_prompt(), **GREEDY)
    assistant = tiny_model(1, hidden_size=32)  # wider: the target's head would be an error here
    if draft != "stock":
        enable_recontrol(assistant)
    if draft == "with defaults of its own":
        assistant.set_recontrol_defaults(tiny_head(1, hidden_size=32), step_size=2.0)
    states, given = [], []
    assistant.model.register_forward_hook(lambda module, args, output: states.append(output.last_hidden_state))
    assistant.lm_head.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    actual = model.generate(**repetitive_prompt(), **GREEDY, assistant_model=assistant)
    assert actual.tolist() == expected.tolist()
    assert states
    for state, own in zip(given, states, strict=True):
        torch.testing.assert_close(state, own[:, -state.shape[1] :], rtol=0, atol=0)


def test_a_model_with_defaults_may_draft_for_itself_and_look_up(model, head):
    model.set_recontrol_defaults(head, step_size=2.0, num_steps=3)
    expected = model.generate(**repetitive_prompt(), **GREEDY).tolist()
    for draft in ({"assistant_model": model}, {"prompt_lookup_num_tokens": 3}):
        assert model.generate(**repetitive_prompt(), **GREEDY, **draft).tolist() == expected


def test_batches_obey_and_refuse_configs_as_generate_does(model, head):
    texts, settings = [[1, 5, 9], [1, 7, 8, 11]], {**GREEDY, "eos_token_id": 2, "pad_token_id": 0}
    register_value_heads({"polite": head})

    def singles(**keywords):
        outputs = [model.generate(torch.tensor([ids]), **settings, **keywords)[0] for ids in texts]
        return [output[len(ids) :].tolist() for output, ids in zip(outputs, texts, strict=True)]

    def batch(config, **keywords):
        config.update(**settings)
        outputs = model.generate_batch(texts, config, continuous_batching_config=small_batches(), **keywords)
        return [output.generated_tokens for output in outputs.values()]

    steered, plain = singles(recontrol_value_head=head, **STEER), singles()
    assert steered != plain
    model.set_attn_implementation("paged|eager")
    assert batch(named(step_size=2.0, num_steps=3)) == steered
    model.set_recontrol_defaults(head, step_size=2.0, num_steps=3)
    assert batch(GenerationConfig()) == steered  # the model's defaults stand behind a given config
    assert batch(named(False)) == plain
    assert batch(named(), recontrol_value_head=False) == plain
    for config, words in (
        (named("stranger"), "'stranger', which is not registered"),
        (named(step_size="1"), "In the given generation config: step_size is '1'"),
        (named(token="x"), "no keyword 'recontrol_token'"),
        (named(trace=True), "recontrol_trace is for greedy decoding"),
        (named(strict=True), "asks for the same Hub id"),
    ):
        with pytest.raises(ValueError, match=words):
            batch(config)
    with pytest.raises(ValueError, match="persistent_manager"):
        model.generate_batch(texts, persistent_manager=True)
    for given in ([], [GenerationConfig(**settings)], [named("polite")]):
        with pytest.raises(ValueError, match="not steered by its generation config"):
            model.init_continuous_batching(*given)


def test_batches_pass_on_what_is_given_by_position(model, head):
    batching, seen = small_batches(), []

    def stock(inputs, generation_config, *rest):
        seen.append((inputs, generation_config.max_new_tokens, *rest))

    steer = {"recontrol_value_head": head}
    steered_generate_batch(stock, model, ([[1, 5]], GenerationConfig(**GREEDY), batching, True), {})
    with pytest.raises(SteeringNotApplied, match="went by our hooks"):  # by this stock, which runs no forward
        steered_generate_batch(stock, model, ([[1, 5]], GenerationConfig(**GREEDY), batching, True), steer)
    assert seen == [([[1, 5]], 8, batching, True)] * 2


def test_a_config_may_ask_for_strictness(model):
    head = tiny_head(base_model_name_or_path="user/other")
    model.config._name_or_path = "user/other"
    model.set_recontrol_defaults(head, strict=True)
    tokens(model)
    model.config._name_or_path = "user/this"
    with pytest.raises(HeadMismatch, match=r"user/other.*user/this.*recontrol_strict"):
        model.generate(**prompts(), streamer=NoToken())
    with pytest.warns(UserWarning, match="user/this"):
        tokens(model, recontrol_strict=False)


SETTINGS = {**GREEDY, "eos_token_id": 2, "pad_token_id": 0}


@pytest.mark.parametrize("where", ["given", "model's"])
def test_false_gives_plain_batches_whatever_a_config_says(model, where):
    model.set_attn_implementation("paged|eager")
    given = named(token="hf_x") if where == "given" else GenerationConfig()
    given.update(**SETTINGS)
    if where == "model's":
        model.generation_config.recontrol_token = "hf_x"
    batching = small_batches()
    outputs = model.generate_batch([[1, 5]], given, continuous_batching_config=batching, recontrol_value_head=False)
    assert len(outputs) == 1


def test_a_persistent_manager_is_refused_by_position_too(model, head):
    """It would go on steering later calls that ask for nothing, or for plain text."""
    with pytest.raises(ValueError, match="persistent_manager"):
        model.generate_batch(
            [[1, 5]], GenerationConfig(**SETTINGS), small_batches(), False, False, True, recontrol_value_head=head
        )
