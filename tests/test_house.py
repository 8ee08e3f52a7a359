"""The house rules: which file may import which, and what the package shows to the world."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_recontrol

SOURCE = Path(hf_recontrol.__file__).parent
ORDER = [
    "errors",
    "config_checks",
    "activations",
    "head_config",
    "control_config",
    "kl_bound",
    "standalone",
    "custom_generate",
    "cuda_graph",
    "start",
    "recording",
    "calls",
    "hooks",
    "card_text",
    "card_comparison",
    "card_tuning",
    "model_card",
    "intervals",
    "head_format",
    "hub_deadline",
    "head_hub",
    "head_push",
    "head_files",
    "head",
    "value_head",
    "control_head",
    "sharing",
    "ascent",
    "objectives",
    "control",
    "merging",
    "row_control",
    "landscape",
    "trace",
    "registry",
    "keywords",
    "steering",
    "generation",
    "forwards",
    "logit_bias",
    "fingerprints",
    "reward_models",
    "reward_calls",
    "rewards",
    "prompts",
    "answers",
    "disk",
    "rollout_files",
    "rollout_dataset",
    "rollout_store",
    "rollout_blocks",
    "replay",
    "finite_states",
    "preemption",
    "processes",
    "rollout_settings",
    "rollouts",
    "fitting",
    "value_fitting",
    "comparison_heads",
    "control_checks",
    "control_fitting",
    "calibration",
    "training_args",
    "checkpoints",
    "sigterm",
    "run_record",
    "trainer",
    "ensemble",
    "on_policy",
    "token_statistics",
    "coherence",
    "judging",
    "chat_judge",
    "evaluation",
    "guided_decoding",
    "sampling",
    "baselines",
    "comparison",
    "comparison_verdicts",
    "comparison_sweeps",
    "tuning",
    "comparison_plan",
    "comparison_run",
    "search_ranges",
    "search_results",
    "control_search",
    "trace_text",
    "figure_style",
    "figure_rows",
    "figures",
    "comparison_figures",
    "comparison_report",
    "plots",
    "page_answers",
    "page",
    "demo",
    "serving",
    "cli_inputs",
    "cli_rollouts",
    "cli_evaluate",
    "cli_share",
    "cli_tune",
    "train_options",
    "cli_train",
    "cli",
    "__init__",
    "__main__",
]
PACKAGES = ("demo", "serving")
"""Folders, whose files may import each other."""
FILES = sorted(SOURCE.rglob("*.py"))


def part(path: Path) -> str:
    """The entry of ORDER that a file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """The parts of our package that a file imports, also inside functions and under TYPE_CHECKING."""
    package = ["hf_recontrol", *path.relative_to(SOURCE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = [*base, *(node.module.split(".") if node.module else [])]
            names = [".".join([*stem, alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "hf_recontrol":
                inside = name.split(".")[1:]
                found.add(inside[0] if inside and inside[0] in ORDER else "__init__")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_module_imports_only_from_those_above_it(path):
    assert part(path) in ORDER, f"{path.name} is not in the list: put it where it belongs"
    own = ORDER.index(part(path))
    upward = {name for name in imported_parts(path) if ORDER.index(name) > own or (name == part(path) not in PACKAGES)}
    assert not upward, f"{path.name} imports {sorted(upward)}, which stand below it"


def test_the_import_rule_can_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path)
    bad = tmp_path / "errors.py"
    bad.write_text("def f():\n    from .hooks import Call\n    import hf_recontrol.cli\n    from . import ValueHead\n")
    assert imported_parts(bad) == {"hooks", "cli", "__init__"}


def test_the_public_names_are_sorted_and_exist():
    assert hf_recontrol.__all__ == sorted(hf_recontrol.__all__)
    assert all(hasattr(hf_recontrol, name) for name in hf_recontrol.__all__)


def test_files_stay_readable():
    lines = {str(path): path.read_text(encoding="utf-8").count("\n") for path in FILES}
    assert {name: count for name, count in lines.items() if count > 400} == {}


SINKS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "runpy.run_path", "runpy.run_module"),
    *("torch.load", "torch.hub.load", "torch.compile", "yaml.load", "yaml.unsafe_load", "numpy.load", "joblib.load"),
}
MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy", "imp", "ctypes", "importlib"}
ALLOWED = {
    "cli_inputs.py": {"runpy", "runpy.run_path"},  # the file of reward functions that its own user names
    "serving/vllm_serve.py": {"importlib.util.find_spec"},  # whether vLLM is there; runs nothing of it
}
KEYWORDS = {"shell", "trust_remote_code", "allow_pickle", "weights_only"}


def code_sinks(source: str) -> set[str]:
    """Calls, under whatever name they were imported, and keywords that can run a stranger's code; and their modules."""
    tree = ast.parse(source)
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            names |= {alias.asname or alias.name: module + alias.name for alias in node.names}
    found = {name for name in names.values() if name.split(".")[0] in MODULES} - {"importlib.metadata"}
    found |= set(names.values()) & SINKS
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            first, dot, rest = ast.unparse(node).partition(".")
            found |= {names.get(first, first) + dot + rest} & SINKS
        elif isinstance(node, ast.keyword):
            found |= {node.arg} & KEYWORDS
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_in_the_package_can_run_a_strangers_code(path):
    assert code_sinks(path.read_text(encoding="utf-8")) <= ALLOWED.get(str(path.relative_to(SOURCE)), set())


@pytest.mark.parametrize(
    "code",
    [
        *("import pickle", "from pickle import loads", "import importlib", "import importlib.util", "import dill as d"),
        *("from importlib import import_module", "import torch\ntorch.load(x)", "import torch as t\nt.load(x)"),
        *("from torch import load", "from torch import load as read", "import yaml as y\ny.load(x)", "f = eval"),
        *("exec(x)", "__import__('os')", "import os\nos.system(x)", "f(shell=True)", "f(trust_remote_code=True)"),
        *("import numpy as np\nnp.load(x)", "f(weights_only=False)", "dict(trust_remote_code=True)"),
    ],
)
def test_code_that_can_is_seen(code):
    assert code_sinks(code)
    assert not code_sinks("from importlib import metadata\nimport torch\ntorch.loads\nmodel.eval()\njson.load(x)")


NAMES_OF_OURS = {"getattr(self, name)", "getattr(hub_errors, name, None)"}  # of loops over names that stand there
LOADER = ["config_checks", "head_config", "head_format", "head_hub", "head_files", "model_card"]


@pytest.mark.parametrize("name", LOADER)
def test_the_loader_matches_no_patterns_and_looks_up_no_names_of_a_head(name):
    """No regular expression meets a stranger's text, and no text of theirs becomes an attribute's name."""
    tree = ast.parse((SOURCE / f"{name}.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    for call in calls:
        if call.func.id in ("getattr", "setattr"):
            assert isinstance(call.args[1], ast.Constant) or ast.unparse(call) in NAMES_OF_OURS
    assert not {"re", "regex", "fnmatch", "glob"} & {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }


NETWORK = """
import pkgutil, sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        raise SystemExit(f"{event} {arguments}")

sys.addaudithook(refuse)
import hf_recontrol
for module in pkgutil.walk_packages(hf_recontrol.__path__, "hf_recontrol."):
    if not module.name.endswith("__main__"):
        try:
            __import__(module.name)
        except ImportError as error:
            assert error.name and not error.name.startswith("hf_recontrol"), error  # of an extra that is not here
print(len([name for name in sys.modules if name.startswith("hf_recontrol")]))
import socket
try:
    socket.create_connection(("127.0.0.1", 9), 1)
except SystemExit:
    print("seen")
"""


def test_importing_every_module_opens_no_connection():
    """Python's own audit events, which no module can go around; at the end a connection, which is seen."""
    done = subprocess.run([sys.executable, "-c", NETWORK], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr + done.stdout
    modules, seen = done.stdout.split()[-2:]
    assert int(modules) > 60
    assert seen == "seen"


def test_importing_the_package_changes_nothing():
    code = (
        "import transformers; from transformers import GenerationMixin as G; before = G.generate\n"
        "import hf_recontrol, hf_recontrol.generation; assert G.generate is before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
