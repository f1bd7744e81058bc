"""Which class each sample is drawn of: a function of (protocol, seed, index) alone."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ig_jax.diffusion.randomness import Purpose, address
from ig_jax.errors import UserError


def labels_for(indices: np.ndarray, protocol: str, num_classes: int, seed: int) -> np.ndarray:
    """Labels int32 of the given sample indices, by `protocol`.

    "balanced" (i mod classes), "random" (of (seed, i)), a list "3,1,4" that is repeated, or a file: .npy,
    or text with one label a line, also repeated. Raises: UserError for anything else and for labels out of
    range.
    """
    if protocol == "balanced":
        return (indices % num_classes).astype(np.int32)
    if protocol == "random":
        drawn = jax.vmap(lambda i: jax.random.randint(
            address(seed, Purpose.SAMPLE_LABEL, i), (), 0, num_classes))(jnp.asarray(indices, jnp.int32))
        return np.asarray(drawn, np.int32)
    listed = _read(protocol)
    outside = listed[(listed < 0) | (listed >= num_classes)]
    if outside.size:
        raise UserError(f"labels={int(outside[0])} must be in 0..{num_classes - 1}, the classes of this model")
    return listed[indices % listed.size].astype(np.int32)


def _read(protocol: str) -> np.ndarray:
    """Whole numbers [n], n >= 1, from a list or a file."""
    path = Path(protocol).expanduser()
    try:
        if path.suffix == ".npy":
            listed = np.load(path, allow_pickle=False)
        else:
            text = path.read_text().split() if path.suffix or path.is_file() else protocol.split(",")
            listed = np.array([int(part) for part in text], np.int64)
    except OSError as error:
        raise UserError(f"labels={protocol!r} cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError, OverflowError):
        listed = None
    if not isinstance(listed, np.ndarray) or listed.ndim != 1 or listed.size == 0 or not np.issubdtype(listed.dtype, np.integer):
        raise UserError(f"labels={protocol!r} must be balanced, random, a list such as 3,1,4, or a .npy or text "
                        "file of whole numbers")
    return listed
