"""A repository's custom_generate/generate.py says what the plug-in says, where the package cannot be imported."""

import ast
import collections
import functools
import gc
import json
import os
import subprocess
import sys
import threading
import time
import warnings
import weakref

import pytest
import torch
from hub_server import TOKEN
from tiny import CONTROL_SHAPES, prompts, tiny_control_head, tiny_head, tiny_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LogitsProcessor,
    T5Config,
    T5ForConditionalGeneration,
    TextStreamer,
    set_seed,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_recontrol import Head, HeadError, HeadUnavailable, enable_recontrol

pytestmark = pytest.mark.versions

MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.9},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled beams": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
}
TOKENS = {"max_new_tokens": 8}
CALIBRATION = [[0.02, 0.1], [0.4, 0.8]]
VALUE_SHAPES = {
    "linear": {"num_hidden_layers": 0},
    "relu": {"num_hidden_layers": 1},
    "two layers": {"num_hidden_layers": 2, "hidden_act": "gelu"},
    "silu": {"num_hidden_layers": 1, "hidden_act": "silu"},
    "tanh": {"num_hidden_layers": 2, "hidden_act": "tanh"},
}
CHILD = """
import json, sys

class Blocked:
    def find_spec(self, name, *rest):
        if name.split(".")[0] == "hf_recontrol":
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM, set_seed
torch.set_num_threads(1)
work = json.load(sys.stdin)
model = AutoModelForCausalLM.from_pretrained(work["model"])
inputs = {name: torch.tensor(value) for name, value in work["inputs"].items()}

class Kept:
    def __init__(self): self.tokens = []
    def put(self, value): self.tokens += value.flatten().tolist()
    def end(self): pass

said = {}
for repo_id in work["heads"]:
    for name, mode in work["modes"].items():
        if "beams" in name and repo_id not in work["beams"]:
            continue
        set_seed(0)
        found = model.generate(**inputs, **mode, custom_generate=repo_id, trust_remote_code=True)
        said[f"{repo_id} {name}"] = found.tolist()
    streamer, one = Kept(), {name: value[:1] for name, value in inputs.items()}
    found = model.generate(**one, **work["modes"]["greedy"], custom_generate=repo_id, trust_remote_code=True,
        streamer=streamer)
    assert streamer.tokens == found[0].tolist()
    said[f"{repo_id} streamed"] = found.tolist()
said["plain"] = model.generate(**inputs, **work["modes"]["greedy"]).tolist()
assert not any(name.startswith("hf_recontrol") for name in sys.modules)
json.dump(said, sys.stdout)
"""


def heads():
    """One head of every shape, by the defaults that a head may have."""
    found = {f"value-{i}": tiny_head(i, **shape) for i, shape in enumerate(VALUE_SHAPES.values())}
    found |= {f"control-{i}": tiny_control_head(i, **shape) for i, shape in enumerate(CONTROL_SHAPES.values())}
    for i, head in enumerate(found.values()):
        if i % 2:
            head.config.control.calibration, head.config.control.strength = CALIBRATION, 0.1
        elif head.config.kind == "value":
            head.config.control.step_size, head.config.control.num_steps = 0.8, 7
        if i % 4 == 2:
            head.config.control.max_kl = 0.05
    return {f"user/{name}": head for name, head in found.items()}


def environment(hub, home):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": ""}


def by_plug_in(model, head, mode, **inputs):
    set_seed(0)
    return enable_recontrol(model).generate(**inputs, **mode, recontrol_value_head=head).tolist()


def by_file(model, repo_id, **arguments):
    return model.generate(custom_generate=repo_id, trust_remote_code=True, **arguments)


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """transformers keeps the code that it runs there."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def pushed(hub, modules):
    """pushed(head, …): its repository's id, with generate.py."""

    def push(head, repo_id="user/head", **arguments):
        head.push_to_hub(repo_id, token=TOKEN, custom_generate=True, **arguments)
        return repo_id

    return push


def files(hub, repo_id="user/head", branch="main"):
    repository = hub.repositories[repo_id]
    return repository.commits[repository.branches[branch]]


