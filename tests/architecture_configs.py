"""Tiny configs of every architecture of the installed transformers: few layers, two heads, and widths to match."""

import copy
import dataclasses
import math
import re
from typing import Any

from transformers import BertConfig, PreTrainedConfig, SiglipVisionConfig, ViTConfig
from transformers.models.auto import modeling_auto

MAPPINGS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "sequence-to-sequence": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "image-text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
VOCABULARY = 128  # words below 100, special tokens of images and sound above

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
