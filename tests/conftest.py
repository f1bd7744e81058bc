"""Eight host devices for every test, data sets in a temporary directory; warnings are errors (pyproject.toml)."""

import os
import sys
from pathlib import Path

# Most of a test is compilation, and LLVM's optimisations are nearly half of it; no result here is one of speed.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# `train` called inside this process would leave the cache of its run to all later tests; commands of their own have it.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import pytest

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
