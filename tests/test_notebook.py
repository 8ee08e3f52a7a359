"""The notebook's cells run in order, as IPython runs them, with the demo's model.

By IPython itself: nbclient would bring a kernel and fifteen packages to do the same in another process.
"""

import json
import os
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "steer_and_train.ipynb"


def test_the_notebook_is_kept_without_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_the_notebook_runs_from_base_model_to_card(tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    interactive = pytest.importorskip("IPython.core.interactiveshell")
    capture = pytest.importorskip("IPython.utils.capture")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IPYTHONDIR", os.fspath(tmp_path / "ipython"))
    shell = interactive.InteractiveShell()
    shell.history_manager.enabled = False
    shown = []
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            with capture.capture_output() as captured:
                result = shell.run_cell("".join(cell["source"]))
            result.raise_error()
            shown.append((captured.stdout, result.result))
    coloured = [result._repr_html_() for _, result in shown if hasattr(result, "_repr_html_")]
    assert ["value before the control" in coloured[0], "KL from the unsteered model" in coloured[1]] == [True, True]
    gains = next(result for _, result in shown if isinstance(result, dict))
    assert gains["this head"] > max(0.2, gains["random direction"])
    assert "# " in shown[-1][0]
    assert (tmp_path / "my-head" / "model.safetensors").is_file()
