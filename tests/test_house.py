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
    "head_format",
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
    "intervals",
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
    upward = {name for name in imported_parts(path) if ORDER.index(name) > own or (name == part(path) != "demo")}
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


SINKS = {"torch.load", "pickle.load", "pickle.loads", "eval", "exec", "compile", "importlib.import_module", "yaml.load"}


def code_sinks(source: str) -> set[str]:
    """Calls that can run a stranger's code, and keywords that let others do so."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            found |= {ast.unparse(node.func)} & SINKS
            found |= {keyword.arg for keyword in node.keywords if keyword.arg in ("shell", "trust_remote_code")}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.name for alias in node.names} & {"pickle", "import_module"}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_in_the_package_can_run_a_strangers_code(path):
    assert code_sinks(path.read_text(encoding="utf-8")) == set()
    assert code_sinks("import pickle\ntorch.load(x)\nf(trust_remote_code=True)") == {
        "pickle",
        "torch.load",
        "trust_remote_code",
    }


def test_importing_the_package_changes_nothing():
    code = (
        "import transformers; from transformers import GenerationMixin as G; before = G.generate\n"
        "import hf_recontrol, hf_recontrol.generation; assert G.generate is before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
