"""What a control is fitted by: the clipped objective, through the model's own LM head, and its closed form."""

import math

import pytest
import torch
from tiny import VOCABULARY, tiny_control_head, tiny_head, tiny_model, tiny_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import Subset
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

import hf_recontrol.control_fitting as control_fitting
from hf_recontrol import ControlConfig, Controller, HeadMismatch, collect_rollouts
from hf_recontrol.control_fitting import fit_constant_control, policy_losses, scores
from hf_recontrol.fitting import fit_linear_head, pack_answers
from hf_recontrol.kl_bound import kl_divergence
from hf_recontrol.objectives import clipped_gain, lambda_returns

PROMPTS = [f"w{i} w{i + 1}" for i in range(3, 62)]
WIDTH = 16


def count_w7(completions, **kwargs):
    return [float(completion.split().count("w7")) for completion in completions]


def collect(folder, model=None, reward=count_w7, **options):
    options = {"num_return_sequences": 8, "max_new_tokens": 8, "progress": False} | options
    return collect_rollouts(model or tiny_model(), tiny_tokenizer(), PROMPTS, reward, folder, **options)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    return collect(tmp_path_factory.mktemp("rollouts"))


@pytest.fixture(scope="module")
def behavior():
    return Controller(tiny_control_head(rank=0, num_hidden_layers=0))


def whole(dataset):
    return pack_answers([dataset[i] for i in range(len(dataset))])


def standard_error(x):
    return (x.std() / len(x) ** 0.5).item()


def test_the_clipped_gain_is_the_smaller_of_both_products():
    generator = torch.Generator().manual_seed(0)
    log_ratios, advantages = torch.randn(2, 200, generator=generator)
    for clip_ratio in (1.2, 2.0, 10.0):
        by_hand = [
            min(math.exp(x) * a, min(max(math.exp(x), 1 / clip_ratio), clip_ratio) * a)
            for x, a in zip(log_ratios.tolist(), advantages.tolist(), strict=True)
        ]
        torch.testing.assert_close(clipped_gain(log_ratios, advantages, clip_ratio), torch.tensor(by_hand))


def test_at_the_edges_of_the_range_nothing_is_clipped_yet():
    edges = torch.tensor([-1.0, 1.0], dtype=torch.float64) * math.log(2)
    for advantage in (1.5, -1.5):
        expected = torch.tensor([0.5, 2.0], dtype=torch.float64) * advantage
        torch.testing.assert_close(clipped_gain(edges, torch.full_like(edges, advantage), 2.0), expected)


@pytest.mark.parametrize("advantage", [1.5, -1.5, 0.0])
def test_beyond_the_range_there_is_no_gradient_on_the_gaining_side_only(advantage):
    log_ratios = torch.tensor([-1.0, -0.3, 0.0, 0.3, 1.0], requires_grad=True)
    clipped_gain(log_ratios, torch.full((5,), advantage), 2.0).sum().backward()
    expected = log_ratios.detach().exp() * advantage  # d ρA / d log ρ
    if advantage > 0:
        expected[4] = 0  # a good token that is likely enough; one that became too unlikely is still pulled back
    elif advantage < 0:
        expected[0] = 0
    torch.testing.assert_close(log_ratios.grad, expected)


KINDS = {
    "plain": (LlamaForCausalLM, None, {}, lambda z: z),
    "soft-capped": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {"final_logit_softcapping": 2.0, "head_dim": 8},
        lambda z: 2 * (z / 2).tanh(),
    ),
    "scaled": (CohereForCausalLM, CohereConfig, {"logit_scale": 0.4}, lambda z: z * 0.4),
    "divided": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 3.0}, lambda z: z / 3),
    "biased": (PhiForCausalLM, PhiConfig, {"resid_pdrop": 0.5, "embd_pdrop": 0.5}, lambda z: z),
}


def model_of(kind, **more):
    model_class, config_class, own, after = KINDS[kind]
    if config_class is None:
        return tiny_model(**more), after
    shape = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "initializer_range": 0.3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    torch.manual_seed(0)
    model = model_class(config_class(**shape | heads | tokens | own | more)).eval()
    if model.lm_head.bias is not None:
        torch.nn.init.normal_(model.lm_head.bias)
    return model, after


