"""Pipelines, in every way they can be told and asked: the text is that of generate() with the same head."""

import pytest
import torch
from steered import GREEDY, STEER
from tiny import tiny_control_head, tiny_head, tiny_model, tiny_tokenizer
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    TextIteratorStreamer,
    pipeline,
)
from transformers.utils import is_vision_available

from hf_recontrol import disable_recontrol, enable_recontrol, register_value_heads

pytestmark = pytest.mark.versions
PROMPT = "w5 w6 w7"
PROMPTS = [PROMPT, "w8", "w9 w10"]
CHAT = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7"}, {"role": "user", "content": "w8"}]
OTHER_CHAT = [{"role": "user", "content": "w11"}]
SCALARS = {name: value for name, value in STEER.items() if name != "recontrol_value_head"}


def fresh():
    """The model without anyone's defaults."""
    return enable_recontrol(tiny_model())


@pytest.fixture
def model():
    return fresh()


@pytest.fixture
def head():
    return tiny_head()


@pytest.fixture
def tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "<s>{% for message in messages %} {{ message['content'] }}{% endfor %} w9"
    tokenizer.padding_side = "left"
    return tokenizer


def config(**extra):
    """A generation config that names the registered head."""
    return GenerationConfig(**GREEDY, recontrol_value_head="polite", **STEER, **extra)


def told_in_the_call(model, tokenizer, head):
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    return lambda *inputs, **kwargs: pipe(*inputs, **GREEDY, recontrol_value_head=head, **STEER, **kwargs)


def told_in_the_constructor(model, tokenizer, head):
    steer = {"recontrol_value_head": head, **STEER}
    return pipeline("text-generation", model=model, tokenizer=tokenizer, **GREEDY, **steer)


def told_by_a_config_in_the_call(model, tokenizer, head):
    register_value_heads({"polite": head})
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    return lambda *inputs, **kwargs: pipe(*inputs, generation_config=config(), **kwargs)


def told_by_a_config_in_the_constructor(model, tokenizer, head):
    register_value_heads({"polite": head})
    return pipeline("text-generation", model=model, tokenizer=tokenizer, generation_config=config())


def told_by_the_models_defaults(model, tokenizer, head):
    model.set_recontrol_defaults(head, **{name.removeprefix("recontrol_"): value for name, value in STEER.items()})
    return pipeline("text-generation", model=model, tokenizer=tokenizer, **GREEDY)


def told_by_defaults_set_later(model, tokenizer, head):
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, **GREEDY)
    model.set_recontrol_defaults(head, **{name.removeprefix("recontrol_"): value for name, value in STEER.items()})
    return pipe


TOLD = [
    told_in_the_call,
    told_in_the_constructor,
    told_by_a_config_in_the_call,
    told_by_a_config_in_the_constructor,
    told_by_the_models_defaults,
    told_by_defaults_set_later,
]


def inputs_of(tokenizer, asked):
    """The tensors that a pipeline makes of a prompt or a chat."""
    if isinstance(asked, str):
        return tokenizer(asked, return_tensors="pt")
    return tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True, return_tensors="pt")


def answer(model, tokenizer, asked, **keywords):
    """What generate() goes on with."""
    inputs = inputs_of(tokenizer, asked)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    output = model.generate(ids, attention_mask=mask, **(GREEDY | keywords))
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("told", TOLD)
def test_every_way_to_tell_a_pipeline_steers_every_kind_of_input(model, tokenizer, head, told):
    plain = [answer(tiny_model(), tokenizer, asked) for asked in (*PROMPTS, CHAT, OTHER_CHAT)]
    steer = {"recontrol_value_head": head, **STEER}
    steered = [answer(model, tokenizer, asked, **steer) for asked in (*PROMPTS, CHAT, OTHER_CHAT)]
    assert all(a != b for a, b in zip(plain, steered, strict=True))
    pipe = told(model, tokenizer, head)

    assert pipe(PROMPT) == [{"generated_text": PROMPT + steered[0]}]
    assert pipe(PROMPT, return_full_text=False) == [{"generated_text": steered[0]}]
    assert pipe(PROMPTS) == [[{"generated_text": p + text}] for p, text in zip(PROMPTS, steered, strict=False)]
    assert pipe(CHAT) == [{"generated_text": [*CHAT, {"role": "assistant", "content": steered[3]}]}]
    chats = pipe([CHAT, OTHER_CHAT], return_full_text=False)
    assert chats == [[{"generated_text": text}] for text in steered[3:]]
    (tokens,) = pipe(PROMPT, return_tensors=True)
    assert tokenizer.decode(tokens["generated_token_ids"], skip_special_tokens=True) == f"{PROMPT} {steered[0]}"


@pytest.mark.parametrize("told", TOLD)
def test_a_batch_of_prompts_is_steered_row_by_row(model, tokenizer, head, told):
    pipe = told(model, tokenizer, head)
    assert pipe(PROMPTS, batch_size=3) == [pipe(prompt) for prompt in PROMPTS]
    assert [text[0]["generated_text"] for text in pipe(PROMPTS, batch_size=3)] == [
        prompt + answer(fresh(), tokenizer, prompt, recontrol_value_head=head, **STEER) for prompt in PROMPTS
    ]


def test_each_prompt_of_a_batch_may_have_a_head_of_its_own(model, tokenizer, head):
    pipe, other = pipeline("text-generation", model=model, tokenizer=tokenizer), tiny_control_head(3)
    heads = [head, False, other]
    texts = pipe(PROMPTS, batch_size=3, return_full_text=False, **GREEDY, recontrol_value_head=heads)
    assert [text[0]["generated_text"] for text in texts] == [
        answer(model, tokenizer, prompt, recontrol_value_head=one) for prompt, one in zip(PROMPTS, heads, strict=True)
    ]
    with pytest.raises(ValueError, match="is a list of 3, but 1 prompts were given"):
        pipe(PROMPTS, **GREEDY, recontrol_value_head=heads)


