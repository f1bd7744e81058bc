"""Extensions of the package: each kind is made here, and the files that it touches are counted.

Where a registry takes it from outside, the extension is a few lines in this file. Otherwise the files of a copy of the
package are edited as a contributor would edit them, and the copy is run.
"""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoint
import toy
from absl import flags
from refusal import refused

from ig_jax.base.schema import bind
from ig_jax.config import files as config_files
from ig_jax.config.experiment import Experiment
from ig_jax.data import formats
from ig_jax.data.formats import registry
from ig_jax.diffusion import guidance, integration
from ig_jax.diffusion.integration import FixedGrid, Row, option, register
from ig_jax.generation import flags as recipe_flags
from ig_jax.generation import pretrained
from ig_jax.training.loop import train
from ig_jax.training.workdir import read_metrics

MOST_FILES = {"solver with an option": 1, "loss term": 2, "guidance rule": 2, "data format": 2, "family": 3}

# What each extension that cannot come from outside edits: (file, the line before which it goes, the lines).
EDITS = {
    "loss term": [
        (
            "ig_jax/diffusion/loss.py",
            "    def __post_init__(self):\n        for weight in self.inter_weight:",
            "    gap_weight: float = 0.0  # of the squared gap between the heads; 0 for none\n\n",
        ),
        (
            "ig_jax/diffusion/loss.py",
            "        if variances is not None:  # the variational bound",
            '        if loss.gap_weight:\n            terms["loss/gap"] = Term(loss.gap_weight, '
            "jnp.mean(guidance_gap(predictions) ** 2, axis=(1, 2, 3)))\n",
        ),
    ],
    # A DiT with normalised queries and keys, whose release calls the network that embeds the time `clock_embedder`.
    "family": [
        (
            "ig_jax/models/zoo.py",
            '    "lightningdit": Family("LightningDiT"',
            '    "toydit": Family("ToyDiT", ("S",), _DIT | dict(sigma_channels="variance", qk_norm="layernorm")),\n',
        ),
        (
            "ig_jax/config/published.py",
            "def names() -> tuple[str, ...]:",
            'FAMILIES["toydit"] = dataclasses.replace(FAMILIES["dit"], steps={"": 300_000})\n\n\n',
        ),
        (
            "ig_jax/interop/published.py",
            'ROPE_BUFFERS = ("feat_rope.freqs_cos"',
            '_VARIANT_NAMES["qk_norm", "layernorm"] = {r"^t_embedder": "clock_embedder"}\n',
        ),
    ],
}