def some_tokens(count=11, vocabulary=VOCABULARY, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    states, u = torch.randn(2, count, WIDTH, generator=generator, dtype=dtype)
    tokens = torch.randint(vocabulary, (count,), generator=generator)
    return states, 0.3 * u, tokens, torch.randn(count, generator=generator, dtype=dtype)


def losses_in_one_piece(model, after, states, u, tokens, advantages, old_shift, beta=0.3, clip_ratio=1.5):
    """The objective as it is written, by autograd, all logits at once."""
    log_p, base, old = (after(model.lm_head(states + shift)).log_softmax(-1) for shift in (u, 0.0 * u, old_shift))
    ratios = (log_p - old).gather(1, tokens[:, None])[:, 0].exp()
    gain = torch.minimum(ratios * advantages, ratios.clamp(1 / clip_ratio, clip_ratio) * advantages)
    return beta * (log_p.exp() * (log_p - base)).sum(-1) - gain


@pytest.mark.versions
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steered", [False, True], ids=["base model's answers", "a control's answers"])
def test_losses_and_gradient_are_those_of_autograd_through_the_whole_lm_head(kind, steered, behavior, monkeypatch):
    model, after = model_of(kind)
    model = model.double()
    states, u, tokens, advantages = some_tokens()
    old_shift = behavior.control(states).double() if steered else torch.zeros_like(u)
    u.requires_grad_(True)
    weights = torch.linspace(0.5, 2, len(u), dtype=u.dtype)  # the losses of tokens may count differently
    expected = losses_in_one_piece(model, after, states, u, tokens, advantages, old_shift)
    (expected_gradient,) = torch.autograd.grad((weights * expected).sum(), u)
    for at_once in (1000, 3, 1):
        monkeypatch.setattr(control_fitting, "logits_at_once", lambda model, n=at_once: n)
        losses = policy_losses(
            model, states, u, tokens, advantages, beta=0.3, clip_ratio=1.5, behavior=behavior if steered else None
        )
        (gradient,) = torch.autograd.grad((weights * losses).sum(), u)
        # the behavior's edit is rounded to float32 by its head
        torch.testing.assert_close(losses, expected, rtol=1e-6 if steered else 1e-10, atol=1e-10)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6 if steered else 1e-10, atol=1e-10)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.versions
def test_in_bfloat16_losses_and_gradient_are_those_of_float32_but_for_rounding(model):
    states, u, tokens, advantages = some_tokens(200, dtype=torch.float32)
    found = []
    for one, dtype in ((model, torch.float32), (tiny_model().bfloat16(), torch.bfloat16)):
        shift = u.clone().requires_grad_(True)
        losses = policy_losses(one, states.to(dtype), shift, tokens, advantages, beta=0.3, clip_ratio=2.0)
        losses.sum().backward()
        found.append((losses.detach(), shift.grad))
    for exact, rounded in zip(*found, strict=True):
        assert rounded.dtype == torch.float32
        assert (rounded - exact).norm() < 0.05 * exact.norm()


@pytest.mark.versions
def test_a_token_that_the_model_forbids_spoils_neither_losses_nor_gradient():
    states, u, tokens, advantages = some_tokens(dtype=torch.float32)
    found = []
    for bias in (-torch.inf, -1e4):
        model, _ = model_of("biased")
        model.lm_head.bias.data[:2] = bias  # tokens 0 and 1
        shift = u.clone().requires_grad_(True)
        losses = policy_losses(model, states, shift, tokens.clamp(min=2), advantages, beta=0.3, clip_ratio=1.5)
        losses.sum().backward()
        found.append((losses.detach(), shift.grad, scores(model, states, tokens.clamp(min=2))))
    for forbidden, unlikely in zip(*found, strict=True):
        torch.testing.assert_close(forbidden, unlikely)


