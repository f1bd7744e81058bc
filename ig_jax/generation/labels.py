"""Class labels of the samples, a function of (protocol, seed, index) alone."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ig_jax.base.errors import UserError
from ig_jax.base.files import is_file
from ig_jax.diffusion.randomness import Purpose, address


def labels_for(indices: np.ndarray, protocol: str, num_classes: int, seed: int) -> np.ndarray:
    """Labels int32 (n,) of the samples `indices` (n,), by a protocol.

    "balanced" (i mod classes), "random" (of (seed, i)), "null" (no class), a list "3,1,4" that is repeated, or a file:
    .npy, or text with one label per line, also repeated. The number `num_classes` is the null label.
    Raises: UserError for anything else and for labels out of range.
    """
    if protocol == "balanced":
        return (indices % num_classes).astype(np.int32)
    if protocol == "random":
        one = lambda i: jax.random.randint(address(seed, Purpose.SAMPLE_LABEL, i), (), 0, num_classes)
        return np.asarray(jax.vmap(one)(jnp.asarray(indices, jnp.int32)), np.int32)
    if protocol == "null":
        return np.full(len(indices), num_classes, np.int32)
    listed = _read(protocol)
    for label in listed[(listed < 0) | (listed > num_classes)].tolist():
        expected = f"in 0..{num_classes - 1}, the classes of this model, or {num_classes} for no class"
        raise UserError(name="labels", value=label, expected=expected)
    return listed[indices % listed.size].astype(np.int32)


def _read(protocol: str) -> np.ndarray:
    """Whole numbers (n,), n >= 1, from a list or a file."""
    path = Path(protocol).expanduser()
    try:
        if path.suffix == ".npy":
            with open(path, "rb") as file:  # np.load leaves an archive open
                listed = np.load(file, allow_pickle=False)
        else:
            text = path.read_text().split() if path.suffix or is_file(protocol) else protocol.split(",")
            listed = np.array([int(part) for part in text], np.int64)
    except OSError as error:
        expected = f"a readable file ({error.strerror or error})"
        raise UserError(name="labels", value=protocol, expected=expected, fix="check the path") from error
    except (ValueError, EOFError, OverflowError):
        listed = None
    whole = isinstance(listed, np.ndarray) and listed.ndim == 1 and np.issubdtype(listed.dtype, np.integer)
    if listed is None or not whole or not listed.size:
        expected = "balanced, random, null, a list such as 3,1,4, or a .npy or text file of whole numbers"
        raise UserError(name="labels", value=protocol, expected=expected)
    return listed
