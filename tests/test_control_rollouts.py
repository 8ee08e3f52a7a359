"""Rollouts that a control is fitted to: whose they are, under which control, and what they weigh afterwards."""

import math

import pytest
import torch
from tiny import tiny_control_head, tiny_head, tiny_model, tiny_tokenizer
from torch.utils.data import ConcatDataset, Subset
from transformers import LlamaForCausalLM

from hf_recontrol import (
    CollectError,
    ControlConfig,
    Controller,
    HeadMismatch,
    RolloutDataset,
    collect_rollouts,
    enable_recontrol,
)
from hf_recontrol.control_checks import NEUTRAL, check_lm_head, unlike_softmax
from hf_recontrol.control_fitting import advantages_of, policy_terms
from hf_recontrol.fitting import fit_linear_head, pack_answers
from hf_recontrol.forwards import forward_steered
from hf_recontrol.kl_bound import kl_divergence
from hf_recontrol.rollout_store import RolloutStore

pytestmark = pytest.mark.versions
PROMPTS = ["w10 w11 w12", "w20", "w30 w31 w32 w33 w34", "w40 w41", "w50", "w60 w61 w62"]


def count_w7(completions, **kwargs):
    return [float(completion.split().count("w7")) for completion in completions]


def collect(folder, controller=None, model=None, **options):
    options = {"num_return_sequences": 4, "max_new_tokens": 6, "block_size": 4, "progress": False} | options
    tokenizer = tiny_tokenizer()
    return collect_rollouts(
        model or tiny_model(), tokenizer, PROMPTS, count_w7, folder, controller=controller, **options
    )


def constant(u, **config):
    """A control of one constant u."""
    head = tiny_control_head(rank=0, num_hidden_layers=0)
    with torch.no_grad():
        head.output_scale.fill_(1.0)
        head.bias.copy_(u)
    return Controller(head, ControlConfig(**{"scale": 1.0} | config))


