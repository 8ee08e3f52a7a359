"""The page's parts, how the command line makes it, and the Space; test_page_browser.py has it in a browser."""

import asyncio
import re
import runpy
import sys
from pathlib import Path

import pytest
from tiny import tiny_control_head, tiny_head, tiny_model, tiny_tokenizer

from hf_recontrol import HeadMismatch
from hf_recontrol.page import build_page, launch_page

SPACE = Path(__file__).parents[1] / "examples" / "space"


@pytest.fixture
def gradio():
    return pytest.importorskip("gradio")


def in_a_loop(make, *arguments):
    """What `make` returns, made while an event loop runs: where none does, gradio makes one and leaves it open."""

    async def run():
        return make(*arguments)

    return asyncio.run(run())


def parts(page):
    """The page's components by their elem_id."""
    return {block.elem_id: block for block in page.blocks.values() if getattr(block, "elem_id", None)}


def test_a_calibrated_head_has_a_slider_as_far_as_its_calibration_and_no_number_of_its_own(gradio):
    head = tiny_head()
    head.config.control.calibration = [[0.05, 1.0], [0.3, 4.0]]
    page = parts(in_a_loop(build_page, tiny_model(), tiny_tokenizer(), {"head": head}))
    assert (page["strength"].minimum, page["strength"].maximum, page["strength"].interactive) == (0, 0.3, True)
    assert page["multiplier"].value == ""
    assert page["num_steps"].visible


def test_an_uncalibrated_head_steers_by_its_own_number(gradio):
    head = tiny_control_head()
    page = parts(in_a_loop(build_page, tiny_model(), tiny_tokenizer(), {"head": head}))
    assert not page["strength"].interactive
    assert page["multiplier"].value == str(head.config.control.scale)
    assert not page["num_steps"].visible


def test_all_that_generates_waits_in_one_line_and_nothing_is_reported_home(gradio):
    page = in_a_loop(build_page, tiny_model(), tiny_tokenizer(), {"head": tiny_head()})
    answering = [event for event in page.fns.values() if event.name == "answer"]
    assert len(answering) > 1
    assert {(event.concurrency_id, event.concurrency_limit) for event in answering} <= {
        ("model", "default"),
        ("model", 1),
    }
    assert page.analytics_enabled is False


def test_a_head_that_does_not_fit_is_refused_before_there_is_a_page(gradio):
    with pytest.raises(HeadMismatch, match="8 wide"):
        build_page(tiny_model(), tiny_tokenizer(), {"narrow": tiny_head(hidden_size=8)})


def test_without_gradio_the_page_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r'pip install "hf-recontrol\[demo\]"'):
        build_page(tiny_model(), tiny_tokenizer(), {"head": tiny_head()})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "7860"], "are of the page: pass --page too"),
        (["--model", "some/model"], "are of the page: pass --page too"),
        (["--page", "--train"], "Train first, then --page --head mine="),
        (["--page", "--model", "some/model"], "no head for it was named. Add --head NAME=HEAD"),
        (["--page", "--head", "some/head"], "must be a name and what it stands for"),
    ],
    ids=str,
)
def test_the_command_refuses_options_that_would_do_nothing(arguments, words, command):
    assert words in command("demo", *arguments, status=2)


def test_the_command_takes_any_model_and_heads(gradio, tmp_path, monkeypatch, command):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    tiny_head().save_pretrained(tmp_path / "head")
    opened = []
    monkeypatch.setattr("hf_recontrol.page.launch_page", lambda page, **where: opened.append((page, where)))
    head = f"mine={tmp_path / 'head'}"
    in_a_loop(command, "demo", "--page", "--model", tmp_path / "model", "--head", head, "--port", "7999")
    ((page, where),) = opened
    assert where == {"host": None, "port": 7999}
    assert parts(page)["head"].choices == [("mine", "mine")]


def test_the_space_shows_the_demos_heads_by_the_gradio_that_is_tested(gradio, monkeypatch):
    monkeypatch.delenv("MODEL", raising=False)
    page = in_a_loop(runpy.run_path, str(SPACE / "app.py"))["page"]
    assert parts(page)["head"].value == "control head"
    header = (SPACE / "README.md").read_text(encoding="utf-8").split("---")[1]
    settings = dict(re.findall(r"^(\w+): (.*)$", header, re.MULTILINE))
    assert settings["sdk"] == "gradio"
    assert settings["app_file"] == "app.py"
    assert settings["sdk_version"].split(".")[0] == gradio.__version__.split(".")[0]
    assert len(settings["short_description"]) <= 60  # the Hub's bound
    assert callable(launch_page)


def test_the_space_takes_a_model_and_heads_by_its_variables(gradio, tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    tiny_head().save_pretrained(tmp_path / "head")
    monkeypatch.setenv("MODEL", str(tmp_path / "model"))
    monkeypatch.setenv("HEADS", f"one={tmp_path / 'head'} two={tmp_path / 'head'}")
    page = in_a_loop(runpy.run_path, str(SPACE / "app.py"))["page"]
    assert [name for name, _ in parts(page)["head"].choices] == ["one", "two"]
