"""Every architecture of the installed transformers, tiny and random: built, run, and steered beside an oracle.

`python tests/architectures.py` prints the README's section on support, `--check` compares it with the README's,
`--json FILE` keeps the result of each class, and names after it run those classes only.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import gc
import io
import json
import math
import re
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from test_kl_bound import kl_by_hand, merged_by_hand
from transformers import BertConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel, SiglipVisionConfig, ViTConfig
from transformers.models.auto import modeling_auto

from hf_recontrol import ControlConfig, Controller, ValueHead, ValueHeadConfig, enable_recontrol
from hf_recontrol.forwards import forward_steered
from hf_recontrol.generation import RecontrolGenerationMixin
from hf_recontrol.hooks import HiddenStates, lm_head, lm_head_owner
from hf_recontrol.steering import steered_generate

MAPPINGS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "sequence-to-sequence": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "image-text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
SECONDS = 20  # for each class
PARAMETERS = 100_000_000  # in each model at most
VOCABULARY = 128  # words below 100, special tokens of images and sound above
NEW_TOKENS = 3
GREEDY = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "return_dict_in_generate": True, "output_logits": True}

_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_MROPE = {"rope_parameters": _ROPE | {"mrope_section": [16, 24, 24]}}
CHANGES: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "text_config": {"vocab_size": 256},
        "vision_config": {"codebook_size": 16, "base_channels": 32},
        "audio_config": {"codebook_size": 16},
        "image_token_offset": 200,
        "audio_token_offset": 216,
    },
    "bamba": {"attn_layer_indices": [1]},
    "blip-2": {"num_query_tokens": 2, "image_token_index": 100},
    "blt": {
        "num_hidden_layers": 2,
        "encoder_config": {"hidden_size_global": 256},
        "decoder_config": {"hidden_size_global": 256},
    },
    "chameleon": {"vocabulary_map": {"<image>": 100, "IMGIMGAZ": 101}},
    "codegen": {"n_head": 4, "n_embd": 256},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {
        "d_model": 64,
        "n_heads": 2,
        "attn_config": {"rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [64, 64]},
    "deepseek_ocr2_text": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots3_note": {"vision_config": {"adapter_out_dim": 80}, "audio_config": {"adapter_out_dim": 80}},
    "dots3_note_vision_encoder": {"num_hidden_layers": 42},
    "emu3": {"vocabulary_map": {"<image>": 100, "<|visual token 000000|>": 101}},
    "emu3_vqgan": {"base_channels": 32},
    "fast_vlm": {"vision_config": SiglipVisionConfig(num_hidden_layers=1)},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "glm4v_moe_text": {"num_attention_heads": 2, "hidden_size": 256},
    "glm4v_text": _MROPE,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gpt_oss": {"hidden_size": 64, "intermediate_size": 64},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2"},
    "granite_docling": {"vision_config": {"out_hidden_size": 128}},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl_text": {"head_dim": 128, "rope_parameters": _ROPE | {"mrope_section": [16, 16, 16, 16]}},
    "inkling2": {"vision_config": {"text_hidden_size": 192}},
    "inkling2_loop": {"vision_config": {"text_hidden_size": 192}},
    "inkling_vision": {"num_hidden_layers": 4},
    "instructblip": {"num_query_tokens": 2, "image_token_index": 100},
    "instructblipvideo": {"num_query_tokens": 2, "video_token_index": 100},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "janus": {"vq_config": {"base_channels": 32}},
    "kosmos-2": {"latent_query_num": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "ministral": {"head_dim": 128},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "muse_spark": {"audio_config": {"out_hidden_size": 128}},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "nemo_speechlm": {"audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 128}}}},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "ovis2": {"hidden_size": 256},
    "perception_lm": {"vision_config": SiglipVisionConfig(num_hidden_layers=1, model_args={"embed_dim": 768})},
    "pp_formulanet": {"vision_config": {"decoder_hidden_size": 64}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 110},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 110},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False},
    "step3p5": {"sliding_window": 64},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 2, "depths": [1] * 7},
    "xlm": {"mask_token_id": 3},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 9},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
}
"""What the rules of `shrunk` get wrong, by the config's model_type."""