def edited(folder: Path, kind: str) -> Path:
    """A copy of the package and the configs with the edits of one extension."""
    for name in ("ig_jax", "configs"):
        shutil.copytree(toy.ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file, anchor, lines in EDITS[kind]:
        path = folder / file
        text = path.read_text()
        assert text.count(anchor) == 1, f"{file} no longer has one place that reads {anchor!r}"
        path.write_text(text.replace(anchor, lines + anchor))
    assert len({file for file, _, _ in EDITS[kind]}) <= MOST_FILES[kind]
    return folder


def run_in(folder: Path, *command: str) -> subprocess.CompletedProcess:
    """`python -m COMMAND...` of the copy."""
    environment = {**toy.environment(), "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, env=environment, text=True, capture_output=True, timeout=toy.HANGS
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of the package as it is."""
    return tiny_checkpoint.write(tmp_path_factory.mktemp("run"), tiny_checkpoint.experiment())


@pytest.fixture
def registries(monkeypatch):
    """Registries that forget what a test adds to them."""
    monkeypatch.setattr(registry, "_openers", dict(registry._openers))
    tables = [(table, dict(table)) for table in (integration.SOLVERS, guidance.RULES)]
    yield
    for table, before in tables:
        table.clear()
        table.update(before)


def test_a_solver_with_an_option_is_one_class(checkpoint, registries):
    @register("damped")
    @dataclasses.dataclass(frozen=True)
    class Damped(FixedGrid):
        """Euler steps of a damped slope."""

        order = 1
        damping: float = option(0.5, "Factor of each slope.")

        def rows(self, path, steps, reverse=False):
            update = lambda x, v, c, noise: x + c.dt * v[0](x, c.t)
            times = np.linspace(1, 0, steps + 1)
            return [Row(update, (t,), {"t": t, "dt": self.damping * (n - t)}) for t, n in zip(times, times[1:])]

    model = pretrained.load(checkpoint)
    values = flags.FlagValues()
    recipe_flags.define_recipe(values)
    values(["sample", "--solver=damped", "--damping=1.0"])
    recipe = recipe_flags.recipe_from(values, model)
    assert recipe.solver == Damped(damping=1.0) and type(recipe).of(recipe.flat()) == recipe
    euler = model.sample([1, 2, 3], solver="euler")
    np.testing.assert_array_equal(model.sample([1, 2, 3], recipe), euler)
    assert (model.sample([1, 2, 3], recipe, damping=0.5) != euler).any()


def test_a_guidance_rule_is_one_entry(checkpoint, registries):
    still = guidance.Definition("Scale of guidance against standing still", lambda call: jnp.zeros_like(call.x))
    guidance.RULES["still"] = still

    model = pretrained.load(checkpoint)
    values = flags.FlagValues()
    recipe_flags.define_recipe(values)
    values(["sample", "--still_scale=2", "--still_interval=0,0.5"])
    recipe = recipe_flags.recipe_from(values, model)
    assert recipe.flat()["still_scale"] == 2.0 and recipe.flat()["still_interval"] == (0.0, 0.5)
    plain = model.sample([1, 2, 3])
    np.testing.assert_array_equal(model.sample([1, 2, 3], recipe, still_scale=1.0), plain)
    assert (model.sample([1, 2, 3], recipe) != plain).any()


FORMAT = """
import numpy as np
from ig_jax.data.formats.registry import data_format
from ig_jax.data.sources import Source
from ig_jax.data.spec import pixels


@data_format("toy-noise")
def open_toy_noise(config, split):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8)
    labels = np.arange(40, dtype=np.int32) % 10
    spec = pixels((8, 8, 1), tuple("0123456789"), config.mirrored, f"toy-noise:{split}")
    return Source(spec, 40, lambda rows: {"image": images[rows], "label": labels[rows]})
"""


def test_a_data_format_is_one_file(registries, monkeypatch, tmp_path):
    """One module in data/formats: a config names it, and a run trains on it."""
    (tmp_path / "toy_noise.py").write_text(FORMAT)
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path)])
    e = toy.experiment(**{"data.source": "toy-noise", "run.steps": 1})
    state = train(e, str(tmp_path / "run"))
    assert int(state.step) == 1 and repr(e.open_split("test")) == "toy-noise:test"


# Of the toy family, at a size that trains in seconds: its settings, a step, and its weights to a file and back.
TOY_FAMILY = """
import sys
from pathlib import Path

import jax
import numpy as np

from ig_jax import convert
from ig_jax.config import published
from ig_jax.config.experiment import Experiment
from ig_jax.base.schema import bind
from ig_jax.generation import pretrained
from ig_jax.interop import exporting, published as tensors
from ig_jax.parallel.mesh import make_mesh
from ig_jax.training.program import TrainProgram
from ig_jax.training.state import born_sharded
from ig_jax.weightfiles.files import LazyTensor, write_torch

folder = Path(sys.argv[1])
settings = published.settings("ToyDiT-S/2")
assert (settings["run"]["steps"], settings["model"]["qk_norm"], settings["process"]["kind"]) == (
    300_000, "layernorm", "gaussian")
settings["model"] |= dict(depth=2, width=32, num_heads=2, inter_depth=(1,), input_size=8, num_classes=10)
settings["data"] |= dict(batch_size=8)
e, mesh = bind(Experiment, settings), make_mesh()

program = TrainProgram.of(e, mesh, e.batch_spec, 8)
state = born_sharded(program.new, program.layout, {})
batch = {name: jax.device_put(np.ones(a.shape, a.dtype), a.sharding) for name, a in program.batch.items()}
state, metrics = program.step(state, batch)
assert int(state.step) == 1 and np.isfinite(metrics["loss/total"]) and metrics["learning_rate"] == np.float32(1e-4)

weights = {name: np.asarray(array) for name, array in state.ema["0.9999"].items()}
stored = {
    tensors.published_name(name, e.model): LazyTensor.of(np.asarray(tensors.to_published(name, array, e.model)))
    for name, array in weights.items()
}
assert "clock_embedder.mlp.0.weight" in stored and "blocks.0.attn.q_norm.bias" in stored
write_torch(folder / "toy.pt", {"ema": stored, "args": exporting.published_args(e.model, e.process)})
convert.FLAGS(["convert", f"--from={folder}/toy.pt", f"--out={folder}/run"])
convert.main()
model = pretrained.load(folder / "run")
assert model.experiment.process == e.process and model.recipe == e.sample
assert model.experiment.model.qk_norm == "layernorm" and model.config["run"]["steps"] == 1
assert all((np.asarray(model.params[name]) == array).all() for name, array in weights.items())
assert np.isfinite(next(model.batches(model.recipe.replace(steps=2), labels=[1, 2])).latents).all()
"""


def test_a_family_is_an_entry_of_each_of_three_tables(tmp_path):
    copy = edited(tmp_path / "copy", "family")
    files = {file for file, _, _ in EDITS["family"]}
    assert files == {f"ig_jax/{name}.py" for name in ("models/zoo", "config/published", "interop/published")}
    (copy / "toy_family.py").write_text(TOY_FAMILY)
    run_in(copy, "toy_family", str(tmp_path))


def rewritten(checkpoint: Path, folder: Path, **changes) -> Path:
    """A copy of a checkpoint whose stored settings are changed, by dotted name; None removes one."""
    shutil.copytree(checkpoint, folder)
    path = folder / "checkpoints" / "0" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    for name, value in changes.items():
        *parents, last = name.split(".")
        section = functools.reduce(dict.__getitem__, parents, meta["config"])
        section.pop(last) if value is None else section.update({last: value})
    path.write_text(json.dumps(meta))
    return folder


def test_stored_settings_of_another_version(checkpoint, tmp_path, capsys):
    """What is missing is as before; sampling asks for nothing but its own; what it lacks is named with the place."""
    old = rewritten(checkpoint, tmp_path / "old", **{"loss.weighting": None, "model.attention": None})
    lacks = {"loss.label_drop": None, "optimizer.name": "lion", "data": None, "run.gone": 1}
    foreign = rewritten(old, tmp_path / "foreign", **lacks)
    model = pretrained.load(foreign)
    np.testing.assert_array_equal(model.sample([1, 2]), pretrained.load(checkpoint).sample([1, 2]))
    for setting, broken in (("config.model.depth", {"model.depth": None}), ("config.model.new", {"model.new": 1})):
        path = rewritten(checkpoint, tmp_path / setting, **broken)
        with refused(setting, says=f"checkpoint {str(path)!r}: {setting}", fix="version that wrote it"):
            pretrained.load(path)
    # Training needs the rest, which overrides can mend.
    sections, _ = config_files.from_checkpoint(str(foreign))
    assert "config.run.gone=1" in capsys.readouterr().err
    with refused("config.data", says="config.data"):
        bind(Experiment, sections)
    whole, overrides = tiny_checkpoint.experiment().as_dict(), [("loss.label_drop", "0.1"), ("optimizer.name", "adamw")]
    e = bind(Experiment, config_files.overridden(sections.to_dict() | {"data": whole["data"]}, overrides))
    assert e.loss == tiny_checkpoint.experiment().loss


def test_a_loss_term_and_a_checkpoint_from_before_it(checkpoint, tmp_path):
    """The new field has a default that means "as before", so older checkpoints are sampled and resumed."""
    copy = edited(tmp_path / "copy", "loss term")
    small = toy.flags(**{"run.steps": 2, "loss.gap_weight": 0.25})
    run_in(copy, "ig_jax.train", "--config=configs/digits.py", f"--workdir={tmp_path / 'run'}", *small)
    lines = read_metrics(tmp_path / "run")
    terms = {name: value for name, value in lines[-1].items() if name.startswith("loss/")}
    total = terms["loss/final"] + 0.5 * terms["loss/intermediate"] + 0.25 * terms["loss/gap"]
    assert terms["loss/gap"] > 0 and terms["loss/total"] == pytest.approx(total, rel=1e-6)
    run_in(copy, "ig_jax.sample", f"--checkpoint={checkpoint}", f"--out={tmp_path / 'samples'}", "--num=2")
    assert (tmp_path / "samples" / "000001.png").is_file() and os.path.getsize(tmp_path / "samples_grid.png")