def test_a_process_without_the_package_says_what_the_plug_in_says(hub, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    inputs = prompts()
    inputs["attention_mask"][0, :2] = 0
    for repo_id, head in heads().items():
        head.push_to_hub(repo_id, token=TOKEN, custom_generate=True)
    modes = {name: {**mode, **TOKENS} for name, mode in MODES.items()}
    work = {"model": str(tmp_path / "model"), "inputs": {name: value.tolist() for name, value in inputs.items()}}
    beams = ["user/value-1", "user/control-3"]  # the other shapes would show nothing that sampling does not
    work |= {"heads": list(heads()), "modes": modes, "beams": beams}
    child = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(work),
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(hub, tmp_path / "home"),
        cwd=tmp_path,
    )
    assert child.returncode == 0, child.stderr
    said = json.loads(child.stdout)
    for repo_id, head in heads().items():
        for name, mode in modes.items() if repo_id in beams else list(modes.items())[:2]:
            assert said[f"{repo_id} {name}"] == by_plug_in(model, head, mode, **inputs), (repo_id, name)
        one = {name: value[:1] for name, value in inputs.items()}
        assert said[f"{repo_id} streamed"] == by_plug_in(model, head, modes["greedy"], **one)
        assert said[f"{repo_id} greedy"] != said["plain"]


