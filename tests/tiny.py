"""Tiny random models and tokenizers, made here, so that no test needs a download."""

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_recontrol import ControlHead, ControlHeadConfig, ValueHead, ValueHeadConfig

VOCABULARY = 64
CONTROL_SHAPES: dict[str, dict[str, Any]] = {
    "constant": {"num_hidden_layers": 0, "rank": 0},
    "linear": {"num_hidden_layers": 0},
    "low rank": {"num_hidden_layers": 0, "rank": 3},
    "one hidden layer": {"num_hidden_layers": 1},
    "two hidden layers": {"num_hidden_layers": 2, "hidden_act": "gelu"},
}


def tiny_model(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """A random float32 Llama: 2 layers, width 16, 64 tokens (<pad> 0, <s> 1, </s> 2). It has no EOS, on purpose."""
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "initializer_range": 0.3,  # far from uniform, so that greedy decoding is decided by more than rounding
    }
    return LlamaForCausalLM(LlamaConfig(**(defaults | config))).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """<pad> <s> </s> and the words w3 … w63, split at spaces; texts begin with <s>."""
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="right"
    )


def tiny_head(seed: int = 0, **config: Any) -> ValueHead:
    """A random head for tiny_model, 16 wide, with a standardisation that is not the identity."""
    torch.manual_seed(seed)
    head = ValueHead(ValueHeadConfig(**({"hidden_size": 16, "intermediate_size": 24} | config)))
    with torch.no_grad():
        head.input_mean.normal_()
        head.input_std.uniform_(0.5, 2.0)
    return head.eval()


def tiny_control_head(seed: int = 0, **config: Any) -> ControlHead:
    """A random head for tiny_model, 16 wide, which steers, in units that are not 1."""
    torch.manual_seed(seed)
    head = ControlHead(ControlHeadConfig(**({"hidden_size": 16, "intermediate_size": 24} | config)))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.3)  # at first they would be 0, where it matters
        head.input_mean.normal_()
        head.input_std.uniform_(0.5, 2.0)
        head.output_scale.uniform_(0.5, 2.0)
    return head.eval()


def prompts(rows: int = 3, length: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random prompts with no padding, as generate() takes them."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


class Length:
    """A reward, the words of each completion, which may do something first: its code is the same, so a run goes on."""

    __name__ = "length"

    def __init__(self, first=lambda: None):
        self.first = [first]  # in a list, into which a fingerprint does not look

    def __call__(self, completions, **kwargs):
        self.first[0]()
        return [float(len(completion.split())) for completion in completions]
