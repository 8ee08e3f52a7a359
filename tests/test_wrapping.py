"""Steering under what others put around a model: adapters, offload, quantisation, tensor parallelism, compilation."""

import copy
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from steered import STEER, STEERING, tokens
from tiny import prompts, tiny_head, tiny_model
from transformers import LlamaForCausalLM

from hf_recontrol import Controller, enable_recontrol
from hf_recontrol.generation import unwrapped

pytestmark = [
    pytest.mark.versions,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]  # PEFT's


@torch.no_grad()
def by_hand(model, head, steps=8):
    """Greedy ids of a loop with no hook: the inner model's hidden states, edited, through its LM head as it is."""
    ids, steer = prompts()["input_ids"], Controller(head, STEERING)
    for _ in range(steps):
        h = model.model(input_ids=ids).last_hidden_state[:, -1]
        ids = torch.cat([ids, model.lm_head(steer(h)).argmax(-1, keepdim=True)], -1)
    return ids.tolist()


def steered(model, head=None, **keywords):
    return tokens(model, recontrol_value_head=head or tiny_head(), **STEER, **keywords)


# PEFT


def lora(**config):
    """A tiny model and a random adapter on it, made before or after enable_recontrol."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    return peft, peft.LoraConfig(init_lora_weights=False, **config)


ADAPTERS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "LM head": {"target_modules": ["q_proj", "lm_head"]},
    "a copy of the LM head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("first", ["enable", "wrap"])
def test_an_adapter_is_steered_whichever_comes_first(adapter, first):
    peft, config = lora(**ADAPTERS[adapter])
    if first == "enable":
        model = peft.get_peft_model(enable_recontrol(tiny_model()), config)
    else:
        model = enable_recontrol(peft.get_peft_model(tiny_model(), config))
    if "modules_to_save" in ADAPTERS[adapter]:
        with torch.no_grad():
            model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(-1.0)  # unlike the original
    expected = by_hand(model.get_base_model(), tiny_head())
    assert steered(model) == expected
    assert expected not in (by_hand(tiny_model(), tiny_head()), tokens(model))
    with model.disable_adapter():
        assert steered(model) == by_hand(tiny_model(), tiny_head())
    assert steered(model) == expected


def test_adapters_that_are_added_switched_merged_and_unloaded_stay_steered():
    peft, config = lora(target_modules=["q_proj", "lm_head"])
    model = enable_recontrol(peft.get_peft_model(tiny_model(), config))
    first = by_hand(model.get_base_model(), tiny_head())
    model.add_adapter("other", peft.LoraConfig(init_lora_weights=False, target_modules=["v_proj", "lm_head"]))
    assert steered(model) == first
    model.set_adapter("other")
    other = by_hand(model.get_base_model(), tiny_head())
    assert steered(model) == other != first
    model.set_adapter("default")
    model.merge_adapter()
    assert steered(model) == first
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the other adapter's layers were not merged
        model.unmerge_adapter()
    assert steered(model) == first
    merged = model.merge_and_unload()
    assert steered(merged) == first
    assert type(merged).__name__ == "LlamaForCausalLM"


def test_an_adapter_is_saved_without_the_head_and_read_again(tmp_path):
    peft, config = lora(target_modules=["q_proj"])
    model = enable_recontrol(peft.get_peft_model(tiny_model(), config))
    expected = steered(model)
    model.save_pretrained(tmp_path)
    assert not [path for path in tmp_path.iterdir() if "recontrol" in path.name]
    again = enable_recontrol(peft.PeftModel.from_pretrained(tiny_model(), tmp_path))
    assert steered(again) == expected


# accelerate


@pytest.mark.filterwarnings(
    "ignore:.*on a device type different"
)  # transformers 5.17, which asks the offloaded weights
def test_a_model_whose_weights_are_offloaded_is_steered():
    accelerate = pytest.importorskip("accelerate")
    expected = steered(enable_recontrol(tiny_model()))
    for enabled_first in (True, False):
        model = tiny_model()
        if enabled_first:
            enable_recontrol(model)
        model = accelerate.cpu_offload(model, execution_device="cpu")
        assert steered(enable_recontrol(model)) == expected
        assert model.lm_head.weight.is_meta  # it was fetched for each forward, and is away


def test_a_model_on_a_device_map_is_steered(tmp_path):
    pytest.importorskip("accelerate")
    tiny_model().save_pretrained(tmp_path / "model")
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
             "model.rotary_emb": "cpu", "lm_head": "disk"}  # fmt: skip
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "model", device_map=parts, offload_folder=tmp_path / "offload", offload_buffers=True
    )
    assert steered(enable_recontrol(model)) == steered(enable_recontrol(tiny_model()))


# Quantised LM heads


@pytest.mark.filterwarnings("ignore")  # torch's own, of this kind of quantisation
def test_an_lm_head_in_int8_is_steered():
    def quantised(model):
        return torch.ao.quantization.quantize_dynamic(model, {"lm_head"}, dtype=torch.qint8)

    for model in (quantised(enable_recontrol(tiny_model())), enable_recontrol(quantised(tiny_model()))):
        assert "quantized" in type(model.lm_head).__module__
        expected = by_hand(model, tiny_head())
        assert steered(model) == expected != tokens(model)
        assert model.lm_head.weight().is_quantized


# torch.compile, copies, new vocabularies


@pytest.mark.parametrize("enabled_first", [True, False])
def test_a_compiled_model_is_steered_whichever_comes_first(enabled_first):
    torch._dynamo.reset()
    expected = steered(enable_recontrol(tiny_model()))
    model = tiny_model()
    if enabled_first:
        enable_recontrol(model)
    compiled = enable_recontrol(torch.compile(model, backend="eager"))
    assert steered(compiled) == expected
    assert tokens(compiled) == tokens(tiny_model())
    model.forward = torch.compile(model.forward, backend="eager")
    assert steered(enable_recontrol(model)) == expected


def test_a_copy_and_its_original_are_steered_apart():
    model = enable_recontrol(tiny_model())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(-1.0)
    assert steered(twin) == by_hand(twin, tiny_head()) != steered(model)


def test_a_new_vocabulary_and_a_new_lm_head_are_steered():
    model = enable_recontrol(tiny_model())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(80)
    assert steered(model) == by_hand(model, tiny_head())
    model.set_output_embeddings(torch.nn.Linear(16, 80, bias=True))
    assert steered(model) == by_hand(model, tiny_head())
    assert sum(hook.__module__ == "hf_recontrol.hooks" for hook in model.lm_head._forward_pre_hooks.values()) == 1
    assert unwrapped(model) is model


# Tensor parallelism

RANK = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
from steered import tokens, STEER
from tiny import tiny_head
from transformers import LlamaForCausalLM
from hf_recontrol import enable_recontrol
model = LlamaForCausalLM.from_pretrained(sys.argv[2], tp_plan="auto")
assert type(model.model.layers[0].self_attn.q_proj.weight).__name__ == "DTensor" or model.tp_size == 2
keywords = {"recontrol_value_head": tiny_head(), **STEER}
found = [tokens(model.eval())]
enable_recontrol(model)
found += [tokens(model, **keywords), tokens(model, **keywords, recontrol_max_kl=0.05)]
torch.save(found, f"{sys.argv[3]}/{torch.distributed.get_rank()}.pt")
os._exit(0)  # a thread of gloo that lets go of a tensor late would abort a Python that ends as usual
"""


@pytest.mark.slow
def test_two_tensor_parallel_processes_give_what_one_gives(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    plain = tokens(model)
    enable_recontrol(model)
    bounded = tokens(model, recontrol_value_head=tiny_head(), recontrol_max_kl=0.05, **STEER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-c", RANK, str(Path(__file__).parent), str(tmp_path / "model")]
    ranks = [
        subprocess.Popen(
            [*command, str(tmp_path)],
            env=os.environ
            | {"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        )
        for i in range(2)
    ]
    assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    for i in range(2):
        assert torch.load(tmp_path / f"{i}.pt") == [plain, steered(model), bounded]