@pytest.mark.parametrize("kind", ["soft-capped", "encoder-decoder", "bfloat16"])
def test_models_of_other_kinds_are_steered_alike(pushed, kind):
    head = tiny_control_head()
    head.config.control.max_kl = 0.1
    if kind == "encoder-decoder":
        torch.manual_seed(0)
        config = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=64, pad_token_id=0)
        config.decoder_start_token_id = 0
        make = lambda: T5ForConditionalGeneration(config).eval()  # noqa: E731
    elif kind == "soft-capped":
        config = Gemma2Config(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        config.num_key_value_heads, config.head_dim, config.vocab_size, config.final_logit_softcapping = 2, 8, 64, 0.5
        make = lambda: Gemma2ForCausalLM(config).eval()  # noqa: E731
    else:
        make = lambda: tiny_model().to(torch.bfloat16)  # noqa: E731
    repo_id = pushed(head)
    torch.manual_seed(0)
    model = make()
    set_seed(0)
    found = by_file(model, repo_id, **prompts(), **MODES["sampling"], **TOKENS).tolist()
    assert found == by_plug_in(model, head, {**MODES["sampling"], **TOKENS}, **prompts())


@pytest.mark.parametrize("mode", ["greedy", "sampling"])
@pytest.mark.parametrize("drafts_of", ["another model", "the model itself"])
def test_drafts_of_a_model_are_plain_and_the_text_is_the_plug_ins(pushed, drafts_of, mode):
    head, model, one = tiny_control_head(), tiny_model(), prompts(rows=1)
    mode = {**MODES[mode], "assistant_model": tiny_model(1) if drafts_of == "another model" else model, **TOKENS}
    repo_id = pushed(head)
    set_seed(0)
    found = by_file(model, repo_id, **one, **mode).tolist()
    assert found == by_plug_in(model, head, mode, **one)


def test_a_plain_text_made_inside_a_steered_one_is_plain(pushed):
    head, model, inside = tiny_control_head(), tiny_model(), []
    arguments = {**prompts(), **MODES["greedy"], **TOKENS}
    plain = model.generate(**arguments).tolist()

    class Aside(LogitsProcessor):
        def __call__(self, input_ids, scores):
            inside.append(model.generate(**arguments).tolist())
            return scores

    found = by_file(model, pushed(head), **arguments, logits_processor=[Aside()]).tolist()
    assert inside == [plain] * TOKENS["max_new_tokens"]
    assert found == by_plug_in(model, head, {}, **arguments) != plain


def test_nothing_stays_on_the_model(pushed):
    model, repo_id = tiny_model(), pushed(tiny_control_head())
    plain = model.generate(**prompts(), **MODES["greedy"], **TOKENS)
    by_file(model, repo_id, **prompts(), **MODES["greedy"], **TOKENS)

    class Broken(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        by_file(model, repo_id, **prompts(), **TOKENS, logits_processor=[Broken()])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    torch.testing.assert_close(model.generate(**prompts(), **MODES["greedy"], **TOKENS), plain, rtol=0, atol=0)


def test_another_thread_on_the_same_model_is_plain(pushed):
    model, repo_id = tiny_model(), pushed(tiny_control_head())
    plain = model.generate(**prompts(), **MODES["greedy"], **TOKENS).tolist()
    arguments = {**prompts(), **MODES["greedy"], **TOKENS}
    steered, meanwhile = by_file(model, repo_id, **arguments).tolist(), []

    def aside(*_):
        """Between the layers of a steered forward, another thread makes a plain text."""
        if threading.current_thread() is threading.main_thread():
            work = lambda: meanwhile.append(model.generate(**arguments).tolist())  # noqa: E731
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()

    model.model.layers[0].register_forward_hook(aside)
    assert by_file(model, repo_id, **arguments).tolist() == steered
    assert len(meanwhile) == TOKENS["max_new_tokens"]
    assert all(text == plain for text in meanwhile)


def test_nothing_is_put_on_the_model_meanwhile(pushed):
    """So there is nothing that another thread could meet half put on or half taken away."""
    model, seen = tiny_model(), []
    hooks = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs")

    def state():
        return [(type(m), {**vars(m)}, *({**getattr(m, name)} for name in hooks)) for m in model.modules()]

    class Look(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(state())
            return scores

    before = state()
    by_file(model, pushed(tiny_control_head()), **prompts(), **TOKENS, logits_processor=[Look()])
    assert seen == [before] * TOKENS["max_new_tokens"]


def test_threads_steered_by_two_heads_and_plain_ones_on_one_model_do_not_meet(pushed):
    other = tiny_control_head(1)
    other.config.control.max_kl = 0.05
    model, faults, done = tiny_model(), [], collections.Counter()
    files = [
        model.load_custom_generate(pushed(head, repo_id), trust_remote_code=True)
        for head, repo_id in ((tiny_control_head(), "user/head"), (other, "user/other"))
    ]
    texts = [lambda file=file, **arguments: file(model=model, **arguments) for file in files] + [model.generate] * 2
    arguments = [{**prompts(), **MODES["greedy"], "max_new_tokens": 2 + i} for i in range(len(texts))]
    expected = [text(**one).tolist() for text, one in zip(texts, arguments, strict=True)]
    assert expected[0] != model.generate(**arguments[0]).tolist()
    end = time.monotonic() + 3

    def work(i):
        while time.monotonic() < end:
            try:
                if texts[i](**arguments[i]).tolist() != expected[i]:
                    faults.append(f"thread {i}: another text")
            except Exception as error:
                faults.append(f"thread {i}: {error!r}")
            done[i] += 1

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(texts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not faults, (len(faults), faults[:3])
    assert min(done[i] for i in range(len(texts))) > 3


def never(graph, inputs):
    raise AssertionError("a steered forward was compiled")


@pytest.mark.parametrize("kept", ["accelerate", "torch.compile", "the compiled LM head"])
def test_a_model_that_keeps_a_forward_of_its_own_is_steered(pushed, kept):
    head, model, repo_id = tiny_control_head(), tiny_model(), pushed(tiny_control_head())
    inputs = {"input_ids": prompts()["input_ids"]}
    inputs["input_ids"][0, :2] = 0  # padding, of which generate() makes a mask if forward() takes one
    expected = by_plug_in(tiny_model(), head, {**MODES["greedy"], **TOKENS}, **inputs)
    if kept == "accelerate":
        pytest.importorskip("accelerate").dispatch_model(model, {"": "cpu"}, force_hooks=True)
        assert "forward" in vars(model)
    elif kept == "torch.compile":
        model.forward = torch.compile(model.forward, backend=never)
    else:
        model.lm_head.compile(backend=never)
    assert by_file(model, repo_id, **inputs, **MODES["greedy"], **TOKENS).tolist() == expected


def test_an_lm_head_that_is_called_by_name_is_steered_and_outside_of_a_forward_is_plain(pushed):
    head, aside, states = tiny_control_head(), [], torch.ones(1, 16)

    class ByName(type(tiny_model())):
        def prepare_inputs_for_generation(self, *args, **kwargs):
            aside.append(self.lm_head(input=states).tolist())
            return super().prepare_inputs_for_generation(*args, **kwargs)

        def forward(self, input_ids, attention_mask=None, logits_to_keep=0, **kwargs):
            hidden_states = self.model(input_ids, attention_mask, **kwargs)[0][:, -logits_to_keep:]
            return CausalLMOutputWithPast(logits=self.lm_head(input=hidden_states))

    model, arguments = tiny_model(), {**prompts(), **MODES["greedy"], **TOKENS, "use_cache": False}
    expected = by_plug_in(tiny_model(), head, {}, **arguments)
    model.__class__ = ByName
    assert by_file(model, pushed(head), **arguments).tolist() == expected
    assert aside == [model.lm_head(states).tolist()] * TOKENS["max_new_tokens"]


def test_what_a_forward_notes_on_the_model_is_there_afterwards(pushed):
    class Counting(type(tiny_model())):
        def forward(self, *args, **kwargs):
            self.forwards = getattr(self, "forwards", 0) + 1
            return super().forward(*args, **kwargs)

    model = tiny_model()
    model.__class__ = Counting
    by_file(model, pushed(tiny_control_head()), **prompts(), **TOKENS)
    assert model.forwards == TOKENS["max_new_tokens"]


def test_a_model_deleted_after_a_text_is_freed_at_once(pushed):
    model, repo_id = tiny_model(), pushed(tiny_control_head())
    gc.collect()
    gc.disable()
    try:
        by_file(model, repo_id, **prompts(), **TOKENS)
        weights = [weakref.ref(parameter) for parameter in model.parameters()]
        del model
        assert not any(weight() is not None for weight in weights)
    finally:
        gc.enable()


def test_the_weights_are_those_of_the_commit_that_the_file_was_written_for(hub, pushed):
    head, model = tiny_control_head(), tiny_model()
    repo_id = pushed(head)
    first, second = list(hub.repositories[repo_id].commits)[-2:]
    assert "custom_generate/generate.py" not in hub.repositories[repo_id].commits[first]
    text = files(hub)["custom_generate/generate.py"].decode()
    assert f'REVISION = "{first}"' in text
    assert f'REPO_ID = "{repo_id}"' in text
    hub.repositories[repo_id].commit({"model.safetensors": b"of another head"})
    found = by_file(model, repo_id, **prompts(), **MODES["greedy"], **TOKENS).tolist()
    assert found == by_plug_in(model, head, {**MODES["greedy"], **TOKENS}, **prompts())
    weights = [path for path in hub.paths() if path.endswith("model.safetensors")]
    assert weights
    assert all(first in path for path in weights)
    assert second


def test_weights_that_are_not_those_of_the_push_are_refused(hub, pushed):
    repo_id = pushed(tiny_control_head())
    first = list(hub.repositories[repo_id].commits)[-2]
    hub.repositories[repo_id].commits[first]["model.safetensors"] += b" "
    with pytest.raises(ValueError, match=r"model.safetensors of 'user/head' is damaged"):
        by_file(tiny_model(), repo_id, **prompts(), **TOKENS)


def test_a_branch_may_be_named_and_a_private_repository_takes_its_token(hub, pushed):
    head, model = tiny_control_head(), tiny_model()
    repo_id = pushed(head, private=True, revision="v1")
    found = by_file(model, repo_id, **prompts(), **MODES["greedy"], **TOKENS, revision="v1", token=TOKEN).tolist()
    assert found == by_plug_in(model, head, {**MODES["greedy"], **TOKENS}, **prompts())
    assert TOKEN.encode() not in b"".join(files(hub, branch="v1").values())


def test_a_pull_request_holds_both_commits(hub, pushed):
    tiny_head().push_to_hub("user/head", token=TOKEN)
    head = tiny_control_head()
    pushed(head, create_pr=True, replace_model_card=True)
    assert "custom_generate/generate.py" not in files(hub)
    text = files(hub, branch="refs/pr/1")["custom_generate/generate.py"].decode()
    assert f'REVISION = "{list(hub.repositories["user/head"].commits)[-2]}"' in text


def test_the_file_reads_well_and_imports_what_transformers_brings(hub, pushed):
    for head in (tiny_head(), tiny_control_head()):
        text = files(hub, pushed(head))["custom_generate/generate.py"].decode()
        imported = {
            (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        assert imported - sys.stdlib_module_names == {"torch", "transformers", "safetensors", "huggingface_hub"}
        assert all(len(line) <= 120 for line in text.splitlines())
        assert text.count("\n") < 330


# What is refused


@pytest.mark.parametrize(
    ("control", "match"),
    [
        ({"max_relative_norm": 0.1}, r"max_relative_norm = 0.1.*does not support.*= None"),
        ({"regularization": 0.1}, r"regularization = 0.1.*does not support.*= 0"),
        ({"target_value": 1.0}, r"target_value = 1.0.*does not support"),
        ({"step_size": 0.0}, "do not steer.*plain text"),
        ({"num_steps": 0}, "do not steer.*plain text"),
    ],
)
def test_what_a_generate_py_cannot_do_is_refused_before_anything_is_sent(hub, control, match):
    head = tiny_head()
    for name, value in control.items():
        setattr(head.config.control, name, value)
    with pytest.raises(HeadError, match=match):
        head.push_to_hub("user/head", token=TOKEN, custom_generate=True)
    assert hub.log == []


def test_a_control_head_that_is_0_and_one_of_scale_0_are_refused(hub):
    head = tiny_control_head()
    head.config.control.scale = 0.0
    with pytest.raises(HeadError, match="do not steer"):
        head.push_to_hub("user/head", token=TOKEN, custom_generate=True)
    head.config.control.scale = 1.0
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
    with pytest.raises(HeadError, match="0 everywhere"):
        head.push_to_hub("user/head", token=TOKEN, custom_generate=True)
    assert hub.log == []


def test_a_hidden_layer_whose_products_would_fill_a_gpu_is_refused(hub):
    head = tiny_head(hidden_size=16, intermediate_size=2**14 + 1)
    with pytest.raises(HeadError, match="16384 at most"):
        head.push_to_hub("user/head", token=TOKEN, custom_generate=True)


def test_a_folder_cannot_have_one(tmp_path):
    with pytest.raises(ValueError, match="push_to_hub=True"):
        tiny_head().save_pretrained(tmp_path / "head", custom_generate=True)
    assert not (tmp_path / "head").exists()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"recontrol_strength": 0.1}, "not support recontrol_strength.*pip install"),
        ({"assistant_early_exit": 1}, "assistant_early_exit"),
        ({"assistant_model": tiny_model(1), "assistant_ensemble_weight": 0.5}, "assistant_ensemble_weight"),
    ],
)
def test_a_call_that_would_not_be_steered_as_the_head_does_is_refused(pushed, arguments, match):
    with pytest.raises(ValueError, match=match):
        by_file(tiny_model(), pushed(tiny_head()), **prompts(rows=1), **TOKENS, **arguments)


def test_a_model_of_another_width_is_refused_and_another_base_model_warned_of(pushed):
    head = tiny_head(base_model_name_or_path="user/base")
    repo_id = pushed(head)
    with pytest.raises(ValueError, match=r"16 wide.*32 wide.*user/base"):
        by_file(tiny_model(hidden_size=32), repo_id, **prompts(), **TOKENS)
    model = tiny_model()
    model.config._name_or_path = "user/other"
    with pytest.warns(UserWarning, match="trained on 'user/base'; this model is 'user/other'"):
        by_file(model, repo_id, **prompts(), **TOKENS)
    model.config._name_or_path = "user/base"
    by_file(model, repo_id, **prompts(), **TOKENS)


def by_its_weight(model):
    def forward(self, input_ids, logits_to_keep, **kwargs):
        hidden_states = self.model(input_ids, **kwargs)[0][:, -logits_to_keep:]
        return CausalLMOutputWithPast(logits=torch.nn.functional.linear(hidden_states, self.lm_head.weight))

    model.__class__ = type("ByItsWeight", (type(model),), {"forward": forward})


def by_a_wrapper(model):
    stock = model.forward
    model.forward = functools.wraps(stock)(lambda *args, **kwargs: stock(*args, **kwargs))


@pytest.mark.parametrize("change", [by_its_weight, by_a_wrapper])
def test_a_forward_that_goes_by_the_lm_head_gives_no_text(pushed, change):
    model = tiny_model()
    change(model)
    assert model.generate(**prompts(), **TOKENS).shape[1] > TOKENS["max_new_tokens"]
    with pytest.raises(RuntimeError, match=r"could not be steered.*Was model\.forward replaced"):
        by_file(model, pushed(tiny_control_head()), **prompts(), **TOKENS)


def test_a_text_without_a_forward_of_the_model_is_not_returned(pushed):
    model = tiny_model()
    file = model.load_custom_generate(pushed(tiny_control_head()), trust_remote_code=True)
    model.__class__ = type("Elsewhere", (type(model),), {"generate": lambda self, **_: tiny_model().generate(**_)})
    with pytest.raises(RuntimeError, match="No forward pass of this model was steered"):
        file(model=model, **prompts(), **TOKENS)


def test_paged_is_refused_before_a_token_is_made(pushed):
    model, forwards = tiny_model(), []
    model.register_forward_hook(lambda *_: forwards.append(1))
    with pytest.raises(ValueError, match='does not support cache_implementation="paged"'):
        by_file(model, pushed(tiny_head()), **prompts(), **TOKENS, cache_implementation="paged")
    assert not forwards


@pytest.mark.slow
def test_a_compiled_forward_is_steered_and_keeps_nothing_of_it(pushed):
    model, repo_id, mode = tiny_model(), pushed(tiny_control_head()), {**MODES["greedy"], **TOKENS}
    plain, expected = (
        model.generate(**prompts(), **mode).tolist(),
        by_file(model, repo_id, **prompts(), **mode).tolist(),
    )
    model.forward = torch.compile(model.forward, backend="eager")
    assert by_file(model, repo_id, **prompts(), **mode).tolist() == expected
    assert model.generate(**prompts(), **mode).tolist() == plain


# What is said and kept on the Hub


def test_it_is_off_by_default_and_the_card_says_it_when_it_is_there(hub, pushed):
    head = tiny_head()
    head.push_to_hub("user/plain", token=TOKEN)
    assert "custom_generate/generate.py" not in files(hub, "user/plain")
    assert b"custom_generate" not in files(hub, "user/plain")["README.md"]
    card = files(hub, pushed(head))["README.md"].decode()
    assert 'custom_generate="user/head", trust_remote_code=True' in card
    assert "- custom_generate\n" in card
    assert "read it first" in card


def test_a_later_push_without_it_takes_the_old_one_away_and_says_so(hub, pushed):
    pushed(tiny_head())
    with pytest.warns(UserWarning, match="steered by the head of before.*custom_generate=True"):
        tiny_head(1).push_to_hub("user/head", token=TOKEN)
    assert "custom_generate/generate.py" not in files(hub)
    assert Head.from_pretrained("user/head").digest() == tiny_head(1).digest()


def test_a_card_that_is_kept_and_silent_is_warned_of(hub, pushed):
    hub.add("user/head", {"README.md": b"mine"})
    with pytest.warns(UserWarning, match="edited by hand and is kept: .* and of custom_generate"):
        pushed(tiny_head())
    assert files(hub)["README.md"] == b"mine"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pushed(tiny_head(), replace_model_card=True)
        pushed(tiny_head(1))


@pytest.mark.parametrize("is_there", [False, True])
def test_where_the_second_commit_fails_the_error_says_what_is_there(hub, pushed, is_there):
    class OnlyOne(list):
        """Faults that begin with the second commit."""

        def __iter__(self):
            return super().__iter__() if len(hub.repositories.get("user/head").commits) > before else iter(())

    hub.add("user/head", {})
    if is_there:
        pushed(tiny_head(1))
    before = len(hub.repositories["user/head"].commits)
    hub.fail("/commit/", status=403)
    hub.faults = OnlyOne(hub.faults)
    with pytest.raises(HeadUnavailable, match=r"was pushed to 'user/head', but without custom_generate/generate.py"):
        pushed(tiny_head())
    assert Head.from_pretrained("user/head").digest() == tiny_head().digest()
    assert "custom_generate/generate.py" not in files(hub)  # that of the head of before is away
    assert b"custom_generate" not in files(hub)["README.md"]


def test_saving_can_push_it_too(hub, modules, tmp_path):
    tiny_head().save_pretrained(tmp_path / "head", push_to_hub=True, token=TOKEN, custom_generate=True)
    assert "custom_generate/generate.py" in files(hub)


def test_text_is_streamed_word_by_word(pushed, capsys):
    from tiny import tiny_tokenizer

    one = prompts(rows=1)
    found = by_file(tiny_model(), pushed(tiny_head()), **one, **TOKENS, streamer=TextStreamer(tiny_tokenizer()))
    assert capsys.readouterr().out.split() == tiny_tokenizer().decode(found[0]).split()
