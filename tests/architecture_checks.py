"""A tiny random model of any architecture, and steering it beside an oracle that has no hook of ours."""

import contextlib
import copy
import dataclasses
import functools
from typing import Any

import torch
import transformers
from architecture_configs import config_of
from test_kl_bound import kl_by_hand, merged_by_hand
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from hf_recontrol import ControlConfig, Controller, ValueHead, ValueHeadConfig, enable_recontrol
from hf_recontrol.forwards import forward_steered
from hf_recontrol.generation import RecontrolGenerationMixin
from hf_recontrol.hooks import lm_head, lm_head_owner
from hf_recontrol.recording import HiddenStates
from hf_recontrol.steering import steered_generate

PARAMETERS = 100_000_000  # in each model at most
NEW_TOKENS = 3
GREEDY = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "return_dict_in_generate": True, "output_logits": True}


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
