"""push and list, and the cards that go along: what a stranger wrote stays text, and the snippet runs."""

import json
import re
import sys

import pytest
import torch
import yaml
from hub_server import READ_TOKEN, TOKEN
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from tiny import tiny_control_head, tiny_head, tiny_model, tiny_tokenizer

from hf_recontrol import Head, HeadUnavailable
from hf_recontrol.model_card import CardFacts, card
from hf_recontrol.sharing import list_heads, push_head

BASE = "user/base"


def shared(hub, repo_id, head, **facts):
    """A repository of a head with its card, as its owner pushed it."""
    head.config.base_model_name_or_path = facts.pop("base", BASE)
    head.config.reward.name = facts.pop("reward", "politeness")
    head.push_to_hub(repo_id, token=TOKEN, **facts)


@pytest.fixture
def logged_in(monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: TOKEN)


def files(hub, repo_id):
    repository = hub.repositories[repo_id]
    return repository.commits[repository.branches["main"]]


# list


def test_the_heads_of_a_base_model_are_found_by_their_cards(hub):
    shared(hub, "user/polite", tiny_head())
    shared(hub, "user/steer", tiny_control_head(), reward="brevity")
    shared(hub, "user/other", tiny_head(), base="user/another")
    shared(hub, "user/hidden", tiny_head(), private=True)
    hub.add("user/lora", {"README.md": f"---\nbase_model: {BASE}\nbase_model_relation: adapter\n---\n".encode()})
    hub.log.clear()
    found = {head.repo_id: (head.kind, head.reward) for head in list_heads(BASE)}
    assert found == {"user/polite": ("value", "politeness"), "user/steer": ("control", "brevity")}
    assert hub.paths() == ["/api/models"]  # no head is loaded
    assert [head.repo_id for head in list_heads(BASE, kind="control")] == ["user/steer"]
    assert len(list_heads(BASE, limit=1)) == 1
    assert list_heads("user/unknown") == []


def test_list_prints_a_table_or_that_there_is_none(hub, command):
    shared(hub, "user/polite", tiny_head())
    head, row = command("list", BASE).splitlines()
    assert head.split() == ["head", "kind", "reward", "licence", "downloads", "changed"]
    assert row.split() == ["user/polite", "value", "politeness", "11"]
    assert command("list", "user/unknown") == "No head for user/unknown was found.\n"


def test_what_a_stranger_wrote_is_one_printable_line(hub, command):
    front = {"base_model": BASE, "base_model_relation": "adapter", "tags": ["recontrol", "value-head"]}
    front["tags"].append("reward:\x1b[2Ja\nb\u202e" + "x" * 9999)
    front["license"] = ["mit"]
    hub.add("evil/head", {"README.md": f"---\n{yaml.safe_dump(front)}---\n".encode()})
    said = command("list", BASE)
    assert said.count("\n") == 2
    assert all(character.isprintable() or character == "\n" for character in said)
    assert max(map(len, said.splitlines())) < 120


@pytest.mark.parametrize(
    "front", ["self: 1", "ignore_metadata_errors: true", "eval_results: [1]", "model-index: 3", "license: [[]]"]
)
def test_a_strangers_card_hides_no_other_head(hub, front):
    shared(hub, "user/polite", tiny_head())
    named = f"base_model: {BASE}\nbase_model_relation: adapter\ntags: [recontrol, value-head]\n"
    hub.add("evil/head", {"README.md": f"---\n{named}{front}\n---\n".encode()})
    assert "user/polite" in {head.repo_id for head in list_heads(BASE)}


@pytest.mark.parametrize(("name", "match"), [("./model", "by its id on the Hub"), ("a b", "by its id on the Hub")])
def test_a_folder_has_no_heads_on_the_hub(hub, command, name, match):
    assert match in command("list", name, status=2)
    assert hub.log == []


def test_list_says_what_is_wrong(hub, command):
    assert "value" in command("list", BASE, "--kind", "lora", status=2)
    hub.fail("/api/models", status=403)  # of 429 and 503 huggingface_hub asks again, for longer than a test
    with pytest.raises(HeadUnavailable, match=r"list of heads for 'user/base'.*403"):
        list_heads(BASE)


# push


def test_push_sends_a_folder_and_prints_where_it_is(hub, command, logged_in, tmp_path):
    tiny_head().save_pretrained(tmp_path / "head")
    url = command("push", tmp_path / "head", "user/new", "--private", "--custom-generate", "--message", "First").strip()
    assert url.startswith(f"{hub.url}/user/new/commit/")
    assert hub.repositories["user/new"].private
    assert {"README.md", "config.json", "model.safetensors", "custom_generate/generate.py"} < files(
        hub, "user/new"
    ).keys()
    assert b"user/new" in files(hub, "user/new")["README.md"]  # the folder's card knew no repository
    assert Head.from_pretrained("user/new", token=TOKEN).digest() == tiny_head().digest()


def test_a_head_of_a_model_in_a_folder_is_pushed_with_the_models_id(hub, command, logged_in, tmp_path):
    head = tiny_head()
    head.config.base_model_name_or_path = "./somewhere"
    head.save_pretrained(tmp_path / "head")
    command("push", tmp_path / "head", "user/new", "--base-model", BASE)
    assert [found.repo_id for found in list_heads(BASE)] == ["user/new"]
    assert "expected is an id" in command("push", tmp_path / "head", "user/new", "--base-model", "./x", status=2)


