"""What importing costs and needs, each in a process of its own."""

import subprocess
import sys

import toy

HEAVY = ("tensorflow", "tensorflow_datasets", "orbax", "clu", "grain", "PIL", "ml_collections", "absl", "tqdm")
CORE = [
    "ig_jax.models.dit", "ig_jax.models.zoo", "ig_jax.models.cost", "ig_jax.models.latents", "ig_jax.models.kernels",
    "ig_jax.models.autoencoder", "ig_jax.diffusion.paths", "ig_jax.diffusion.losses", "ig_jax.diffusion.guidance",
    "ig_jax.diffusion.samplers", "ig_jax.diffusion.randomness", "ig_jax.parallel.mesh", "ig_jax.parallel.sharding",
    "ig_jax.training.step",
]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=toy.ROOT, env=toy.environment(),
                          text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_is_light():
    loaded = python("import sys, ig_jax; print(*sys.modules)").split()
    assert not {"jax", "flax", "numpy", *HEAVY} & {name.split(".")[0] for name in loaded}


def test_commands_parse_their_flags_before_anything_heavy_is_imported():
    loaded = python("import sys, ig_jax.train; print(*sys.modules)").split()
    assert not {"tensorflow", "tensorflow_datasets", "orbax", "clu", "grain"} & {n.split(".")[0] for n in loaded}


def test_the_core_runs_where_only_jax_flax_optax_and_einops_exist():
    """Everything else is made impossible to import; flax itself brings orbax, which is therefore allowed there."""
    blocked = [name for name in HEAVY if name not in ("orbax", "absl", "tqdm")]
    python(f"""
import importlib, sys
import flax.nnx, optax, einops
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(name)
for name in [n for n in sys.modules if n.split(".")[0] in {blocked!r}]:
    del sys.modules[name]
sys.meta_path.insert(0, Blocked())
for module in {CORE!r}:
    importlib.import_module(module)
""")
