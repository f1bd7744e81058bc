"""Every command of the README parses, and its Python runs."""

import importlib
import re
import shlex
import sys

import pytest
import tiny_checkpoint
import toy

from ig_jax import cli

README = (toy.ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^(?:python|\.venv/bin/python) -m (ig_jax\.\w+) (.+)$", README, re.MULTILINE)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
FILES = re.findall(r"\]\(([\w./]+)\)", README)


@pytest.mark.parametrize("module,arguments", COMMANDS, ids=[f"{m} {a}" for m, a in COMMANDS])
def test_a_command_parses(module, arguments, monkeypatch):
    module = importlib.reload(importlib.import_module(module))
    if "retrofit" in arguments or "finetune" in arguments:
        pytest.skip("this config opens the checkpoint it names; tests/training/test_retrofit.py runs it")
    monkeypatch.chdir(toy.ROOT)
    monkeypatch.setattr(sys, "argv", [module.__name__, *shlex.split(arguments, comments=True)])
    cli.parse(module.FLAGS, getattr(module, "WORDS", ()))
    if hasattr(module, "CONFIG"):
        cli.required(module.CONFIG)


def test_there_is_an_example_of_every_command():
    commands = {path.stem for path in (toy.ROOT / "ig_jax").glob("*.py") if "cli.run(" in path.read_text()} - {"cli"}
    assert {module.removeprefix("ig_jax.") for module, _ in COMMANDS} == commands


@pytest.mark.parametrize("code", PYTHON)
def test_the_python_runs(code, tmp_path):
    checkpoint = tiny_checkpoint.write(tmp_path, tiny_checkpoint.experiment())
    namespace = {}
    exec(code.replace('"runs/digits"', repr(str(checkpoint))), namespace)
    assert namespace["images"].shape == (4, 8, 8, 1)


@pytest.mark.parametrize("name", FILES)
def test_a_named_file_exists(name):
    assert (toy.ROOT / name).exists()


def test_the_scripts_it_names_exist():
    for script in re.findall(r"bash (launch/\w+\.sh)", README):
        assert (toy.ROOT / script).exists()