@pytest.mark.parametrize("told", [one for one in TOLD if one not in (told_in_the_call, told_by_a_config_in_the_call)])
def test_a_call_has_the_last_word(model, tokenizer, head, told):
    pipe, other = told(model, tokenizer, head), tiny_control_head(3)
    (plain,) = pipe(PROMPT, return_full_text=False, recontrol_value_head=False)
    assert plain["generated_text"] == answer(tiny_model(), tokenizer, PROMPT)
    steer = {"recontrol_step_size": 4.0}
    (further,) = pipe(PROMPT, return_full_text=False, recontrol_value_head=head, **steer)
    assert further["generated_text"] == answer(fresh(), tokenizer, PROMPT, recontrol_value_head=head, **STEER | steer)
    if told is told_in_the_constructor:  # its step size and number of steps are keywords too, and of a value head
        return
    (controlled,) = pipe(PROMPT, return_full_text=False, recontrol_value_head=other)
    assert controlled["generated_text"] == answer(fresh(), tokenizer, PROMPT, recontrol_value_head=other)


@pytest.mark.parametrize("told", TOLD)
def test_a_streamer_of_a_pipeline_is_given_the_steered_text(model, tokenizer, head, told):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    (whole,) = told(model, tokenizer, head)(PROMPT, return_full_text=False, streamer=streamer)
    assert "".join(streamer) == whole["generated_text"] != answer(tiny_model(), tokenizer, PROMPT)


def test_sampled_answers_of_a_pipeline_are_steered(model, tokenizer, head):
    sampling = {"do_sample": True, "temperature": 0.5, "top_k": 0, "num_return_sequences": 3, "max_new_tokens": 8}
    keywords = sampling | {"recontrol_value_head": head, **STEER}
    torch.manual_seed(1)
    texts = pipeline("text-generation", model=model, tokenizer=tokenizer)(PROMPT, return_full_text=False, **keywords)
    torch.manual_seed(1)
    inputs = inputs_of(tokenizer, PROMPT)
    output = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **keywords)
    expected = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [text["generated_text"] for text in texts] == expected
    assert len(set(expected)) > 1


def test_a_pipeline_with_an_assistant_model_steers_the_target(model, tokenizer, head):
    draft = tiny_model(seed=1)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, assistant_model=draft)
    (text,) = pipe(PROMPT, return_full_text=False, **GREEDY, recontrol_value_head=head, **STEER)
    assert text["generated_text"] == answer(model, tokenizer, PROMPT, recontrol_value_head=head, **STEER)


def test_a_pipeline_that_loads_its_model_itself_is_steered_where_all_models_are(tokenizer, head, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = answer(enable_recontrol(tiny_model()), tokenizer, PROMPT, recontrol_value_head=head, **STEER)
    enable_recontrol()
    try:
        pipe = pipeline("text-generation", model=str(tmp_path))
        (text,) = pipe(PROMPT, return_full_text=False, **GREEDY, recontrol_value_head=head, **STEER)
    finally:
        disable_recontrol()
    assert text["generated_text"] == expected != answer(tiny_model(), tokenizer, PROMPT)


def test_a_misspelt_keyword_is_refused_by_a_pipeline_too(model, tokenizer, head):
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="the nearest is 'recontrol_value_head'"):
        pipe(PROMPT, recontrol_valuehead=head)
    with pytest.raises(ValueError, match="the nearest is 'recontrol_step_size'"):
        pipe(PROMPT, generation_config=GenerationConfig(**GREEDY, recontrol_stepsize=1.0))


def llava(tokenizer):
    """A tiny model that reads an image of 16 × 16 pixels as 4 tokens, and its processor."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, "projection_dim": 16, **sizes}
    text = tiny_model().config.to_dict()
    tokenizer.add_tokens(["w63"], special_tokens=True)  # found also where nothing parts it from its neighbours
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=63))
    square = {"height": 16, "width": 16}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=square, crop_size=square),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="w63",
    )
    return model.eval(), processor


@pytest.mark.skipif(not is_vision_available(), reason="needs Pillow")
@pytest.mark.parametrize("where", ["call", "constructor", "defaults"])
def test_a_pipeline_of_images_is_steered_through_its_generate_kwargs(tokenizer, head, where):
    from PIL import Image

    model, processor = llava(tokenizer)
    image = Image.new("RGB", (16, 16), (200, 30, 90))
    inputs = processor(images=image, text="w63 w5", return_tensors="pt")
    plain = processor.decode(model.generate(**inputs, **GREEDY)[0], skip_special_tokens=True)
    enable_recontrol(model)
    keywords = {"recontrol_value_head": head, **STEER}
    expected = processor.decode(model.generate(**inputs, **GREEDY, **keywords)[0], skip_special_tokens=True)
    assert expected != plain
    if where == "defaults":
        model.set_recontrol_defaults(head, **{n.removeprefix("recontrol_"): value for n, value in STEER.items()})
        keywords = {}
    told = {"generate_kwargs": {**GREEDY, **keywords}}
    in_constructor, in_call = ({}, told) if where == "call" else (told, {})
    pipe = pipeline("image-text-to-text", model=model, processor=processor, **in_constructor)
    (answer,) = pipe(images=image, text="w63 w5", return_tensors=True, **in_call)
    assert processor.decode(answer["generated_token_ids"], skip_special_tokens=True) == expected
