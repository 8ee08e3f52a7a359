"""vLLM, steered, with LoRA adapters: the tokens of generate() by the model with the adapter merged into its weights."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from test_vllm import ASKED, LLAMA, WIDTH, assert_as_generated, request, save, tokens
from tiny import VOCABULARY, tiny_model

from hf_recontrol import enable_recontrol

pytest.importorskip("vllm", reason="vLLM is not installed")
from vllm_engine import run_engine

pytestmark = pytest.mark.vllm
RANK, ALPHA = 8, 16


def add_adapter(model, folder):
    """Write one into the folder, and merge it into the model."""
    folder.mkdir()
    torch.manual_seed(1)
    weights = {}
    for name, rows in (("model.layers.1.self_attn.q_proj", WIDTH), ("lm_head", VOCABULARY)):
        a, b = torch.randn(RANK, WIDTH) / 8, torch.randn(rows, RANK) / 8
        weights |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        model.get_submodule(name).weight.data += ALPHA / RANK * b @ a
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj", "lm_head"]}))
    return str(folder)


def test_rows_with_an_adapter_and_without_get_the_tokens_of_generate(tmp_path):
    model = tiny_model(**LLAMA)
    named, adapted = save(model, tmp_path), copy.deepcopy(model)
    adapter = add_adapter(adapted, tmp_path / "adapter")
    plain = [request(4 + i, asked, seed=i) for i, asked in enumerate(ASKED)]
    with_adapter = [request(4 + i, asked, seed=i, adapter=adapter) for i, asked in enumerate(ASKED)]
    batch = [one for pair in zip(plain, with_adapter, strict=True) for one in pair]
    # two places for adapters: vLLM's kernels for a CPU give a row without one what is in the last place, here nothing
    engine = {"model": str(tmp_path / "model"), "max_num_seqs": 6, "enable_lora": True, "max_loras": 2}
    (answers,) = run_engine(tmp_path, [batch], heads=named, engine=engine)["batches"]
    assert_as_generated(enable_recontrol(model), plain, answers[::2])
    assert_as_generated(enable_recontrol(adapted), with_adapter, answers[1::2])
    assert sum(tokens(model, one) != tokens(adapted, one) for one in plain) >= 6  # else nothing would be shown
