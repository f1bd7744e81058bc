"""A trained model from its checkpoint directory alone.

    model = pretrained.load("runs/digits")
    recipe = dataclasses.replace(model.recipe, ig_scale=2.0)
    images = model.sample(recipe, labels=[0, 1, 2, 3])          # uint8 [4, H, W, C]
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from ig_jax.config import Experiment, bind
from ig_jax.errors import UserError
from ig_jax.generation.generate import generate
from ig_jax.generation.recipe import Recipe
from ig_jax.models import dit
from ig_jax.parallel.mesh import make_mesh
from ig_jax.parallel.sharding import tree_shardings
from ig_jax.training import checkpoints as ckpt


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """EMA weights with everything needed to sample from them."""

    experiment: Experiment
    params: dict[str, jax.Array]
    mesh: Mesh
    step: int
    ema: str  # which average, by its decay
    digest: str  # sha256 over the digests of all arrays: names these weights beside every result
    class_names: tuple[str, ...]

    @property
    def recipe(self) -> Recipe:
        """The recipe the checkpoint was configured with."""
        return self.experiment.sample

    def generate(self, recipe: Recipe, labels: np.ndarray, *, seed: int = 0, batch_size: int = 64):
        """Batches (indices, images uint8 [b, H, W, C]); see generation.generate."""
        recipe.check_model(self.experiment.model)
        e = self.experiment
        return generate(
            self.params, recipe, model=e.model, path=e.path, uint8_rule=e.latents.uint8_rule, mesh=self.mesh,
            seed=seed, labels=np.asarray(labels, np.int32), batch_size=batch_size,
        )

    def sample(self, recipe: Recipe, labels: Sequence[int], *, seed: int = 0, batch_size: int = 64) -> np.ndarray:
        """Images uint8 [N, H, W, C], one for each label."""
        batches = self.generate(recipe, np.asarray(labels), seed=seed, batch_size=batch_size)
        return np.concatenate([images for _, images in batches])


def stored_experiment(checkpoint: str | os.PathLike) -> Experiment:
    """The config that the newest whole step under `checkpoint` was trained with; no array is read.

    Raises: UserError for a missing, damaged or foreign checkpoint.
    """
    directory, step = ckpt.find(checkpoint)
    with ckpt.Checkpoints(directory, read_only=True) as reader:
        found = reader.restore_newest(lambda meta: {}, step)
    if found is None:
        raise UserError(f"checkpoint={str(checkpoint)!r} must hold a saved step; give the --workdir of a run")
    return bind(Experiment, found[1]["config"])


def load(checkpoint: str | os.PathLike, *, ema: str = "", mesh: Mesh | None = None) -> Pretrained:
    """The newest whole step under `checkpoint` (a workdir, its checkpoints, or one step), on any mesh.

    Only the EMA named by its decay is read ("" for the first). Raises: UserError for a missing, damaged or
    foreign checkpoint, or an EMA it does not have.
    """
    directory, step = ckpt.find(checkpoint)
    mesh = make_mesh() if mesh is None else mesh
    chosen: dict[str, object] = {}

    def wanted(meta: dict) -> dict[str, object]:
        experiment = chosen["experiment"] = bind(Experiment, meta["config"])
        name = chosen["ema"] = ema or experiment.ema.names[0]
        if name not in experiment.ema.names:
            raise UserError(f"ema={name!r} must be one of {', '.join(experiment.ema.names)}, the averages in "
                            f"{str(directory)!r}")
        shapes = dit.shapes(experiment.model)
        shardings = tree_shardings(shapes, mesh)
        return {f"ema_{name}": {
            key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[key]) for key, leaf in shapes.items()
        }}

    with ckpt.Checkpoints(directory, read_only=True) as reader:
        found = reader.restore_newest(wanted, step)
    if found is None:
        raise UserError(f"checkpoint={str(checkpoint)!r} must hold a saved step; give the --workdir of a run")
    items, meta = found
    item = f"ema_{chosen['ema']}"
    digest = hashlib.sha256(json.dumps(meta["arrays"][item], sort_keys=True).encode()).hexdigest()
    return Pretrained(chosen["experiment"], items[item], mesh, meta["step"], chosen["ema"], digest,
                      tuple(meta["labels"]))
