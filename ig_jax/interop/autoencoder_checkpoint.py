"""An autoencoder in a directory of its own: autoencoder.json and its parameters, each with a digest.

    config, params = load("vae/sd-vae-ft-ema")
    model = autoencoder.from_params(config, params)
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from ig_jax.errors import UserError, check
from ig_jax.interop import autoencoder_weights as weights
from ig_jax.models.autoencoder_config import AutoencoderConfig
from ig_jax.parallel.storage import abandoned_unheard, describe, first_line

FILE = "autoencoder.json"
_FORMAT = 1
_ARRAYS = "params"


def save(directory: str | os.PathLike, config: AutoencoderConfig, params: dict, naming: str) -> None:
    """Write into `directory` what `load` reads; the JSON file comes last and makes it whole.

    params: nested dict of arrays, the tree of Autoencoder(config); naming: that of the published file it came
    from, one of autoencoder_weights.NAMINGS.  Raises: UserError when it cannot be written.
    """
    directory = Path(directory).absolute()
    flat = jax.tree.map(jax.numpy.asarray, weights.flattened(params))
    content = {
        "format": _FORMAT, "config": dataclasses.asdict(config), "naming": naming, "arrays": describe(flat),
    }
    text = json.dumps(content | {"sha256": _sha256(content)}, indent=1) + "\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with abandoned_unheard(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
            writer.save(directory / _ARRAYS, args=ocp.args.StandardSave(flat))
        (directory / FILE).write_text(text)
    except (OSError, ValueError) as error:  # ValueError: how a full disk comes back
        raise UserError(f"{directory}: the autoencoder could not be written ({first_line(error)}); "
                        "free space or write elsewhere") from error


def load(
    directory: str | os.PathLike, sharding: jax.sharding.Sharding | None = None
) -> tuple[AutoencoderConfig, dict]:
    """(config, nested dict of float32 arrays) as Autoencoder(config) and from_params want them.

    sharding: of every array; on this process's first device where None.
    Raises: UserError for a missing, damaged or foreign directory.
    """
    config, _, arrays = describe_directory(directory)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {
        name: jax.ShapeDtypeStruct(shape, jax.numpy.float32, sharding=sharding)
        for name, shape in weights.flat_shapes(config).items()
    }
    stored = {name: entry[:2] for name, entry in arrays.items()}
    if stored != {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in wanted.items()}:
        raise UserError(f"{directory}: its arrays are not those of {config}; convert its file again")
    try:
        with abandoned_unheard(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
            flat = reader.restore(Path(directory).absolute() / _ARRAYS, args=ocp.args.StandardRestore(wanted))
    except Exception as error:  # Orbax raises bare Exception, KeyError or JSONDecodeError for torn files
        raise _damaged(directory, first_line(error)) from error
    for name, found in describe(flat).items():
        if found != arrays[name]:
            raise _damaged(directory, f"{name} does not match its digest")
    return config, weights.nested(flat, config)


def describe_directory(directory: str | os.PathLike) -> tuple[AutoencoderConfig, str, dict]:
    """(config, naming, {array: [shape, dtype, digest]}) from the JSON file alone.  Raises: UserError."""
    file = Path(directory).expanduser() / FILE
    if not file.is_file():
        raise UserError(f"autoencoder={str(directory)!r} must be a directory with an {FILE}; "
                        "make one with python -m ig_jax.convert --from=FILE --out=DIR")
    try:
        content = json.loads(file.read_text())
        stored = content.pop("sha256")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(directory, f"{FILE}: {first_line(error)}") from error
    if stored != _sha256(content):
        raise _damaged(directory, f"{FILE} does not match its digest")
    check(content["format"] == _FORMAT, f"{file} format", content["format"], str(_FORMAT), "use a newer ig_jax")
    return AutoencoderConfig(**content["config"]), content["naming"], content["arrays"]


def digest(directory: str | os.PathLike) -> str:
    """sha256 over the digests of its arrays, which names the weights.  Raises: UserError as `describe_directory`."""
    return _sha256(describe_directory(directory)[2])


def _sha256(content: Mapping) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _damaged(directory, what: str) -> UserError:
    return UserError(f"{directory}: the autoencoder is damaged: {what}; convert the published file again")