NOT_RUN: dict[str, str] = {
    "DiffusionGemmaForBlockDiffusion": "denoises whole blocks of tokens",
    "Gemma3nForConditionalGeneration": "needs the package timm",
    "Gemma4AssistantForCausalLM": "drafts from another model's cache",
    "Gemma4UnifiedAssistantForCausalLM": "drafts from another model's cache",
    "Llama4ForConditionalGeneration": "its own forward fails in transformers 5.24",
    "MusicgenForCausalLM": "needs codes of sound",
    "PI0ForConditionalGeneration": "makes actions, no text",
    "VoxtralRealtimeForConditionalGeneration": "needs sound",
}
"""Classes that are not built or do not generate here, with the reason."""

REFUSED: dict[str, str] = {
    "FSMTForConditionalGeneration": "its output embeddings are an Embedding",
    "MusicgenMelodyForCausalLM": "an LM head for each code of sound",
}
"""Classes that generate, and that enable_recontrol refuses, with the reason."""


def classes(mapping: str) -> list[str]:
    """The classes of a mapping, each once."""
    return list(dict.fromkeys(MAPPINGS[mapping].values()))


ALL = list(dict.fromkeys(name for mapping in MAPPINGS for name in classes(mapping)))

MAIN_HEADS = re.compile(r"attention_heads$|^n_heads?$|^num_heads$")
HEADS = re.compile(r"heads$|^n_head$")
LAYERS = re.compile(r"(^|_)(n_)?layers?$|(^|_)depth$|^num_blocks$")
WIDTH = re.compile(r"size$|dim$|^d_model$|_d_model$|^d_ff$|^n_embd$|^n_inner$|rank$|width$|^d_inner$|^mamba_d_ssm$")
NO_WIDTH = re.compile(
    r"vocab|head_dim|head_size|patch|image|kernel|chunk|window|block|group|conv|state|merge|position|tile|crop|eval|d_kv"
)
EXPERTS = re.compile(r"(^|_)experts$")
CHOSEN_EXPERTS = re.compile(r"experts_per_tok|^moe_k$|^moe_topk$|^top_k_experts$|^experts_top_k$")
ONE_GROUP = re.compile(r"^(n_group|topk_group|n_groups|mamba_n_?groups|first_k_dense_replace)$")
SPECIAL = re.compile(r"(token|_id|_index)$")


