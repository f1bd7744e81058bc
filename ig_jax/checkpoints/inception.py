"""The InceptionV3 of FID in a directory: inception.safetensors, with the digest of its parameters and its origin."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from ig_jax.base.copies import local_copy
from ig_jax.base.errors import check
from ig_jax.base.files import local_path
from ig_jax.models import inception
from ig_jax.weightfiles.files import LazyTensor, open_weights, write_safetensors

FILE = "inception.safetensors"


def save(directory: str | os.PathLike, params: Mapping[str, np.ndarray], source: Mapping[str, Any]) -> None:
    """Write what `load` reads: float32 arrays by the names of models.inception.shapes.

    Raises: UserError when the directory cannot be written.
    """
    path = local_path(directory, "inception") / FILE
    text = {"digest": digest(params), "source": json.dumps(dict(source))}
    write_safetensors(path, {name: LazyTensor.of(np.asarray(array)) for name, array in params.items()}, text)


def load(directory: str | os.PathLike) -> tuple[dict[str, np.ndarray], str]:
    """(parameters by name, their digest).  Raises: UserError for a missing, damaged or foreign directory."""
    fix = "make one with python -m ig_jax.convert --from=FILE --out=DIR"
    path = local_copy(directory, "inception") / FILE
    check(path.is_file(), "inception", str(directory), f"a directory with an {FILE}", fix)
    with open_weights(path) as weights:
        found = {name: tensor.shape for name, tensor in weights.sets[""].items()}
        wanted = {name: leaf.shape for name, leaf in inception.shapes().items()}
        params = {name: tensor.read() for name, tensor in weights.sets[""].items()} if found == wanted else {}
        stored = weights.metadata.get("digest")
    check(
        bool(params) and digest(params) == stored,
        "inception",
        str(directory),
        "as it was written",
        f"it is damaged; {fix}",
    )
    return params, str(stored)


def digest(params: Mapping[str, np.ndarray]) -> str:
    """The sha256 (hex) of the little-endian float32 parameters in the order of their names."""
    found = hashlib.sha256()
    for name in sorted(params):
        found.update(np.ascontiguousarray(params[name], "<f4").tobytes())
    return found.hexdigest()
