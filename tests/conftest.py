"""Eight host devices for every test, data sets in a temporary directory; warnings are errors (pyproject.toml)."""

import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

# Most of a test is compilation, and LLVM's optimisations are nearly half of it; no result here is one of speed.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if version("jax").startswith("0.10.") and os.environ.get("IG_JAX_SLOW") != "1":
    # XLA's older code generators take a quarter less (tests of steps and whole runs: 139 s, not 176). The slow tests
    # run with those that a user gets, and so do the core rooms on the newest JAX, which has no others.
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Many tests need the same programs: each process compiles them once. JAX writes them in place, so that another process
# could read half of one.
_programs = tempfile.TemporaryDirectory(prefix="ig_jax_programs_")  # until this process ends
os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"

sys.path.insert(0, str(Path(__file__).parent))  # tests/toy.py


@pytest.fixture(scope="session", autouse=True)
def tfds_directory(tmp_path_factory):
    """Data sets are prepared, and commands compiled, once a session, away from the user's own directories."""
    directory = tmp_path_factory.mktemp("tfds")
    os.environ["TFDS_DATA_DIR"] = str(directory)
    os.environ["IG_JAX_CACHE"] = str(tmp_path_factory.mktemp("cache"))  # commands share compiled programs
    return directory


def pytest_collection_modifyitems(items):
    """Files of whole commands first: they take longest, and one worker would finish them alone."""
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)
