"""The README and the pages: every command parses, the Python runs, every link has a target."""

import importlib
import re
import shlex
import sys

import pytest
import tiny_checkpoint
import toy

from ig_jax.base import cli

README = toy.ROOT / "README.md"
PAGES = sorted(
    path for pattern in ("*.md", "configs/*.md", "launch/*.md", "ig_jax/**/*.md") for path in toy.ROOT.glob(pattern)
)
# A command is a line of a block or stands in backticks; local.sh may start it.
COMMAND = re.compile(
    r"(?:^ *|`)(?:bash launch/local\.sh \d+ )?(?:python|\.venv/bin/python) -m (ig_jax\.\w+) ([^`\n]+?)(?:`|$)",
    re.MULTILINE,
)
DEMO = (
    (toy.ROOT / "launch" / "demo.sh")
    .read_text()
    .replace("\\\n", " ")
    .replace("$accelerated", "runs/accelerated")
    .replace("$work", "runs/digits")
    .replace("$python", "python")
)
COMMANDS = sorted({found for text in (*(path.read_text() for path in PAGES), DEMO) for found in COMMAND.findall(text)})
LINKS = [
    (path, target)
    for path in PAGES
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())
    if not target.startswith("https://")
]
PYTHON = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def name(path) -> str:
    return str(path.relative_to(toy.ROOT))


@pytest.mark.parametrize("module,arguments", COMMANDS, ids=[f"{m} {a}" for m, a in COMMANDS])
def test_a_command_parses(module, arguments, monkeypatch):
    module = importlib.import_module(module)
    if "retrofit" in arguments or "finetune" in arguments:
        pytest.skip("this config opens the checkpoint it names; tests/training/test_retrofit.py runs it")
    monkeypatch.chdir(toy.ROOT)
    monkeypatch.setattr(sys, "argv", [module.__name__, *shlex.split(arguments, comments=True)])
    cli.parse(toy.fresh(module.FLAGS), getattr(module, "WORDS", ()))
    if hasattr(module.FLAGS, "experiment"):
        module.FLAGS.experiment()


def test_there_is_an_example_of_every_command():
    commands = {path.stem for path in (toy.ROOT / "ig_jax").glob("*.py") if "cli.run(" in path.read_text()}
    assert {module.removeprefix("ig_jax.") for module, _ in COMMANDS} == commands


@pytest.mark.parametrize("code", PYTHON)
def test_the_python_runs(code, tmp_path):
    checkpoint = tiny_checkpoint.write(tmp_path, tiny_checkpoint.experiment())
    namespace = {}
    exec(code.replace('"runs/digits"', repr(str(checkpoint))), namespace)
    assert namespace["images"].shape == (4, 8, 8, 1)


@pytest.mark.parametrize("path,target", LINKS, ids=[f"{name(path)} {target}" for path, target in LINKS])
def test_a_link_leads_to_a_file(path, target):
    assert (path.parent / target).exists()


def test_the_scripts_that_pages_name_exist():
    named = {script for path in PAGES for script in re.findall(r"bash (launch/\w+\.sh)", path.read_text())}
    assert "launch/demo.sh" in named
    for script in named:
        assert (toy.ROOT / script).exists()


def test_the_readme_fits_a_home_page():
    assert len(README.read_text().split()) <= 1200
    assert all(
        (toy.ROOT / "launch" / picture).stat().st_size < 300_000 for picture in ("fractal.png", "demo_compare.png")
    )


def test_every_page_is_reached_from_the_readme():
    linked = {(README.parent / target).resolve() for path, target in LINKS if path == README}
    assert {path.resolve() for path in PAGES} - {README.resolve()} <= linked


def test_every_published_system_has_its_command():
    commands = " ".join(f"{module} {arguments}" for module, arguments in COMMAND.findall(README.read_text()))
    for config in ("sit_imagenet256.py:B", "sit_imagenet256.py:L", "sit_imagenet256.py:XL", "dit_imagenet256.py:B"):
        assert config in commands
    for config in ("dit_imagenet256.py:L", "lightningdit_imagenet256.py:XL", "sit-xl-ig", "lightningdit-ig"):
        assert config in commands
