# ruff: noqa: E402
"""What every test has: a Hub in memory instead of the real one, caches of its own, one torch thread.

The environment is set before huggingface_hub is imported anywhere, because it reads it once.
"""

import atexit
import os
import shutil
import sys
import tempfile

from hub_server import HubServer

_HUB = HubServer()
_HOME = tempfile.mkdtemp(prefix="hf_recontrol-tests-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)

for _name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
    del os.environ[_name]
os.environ |= {
    "HF_ENDPOINT": _HUB.url,
    "HF_HOME": _HOME,
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DISABLE_SAFETENSORS_CONVERSION": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import pytest
import torch

from hf_recontrol import registry
from hf_recontrol.cli import main
from hf_recontrol.head_config import ValueHeadConfig
from hf_recontrol.value_head import ValueHead

torch.set_num_threads(1)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hub, and an empty cache."""
    _HUB.reset()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield _HUB
    _HUB.reset()


@pytest.fixture
def make_head():
    """make_head(hidden_size=8, seed=0, **config fields): a head with random weights and statistics."""

    def make(hidden_size: int = 8, *, seed: int = 0, **fields: object) -> ValueHead:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            head = ValueHead(ValueHeadConfig(hidden_size=hidden_size, **fields))  # type: ignore[arg-type]
            head.input_mean.normal_()
            head.input_std.uniform_(0.5, 2.0)
        return head.eval()

    return make


@pytest.fixture
def head(make_head):
    """One small head with a hidden layer."""
    return make_head()


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch):
    """No test sees the heads of another."""
    monkeypatch.setattr(registry, "_REGISTERED", {})
    monkeypatch.setattr(registry, "_HEADS", registry._HeadCache())


@pytest.fixture
def command(monkeypatch, capsys):
    """command(*arguments, status=0): what `hf-recontrol` prints, or its error; in this process, for speed."""

    def run(*arguments: object, status: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["hf-recontrol", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            main()
        torch.set_num_threads(1)  # `demo` takes what the machine has, and later tests fork
        printed, error = capsys.readouterr()
        assert exited.value.code == status, error
        return error if status else printed

    return run
