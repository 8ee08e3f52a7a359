"""fit_ensemble: one head for several, on a line of states beside which the heads know nothing and disagree."""

import copy

import pytest
import torch
from test_train_control import little_garbage  # noqa: F401
from test_trainer import arguments

from hf_recontrol import ValueHead, ValueHeadConfig, fit_ensemble
from hf_recontrol.ensemble import DistillationObjective, Distiller, pessimistic_values

pytestmark = pytest.mark.versions
WIDTH = 3
SETTINGS = {"learning_rate": 1e-2, "num_train_epochs": 30, "per_device_train_batch_size": 32}


class OnALine(torch.utils.data.Dataset):
    """States (x, small, small): answers of two tokens whose reward is x, up to noise; the others say nothing."""

    def __init__(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        states = torch.randn(count, 2, WIDTH, generator=generator) * torch.tensor([1.0, 0.1, 0.1])
        states[:, 1, 0] = states[:, 0, 0]
        noise = 0.3 * torch.randn(count, generator=generator)
        self.items = [{"hidden_states": h, "reward": h[0, 0] + e} for h, e in zip(states, noise, strict=True)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


@pytest.fixture(scope="module")
def data():
    return OnALine(192, 0), OnALine(64, 1)


def new_head(seed=0):
    torch.manual_seed(seed)
    return ValueHead(ValueHeadConfig(WIDTH, intermediate_size=32))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, data):
    """{κ: (the head, the ensemble it was distilled from)}."""
    made, members = {}, []
    with pytest.MonkeyPatch.context() as patch:
        original = Distiller.__init__

        def spy(self, *args, **options):
            members[:] = copy.deepcopy(options["members"])
            original(self, *args, **options)

        patch.setattr(Distiller, "__init__", spy)
        for kappa in (0.0, 2.0):
            args = arguments(tmp_path_factory.mktemp("ensemble"), **SETTINGS)
            head = fit_ensemble(data[0], eval_dataset=data[1], head=new_head(), args=args, kappa=kappa)
            made[kappa] = head, list(members)
    return made


def states_of(dataset):
    return torch.cat([answer["hidden_states"] for answer in dataset.items])


def test_without_pessimism_the_head_has_the_mean_of_the_values(fitted, data):
    head, members = fitted[0.0]
    states = states_of(data[1])
    mean = torch.stack([member(states) for member in members]).mean(0)
    assert (head(states) - mean).square().mean().sqrt() < 0.1 * mean.std()
    assert head.config.info["evaluation"]["distance"] == pytest.approx((head(states) - mean).square().mean().item())


def test_pessimism_lowers_v_where_the_heads_disagree_and_little_where_they_agree(fitted, data):
    (mean, members), (low, others) = fitted[0.0], fitted[2.0]
    assert [member.digest() for member in members] == [member.digest() for member in others]
    assert len({member.digest() for member in members}) == 3
    near = states_of(data[1])
    off_the_line = torch.tensor([0.0, 1.0, 1.0])  # ten times as far as any state was
    far = torch.cat([near + off_the_line, near - off_the_line])

    def disagreement(states):
        return torch.stack([member(states) for member in members]).std(0).mean()

    assert disagreement(far) > 3 * disagreement(near)
    lowered = [(mean(states) - low(states)).mean() for states in (near, far)]
    assert 0 < lowered[0] < 3 * 2 * disagreement(near)
    assert lowered[1] > 2 * lowered[0]


def test_what_the_heads_were_is_told_in_the_config_and_the_card(fitted):
    head, _ = fitted[2.0]
    training = head.config.info["training"]
    assert (training["heads"], training["kappa"]) == (3, 2.0)
    assert not head.training
    for words in ("Heads of other seeds whose values it was distilled from: 3", "κ: their mean, less κ"):
        assert words in head.model_card()


def test_the_targets_are_those_of_the_formula():
    members = [new_head(seed) for seed in range(4)]
    states = torch.randn(5, WIDTH)
    values = torch.stack([member(states) for member in members])
    torch.testing.assert_close(pessimistic_values(members, states, 0.5), values.mean(0) - 0.5 * values.std(0))
    options = {"members": members, "kappa": 0.5, "td_lambda": 1.0, "device": torch.device("cpu")}
    objective = DistillationObjective(members[0], None, **options)
    assert not objective.targets(states).requires_grad
    moved = objective._moved(states)
    shares = (moved - states).norm(dim=-1) / states.norm(dim=-1)
    assert 0 < shares.max() <= 0.3


def test_half_of_the_loss_is_where_an_ascent_would_go(monkeypatch):
    head, members = new_head(9), [new_head(seed) for seed in range(2)]
    options = {"members": members, "kappa": 1.0, "td_lambda": 1.0, "device": torch.device("cpu")}
    objective, states = DistillationObjective(head, None, **options), torch.randn(5, WIDTH)
    monkeypatch.setattr(objective, "_moved", lambda states: states + 5)
    errors = [(head(x) - pessimistic_values(members, x, 1.0)).square() for x in (states, states + 5)]
    losses = objective.losses(head, {"hidden_states": states})
    torch.testing.assert_close(losses, (errors[0] + errors[1]) / 2)


def test_the_same_seed_gives_the_same_head_and_the_callers_random_state_stays(tmp_path, data):
    def fit(seed):
        torch.manual_seed(seed)
        args = arguments(tmp_path / str(seed), max_steps=3, seed=7)
        return fit_ensemble(data[0], args=args, num_heads=2).digest()

    assert fit(1) == fit(2)


def test_members_of_a_head_that_was_trained_share_its_scales(tmp_path, data):
    head = fit_ensemble(data[0], head=new_head(), args=arguments(tmp_path, max_steps=2), num_heads=2)
    before = copy.deepcopy(head.config.reward)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_recontrol.ensemble.pessimistic_values", lambda m, s, k: seen.extend(m) or m[0](s))
        again = fit_ensemble(data[1], head=head, args=arguments(tmp_path, max_steps=1), num_heads=2)
    assert again is head
    assert head.config.reward == before
    assert all(member.config.reward == before for member in seen)
    assert all(torch.equal(member.input_std, head.input_std) for member in seen)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_heads": 1}, "num_heads is 1; an ensemble has an integer number of heads, 2 or more"),
        ({"num_heads": 2.0}, r"num_heads is 2\.0"),
        ({"kappa": -1.0}, r"kappa is -1\.0; it must be a finite number ≥ 0"),
        ({"kappa": float("nan")}, "kappa is nan"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_any_fit(tmp_path, data, change, words):
    with pytest.raises(ValueError, match=words):
        fit_ensemble(data[0], args=arguments(tmp_path), **change)
