"""Every block of code in the guides runs, in its guide's order, with the demo's model, a head and prompts."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN

import hf_recontrol
from hf_recontrol import enable_recontrol
from hf_recontrol.demo.assets import FOLDER, Demo

ROOT = Path(__file__).parents[1]
GUIDES = sorted((ROOT / "examples" / "guides").glob("*.md"))
ELSEWHERE = {
    "hf-recontrol demo": "tests/test_demo.py runs it",
    "pip install": "as a newcomer would, not in a test",
}
REWARD = "def reward(completions, **_):\n    return [float(len(text)) for text in completions]\n"
SMALL = {
    "rollouts": ("--limit", "8", "--max-new-tokens", "6"),
    "tune": ("--max-new-tokens", "6"),
    "evaluate": ("--limit", "8", "--tuning-prompts", "8", "--max-new-tokens", "6", "--best-of", "2", "--no-plots"),
}
SEARCHED = ("--limit", "8", "--trials", "2")
SKIPPED = ("CD prefix", "CD prefix + prompting", "CD (ARGS)")
NAMED = {
    "Qwen/Qwen3-0.6B-Base": FOLDER / "language_model",
    "Qwen/Qwen3-0.6B": FOLDER / "language_model",
    "MODEL": FOLDER / "language_model",
    "Ray2333/gpt2-large-harmless-reward_model": FOLDER / "reward",
    "OpenAssistant/reward-model-deberta-v3-large-v2": FOLDER / "judge",
    "Anthropic/hh-rlhf": "prompts",
}
"""What stands in for the names in the guides."""


def blocks(guide, language):
    return re.findall(rf"```{language}\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL)


def with_stand_ins(code):
    for name, stand_in in NAMED.items():
        code = code.replace(name, str(stand_in))
    return code


@pytest.fixture
def files(hub, tmp_path, monkeypatch):
    """A folder with what the guides' commands name, and a Hub on loopback where the user is logged in."""
    pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: TOKEN)
    monkeypatch.chdir(tmp_path)
    prompts = Demo().prompts["train"][:20]
    (tmp_path / "prompts").mkdir()
    lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    for name in ("prompts.jsonl", "prompts/train.jsonl", "prompts/test.jsonl"):
        (tmp_path / name).write_text(lines, encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    (tmp_path / "rewards.py").write_text(REWARD)
    (tmp_path / "judge.py").write_text(REWARD.replace("def reward", "def judge"))
    (tmp_path / "path" / "to").mkdir(parents=True)
    head = Demo().head("value_head")
    head.config.base_model_name_or_path = None  # a folder has no place in a card
    for name in ("head", "other"):
        head.save_pretrained(tmp_path / "path" / "to" / name)
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
@pytest.mark.filterwarnings("ignore:The value head was trained on:UserWarning")
@pytest.mark.parametrize("guide", [guide for guide in GUIDES if blocks(guide, "python")], ids=lambda guide: guide.stem)
def test_the_python_of_a_guide_runs(guide, files):
    pytest.importorskip("accelerate")
    demo = Demo()
    names = {"model": enable_recontrol(demo.model), "tokenizer": demo.tokenizer}
    for code in blocks(guide, "python"):
        exec(with_stand_ins(code).replace("max_new_tokens=40", "max_new_tokens=8"), names)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
@pytest.mark.filterwarnings("ignore:The value head was trained on:UserWarning")
@pytest.mark.parametrize("guide", [guide for guide in GUIDES if blocks(guide, "bash")], ids=lambda guide: guide.stem)
def test_the_commands_of_a_guide_run(guide, files, command):
    pytest.importorskip("accelerate")
    for block in blocks(guide, "bash"):
        for line in block.replace("\\\n", " ").strip().splitlines():
            if any(line.startswith(known) for known in ELSEWHERE):
                continue
            program, name, *rest = shlex.split(with_stand_ins(line))
            assert program == "hf-recontrol", line
            more = [*SMALL.get(name, ()), *(SEARCHED if "--objective" in rest else ())]
            more += [part for row in SKIPPED if name == "evaluate" for part in ("--skip", row)]
            command(name, *rest, *more)


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_a_guide_links_only_to_what_exists(guide):
    text = guide.read_text(encoding="utf-8")
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    missing = [target for target in targets if target and not (guide.parent / target).exists()]
    assert not missing
    assert all((ROOT / name).exists() for name in re.findall(r"`(examples/[\w/.]*|tests/[\w/.]*)`", text))


def test_the_guides_become_a_site_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    config = ROOT / ".github" / "mkdocs.yml"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-f", str(config), "-d", str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for guide in GUIDES:
        assert (tmp_path / "guides" / guide.stem / "index.html").is_file()
    api = (tmp_path / "guides" / "api" / "index.html").read_text(encoding="utf-8")
    missing = [name for name in hf_recontrol.__all__ if f'id="hf_recontrol.{name}"' not in api]
    assert not missing


@pytest.mark.parametrize(("name", "file"), [("table", "table.md"), ("other", "other/table.md")])
def test_the_tables_of_the_comparison_are_those_that_its_command_wrote(name, file):
    text = (ROOT / "examples" / "guides" / "comparison.md").read_text(encoding="utf-8")
    shown = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", text, re.DOTALL)[1]
    assert shown == (ROOT / "examples" / "demo" / "comparison" / file).read_text(encoding="utf-8").strip()