class Largest(TorchDispatchMode):
    """Sees every tensor that comes to be, backward too."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(made) if isinstance(x, torch.Tensor))])
        return made


@pytest.mark.versions
def test_no_tensor_of_all_tokens_times_the_vocabulary_comes_to_be(monkeypatch, behavior):
    model = tiny_model(vocab_size=20_000)
    states, u, tokens, advantages = some_tokens(40, 20_000, torch.float32)
    u.requires_grad_(True)

    def largest(at_once):
        monkeypatch.setattr(control_fitting, "logits_at_once", lambda model: at_once)
        with Largest() as seen:
            options = {"beta": 0.3, "clip_ratio": 2.0, "behavior": behavior}
            policy_losses(model, states, u, tokens, advantages, **options).sum().backward()
            scores(model, states, tokens)
        return seen.elements

    assert largest(4) <= max(2 * 4, WIDTH) * 20_000  # of the control and its base together; or the weights
    assert largest(40) >= 40 * 20_000, "the test sees nothing"


@pytest.mark.versions
def test_the_score_of_a_linear_lm_head_is_its_tokens_row_less_the_mean_row(model):
    states, _, tokens, _ = some_tokens(dtype=torch.float32)
    weight = model.lm_head.weight.detach()
    p = (states @ weight.T).softmax(-1)
    torch.testing.assert_close(scores(model, states, tokens), weight[tokens] - p @ weight)


@pytest.mark.versions
@pytest.mark.parametrize("kind", KINDS)
def test_the_score_is_the_gradient_of_the_tokens_log_probability(kind, monkeypatch):
    monkeypatch.setattr(control_fitting, "logits_at_once", lambda model: 3)
    model, after = model_of(kind)
    states, _, tokens, _ = some_tokens(dtype=torch.float32)
    h = states.clone().requires_grad_(True)
    after(model.lm_head(h)).log_softmax(-1)[range(len(tokens)), tokens].sum().backward()
    torch.testing.assert_close(scores(model, states, tokens), h.grad, rtol=1e-4, atol=1e-5)
    # and 0 in the mean over the model's own choices
    everything = torch.arange(VOCABULARY)
    for state in states[:3]:
        p = after(model.lm_head(state)).softmax(-1).detach()
        mean = p @ scores(model, state.expand(VOCABULARY, -1), everything)
        torch.testing.assert_close(mean, torch.zeros(WIDTH), rtol=0, atol=1e-5)


def test_the_scores_of_sampled_tokens_are_zero_in_the_mean(model, rollouts):
    batch = whole(rollouts)
    found = scores(model, batch["hidden_states"], batch["token_ids"])
    t = found.mean(0) / (found.std(0) / len(found) ** 0.5)
    assert t.square().sum() < 16 + 5 * 32**0.5  # χ² of 16 dimensions
    likeliest = model.lm_head(batch["hidden_states"]).argmax(-1)
    assert scores(model, batch["hidden_states"], likeliest).mean(0).norm() > 5 * found.mean(0).norm()


@pytest.mark.parametrize(
    "options",
    [{}, {"ridge": 0.5, "beta": 2.0, "td_lambda": 0.3}, {"ridge": 0.0}],
    ids=["default", "others", "no ridge"],
)
def test_the_constant_is_the_inverse_fisher_times_the_policy_gradient(model, rollouts, options):
    own = {"beta": 0.3, "td_lambda": 1.0, "ridge": 1e-3} | options
    head = fit_constant_control(rollouts, model, **options)
    critic, batch = fit_linear_head(rollouts), whole(rollouts)
    h, weight = batch["hidden_states"].double(), model.lm_head.weight.detach().double()
    s = weight[batch["token_ids"]] - (h @ weight.T).softmax(-1) @ weight
    values = critic.double()(h)
    rewards = batch["rewards"].double()
    rewards = (rewards - rewards.mean()) / rewards.std(correction=0)
    advantages = lambda_returns(values, rewards, batch["offsets"], own["td_lambda"]) - values
    fisher = s.T @ s / len(s)
    damped = fisher + own["ridge"] * fisher.diagonal().mean() * torch.eye(WIDTH)
    expected = torch.linalg.solve(damped, advantages.detach() @ s / len(s)) / own["beta"]
    u = head(torch.randn(2, 3, WIDTH))
    torch.testing.assert_close(u, expected.float().expand(2, 3, WIDTH), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(head.output_scale, (WIDTH * fisher.diagonal()).rsqrt().float(), rtol=1e-4, atol=0)
    training = head.config.info["training"]
    assert {name: training[name] for name in own} == own
    assert (training["answers"], head.config.rank, head.training) == (len(rollouts), 0, False)


def test_the_closed_form_draws_nothing_and_leaves_model_and_critic_alone(rollouts):
    model, critic = tiny_model(attention_dropout=0.5).train(), tiny_head()
    model.model.layers[1].train(False)
    modes = [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in critic.state_dict().items()}
    state = torch.get_rng_state()
    heads = [fit_constant_control(rollouts, model, critic=critic) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert heads[0].digest() == heads[1].digest() != fit_constant_control(rollouts, model).digest()
    assert modes == [module.training for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in critic.state_dict().items())


def test_steered_to_a_word_the_model_says_it_more_often(tmp_path, model, rollouts):
    head = fit_constant_control(rollouts, model)
    states = whole(rollouts)["hidden_states"]
    before, after = (model.lm_head(x).softmax(-1)[:, 7].mean() for x in (states, states + head(states)))
    assert after > 3 * before
    steered = collect(tmp_path, controller=Controller(head, ControlConfig(scale=1.0)))
    error = math.hypot(standard_error(steered.rewards), standard_error(rollouts.rewards))
    assert steered.rewards.mean() - rollouts.rewards.mean() > 8 * error


@pytest.fixture(scope="module")
def one_token_answers(tmp_path_factory):
    """Answers of one token, whose reward is a table: then A(h, y) is known for every y."""
    table = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1))

    def by_table(completion_ids, **kwargs):
        return [table[ids[0]].item() for ids in completion_ids]

    options = {"num_return_sequences": 40, "max_new_tokens": 1, "generation_kwargs": {"eos_token_id": VOCABULARY}}
    return table, collect(tmp_path_factory.mktemp("one token"), reward=by_table, **options)


def test_of_all_constants_of_equal_kl_it_gains_most(model, one_token_answers):
    table, answers = one_token_answers
    assert len(answers) == 40 * len(PROMPTS)  # no answer was EOS alone: there is no such token
    states = whole(answers)["hidden_states"][::40]  # the same for all answers to a prompt
    base, weight = model.lm_head(states).detach(), model.lm_head.weight.detach()

    def gain(direction, nats=0.01):
        """E[A] under p_u less that under p, exactly, at the multiple of the direction whose mean KL is `nats`."""
        low, high = 0.0, 100 / direction.norm().item()
        for _ in range(25):
            middle = (low + high) / 2
            logits = base + middle * (direction @ weight.T)
            low, high = (low, middle) if kl_divergence(logits, base).mean() > nats else (middle, high)
        return ((logits.softmax(-1) - base.softmax(-1)) @ table).mean().item()

    critic = fit_linear_head(answers)
    best = gain(fit_constant_control(answers, model, critic=critic)(states[0]).detach())
    others = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(0))
    rivals = [gain(sign * direction) for direction in (critic.gradient(states[0]), *others) for sign in (1, -1)]
    assert best > max(rivals)
    assert best > 2 * sorted(map(abs, rivals))[len(rivals) // 2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 0}, "beta is 0; it must be a finite number > 0"),
        ({"beta": math.nan}, "beta is nan"),
        ({"beta": math.inf}, "beta is inf"),
        ({"ridge": math.inf}, "ridge is inf"),
        ({"beta": "0.3"}, "beta is '0.3'"),
        ({"ridge": -0.1}, r"ridge is -0\.1; it must be a finite number ≥ 0"),
        ({"td_lambda": 1.5}, r"td_lambda is 1\.5"),
    ],
)
def test_senseless_numbers_are_refused(model, rollouts, options, words):
    with pytest.raises(ValueError, match=words):
        fit_constant_control(rollouts, model, **options)


def test_no_answers_and_answers_of_another_model_are_refused(model, rollouts):
    with pytest.raises(ValueError, match="train_dataset has 0 answers"):
        fit_constant_control(Subset(rollouts, []), model)
    with pytest.raises(HeadMismatch, match="Were the rollouts written by this very model"):
        fit_constant_control(rollouts, tiny_model(seed=1))


def test_a_dimension_that_the_lm_head_ignores_gives_a_head_that_can_be_saved(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[:, 3] = 0
    rollouts = collect(tmp_path / "rollouts", model)
    head = fit_constant_control(rollouts, model)
    assert head.output_scale.isfinite().all()
    assert abs(head(torch.zeros(16))[3].item()) < 1e-6
    head.save_pretrained(tmp_path / "head")