def shrunk(config: PreTrainedConfig, **changes: Any) -> PreTrainedConfig:
    """The config, of the same class, with as few layers as have one of each kind, two heads, and widths to match.

    All numbers of heads and all widths but that of a head are divided by one number, so that what the model's code
    says of them still holds.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    layers = getattr(config, "num_hidden_layers", None)
    enough = layers_enough(config, layers) if isinstance(layers, int) else 2
    divisor = divisor_for(config)
    changes = copy.deepcopy(CHANGES.get(config.model_type, {})) | changes  # a config may write into its dicts
    small: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            change = changes.pop(name, {})
            small[name] = change if isinstance(change, PreTrainedConfig) else shrunk(value, **change)
        elif defaults.get(name) not in (None, "auto"):  # what was None is worked out from the rest
            if isinstance(value, list | tuple) and len(value) == layers:
                value = value[:enough]
            new = shrunk_value(name, value, divisor, enough)
            if new != defaults[name]:
                small[name] = new
    return type(config)(**(small | token_ids(config) | changes))


def layers_enough(config: PreTrainedConfig, layers: int) -> int:
    """How many of the first layers have one of each kind, 2 to 8."""
    lists = [value for value in vars(config).values() if isinstance(value, list) and len(value) == layers]
    kinds = [value for value in lists if value and isinstance(value[0], str)]
    return min(layers, max([2, *(max(value.index(kind) for kind in set(value)) + 1 for value in kinds)]), 8)


def divisor_for(config: PreTrainedConfig) -> int:
    """By what heads and widths are divided: two heads are left, or, of an odd number, one."""
    heads = [value for name, value in vars(config).items() if MAIN_HEADS.search(name) and type(value) is int and value]
    if heads:
        common = math.gcd(*heads)
        return common // 2 if common % 2 == 0 else common
    width = getattr(config, "hidden_size", None)
    return max(1, width // 64) if isinstance(width, int) else 1


def shrunk_value(name: str, value: Any, divisor: int, layers: int) -> Any:
    """A number by the meaning of its name; the rest as it is."""
    if isinstance(value, list | tuple) and len(value) == layers:  # one for each layer
        return [shrunk_value(name, one, divisor, layers) for one in value]
    if type(value) is not int:
        return value
    if HEADS.search(name):
        return max(1, value // divisor)
    if LAYERS.search(name):
        return min(value, layers)
    if CHOSEN_EXPERTS.search(name):
        return min(value, 2)
    if EXPERTS.search(name) and "shared" not in name:
        return min(value, 4)
    if ONE_GROUP.search(name):
        return min(value, 1)
    if "vocab" in name and "type" not in name and "offset" not in name:
        return min(value, VOCABULARY)
    if re.search(r"^(mamba_)?chunk_size$|d_state$|state_size$", name):
        return min(value, 16)
    if "position" in name:
        return min(value, 4096)
    if WIDTH.search(name) and not NO_WIDTH.search(name) and value >= 64:
        return value // divisor if value % divisor == 0 else max(8, value // divisor // 8 * 8)
    return value


def token_ids(config: PreTrainedConfig) -> dict[str, Any]:
    """Special tokens inside the small vocabulary, out of the way of the prompts."""
    ids: dict[str, Any] = {}
    names = [field.name for field in dataclasses.fields(config) if SPECIAL.search(field.name)]
    for name in sorted(names):
        value = getattr(config, name, None)
        if not isinstance(value, int | list) or isinstance(value, bool):
            continue
        ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
        if name in ends:
            ids[name] = ends[name]
        elif isinstance(value, int) and (value >= VOCABULARY or re.search("image|video|audio|vision", name)):
            ids[name] = 100 + sum(name.encode()) % 28
    return ids


def config_of(model_class: Any) -> PreTrainedConfig:
    name = model_class.__name__
    if name in ("EncoderDecoderModel", "VisionEncoderDecoderModel"):
        encoder = BertConfig() if name == "EncoderDecoderModel" else ViTConfig()
        return model_class.config_class.from_encoder_decoder_configs(shrunk(encoder), shrunk(BertConfig()))
    config_class = model_class.config_class
    fields = [field.name for field in dataclasses.fields(config_class)]
    is_decoder = {"is_decoder": True} if "is_decoder" in fields and name in classes("causal") else {}
    return shrunk(config_class(), **is_decoder)


def check_size(model_class: Any, config: PreTrainedConfig) -> None:
    """Raise MemoryError where the rules left a model large."""
    with torch.device("meta"):
        try:
            model = model_class(copy.deepcopy(config))
        except Exception:  # some cannot be made without data; building them says why
            return
    if (count := sum(parameter.numel() for parameter in model.parameters())) > PARAMETERS:
        raise MemoryError(f"{count:,} parameters")


def output_layer(model: Any) -> Any:
    """What transformers calls the model's output embeddings; of some that name none, those of a model inside."""
    inside = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    heads = [module.get_output_embeddings() for module in inside]
    return next((head for head in heads if head is not None), None)


def tiny(name: str) -> Any:
    """A random float32 instance, whose logits are far from uniform and which never ends a text."""
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    config = config_of(model_class)
    check_size(model_class, config)
    model = model_class(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some are left as torch.empty made them
            if not torch.isfinite(parameter).all() or parameter.abs().max() > 1e3:
                parameter.normal_(std=0.02)
    head = output_layer(model)
    if isinstance(head, torch.nn.Linear):  # untied: the embedding as it is, or the last token would be repeated
        head.weight = torch.nn.Parameter(4 * head.in_features**-0.5 * torch.randn_like(head.weight))
    for module in model.modules():
        if getattr(module, "generation_config", None) is not None:
            module.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, decoder_start_token_id=1)
    return model


