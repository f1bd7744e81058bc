"""Export of checkpoints to weight files with the names and layouts that the published code loads."""

import dataclasses
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np

from ig_jax.base.errors import UserError, check
from ig_jax.base.progress import Progress
from ig_jax.checkpoints import autoencoder as autoencoder_checkpoint
from ig_jax.checkpoints import steps as ckpt
from ig_jax.config import stored
from ig_jax.config.published import FAMILIES
from ig_jax.diffusion.process import ProcessConfig
from ig_jax.interop import autoencoder_weights, diffusers_dit, published, recognition
from ig_jax.interop.importing import BUFFERS
from ig_jax.models import dit, zoo
from ig_jax.weightfiles.files import LazyTensor, write_safetensors, write_torch


@dataclasses.dataclass(frozen=True)
class Published:
    """Tensors by their published names, and the metadata that is stored with them."""

    tensors: dict[str, LazyTensor]
    key: str  # under which the published code looks for the tensors; "" for a bare state dict
    metadata: dict  # args and steps, as training scripts store them; JSON in a safetensors file

    def write(self, file: Path) -> None:
        """Write `file` in the form its suffix names, one tensor in memory at a time.  Raises: UserError."""
        with Progress(len(self.tensors), "tensors", stream=sys.stderr) as progress:

            def counted(tensor: LazyTensor) -> LazyTensor:
                def read() -> np.ndarray:
                    progress.count("written")
                    return tensor.read()

                return LazyTensor(tensor.shape, tensor.dtype, read)

            tensors = {name: counted(tensor) for name, tensor in self.tensors.items()}
            if file.suffix == ".safetensors":
                write_safetensors(file, tensors, {key: json.dumps(value) for key, value in self.metadata.items()})
            else:
                write_torch(file, {self.key: tensors} | self.metadata if self.key else tensors)


def published_form(checkpoint: Path, ema: str) -> Published:
    """An autoencoder directory, or one EMA of a checkpoint ("" for the first), in its published form.

    Raises: UserError for a missing or damaged checkpoint, or a network that no published code has.
    """
    if (checkpoint / autoencoder_checkpoint.FILE).is_file():
        return _published_autoencoder(checkpoint)
    params, buffers, meta = _open(checkpoint, ema)
    config = stored.network(meta, checkpoint)
    model = config.model
    args = published_args(model, config.process)
    computed = published.rope_buffers(model) if model.rope else {}
    reads: dict[str, Callable] = buffers or {name: partial(np.asarray, table) for name, table in computed.items()}
    for own in published.parameter_shapes(model):
        reads[published.published_name(own, model)] = partial(_to_published, own, params[own], model)
    dtypes = meta.get("source", {}).get("dtypes", {})  # of an imported file, to give back what was taken

    def tensor(name: str, shape: tuple[int, ...]) -> LazyTensor:
        dtype = np.dtype(dtypes.get(name, "float32"))
        return LazyTensor(shape, dtype, lambda: np.asarray(reads[name]()).astype(dtype, copy=False))

    tensors = {name: tensor(name, shape) for name, shape in published.published_shapes(model).items()}
    if meta.get("source", {}).get("naming") == "diffusers":
        return Published(diffusers_dit.from_release(tensors, model), "", {})
    return Published(tensors, "ema", {"args": args, "steps": meta["step"]})


def write_pipeline(folder: Path, checkpoint: Path, ema: str) -> None:
    """Write a DiT, and the autoencoder of CHECKPOINT/autoencoder if it is there, as the folder of diffusers' pipeline.

    Raises: UserError for a missing or damaged checkpoint, or a network that diffusers' DiT is not.
    """
    meta = ckpt.stored_meta(checkpoint)
    model, form = stored.network(meta, checkpoint).model, published_form(checkpoint, ema)
    in_release = not any(name.startswith("transformer_blocks.") for name in form.tensors)
    tensors = diffusers_dit.from_release(form.tensors, model) if in_release else form.tensors
    directory, autoencoder = checkpoint / "autoencoder", None
    parts = {"transformer": Published(tensors, "", {})}
    if (directory / autoencoder_checkpoint.FILE).is_file():
        autoencoder, params, _ = autoencoder_checkpoint.load(directory)
        arrays = autoencoder_weights.to_published(params, autoencoder, "diffusers")
        parts["vae"] = Published({name: LazyTensor.of(array) for name, array in arrays.items()}, "", {})
    for name, text in diffusers_dit.pipeline_files(model, meta["labels"], autoencoder).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for name, part in parts.items():
        part.write(folder / name / diffusers_dit.FILE)


def _to_published(name: str, read: Callable[[], jax.Array], model: dit.DiTConfig) -> np.ndarray:
    return published.to_published(name, np.asarray(read()), model)


def published_args(model: dit.DiTConfig, process: ProcessConfig) -> dict:
    """The args that a training script stores with such weights, sufficient to recognise them again.

    Raises: UserError for a network that no published code has, which would run its weights as another one.
    """
    shapes, own = published.published_shapes(model), dataclasses.asdict(model)
    unimportant = ("inter_head_init", "mlp_ratio")  # matters before training only; shows in the shapes
    for title, family in zoo.NAMES.items():
        args = {"model": title, "num_heads": model.num_heads, "num_classes": model.num_classes}
        if model.inter_depth:
            args["encoder_depth"] = model.inter_depth[0]
        of_family = FAMILIES[family].process
        if of_family["kind"] != "gaussian":  # which has no path to choose
            args["path_type"] = recognition.path_type(process.kind, model.clock)
        try:
            settings = recognition.recognise(shapes, recognition.FileSettings.of({"args": args}))
        except UserError:
            continue
        possible = process.prediction == of_family["prediction"] and args.get("path_type", process.kind == "gaussian")
        if possible and all(own[key] == value for key, value in settings.items() if key not in unimportant):
            return args
    what = "no published SiT, DiT or LightningDiT computes the same from its weights"
    problem = f"this network has no published form: {what}, with {process} and {model}"
    raise UserError(problem, name="network", value=str(model))


def _open(checkpoint: Path, ema: str) -> tuple[dict, dict, dict]:
    """(parameters, stored published constants, meta) of one EMA; for each array, a function that reads it.

    One array is in memory at a time: a hundredth of the restored EMA of a full-size network.
    """
    item = ""

    def wanted(meta: dict) -> dict[str, dict]:
        nonlocal item
        names = stored.network(meta, checkpoint).ema.names
        check(ema in ("", *names), "--ema", ema, f"one of {', '.join(names)}, the averages in {checkpoint}")
        item = f"ema_{ema or names[0]}"
        return ckpt.stored_arrays(meta, (name for name in (item, BUFFERS) if name in meta["arrays"]))

    items, meta = ckpt.open_newest(checkpoint, wanted, as_readers=True)
    return items[item], items.get(BUFFERS, {}), meta


def _published_autoencoder(directory: Path) -> Published:
    config, params, _ = autoencoder_checkpoint.load(directory)
    naming = autoencoder_checkpoint.describe_directory(directory)[1]
    arrays = autoencoder_weights.to_published(params, config, naming)
    tensors = {name: LazyTensor.of(array) for name, array in arrays.items()}
    return Published(tensors, "state_dict" if naming.startswith("ldm") else "", {})
