"""From training to a stranger's generate(), each in a process of its own: on the Hub in memory, and on the real one."""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from hub_journey import author
from hub_server import READ_TOKEN, TOKEN

SCRIPT = Path(__file__).with_name("hub_journey.py")
REAL_TOKEN = os.environ.get("RECONTROL_TEST_TOKEN")


def run(*arguments, **environment):
    """What that step of the journey prints, and what it says on stderr."""
    quiet = {"HF_HUB_DISABLE_XET": "1"} if "HF_ENDPOINT" in environment else {}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "RECONTROL_"))}
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        env=inherited | quiet | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


def check(made, said):
    """The tag and the commit are the first head, main is the second, no two say the same; and what is refused, why."""
    assert said["v1"] == said[made["commit"]] == made["v1"]
    assert said["main"] == made["main"]
    assert len({str(said[name]) for name in ("v1", "main", "plain")}) == 3
    assert "has no such revision" in said["v9"]
    assert "does not exist, or is private" in said["nobody"]
    assert "lacks a file" in said["elsewhere"]


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the Hub library's own upload by LFS
@pytest.mark.parametrize("lfs", [(), (".safetensors",)], ids=["regular", "lfs"])
def test_a_head_is_trained_pushed_tagged_replaced_pulled_and_used_offline(hub, tmp_path, monkeypatch, capfd, lfs):
    """Trained and pushed in this process, which has all of it imported; pulled in new ones."""
    hub.lfs = lfs
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    made = author("head", tmp_path)
    assert hub.repositories[made["repo_id"]].private
    assert len(hub.repositories[made["repo_id"]].commits) == 3  # the empty one and two heads
    pull = ("user", made["repo_id"], made["commit"])
    there = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    said, output = run(*pull, **there, HF_TOKEN=READ_TOKEN, HF_DEBUG="1")
    check(made, said)
    assert hub.hosts_of_tokens() == {"127.0.0.1"}
    assert bool(hub.storage) == bool(lfs)
    for token in (TOKEN, READ_TOKEN):
        assert token not in output + "".join(capfd.readouterr())
    if lfs:
        asked = len(hub.log)
        said, _ = run(*pull, **there, HF_HUB_OFFLINE="1")
        assert (said["v1"], said["main"]) == (made["v1"], made["main"])
        assert "HF_HUB_OFFLINE" in said["v9"]
        assert len(hub.log) == asked


@pytest.mark.hub
@pytest.mark.skipif(REAL_TOKEN is None, reason="RECONTROL_TEST_TOKEN is not set: a token that may write")
def test_the_real_hub_does_the_same(tmp_path):
    """Makes a private repository, and deletes it: RECONTROL_TEST_TOKEN=hf_… pytest -m hub tests/test_hub_journey.py

    It runs in processes of its own: this one may open no socket, and its Hub is the one in memory.
    """
    there = {"HF_TOKEN": REAL_TOKEN, "HF_HOME": str(tmp_path / "home")}
    made, _ = run("author", f"recontrol-test-{uuid.uuid4().hex[:12]}", tmp_path, **there)
    try:
        pull = ("user", made["repo_id"], made["commit"])
        said, output = run(*pull, **there)
        check(made, said)
        assert REAL_TOKEN not in output
        said, _ = run(*pull, **there, HF_HUB_OFFLINE="1")
        assert said["v1"] == made["v1"]
    finally:
        run("delete", made["repo_id"], **there)