def words(rows: int = 2, length: int = 6) -> torch.Tensor:
    return torch.randint(8, 96, (rows, length), generator=torch.Generator().manual_seed(0))


def pixels(config: Any, *frames: int) -> torch.Tensor:
    size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    return torch.randn(2, *frames, 3, size, size, generator=torch.Generator().manual_seed(0))


def after_image(*frames: int, **extra: torch.Tensor) -> Any:
    """Inputs in which tokens 100, two for each frame, stand for an image."""

    def made(config: Any) -> dict[str, Any]:
        ids = torch.cat([torch.full((2, 2 * max([1, *frames])), 100), words()], dim=1)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": pixels(config.vision_config, *frames),
        } | extra

    return made


def of_image(config: Any) -> dict[str, Any]:
    """For an encoder that reads an image and no text."""
    encoder = getattr(config, "encoder", None) or getattr(config, "vision_config", config)
    return {"pixel_values": pixels(encoder), "input_ids": None, "attention_mask": None}


INPUTS: dict[str, Any] = {
    "BlipForConditionalGeneration": lambda config: {"pixel_values": pixels(config.vision_config)},
    "Blip2ForConditionalGeneration": after_image(),
    "InstructBlipForConditionalGeneration": after_image(qformer_input_ids=words()),
    "InstructBlipVideoForConditionalGeneration": after_image(4, qformer_input_ids=words()),
    "IdeficsForVisionText2Text": lambda config: {
        "pixel_values": pixels(config.vision_config, 1),
        "image_attention_mask": torch.ones(2, 6, 1, dtype=torch.long),
    },
    "Kosmos2ForConditionalGeneration": after_image(image_embeds_position_mask=torch.tensor([[1, 1] + [0] * 6] * 2)),
    "PPFormulaNetForConditionalGeneration": of_image,
    "VisionEncoderDecoderModel": of_image,
    "Pix2StructForConditionalGeneration": lambda config: {
        "flattened_patches": torch.rand(2, 8, 770),
        "attention_mask": torch.ones(2, 8),
        "input_ids": None,
    },
    "UdopForConditionalGeneration": lambda config: {"bbox": torch.zeros(2, 6, 4)},
}
"""What a class takes besides text, or, where None, in its place."""


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    """Two rows, as generate() takes them."""
    inputs = {"input_ids": words(), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    inputs |= INPUTS.get(type(model).__name__, lambda config: {})(model.config)
    return {name: value for name, value in inputs.items() if value is not None}


def forward(model: Any, inputs: dict[str, torch.Tensor], run: Any = None) -> torch.Tensor:
    """The logits of one forward over the text, (rows, positions, vocabulary)."""
    extra = {"decoder_input_ids": words()} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        logits: torch.Tensor = (run or model)(**inputs, **extra).logits
    return logits


def generated(model: Any, inputs: dict[str, torch.Tensor], **keywords: Any) -> tuple[list[Any], torch.Tensor]:
    """The tokens, and the logits of each, (rows, new tokens, vocabulary)."""
    outputs = model.generate(**inputs, **GREEDY, **keywords)
    return outputs.sequences.tolist(), torch.stack(outputs.logits, dim=1)


@contextlib.contextmanager
def edited_by_hand(model: Any, control: Controller):
    """The oracle: the LM head's output becomes its output of h + u, by a plain hook of torch."""

    def instead(head, args, kwargs, output):
        h, *rest = args or kwargs.values()
        return head.forward(control(h), *rest)

    handle = output_layer(model).register_forward_hook(instead, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def watched(model: Any, seen: list[str], states: list[torch.Tensor]):
    """What happens, in order: forwards of the model that owns the LM head, and the LM head's, with its last input."""

    def before_head(head, args, kwargs):
        seen.append("LM head")
        states.append((args or tuple(kwargs.values()))[0][..., -1, :].clone())

    handles = [
        lm_head_owner(model).register_forward_pre_hook(lambda module, args: seen.append("forward")),
        lm_head(model).register_forward_pre_hook(before_head, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def random_head(width: int) -> ValueHead:
    torch.manual_seed(1)
    return ValueHead(ValueHeadConfig(hidden_size=width, intermediate_size=8, hidden_act="tanh")).eval()


def check(model: Any, inputs: dict[str, torch.Tensor], tokens: list[Any], base: torch.Tensor) -> None:
    """Raise unless the model is steered exactly as the oracle, in a forward and in greedy decoding.

    Args:
        tokens, base: of the stock generate().
    """
    seen: list[str] = []
    states: list[torch.Tensor] = []
    with watched(model, seen, states):
        generated(model, inputs)
    assert seen == ["forward", "LM head"] * NEW_TOKENS, f"the LM head is not reached once a forward: {seen}"
    # ‖u‖ = ‖h‖ / 2, whatever the architecture's scale
    head, steering = random_head(states[0].shape[-1]), ControlConfig(1e4, 2, max_relative_norm=0.5)
    control = Controller(head, steering)
    plain = forward(model, inputs)
    with edited_by_hand(model, control):
        expected, (steered_tokens, steered) = forward(model, inputs), generated(model, inputs)
    enable_recontrol(model)
    steer = {"recontrol_value_head": head, "recontrol_config": steering}
    _check_zero(model, inputs, head, tokens, base)
    recorder = HiddenStates(2 * NEW_TOKENS)
    stock = super(RecontrolGenerationMixin, model).generate
    output = steered_generate(stock, model, (), inputs | GREEDY, recorder)
    recorded, by_hand = recorder.recorded(output.sequences.shape[1]), torch.stack(states, dim=1)
    torch.testing.assert_close(recorded, by_hand, rtol=0, atol=0, msg=lambda text: f"h: {text}")
    actual = forward(model, inputs, functools.partial(forward_steered, model, control))
    torch.testing.assert_close(actual, expected, msg=lambda text: f"a forward's logits: {text}")
    assert kl_by_hand(actual, plain).mean() > 1e-3, "the edit does not change a forward's logits"
    actual_tokens, logits = generated(model, inputs, **steer)
    assert actual_tokens == steered_tokens, "greedy decoding gives other tokens than the oracle"
    torch.testing.assert_close(logits, steered, msg=lambda text: f"the logits of generate(): {text}")
    assert kl_by_hand(logits[:, 0], base[:, 0]).mean() > 1e-3, "the edit does not change the logits of generate()"
    _check_bound(model, inputs, (plain, expected), base, steer)


def _check_zero(model: Any, inputs: Any, head: ValueHead, tokens: list[Any], base: torch.Tensor) -> None:
    for keywords in ({}, {"recontrol_value_head": head, "recontrol_num_steps": 0}):
        actual, logits = generated(model, inputs, **keywords)
        assert actual == tokens, f"greedy decoding changes with {keywords or 'no head'}"
        torch.testing.assert_close(logits, base, rtol=0, atol=0)


def _check_bound(model: Any, inputs: Any, logits: Any, base: torch.Tensor, steer: dict[str, Any]) -> None:
    """max_kl, at what half of the rows pass without it."""
    plain, edited = logits
    first = kl_by_hand(edited, plain)
    max_kl = float(first.median())
    config = dataclasses.replace(steer["recontrol_config"], max_kl=max_kl)
    control = Controller(steer["recontrol_value_head"], config)
    bounded = forward(model, inputs, functools.partial(forward_steered, model, control))
    kl, merged = kl_by_hand(bounded, plain), merged_by_hand(plain, edited, max_kl)[0]
    assert (kl <= max_kl + 1e-4).all(), f"the KL of a token is {kl.max():.3g}, above max_kl = {max_kl:.3g}"
    probabilities, expected = bounded.double().softmax(-1), merged.softmax(-1)
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-3, msg=lambda text: f"max_kl: {text}")
    assert kl.max() > 0.9 * max_kl, "max_kl binds nowhere"
    _, held = generated(model, inputs, **steer, recontrol_max_kl=max_kl / 2)
    kl = kl_by_hand(held[:, 0], base[:, 0])  # later tokens follow another text
    assert (kl <= max_kl / 2 + 1e-4).all(), f"generate() spends {kl.max():.3g} with max_kl = {max_kl / 2:.3g}"


@dataclasses.dataclass
class Outcome:
    """What came of a class."""

    status: str
    """"passes", "refused" by enable_recontrol, "not run" (not built, or no stock generate()), or "fails"."""
    reason: str = ""
    seconds: float = 0.0


@contextlib.contextmanager
def limited(seconds: int):
    """Raises TimeoutError after so many seconds."""

    def out_of_time(signum, frame):
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@functools.cache
def outcome(name: str) -> Outcome:
    """Build, run and steer one class."""
    stage, began = "not run", time.perf_counter()
    try:
        with limited(SECONDS), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message=".*hidden states were not finite")
            model = tiny(name)
            inputs = inputs_of(model)
            tokens, base = generated(model, inputs)
            stage = "refused"
            lm_head(model)
            stage = "fails"
            check(model, inputs, tokens, base)
    except Exception as error:  # of any model's code, which must not end the others' run
        return Outcome(stage, f"{type(error).__name__}: {error}", time.perf_counter() - began)
    finally:
        gc.collect()
    return Outcome("passes", "", time.perf_counter() - began)


AUTO = {
    "causal": "AutoModelForCausalLM",
    "sequence-to-sequence": "AutoModelForSeq2SeqLM",
    "image-text": "AutoModelForImageTextToText",
}


def section(outcomes: dict[str, Outcome]) -> str:
    """The README's section, in Markdown."""
    rows = []
    for mapping, auto in AUTO.items():
        found = [outcomes[name].status for name in classes(mapping)]
        run = sum(status != "not run" for status in found)
        rows.append(f"| {auto} | {len(found)} | {run} | {found.count('passes')} | {found.count('refused')} |")
    table = "\n".join(rows)
    return f"""\
Every class of three of transformers {transformers.__version__}'s auto classes, built tiny and random, and given text, \
with an image where it must have one. The LM head is reached once a forward, logits and greedy tokens are those of an \
oracle without our hooks, zero steps change nothing, and `recontrol_max_kl` holds (`python tests/architectures.py`).

| | classes | built and run | as the oracle | refused |
|---|---|---|---|---|
{table}

Refused by `enable_recontrol`: {listed(REFUSED, outcomes, "refused")}.

Not tried: {listed(NOT_RUN, outcomes, "not run")}."""


def listed(reasons: dict[str, str], outcomes: dict[str, Outcome], status: str) -> str:
    """The classes of one status by their reason."""
    names: dict[str, list[str]] = {}
    for name in ALL:
        if outcomes[name].status == status:
            names.setdefault(reasons.get(name, "no reason known"), []).append(name)
    return "; ".join(f"{', '.join(group)} ({reason})" for reason, group in names.items()) or "none"


README = Path(__file__).parent.parent / "README.md"
MARKERS = re.compile(r"<!-- support -->\n(.*?)\n<!-- /support -->", re.DOTALL)


def section_of_readme() -> str | None:
    """What the README has between its markers; None where it has no markers."""
    found = MARKERS.search(README.read_text(encoding="utf-8"))
    return None if found is None else found[1].strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="classes; all where none is named")
    parser.add_argument("--check", action="store_true", help="compare with README.md")
    parser.add_argument("--json", type=Path, help="keep the result of each class")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    outcomes: dict[str, Outcome] = {}
    for name in options.names or ALL:
        outcomes[name] = outcome(name)
        print(f"{name}: {outcomes[name].status} {outcomes[name].reason[:2000]}".strip(), file=sys.stderr, flush=True)
    if options.json:
        options.json.write_text(json.dumps({name: dataclasses.asdict(one) for name, one in outcomes.items()}, indent=1))
    if options.names:
        return 0
    if options.check and section(outcomes) == section_of_readme():
        return 0
    print(section(outcomes))
    if options.check:
        print("README.md says something else between its support markers; put this there.", file=sys.stderr)
    return int(options.check)


if __name__ == "__main__":
    sys.exit(main())
