"""An autoencoder in a directory of its own: autoencoder.json and its parameters, each with a digest.

found = load("vae/sd-vae-ft-ema")
model = autoencoder.from_params(found.config, found.params)
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp

from ig_jax.base.copies import local_copy
from ig_jax.base.errors import UserError, check
from ig_jax.base.files import local_path
from ig_jax.checkpoints.digests import describe, first_line, one_error
from ig_jax.models import autoencoder
from ig_jax.models.autoencoder import AutoencoderConfig
from ig_jax.models.latents import autoencoder_name


class Autoencoder(NamedTuple):
    """An autoencoder.

    Attributes:
        config: of the network.
        params: as models.autoencoder.from_params takes them.
        digest: sha256 over the digests of all arrays, stored with every image.
    """

    config: AutoencoderConfig
    params: dict[str, jax.Array]
    digest: str

    @property
    def name(self) -> str:
        """What its latents are called."""
        return autoencoder_name(self.config.latent_channels, self.config.factor)


FILE = "autoencoder.json"
_FORMAT = 1
_ARRAYS = "params"


def save(
    directory: str | os.PathLike,
    config: AutoencoderConfig,
    params: Mapping,
    naming: str,
    source: Mapping = MappingProxyType({}),
) -> None:
    """Write into `directory` what `load` reads; the JSON file comes last and makes it complete.

    params: float32 arrays by the names of models.autoencoder.shapes; naming: that of the published file they come
    from, kept for the way back; source: where that file comes from.
    Raises: UserError when the directory cannot be written.
    """
    directory = local_path(directory, "autoencoder")
    params = {name: jax.numpy.asarray(array) for name, array in params.items()}
    content = {"format": _FORMAT, "config": dataclasses.asdict(config), "naming": naming, "source": dict(source)}
    content["arrays"] = describe(params)
    text = json.dumps(content | {"sha256": _sha256(content)}, indent=1) + "\n"

    def unwritable(why: str) -> UserError:
        what = f"{directory}: the autoencoder could not be written ({why})"
        return UserError(what, name=str(directory), fix="free space or write elsewhere")

    with one_error((OSError, ValueError), unwritable):  # ValueError: how a full disk comes back
        directory.mkdir(parents=True, exist_ok=True)
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
            writer.save(directory / _ARRAYS, args=ocp.args.StandardSave(params))
        (directory / FILE).write_text(text)


def load(directory: str | os.PathLike, sharding: jax.sharding.Sharding | None = None) -> Autoencoder:
    """The autoencoder in a directory, in float32.

    sharding: of every array; on this process's first device where None.
    Raises: UserError for a missing, damaged or foreign directory.
    """
    config, _, arrays = describe_directory(directory)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for name, leaf in autoencoder.shapes(config).items()
    }
    stored = {name: entry[:2] for name, entry in arrays.items()}
    if stored != {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in wanted.items()}:
        raise _damaged(directory, f"its arrays are not those of {config}")
    # Orbax raises bare Exception, KeyError or JSONDecodeError for torn files.
    with one_error(Exception, partial(_damaged, directory)):
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
            params = reader.restore(
                local_copy(directory, "autoencoder") / _ARRAYS, args=ocp.args.StandardRestore(wanted)
            )
    for name, found in describe(params).items():
        if found != arrays[name]:
            raise _damaged(directory, f"{name} does not match its digest")
    return Autoencoder(config, params, _sha256(arrays))


def describe_directory(directory: str | os.PathLike) -> tuple[AutoencoderConfig, str, dict]:
    """(config, naming, {array: [shape, dtype, digest]}) from the JSON file alone.  Raises: UserError."""
    file = local_copy(directory, "autoencoder") / FILE
    fix = "make one with python -m ig_jax.convert --from=FILE --out=DIR"
    check(file.is_file(), "autoencoder", str(directory), f"a directory with an {FILE}", fix)
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
    """sha256 over the digests of its arrays, an identity of the weights.  Raises: UserError as `describe_directory`."""
    return _sha256(describe_directory(directory)[2])


def _sha256(content: Mapping) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _damaged(directory: str | os.PathLike, what: str) -> UserError:
    what = f"{directory}: the autoencoder is damaged: {what}"
    return UserError(what, name=str(directory), fix="convert the published file again")
