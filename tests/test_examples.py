"""The README's own lines run, with the demo's model and head in place of the names they use."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from hf_recontrol.demo.assets import FOLDER, Demo

README = Path(__file__).parents[1] / "README.md"


def block(heading, place=0):
    """The python code under a heading of the README."""
    section = re.search(rf"## {heading}\n(.*?)\n## ", README.read_text(encoding="utf-8"), re.DOTALL)[1]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)[place]


def test_the_lines_that_steer_a_model_run():
    code = block("Steer your own model").replace("Qwen/Qwen3-0.6B", str(FOLDER / "language_model"))
    names = {}
    exec(code.replace("path/to/head", str(FOLDER / "value_head")), names)
    texts = [names["tokenizer"].decode(names[name][0]) for name in ("plain", "steered", "stronger")]
    assert len(set(texts)) == 3
    code = block("Steer your own model", 1)
    if find_spec("matplotlib") is None:
        code = code.rpartition("figure =")[0]
    exec(code.replace("path/to/head", str(FOLDER / "value_head")), names)
    new = names["out"].sequences.shape[1] - names["inputs"]["input_ids"].shape[1]
    assert names["out"].recontrol_trace.lengths.tolist() == [new]


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_the_lines_that_train_a_head_run(tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    demo = Demo()
    names = {"model": demo.model, "tokenizer": demo.tokenizer, "prompts": demo.prompts["train"][:12]}
    for place in (0, 1):
        code = block("Train a head", place).replace("max_new_tokens=128", "max_new_tokens=8")
        code = code.replace(
            'RecontrolTrainingArguments("runs")', 'RecontrolTrainingArguments("runs", report_to="none")'
        )
        exec(code.replace('"path/to/head"', '"head"'), names)
        assert type(names["head"]).__name__ == ("ControlHead", "ValueHead")[place]
    files = sorted(path.name for path in (tmp_path / "head").iterdir())
    assert files == ["README.md", "config.json", "model.safetensors"]


def test_the_lines_that_compare_run():
    demo = Demo()
    prompts = demo.prompts["test"][:2]
    inputs = demo.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    names = {"model": demo.model, "tokenizer": demo.tokenizer, "prompts": prompts, "inputs": inputs}
    names |= {"head": demo.head("value_head"), "reward": lambda completions, **_: [float(len(c)) for c in completions]}
    exec(block("Compare").replace("weight=1.0", "weight=1.0, top_k=3"), names)


def test_the_readme_names_only_files_that_exist():
    root = README.parent
    text = README.read_text(encoding="utf-8")
    assert all((root / name).exists() for name in re.findall(r"`(examples/[\w/.]*|\.ci/[\w/.]*)`", text))
