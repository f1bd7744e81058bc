"""Costs and requirements of imports, each in a process of its own."""

import subprocess
import sys

import toy

HEAVY = ("tensorflow", "tensorflow_datasets", "orbax", "grain", "PIL", "ml_collections", "absl")
CORE = [
    "ig_jax.models.dit",
    "ig_jax.models.zoo",
    "ig_jax.models.cost",
    "ig_jax.models.latents",
    "ig_jax.models.kernels",
    "ig_jax.models.autoencoder",
    "ig_jax.diffusion.paths",
    "ig_jax.diffusion.loss",
    "ig_jax.diffusion.guidance",
    "ig_jax.diffusion.samplers",
    "ig_jax.diffusion.randomness",
    "ig_jax.parallel.mesh",
    "ig_jax.parallel.sharding",
    "ig_jax.data.spec",
    "ig_jax.data.sources",
    "ig_jax.optim.optimizer",
    "ig_jax.optim.ema",
    "ig_jax.config.experiment",
    "ig_jax.training.step",
    "ig_jax.training.program",
]
BENCHMARK = [f"ig_jax.benchmarking.{name}" for name in ("run", "programs", "worker")]


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=toy.ROOT, env=toy.environment(), text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_is_light():
    loaded = python("import sys, ig_jax; print(*sys.modules)").split()
    assert not {"jax", "flax", "numpy", *HEAVY} & {name.split(".")[0] for name in loaded}


def test_commands_parse_their_flags_before_anything_heavy_is_imported():
    loaded = python("import sys, ig_jax.train; print(*sys.modules)").split()
    assert not {"tensorflow", "tensorflow_datasets", "orbax", "grain"} & {n.split(".")[0] for n in loaded}


def test_the_core_runs_where_only_jax_flax_optax_and_einops_exist():
    """Everything else is made impossible to import; flax itself brings orbax, which is therefore allowed there."""
    only_with(
        "flax.nnx, optax, einops",
        blocked=[name for name in HEAVY if name not in ("orbax", "absl")],
        code=f"for module in {CORE!r}: importlib.import_module(module)",
    )


def test_the_benchmark_of_a_named_model_needs_no_more_and_its_driver_touches_no_device():
    """A device that the driver had opened would be lost to its workers."""
    only_with(
        "flax.nnx, optax, einops, absl.flags",
        blocked=[n for n in HEAVY if n not in ("orbax", "absl")],
        code=f"""
for module in {BENCHMARK!r}: importlib.import_module(module)
from ig_jax.benchmarking import cases, run
made = cases.expanded(cases.published("SiT-XL/2"), {{"data.batch_size": [8, 16], "sample.cfg_scale": [1.0, 1.35]}})
group = run.variants_of("sample", made[0], ["sh other"], "")
run.results_of("sample", group[0])
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
""",
    )


def test_a_benchmark_reads_its_flags_before_jax():
    loaded = python("import sys, ig_jax.benchmark, ig_jax.benchmarking.worker; print(*sys.modules)").split()
    assert not {"jax", "flax", *HEAVY} & {name.split(".")[0] for name in loaded} - {"absl"}


def only_with(packages: str, *, blocked: list[str], code: str) -> None:
    """Run code where `blocked` cannot be imported once `packages` are; what those brought of it is forgotten."""
    python(f"""
import importlib, sys
import {packages}
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(name)
for name in [n for n in sys.modules if n.split(".")[0] in {blocked!r}]:
    del sys.modules[name]
sys.meta_path.insert(0, Blocked())
{code}
""")