# what a control of these tests is: a small network, one that a bound holds down, and the ascent of a value head
CONTROLS = {
    "control": lambda: Controller(tiny_control_head()),
    "held": lambda: Controller(tiny_control_head(), ControlConfig(scale=2.0, max_kl=0.05)),
    "value head": lambda: Controller(tiny_head(), ControlConfig(step_size=0.3, num_steps=3)),
    "both": lambda: Controller({tiny_control_head(): 0.5, tiny_head(): -1.0}, ControlConfig(max_kl=0.3)),
}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return collect(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module", params=CONTROLS)
def steered(request, tmp_path_factory):
    """A control, and answers under it."""
    controller = CONTROLS[request.param]()
    return controller, collect(tmp_path_factory.mktemp("steered"), controller)


def ids_of(dataset, i):
    row = dataset.row(i)
    return torch.tensor([row["prompt_token_ids"] + row["token_ids"]]), len(row["prompt_token_ids"])


def test_each_row_has_the_token_ids_of_its_prompt(plain):
    for row in plain.rows():
        assert row["prompt_token_ids"] == tiny_tokenizer()(row["prompt"])["input_ids"]


def test_the_fingerprint_names_the_control_and_that_of_the_base_model_names_none(plain, steered):
    controller, rollouts = steered
    assert "control" not in plain.fingerprint
    assert rollouts.fingerprint["control"] == controller.facts()
    assert {digest for digest, _ in controller.facts()["heads"]} == {head.digest() for head in controller.heads}
    assert rollouts.fingerprint == {**plain.fingerprint, "control": controller.facts()}


def test_a_folder_begun_under_a_control_goes_on_under_that_one_only(tmp_path, monkeypatch):
    collect(tmp_path / "a", CONTROLS["control"]())
    collect(tmp_path / "plain")
    monkeypatch.setattr("hf_recontrol.rollout_blocks.generate_with_hidden_states", None)  # nothing is generated below
    assert len(collect(tmp_path / "a", CONTROLS["control"]()))
    for other in (None, constant(torch.ones(16)), Controller(tiny_control_head(), ControlConfig(scale=0.5))):
        with pytest.raises(CollectError, match=r"made with other settings: control.* there and .* here"):
            collect(tmp_path / "a", other)
    with pytest.raises(CollectError, match="control is None there"):
        collect(tmp_path / "plain", CONTROLS["control"]())


def test_the_states_are_those_before_the_edit(model, steered):
    _, rollouts = steered
    for i in range(0, len(rollouts), 3):
        ids, prompt = ids_of(rollouts, i)
        with torch.no_grad():
            states = model.model(ids).last_hidden_state[0, prompt - 1 : -1]
        torch.testing.assert_close(rollouts[i]["hidden_states"], states, rtol=1e-4, atol=1e-5)


def test_a_strong_control_makes_every_token_its_own(tmp_path, model, plain):
    push = 100 * model.lm_head.weight[9].detach()
    wanted = (model.lm_head.weight @ push).argmax().item()
    forced = collect(tmp_path / "forced", constant(push))
    assert {token for answer in forced for token in answer["token_ids"].tolist()} == {wanted}
    held = collect(tmp_path / "held", constant(push, max_kl=1e-6))  # the same push, and next to nothing of it allowed
    assert [answer["token_ids"].tolist() for answer in held] == [answer["token_ids"].tolist() for answer in plain]


def test_tokens_are_drawn_from_the_steered_distribution(tmp_path, model):
    """First tokens of many answers to one prompt against p_u, and against p of the base model, by χ²."""
    controller = Controller(tiny_control_head(), ControlConfig(scale=1.5, max_kl=0.3))
    answers = collect(
        tmp_path, controller, num_return_sequences=400, max_new_tokens=1, generation_kwargs={"eos_token_id": 64}
    )
    drawn = [answers[i]["token_ids"] for i in range(len(answers)) if answers[i]["prompt_id"] == 0]
    counts = torch.bincount(torch.cat(drawn), minlength=64).double()
    assert counts.sum() == 400
    ids = torch.tensor([tiny_tokenizer()(PROMPTS[0])["input_ids"]])
    with torch.no_grad():
        logits = forward_steered(model, controller, input_ids=ids).logits[0, -1].double()
        base = model(ids).logits[0, -1].double()
    assert kl_divergence(logits, base) == pytest.approx(0.3, abs=1e-3)  # the bound holds it

    def misfit(logits):
        expected = 400 * logits.softmax(-1)
        return ((counts - expected).square() / expected).sum().item()

    assert misfit(logits) < 63 + 5 * 126**0.5
    assert misfit(base) > 63 + 15 * 126**0.5, "the test sees nothing"


def test_p_old_is_the_distribution_that_the_token_was_drawn_from(model, steered):
    controller, rollouts = steered
    for i in range(0, len(rollouts), 5):
        ids, prompt = ids_of(rollouts, i)
        drawn = forward_steered(model, controller, input_ids=ids).logits[0, prompt - 1 : -1].log_softmax(-1)
        base = model(ids).logits[0, prompt - 1 : -1].log_softmax(-1)
        expected = (base - drawn).gather(1, rollouts[i]["token_ids"][:, None])[:, 0].detach()
        states = rollouts[i]["hidden_states"]
        terms = policy_terms(model, states, torch.zeros_like(states), rollouts[i]["token_ids"], controller)
        torch.testing.assert_close(terms.log_ratios, expected, rtol=1e-3, atol=1e-4)
        assert terms.kl.abs().max() < 1e-6  # the KL is from the base model, not from the behavior


@pytest.mark.parametrize("max_kl", [None, 50.0])
def test_at_the_behaviors_own_weights_every_ratio_is_one(tmp_path, model, max_kl):
    head = tiny_control_head()
    behavior = Controller(head, ControlConfig(max_kl=max_kl))
    batch = pack_answers(list(collect(tmp_path, behavior)))
    terms = policy_terms(model, batch["hidden_states"], head(batch["hidden_states"]), batch["token_ids"], behavior)
    assert terms.log_ratios.abs().max() < 1e-4
    assert terms.kl.mean() > 0.1


def test_the_right_model_is_accepted_alone_and_in_parts(model, plain, steered):
    controller, rollouts = steered
    train, test = plain.split(0.3)
    for dataset in (plain, train, Subset(test, [1]), ConcatDataset([train, test]), Subset(plain, [])):
        check_lm_head(model, dataset)
    check_lm_head(model, ConcatDataset([*rollouts.split(0.3)]), controller)
    twin = Controller(dict(zip(controller.heads, controller.weights, strict=True)), controller.config)
    check_lm_head(model, rollouts, twin)


def test_bfloat16_rounding_is_no_reason_to_refuse(tmp_path):
    rollouts = collect(tmp_path, model=tiny_model().bfloat16())
    check_lm_head(tiny_model().bfloat16(), rollouts)


def test_another_model_is_refused(plain):
    for other in (tiny_model(seed=1), tiny_model(seed=1).bfloat16()):
        with pytest.raises(HeadMismatch, match=r"LM head of LlamaForCausalLM.* nats apart, at most 0\.05"):
            check_lm_head(other, plain)
    broken = tiny_model()
    broken.lm_head.weight.data[:] = math.nan
    with pytest.raises(HeadMismatch, match="nan nats apart"):
        check_lm_head(broken, plain)


class Drifting(LlamaForCausalLM):
    """Logits that depend on where a token stands, too."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        length, vocabulary = outputs.logits.shape[-2:]
        outputs.logits = outputs.logits + torch.arange(length)[:, None] * torch.linspace(-1, 1, vocabulary)
        return outputs


def test_a_model_whose_logits_are_more_than_a_function_of_the_state_is_refused(plain):
    model = Drifting(tiny_model().config).eval()
    model.load_state_dict(tiny_model().state_dict())
    with pytest.raises(HeadMismatch, match="depend on more than the last hidden state cannot be used"):
        check_lm_head(model, plain)


def test_a_control_left_out_or_another_one_is_refused(model, plain, steered):
    controller, rollouts = steered
    with pytest.raises(ValueError, match="collected under a control"):
        check_lm_head(model, rollouts)
    with pytest.raises(ValueError, match="collected under no control"):
        check_lm_head(model, plain, controller)
    for other in (constant(torch.ones(16)), Controller(controller.heads[0], ControlConfig(strength=None, max_kl=7.0))):
        with pytest.raises(ValueError, match="collected under another control than behavior"):
            check_lm_head(model, rollouts, other)
    with pytest.raises(ValueError, match="collected under no control"):
        check_lm_head(model, ConcatDataset([rollouts, plain]), controller)


def test_rollouts_without_their_prompts_token_ids_are_refused(tmp_path, model, plain):
    rows = [plain.row(i) for i in range(len(plain))]
    for row in rows:
        del row["prompt_token_ids"]
    batch = pack_answers(list(plain))
    with RolloutStore(tmp_path, plain.fingerprint) as store:
        store.commit(0, *(batch[name] for name in ("hidden_states", "offsets", "rewards", "token_ids")), rows)
    for dataset in (RolloutDataset(tmp_path), list(plain)):
        with pytest.raises(ValueError, match="do not have their prompts' token ids"):
            check_lm_head(model, dataset)


def test_answers_in_memory_bring_their_own_prompts(model, plain):
    answers = [plain[i] | {"prompt_token_ids": plain.row(i)["prompt_token_ids"]} for i in range(len(plain))]
    check_lm_head(model, answers)
    with pytest.raises(HeadMismatch):
        check_lm_head(tiny_model(seed=1), answers)


def test_a_row_belongs_to_its_answer_also_after_a_split_and_past_empty_answers(tmp_path):
    ends = [2, *range(5, 64, 4)]
    dataset = collect(tmp_path, num_return_sequences=6, generation_kwargs={"eos_token_id": ends})
    reasons = [row["finish_reason"] for row in dataset.rows()]
    assert {"empty", "eos"} <= set(reasons[:-1])
    assert len(dataset) == len(reasons) - reasons.count("empty")
    for part in (dataset, *dataset.split(0.4)):
        usable = [row for row in part.rows() if row["finish_reason"] != "empty"]
        assert [part.row(i) for i in range(len(part))] == usable
        for i in range(len(part)):
            row, answer = part.row(i), part[i]
            assert row["token_ids"] == answer["token_ids"].tolist()
            assert (row["prompt_id"], row["reward"]) == (answer["prompt_id"], answer["reward"].item())


@pytest.mark.parametrize("td_lambda", [1.0, 0.0, 0.5])
def test_an_advantage_is_the_return_less_v_in_the_critics_units(plain, td_lambda):
    critic = fit_linear_head(plain)
    batch = pack_answers([plain[i] for i in range(5)])
    by_hand = []
    for i in range(5):
        values = critic(plain[i]["hidden_states"]).tolist()
        reward = (float(plain[i]["reward"]) - critic.config.reward.mean) / critic.config.reward.std
        target, targets = reward, [reward]
        for following in reversed(values[1:]):
            target = (1 - td_lambda) * following + td_lambda * target
            targets.insert(0, target)
        by_hand += [target - value for target, value in zip(targets, values, strict=True)]
    advantages = advantages_of(critic, batch, td_lambda)
    assert not advantages.requires_grad
    torch.testing.assert_close(advantages, torch.tensor(by_hand))


@pytest.mark.parametrize("sampling", [{"temperature": 0.5}, {"temperature": 0, "num_return_sequences": 1}], ids=str)
def test_answers_that_were_not_drawn_from_the_models_own_softmax_are_refused(tmp_path, model, sampling):
    rollouts = collect(tmp_path, **sampling)
    with pytest.raises(ValueError, match=r"collected with .*temperature=1, top_p=1, top_k=0"):
        check_lm_head(model, rollouts)


CHANGING = {
    "top_k": 5,
    "top_p": 0.5,
    "min_p": 0.1,
    "typical_p": 0.9,
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.01,
    "repetition_penalty": 1.1,
    "encoder_repetition_penalty": 1.1,
    "no_repeat_ngram_size": 3,
    "min_length": 4,
    "min_new_tokens": 4,
    "guidance_scale": 2.0,
    "num_beams": 2,
    "exponential_decay_length_penalty": [4, 1.5],
    "forced_eos_token_id": 2,
    "watermarking_config": {},
    "not_known_yet": 1,
}


@pytest.mark.parametrize("name", CHANGING)
def test_every_setting_that_changes_what_a_token_is_drawn_from_is_named(name):
    assert unlike_softmax({"do_sample": True, name: CHANGING[name]}) == {name: CHANGING[name]}


def test_settings_that_change_nothing_are_let_through():
    harmless = {"max_new_tokens": 8, "eos_token_id": 2, "use_cache": True, "renormalize_logits": True}
    assert unlike_softmax(harmless | {name: values[0] for name, values in NEUTRAL.items()}) == {}
    assert unlike_softmax(dict.fromkeys(CHANGING)) == {}  # None is not set


def test_a_sampling_default_of_the_model_is_refused_too(tmp_path):
    model = tiny_model()
    model.generation_config.repetition_penalty = 1.2
    with pytest.raises(ValueError, match=r"'repetition_penalty': 1\.2"):
        check_lm_head(model, collect(tmp_path, model=model))


@pytest.mark.parametrize(("config", "words"), [({"hidden_size": 32}, "is 32 wide"), ({"vocab_size": 20}, "20 tokens")])
def test_a_model_of_another_size_is_refused_by_name(plain, config, words):
    with pytest.raises(HeadMismatch, match=f"16 wide and the token id .* but LlamaForCausalLM .*{words}"):
        check_lm_head(tiny_model(**config), plain)


def test_a_controller_is_taken_as_it_is_whatever_the_models_defaults_say(tmp_path, model):
    controller = Controller(tiny_control_head(), ControlConfig(scale=1.0))
    with_defaults = enable_recontrol(tiny_model())
    with_defaults.set_recontrol_defaults(tiny_head(), step_size=1.0, max_kl=1e-4, max_relative_norm=1e-3)
    collect(tmp_path / "plain", controller)
    collect(tmp_path / "defaults", controller, model=with_defaults)
    tokens = [[row["token_ids"] for row in RolloutDataset(tmp_path / name).rows()] for name in ("plain", "defaults")]
    assert tokens[0] == tokens[1]


def test_what_is_no_controller_is_refused(tmp_path):
    with pytest.raises(TypeError, match="controller is a ControlHead; pass a Controller"):
        collect(tmp_path, tiny_control_head())