def test_push_takes_a_branch_and_a_pull_request(hub, command, logged_in, tmp_path):
    tiny_head().save_pretrained(tmp_path / "head")
    command("push", tmp_path / "head", "user/new", "--revision", "v1")
    assert Head.from_pretrained("user/new@v1").digest() == tiny_head().digest()
    assert command("push", tmp_path / "head", "user/new", "--create-pr").endswith("/discussions/1\n")
    assert "config.json" not in files(hub, "user/new")


def test_a_card_edited_in_the_folder_goes_along_and_one_on_the_hub_stays(hub, tmp_path):
    tiny_head().save_pretrained(tmp_path / "head")
    card_path = tmp_path / "head" / "README.md"
    card_path.write_text(card_path.read_text() + "\nMy note.\n")
    push_head(tmp_path / "head", "user/new", token=TOKEN)
    assert files(hub, "user/new")["README.md"].endswith(b"\nMy note.\n")
    with pytest.warns(UserWarning, match=r"edited by hand and is kept.*replace_model_card=True"):
        push_head(tiny_head(1), "user/new", token=TOKEN)
    assert files(hub, "user/new")["README.md"].endswith(b"\nMy note.\n")
    card_path.write_text(card_path.read_text() + "\nAnother.\n")
    push_head(tmp_path / "head", "user/new", token=TOKEN)
    assert files(hub, "user/new")["README.md"].endswith(b"\nAnother.\n")
    push_head(tmp_path / "head", "user/new", token=TOKEN, replace_model_card=True)
    assert b"Another." not in files(hub, "user/new")["README.md"]


def test_a_card_that_is_no_text_is_refused_before_anything_is_sent(hub, command, tmp_path):
    tiny_head().save_pretrained(tmp_path / "head")
    (tmp_path / "head" / "README.md").write_bytes("Glück".encode("latin-1"))
    assert "The card is not UTF-8" in command("push", tmp_path / "head", "user/new", status=2)
    assert hub.log == []


def test_info_prints_a_strangers_config_in_ascii(command, tmp_path):
    head = tiny_head()
    head.config.info["note"] = "\x9b2J\u202e\x7f\ud800"
    head.save_pretrained(tmp_path / "head")
    said = command("info", tmp_path / "head")
    assert said.isascii()
    assert all(character.isprintable() or character == "\n" for character in said)
    assert json.loads(said)["info"]["note"] == "\x9b2J\u202e\x7f\ud800"


def test_push_says_what_is_wrong(hub, command, tmp_path, monkeypatch):
    assert "neither a folder nor the id" in command("push", tmp_path / "none", "user/new", status=2)
    tiny_head().save_pretrained(tmp_path / "head")
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: READ_TOKEN)
    said = command("push", tmp_path / "head", "user/new", status=2)
    assert "403" in said
    assert READ_TOKEN not in said


# Cards


def test_the_snippets_of_a_card_run_as_they_stand(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    hub.add(BASE, {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()})
    head = tiny_control_head(base_model_name_or_path=BASE, base_model_revision="main")
    head.push_to_hub("user/head", token=TOKEN, custom_generate=True)
    text = files(hub, "user/head")["README.md"].decode()
    by_plug_in, by_file = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names = {}
    torch.manual_seed(0)
    exec(by_plug_in.replace("128", "6"), names)
    steered = names["outputs"].tolist()
    names["model"] = type(names["model"]).from_pretrained(BASE)
    torch.manual_seed(0)
    exec(by_file.replace("128", "6"), names)
    assert names["outputs"].tolist() == steered
    assert steered != names["model"].generate(**names["inputs"], max_new_tokens=6).tolist()


TEXTS = st.text(max_size=60) | st.sampled_from(["---", "a: b", "\n---\n", "```", "<b>", "{{ x }}", "![a](b)", "| a |"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(TEXTS, inside, max_size=3),
    max_leaves=8,
)
NAMES = ("training", "curves", "evaluation", "tuning", "merged", "data", "data_license", "license", "language")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    texts=st.lists(st.none() | TEXTS, min_size=4, max_size=4),
    info=st.dictionaries(st.sampled_from(NAMES) | TEXTS, VALUES, max_size=6),
    custom_generate=st.booleans(),
)
def test_no_text_breaks_out_of_the_yaml_or_the_markdown(texts, info, custom_generate):
    repo_id, base_model, revision, reward = texts
    said = card(CardFacts(repo_id, "value", base_model, revision, reward, info=info, custom_generate=custom_generate))
    _, front, body = re.split(r"^---\n", said, maxsplit=2, flags=re.MULTILINE)
    data = yaml.safe_load(front)
    known = {"library_name", "pipeline_tag", "tags", "model-index"}
    assert set(data) <= known | {"base_model", "base_model_relation", "datasets", "license", "language"}
    assert data["library_name"] == "hf-recontrol"
    tokens = MarkdownIt().enable("table").parse(body)
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    own = ["How to use it", "Training", "Evaluation", "Tuning", "Limits"]
    assert [heading for heading in headings[1:] if heading not in own] == []
    assert [token.content for token in tokens if token.type == "html_block"] == said.splitlines(keepends=True)[
        -1:
    ]  # our own
    inline = [child for token in tokens for child in token.children or []]
    assert not any(child.type in ("html_inline", "image") for child in inline)
    hosts = {str(child.attrs.get("href", "")).split("/")[2] for child in inline if child.type == "link_open"}
    assert hosts <= {"arxiv.org", "huggingface.co"}
