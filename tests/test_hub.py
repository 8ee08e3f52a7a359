"""Heads come from the Hub and go there: two files, one commit, and errors that say what to do."""

import contextlib
import time
import traceback

import pytest
import torch
from hub_server import READ_TOKEN, TOKEN

from hf_recontrol import head_hub, hub_deadline
from hf_recontrol.errors import HeadError, HeadUnavailable
from hf_recontrol.hub_deadline import Deadline, within
from hf_recontrol.value_head import ValueHead

pytestmark = pytest.mark.versions


@pytest.fixture
def files(head, tmp_path):
    head.save_pretrained(tmp_path / "files")
    return {path.name: path.read_bytes() for path in (tmp_path / "files").iterdir()}


@pytest.fixture
def no_waiting(monkeypatch):
    """The Hub library pauses between its tries; not here."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def same(left, right):
    for name, tensor in left.state_dict().items():
        torch.testing.assert_close(right.state_dict()[name], tensor, rtol=0, atol=0)


def unavailable(match, name="user/head", **arguments):
    """The refusal, whose whole traceback, causes included, shows no token."""
    with pytest.raises(HeadUnavailable, match=match) as caught:
        ValueHead.from_pretrained(name, **arguments)
    text = "".join(traceback.format_exception(caught.value))
    assert TOKEN not in text
    assert READ_TOKEN not in text
    assert "user/" in str(caught.value)
    return caught.value


# Pull


def test_exactly_two_files_are_asked_for_whatever_else_the_repository_holds(hub, head, files):
    others = ["modeling.py", "tokenizer.json", "pytorch_model.bin", "model.safetensors.index.json"]
    hub.add("user/head", files | dict.fromkeys([*others, *(f"data/{i}" for i in range(1000))], b"x"))
    same(head, ValueHead.from_pretrained("user/head"))
    assert {path.rpartition("/")[2] for path in hub.paths()} == {"config.json", "model.safetensors"}
    assert all("hf-recontrol" in request.headers["User-Agent"] for request in hub.log if request.method == "HEAD")


def test_both_files_come_from_one_commit_even_if_the_branch_moves_between_them(hub, head, files, monkeypatch):
    first = hub.add("user/head", files)
    fetch = head_hub.hf_hub_download

    def fetch_and_push(repo_id, name, **arguments):
        path = fetch(repo_id, name, **arguments)
        if name == "config.json" and "dry_run" not in arguments:
            hub.repositories["user/head"].commit({name: b"{}", "model.safetensors": b"of another head"})
        return path

    monkeypatch.setattr(head_hub, "hf_hub_download", fetch_and_push)
    same(head, ValueHead.from_pretrained("user/head"))
    weights = [path for path in hub.paths() if path.endswith("model.safetensors")]
    assert weights
    assert all(first in path for path in weights)


@pytest.mark.parametrize("how", ["argument", "at"])
@pytest.mark.parametrize("kind", ["branch", "commit"])
def test_a_revision_is_that_of_both_files(hub, head, files, how, kind):
    old = hub.add("user/head", files)
    hub.repositories["user/head"].branches["v1"] = old
    hub.repositories["user/head"].commit({"config.json": b"{}", "model.safetensors": b""})
    revision = {"branch": "v1", "commit": old}[kind]
    if how == "argument":
        same(head, ValueHead.from_pretrained("user/head", revision=revision))
    else:
        same(head, ValueHead.from_pretrained(f"user/head@{revision}"))
    with pytest.raises(HeadError, match=r"user/head.*revision.*hidden_size"):
        ValueHead.from_pretrained("user/head")


def test_an_existing_folder_wins_over_a_repository_of_its_name(hub, head, make_head, files, tmp_path, monkeypatch):
    hub.add("user/head", files)
    other = make_head(seed=1)
    other.save_pretrained(tmp_path / "user" / "head")
    monkeypatch.chdir(tmp_path)
    same(other, ValueHead.from_pretrained("user/head"))
    assert hub.log == []


def test_a_subfolder_of_a_repository(hub, head, files):
    hub.add("user/heads", {f"one/two/{name}": data for name, data in files.items()})
    same(head, ValueHead.from_pretrained("user/heads", subfolder="one/two"))


def test_a_private_repository_opens_to_its_token_only(hub, head, files):
    hub.add("user/head", files, private=True)
    unavailable("does not exist, or is private.*token=")
    unavailable("does not exist, or is private.*token=", token="hf_wrongTokenOfMine")
    same(head, ValueHead.from_pretrained("user/head", token=READ_TOKEN))


def test_a_token_that_cannot_be_one_is_refused_and_not_shown(hub):
    with pytest.raises(ValueError, match="strip") as caught:
        ValueHead.from_pretrained("user/head", token=f"{TOKEN}\n")
    assert TOKEN not in "".join(traceback.format_exception(caught.value))


def test_a_gated_repository_says_where_its_terms_are(hub, files):
    hub.add("user/head", files, gated=True)
    unavailable("gated.*https://huggingface.co/user/head")


def test_missing_repositories_revisions_and_files_are_told_apart(hub, files):
    unavailable("does not exist", "user/nothing")
    unavailable("does not exist", "user/nothing", token=READ_TOKEN)
    hub.add("user/head", files)
    error = unavailable("no such revision", revision="v9")
    assert "v9" in str(error)
    assert type(error.__cause__).__name__ == "RevisionNotFoundError"
    hub.add("user/text", {"README.md": b"text"})
    unavailable("lacks a file.*config.json", "user/text")
    hub.add("user/half", {"config.json": files["config.json"]})
    unavailable("lacks a file.*model.safetensors", "user/half")


@pytest.mark.parametrize("extra", [{}, {"config.json": None}])
def test_a_repository_of_pickles_is_refused_without_opening_one(hub, files, extra):
    hub.add("user/head", {"pytorch_model.bin": b"x"} | {name: files[name] for name in extra})
    with pytest.raises(HeadError, match=r"pytorch_model.bin.*safetensors only"):
        ValueHead.from_pretrained("user/head")
    assert not any(path.endswith(".bin") for path in hub.paths())


@pytest.mark.parametrize("files_there", [{"config.json": b"{}"}, {"config.json": b"x" * 100_000}])
def test_a_repository_that_is_not_a_head_is_a_head_error_and_its_weights_are_not_fetched(hub, files_there):
    hub.add("user/head", {**files_there, "model.safetensors": b"x"})
    with pytest.raises(HeadError, match="user/head"):
        ValueHead.from_pretrained("user/head")
    assert not any(path.endswith(".safetensors") for path in hub.paths())


# Offline and faults


def test_offline_with_a_cache_works_without_a_request(hub, head, files, monkeypatch):
    hub.add("user/head", files)
    ValueHead.from_pretrained("user/head")
    hub.log.clear()
    same(head, ValueHead.from_pretrained("user/head", local_files_only=True))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    same(head, ValueHead.from_pretrained("user/head"))
    assert hub.log == []


def test_offline_without_a_cache_says_so(hub, files, monkeypatch):
    hub.add("user/head", files)
    unavailable("not in the cache.*HF_HUB_OFFLINE", local_files_only=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    unavailable("not in the cache.*HF_HUB_OFFLINE")
    assert hub.log == []


@pytest.mark.parametrize(
    ("status", "match"),
    [(401, "token="), (403, "403"), (429, "too many requests"), (500, "500"), (502, "502"), (503, "503"), (504, "504")],
)
@pytest.mark.parametrize("where", ["config.json", "model.safetensors"])
@pytest.mark.usefixtures("no_waiting")
def test_a_failing_hub_is_named_with_what_to_do(hub, files, status, match, where):
    hub.add("user/head", files)
    hub.fail(where, status=status)
    error = unavailable(match, token=READ_TOKEN)
    assert error.__cause__ is not None


@pytest.mark.usefixtures("no_waiting")
def test_a_failing_hub_does_not_matter_once_the_head_is_in_the_cache(hub, head, files):
    hub.add("user/head", files)
    ValueHead.from_pretrained("user/head")
    hub.fail("resolve", status=503)
    same(head, ValueHead.from_pretrained("user/head"))


@pytest.mark.usefixtures("no_waiting")
def test_a_hub_that_recovers_is_asked_again(hub, head, files):
    hub.add("user/head", files)
    hub.fail("config.json", status=503, times=2)
    same(head, ValueHead.from_pretrained("user/head"))


@pytest.mark.parametrize("where", ["config.json", "model.safetensors"])
@pytest.mark.usefixtures("no_waiting")
def test_a_body_that_breaks_off_is_no_head(hub, head, files, where):
    hub.add("user/head", files)
    hub.fail(where, method="GET", cut=10)
    unavailable("could not be reached|had now")
    hub.faults.clear()
    same(head, ValueHead.from_pretrained("user/head"))  # and nothing half is in the cache


def test_a_hung_hub_is_left_at_the_deadline(hub, files, monkeypatch):
    monkeypatch.setattr(hub_deadline, "DEADLINE_SECONDS", 0.3)
    hub.add("user/head", files)
    hub.fail("config.json", seconds=5)
    unavailable("no answer from the Hub in time")
    hub.wake()


@pytest.mark.usefixtures("no_waiting")
def test_a_dead_hub_is_unavailable(hub, files, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}",
    )
    unavailable("could not be reached.*Check the network")


def test_weights_damaged_in_the_cache_are_fetched_once_more(hub, head, files, tmp_path):
    hub.add("user/head", files)
    ValueHead.from_pretrained("user/head")
    (weights,) = (tmp_path / "cache").rglob("snapshots/*/model.safetensors")
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.resolve().write_bytes(damaged)
    with pytest.raises(HeadError, match=r"SHA-256"):
        ValueHead.from_pretrained("user/head", local_files_only=True)
    same(head, ValueHead.from_pretrained("user/head"))
    same(head, ValueHead.from_pretrained("user/head", local_files_only=True))


# Push


def test_a_pushed_head_comes_back_and_took_one_commit(hub, head):
    url = head.push_to_hub("user/new", token=TOKEN)
    repository = hub.repositories["user/new"]
    assert url.startswith(f"{hub.url}/user/new/commit/")
    assert len(repository.commits) == 2  # the empty one, and ours
    assert set(repository.commits[repository.branches["main"]]) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "model.safetensors",
    }
    same(head, ValueHead.from_pretrained("user/new"))
    agents = [request.headers["User-Agent"] for request in hub.log if "/commit/" in request.path]
    assert all("hf-recontrol" in agent for agent in agents)
    assert len(agents) == 1


def test_a_push_to_a_branch_leaves_main_alone(hub, head, make_head):
    head.push_to_hub("user/new", token=TOKEN)
    other = make_head(seed=1)
    other.push_to_hub("user/new", token=TOKEN, revision="v2")
    same(head, ValueHead.from_pretrained("user/new"))
    same(other, ValueHead.from_pretrained("user/new@v2"))


def test_a_pull_request_changes_no_branch(hub, head, make_head):
    head.push_to_hub("user/new", token=TOKEN)
    url = make_head(seed=1).push_to_hub("user/new", token=TOKEN, create_pr=True)
    assert url.endswith("/discussions/1")
    same(head, ValueHead.from_pretrained("user/new"))


def test_private_is_asked_for_when_the_repository_is_made(hub, head):
    head.push_to_hub("user/new", token=TOKEN, private=True)
    unavailable("private", "user/new")
    same(head, ValueHead.from_pretrained("user/new", token=TOKEN))


def test_a_card_on_the_hub_that_nobody_edited_tells_of_the_new_head(hub, head, make_head):
    head.push_to_hub("user/new", token=TOKEN)
    other = make_head(seed=1)
    other.config.info["data"] = "other texts"
    other.push_to_hub("user/new", token=TOKEN)
    repository = hub.repositories["user/new"]
    assert b"other texts" in repository.commits[repository.branches["main"]]["README.md"]


def test_a_card_on_the_hub_stays_unless_it_is_to_be_replaced(hub, head, make_head):
    hub.add("user/new", {"README.md": b"mine"})
    with pytest.warns(UserWarning, match="edited by hand and is kept"):
        head.push_to_hub("user/new", token=TOKEN)
    repository = hub.repositories["user/new"]
    assert repository.commits[repository.branches["main"]]["README.md"] == b"mine"
    make_head(seed=1).push_to_hub("user/new", token=TOKEN, replace_model_card=True)
    assert b"hf-recontrol" in repository.commits[repository.branches["main"]]["README.md"]


def test_saving_can_push_with_the_card_of_the_folder(hub, head, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "README.md").write_text("mine")
    head.save_pretrained(tmp_path / "new", push_to_hub=True, token=TOKEN)
    repository = hub.repositories["user/new"]
    assert repository.commits[repository.branches["main"]]["README.md"] == b"mine"
    same(head, ValueHead.from_pretrained("user/new"))


@pytest.mark.parametrize(
    ("token", "match"),
    [(READ_TOKEN, "403"), (False, "token"), ("hf_wrongTokenOfMine", "403")],
    ids=["read", "no", "wrong"],
)
def test_a_push_without_the_right_to_is_refused_and_the_token_not_shown(hub, head, token, match):
    with pytest.raises(HeadUnavailable, match=f"not pushed to 'user/new'.*{match}") as caught:
        head.push_to_hub("user/new", token=token)
    text = "".join(traceback.format_exception(caught.value))
    assert READ_TOKEN not in text
    assert "hf_wrongTokenOfMine" not in text
    assert hub.repositories == {}


@pytest.mark.usefixtures("no_waiting")
def test_a_push_that_fails_leaves_the_old_head_whole(hub, head, make_head):
    head.push_to_hub("user/new", token=TOKEN)
    for where in ("preupload", "/commit/"):
        hub.faults.clear()
        hub.fail(where, status=500)
        with pytest.raises(HeadUnavailable, match=r"not pushed.*500"):
            make_head(seed=1).push_to_hub("user/new", token=TOKEN)
        same(head, ValueHead.from_pretrained("user/new"))


def test_a_push_by_somebody_else_in_between_is_not_overwritten(hub, head, make_head, monkeypatch):
    head.push_to_hub("user/new", token=TOKEN)
    info = head_hub.HfApi.model_info

    def info_then_push(self, *arguments, **keywords):
        found = info(self, *arguments, **keywords)
        hub.repositories["user/new"].commit({"notes": b"theirs"})
        return found

    monkeypatch.setattr(head_hub.HfApi, "model_info", info_then_push)
    with pytest.raises(HeadUnavailable, match="somebody else"):
        make_head(seed=1).push_to_hub("user/new", token=TOKEN)


def test_a_head_that_diverged_is_not_pushed(hub, head):
    with torch.no_grad():
        head.layers[0].bias[0] = float("nan")
    with pytest.raises(HeadError, match=r"layers.0.bias"):
        head.push_to_hub("user/new", token=TOKEN)
    assert hub.log == []


@pytest.mark.parametrize("base", ["/home/me/model", "./model", "a/b/c", "local"])
def test_a_local_base_model_is_warned_of_and_left_out_of_the_card(hub, head, base, tmp_path, monkeypatch):
    (tmp_path / "local").mkdir()
    monkeypatch.chdir(tmp_path)
    head.config.base_model_name_or_path = base
    with pytest.warns(UserWarning, match="not the id of a Hub repository"):
        head.push_to_hub("user/new", token=TOKEN)
    repository = hub.repositories["user/new"]
    card = repository.commits[repository.branches["main"]]["README.md"].decode()
    assert "base_model" not in card
    assert base not in card.replace("path/to", "") or base == "local"


def test_a_base_model_of_the_hub_is_named_in_the_card(hub, head):
    head.config.base_model_name_or_path = "user/base"
    head.push_to_hub("user/new", token=TOKEN)
    repository = hub.repositories["user/new"]
    assert b"base_model: user/base" in repository.commits[repository.branches["main"]]["README.md"]


@pytest.mark.parametrize("repo_id", ["user/my head", "a/b/c", "", "./head"])
def test_a_name_that_no_repository_can_have_is_refused_before_any_request(hub, head, repo_id):
    with pytest.raises(ValueError, match=r"no repository on the Hub can be called so. Expected is \"user/head\""):
        head.push_to_hub(repo_id, token=TOKEN)
    assert hub.log == []


@pytest.mark.parametrize("status", [400, 402, 409, 413, 422])
def test_what_the_hub_refuses_is_said_in_its_words(hub, head, status):
    hub.fail("/commit/", status=status)
    with pytest.raises(HeadUnavailable, match=rf"not pushed.*was refused by the Hub \({status}\).*as asked"):
        head.push_to_hub("user/new", token=TOKEN)


def test_words_of_the_hub_that_may_hold_a_token_are_kept_back(hub, head, monkeypatch):
    hub.fail("/commit/", status=400)
    monkeypatch.setattr("hub_server.REFUSAL", f"not with {TOKEN}")
    with pytest.raises(HeadUnavailable, match="kept back") as raised:
        head.push_to_hub("user/new", token=TOKEN)
    assert TOKEN not in str(raised.value)


@pytest.mark.parametrize("subfolder", ["../x", "/x", "a/../../x"])
def test_a_subfolder_leads_into_the_repository(hub, tmp_path, subfolder):
    for where in ("user/head", tmp_path):
        with pytest.raises(ValueError, match="a place in the head's folder"):
            ValueHead.from_pretrained(where, subfolder=subfolder)
    assert hub.log == []


def test_offline_a_push_says_what_forbids_it(hub, head, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HeadUnavailable, match=r"HF_HUB_OFFLINE=1 is set.*Unset it"):
        head.push_to_hub("user/new", token=TOKEN)


# The deadline itself


def test_within_gives_the_result_or_the_error_of_the_function():
    assert within(Deadline(), lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(Deadline(), lambda: 1 // 0)
    with pytest.raises(TimeoutError, match="its own"), contextlib.ExitStack():
        within(Deadline(), lambda: (_ for _ in ()).throw(TimeoutError("its own")))
