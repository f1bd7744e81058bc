"""The notebook runs from the first cell to the last, and shows pictures."""

import json
import os
import subprocess
import sys

import pytest
import toy

NOTEBOOK = toy.ROOT / "launch" / "quickstart.ipynb"
EXECUTE = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute(cwd=sys.argv[2])
nbformat.write(notebook, sys.argv[3])
"""


def test_it_is_stored_without_outputs():
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_it_runs(tmp_path):
    pytest.importorskip("nbclient")
    environment = {
        name: value for name, value in os.environ.items() if name != "XLA_FLAGS"
    }  # one device, as a user has
    environment |= {"QUICKSTART_WORKDIR": str(tmp_path / "run"), "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)}
    steps = 1000 if toy.ALL else 100  # what it teaches with takes most of its two minutes
    short, done = tmp_path / "short.ipynb", tmp_path / "done.ipynb"
    assert "STEPS = 1000" in NOTEBOOK.read_text()
    short.write_text(NOTEBOOK.read_text().replace("STEPS = 1000", f"STEPS = {steps}"))
    command = [sys.executable, "-c", EXECUTE, str(short), str(toy.ROOT / "launch"), str(done)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=toy.HANGS)
    assert result.returncode == 0, result.stderr[-2000:]
    outputs = [output for cell in json.loads(done.read_text())["cells"] for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) == 2
    printed = "".join(text for output in outputs for text in output.get("text", []))
    assert f"{steps}/{steps} steps" in printed and "w = 5 " in printed
