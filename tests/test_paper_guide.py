"""What examples/guides/paper.md says of the released code (f897869), each on the same operation in our own lines."""

import argparse
import math

import pytest
import torch
from torch import nn
from transformers import FalconConfig

from hf_recontrol.evaluation import diversity


def test_argmax_of_a_mask_is_the_first_position_of_an_answer():
    """train_value_model.py:62 and 104."""
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    assert mask.float().argmax(dim=1).tolist() == [0, 0]
    assert (mask.sum(1) - 1).tolist() == [2, 1]


@pytest.mark.parametrize("stopped", [True, False])
def test_without_a_stopped_gradient_the_later_value_is_pulled_to_the_earlier_one(stopped):
    """train_value_model.py:51-59."""
    earlier, later = torch.tensor(0.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    target = later.detach() if stopped else later
    ((earlier - target) ** 2).backward()
    assert earlier.grad < 0  # a descent raises it
    assert later.grad is None if stopped else later.grad > 0


def test_three_layers_are_not_loaded_into_two():
    """train_value_model.py:23-33 against inference_intervention.py:17-28."""

    def network(layers):
        return nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))

    with pytest.raises(RuntimeError, match="Unexpected key"):
        network(2).load_state_dict(network(3).state_dict())


def test_an_option_without_a_type_is_true_when_it_says_false():
    """inference_intervention.py:50."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--use_intervention", default=False)
    assert bool(parser.parse_args(["--use_intervention", "False"]).use_intervention)


def test_falcon_is_not_4096_wide():
    """train_value_model.py:151 and inference_intervention.py:59."""
    assert FalconConfig().hidden_size == 4544


def test_an_edit_of_every_position_changes_what_the_last_one_says_no_more_than_an_edit_of_the_last():
    """intervented_model/llama.py:135-148: after the last layer no position sees another."""
    torch.manual_seed(0)
    head, states, edit = nn.Linear(8, 11, bias=False), torch.randn(3, 6, 8), torch.randn(3, 6, 8)
    everywhere = head(states + edit)[:, -1]
    torch.testing.assert_close(everywhere, head(states[:, -1] + edit[:, -1]))


def test_a_text_without_repetition_is_less_than_wholly_diverse():
    """metrics.py:26: rep_n = 1 - |set of n-grams| / (n-grams + 1)."""
    for length in (10, 100):
        counts = [length - n + 1 for n in (2, 3, 4)]
        published = math.prod(count / (count + 1) for count in counts)
        assert published < 1
        assert diversity(" ".join(f"w{i}" for i in range(length))) == pytest.approx(published)
