"""A checkpoint to a published file: the published names and layout, for the published code to load."""

import dataclasses
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np

from ig_jax.config import Experiment, bind
from ig_jax.diffusion.process import ProcessConfig
from ig_jax.errors import UserError, check
from ig_jax.importing import BUFFERS
from ig_jax.interop import (
    autoencoder_checkpoint,
    autoencoder_weights,
    claims,
    published,
    recognition,
)
from ig_jax.interop.weight_files import LazyTensor, write_safetensors, write_torch
from ig_jax.models import dit
from ig_jax.progress import Progress
from ig_jax.training import checkpoints as ckpt


@dataclasses.dataclass(frozen=True)
class Published:
    """Tensors by their published names, and what stands around them in a file."""

    tensors: dict[str, LazyTensor]
    key: str  # under which the published code looks for the tensors; "" for a bare state dict
    beside: dict  # args and steps, as training scripts store them; in a safetensors file as JSON in its metadata

    def write(self, file: Path) -> None:
        """Write `file` in the form its suffix names, one tensor in memory at a time.  Raises: UserError."""
        with Progress(len(self.tensors), "tensors", stream=sys.stderr) as progress:
            tensors = {name: _counted(tensor, progress, len(self.tensors)) for name, tensor in self.tensors.items()}
            if file.suffix == ".safetensors":
                write_safetensors(file, tensors, {key: json.dumps(value) for key, value in self.beside.items()})
            elif self.key:
                write_torch(file, {self.key: tensors} | self.beside)
            else:
                write_torch(file, tensors)


def _counted(tensor: LazyTensor, progress: Progress, total: int) -> LazyTensor:
    def read() -> np.ndarray:
        array = tensor.read()
        progress.advance()
        if progress.done % -(-total // 4) == 0 or progress.done == total:
            progress.show("written")
        return array

    return LazyTensor(tensor.shape, tensor.dtype, read)


def published_form(checkpoint: Path, ema: str) -> Published:
    """An autoencoder directory, or one EMA of a checkpoint ("" for the first), as its published code has it.

    Raises: UserError for a missing or damaged checkpoint, or a network that no published code has.
    """
    if (checkpoint / autoencoder_checkpoint.FILE).is_file():
        return _published_autoencoder(checkpoint)
    params, buffers, meta = _open(checkpoint, ema)
    config = bind(Experiment, meta["config"])
    model = config.model
    args = published_args(model, config.process)
    computed = published.rope_buffers(model) if model.rope else {}
    reads = buffers or {name: partial(np.asarray, table) for name, table in computed.items()}
    for ours in published.parameter_shapes(model):
        reads[published.published_name(ours, model)] = partial(_to_published, ours, params[ours], model)
    dtypes = meta.get("source", {}).get("dtypes", {})  # of an imported file, to give back what was taken
    tensors = {
        name: _entry(shape, np.dtype(dtypes.get(name, "float32")), reads[name])
        for name, shape in published.published_shapes(model).items()
    }
    return Published(tensors, "ema", {"args": args, "steps": meta["step"]})


def _entry(shape: tuple[int, ...], dtype: np.dtype, read) -> LazyTensor:
    return LazyTensor(shape, dtype, lambda: np.asarray(read()).astype(dtype, copy=False))


def _to_published(name: str, read: Callable[[], jax.Array], model: dit.DiTConfig) -> np.ndarray:
    return published.to_published(name, np.asarray(read()), model)


def published_args(model: dit.DiTConfig, process: ProcessConfig) -> dict:
    """What a training script would have stored beside these weights, from which they are recognised again.

    Raises: UserError for a network that no published code has: its weights would be run as another one.
    """
    shapes, ours = published.published_shapes(model), dataclasses.asdict(model)
    unimportant = ("inter_head_init", "mlp_ratio")  # matters before training only; shows in the shapes
    for title in ("SiT", "DiT", "LightningDiT"):
        args = {"model": title, "num_heads": model.num_heads, "num_classes": model.num_classes}
        if model.inter_depth:
            args["encoder_depth"] = model.inter_depth[0]
        if title != "DiT":
            args["path_type"] = claims.path_type(process.kind, model.clock)
        try:
            settings = recognition.recognise(shapes, claims.read({"args": args}))
        except UserError:
            continue
        predicts = "noise" if title == "DiT" else "velocity"
        possible = process.prediction == predicts and (process.kind == "gaussian" or args.get("path_type"))
        if possible and all(ours[key] == value for key, value in settings.items() if key not in unimportant):
            return args
    raise UserError("this network has no published form: no published SiT, DiT or LightningDiT would compute "
                    f"the same from its weights, with {process} and {model}")


def _open(checkpoint: Path, ema: str) -> tuple[dict, dict, dict]:
    """(parameters, stored published constants, meta) of one EMA; of each array, a function that reads it.

    An array in memory at a time: of a full-size network that is a hundredth of what the restored EMA takes.
    """
    directory, step = ckpt.find(checkpoint)
    item = ""

    def wanted(meta: dict) -> dict[str, dict]:
        nonlocal item
        names = bind(Experiment, meta["config"]).ema.names
        check(ema in ("", *names), "ema", ema, f"one of {', '.join(names)}, the averages in {directory}")
        item = f"ema_{ema or names[0]}"
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return {
            name: {leaf: jax.ShapeDtypeStruct(shape, dtype, sharding=device)
                   for leaf, (shape, dtype, _) in meta["arrays"][name].items()}
            for name in (item, BUFFERS) if name in meta["arrays"]
        }

    with ckpt.Checkpoints(directory, read_only=True) as reader:
        found = reader.restore_newest(wanted, step, as_readers=True)
    if found is None:
        raise UserError(f"checkpoint={str(checkpoint)!r} must hold a saved step; give a run's --workdir")
    items, meta = found
    return items[item], items.get(BUFFERS, {}), meta


def _published_autoencoder(directory: Path) -> Published:
    config, params = autoencoder_checkpoint.load(directory)
    naming = autoencoder_checkpoint.describe_directory(directory)[1]
    arrays = autoencoder_weights.to_published(params, config, naming)
    tensors = {name: LazyTensor.of(array) for name, array in arrays.items()}
    return Published(tensors, "state_dict" if naming == "ldm" else "", {})
