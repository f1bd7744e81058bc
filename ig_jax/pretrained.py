"""A trained model from its checkpoint directory alone, on one device or a mesh.

    model = pretrained.load("runs/digits")
    recipe = dataclasses.replace(model.recipe, ig_scale=2.0)
    images = model.sample(recipe, labels=[0, 1, 2, 3])          # uint8 [4, H, W, C]
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from ig_jax.config import Experiment, bind
from ig_jax.errors import UserError, check
from ig_jax.generation import decode, generate
from ig_jax.generation.recipe import Recipe
from ig_jax.models import dit
from ig_jax.parallel.mesh import make_mesh
from ig_jax.parallel.sharding import batch_sharding, with_shardings
from ig_jax.progress import Progress
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
    autoencoder: decode.Autoencoder | None = None
    weak: "Pretrained | None" = None  # the second checkpoint of autoguidance

    @property
    def recipe(self) -> Recipe:
        """The recipe the checkpoint was configured with."""
        return self.experiment.sample

    @property
    def weak_model(self) -> dit.DiTConfig | None:
        """The network of the second checkpoint."""
        return self.weak.experiment.model if self.weak else None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of what the network draws."""
        model = self.experiment.model
        return model.input_size, model.input_size, model.channels

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of its images."""
        return decode.image_shape(self.latent_shape, self.autoencoder)

    @functools.cached_property
    def decode(self) -> Callable[[jax.Array], jax.Array]:
        """Latents [B, H, W, C] float32 -> images uint8.  Raises: UserError where an autoencoder is missing."""
        return decode.make_decoder(self.mesh, self.experiment.latents, self.autoencoder)

    def to_images(self, latents: np.ndarray) -> np.ndarray:
        """Images uint8 [N, H, W, C] of latents [N, h, w, c] float32 on the host, any number of them."""
        count = len(latents)
        rows = np.minimum(np.arange(generate.padded(count, self.mesh)), count - 1)
        return np.asarray(self.decode(generate.on_devices(latents[rows], batch_sharding(self.mesh))))[:count]

    def check(self, recipe: Recipe) -> None:
        """Raise UserError when this model cannot be sampled by the recipe."""
        recipe.check_model(self.experiment.model, self.weak_model)
        if self.weak is not None:
            check(self.weak.experiment.process == self.experiment.process, "auto_checkpoint process",
                  self.weak.experiment.process, f"that of the checkpoint, {self.experiment.process}")

    def draw(
        self, recipe: Recipe, labels: Sequence[int], *, seed: int = 0, batch_size: int = 64,
        indices: np.ndarray | None = None,
    ) -> Iterator[generate.Batch]:
        """Batches of latents of the samples `indices` (0, 1, ... where not given), one for each label."""
        self.check(recipe)
        check(0 <= seed < 2**31, "seed", seed, "in [0, 2^31)")
        check(batch_size >= 1, "batch_size", batch_size, "at least 1 image")
        labels, e = self._checked(labels), self.experiment
        return generate.draw(
            self.params, recipe, model=e.model, process=e.process, mesh=self.mesh, seed=seed, labels=labels,
            indices=np.arange(len(labels)) if indices is None else indices, batch_size=batch_size,
            weak=self.weak_model, weak_params=self.weak.params if self.weak else None,
        )

    def _checked(self, labels: Sequence[int]) -> np.ndarray:
        labels, null = np.asarray(labels), self.experiment.model.num_classes
        whole = labels.ndim == 1 and (np.issubdtype(labels.dtype, np.integer) or not labels.size)
        check(whole, "labels", labels.tolist(), "a list of whole numbers")
        strange = labels[(labels < 0) | (labels > null)].tolist()
        check(not strange, "labels", strange, f"classes in 0..{null - 1}, or {null} for none")
        return labels.astype(np.int32)

    def generate(
        self, recipe: Recipe, labels: Sequence[int], *, seed: int = 0, batch_size: int = 64,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batches (indices, images uint8 [b, H, W, C])."""
        for batch in self.draw(recipe, labels, seed=seed, batch_size=batch_size):
            generate.check_finite(np.asarray(batch.latents), recipe)
            yield batch.indices, np.asarray(self.decode(batch.latents))[: len(batch.indices)]

    def sample(
        self, recipe: Recipe, labels: Sequence[int], *, seed: int = 0, batch_size: int = 64,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Images uint8 [N, H, W, C], one for each label; `progress` counts them.

        Raises: UserError for labels, a seed or a batch size out of range, and for samples that are not finite.
        """
        drawn = [np.empty((0, *self.image_shape), np.uint8)]
        for _, images in self.generate(recipe, labels, seed=seed, batch_size=batch_size):
            drawn.append(images)
            if progress:
                progress.advance(len(images))
                progress.show(f"{progress.rate():.1f} images/s")
        return np.concatenate(drawn)

    def to_noise(self, recipe: Recipe, latents: np.ndarray, labels: Sequence[int]) -> np.ndarray:
        """The noise [N, H, W, C] float32 that the recipe's ODE takes to these latents, by running it in
        reverse.

        latents: normalised, float32; N a multiple of what the mesh cuts a batch into.
        Raises: UserError for a solver of an SDE.
        """
        self.check(recipe)
        e = self.experiment
        program = generate.Program.of(recipe, e.model, e.process, self.weak_model)
        check(hasattr(program.solver, "reverse"), "solver", recipe.solver, "one of an ODE, which runs both ways")
        program = dataclasses.replace(program, solver=dataclasses.replace(program.solver, reverse=True))
        rows, weak_params = batch_sharding(self.mesh), self.weak.params if program.weak else {}
        labels = self._checked(labels)
        noise, _ = generate.make_integrator(self.mesh, program)(
            self.params, weak_params, np.uint32(0), *(generate.on_devices(array, rows) for array in (
                np.arange(len(labels)), labels, np.asarray(latents, np.float32))), recipe.scales,
        )
        return np.asarray(noise)


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


def load(
    checkpoint: str | os.PathLike, *, ema: str = "", mesh: Mesh | None = None,
    autoencoder: str | os.PathLike | None = None, auto_checkpoint: str | os.PathLike | None = None,
) -> Pretrained:
    """The newest whole step under `checkpoint` (a workdir, its checkpoints, or one step), on any mesh.

    Only the EMA named by its decay is read ("" for the first). `autoencoder` is the directory of the
    decoder of a latent model, `auto_checkpoint` the weaker model of autoguidance. Raises: UserError for a
    missing, damaged or foreign checkpoint, or an EMA it does not have.
    """
    mesh = make_mesh() if mesh is None else mesh
    model = _load(checkpoint, ema, mesh)
    if autoencoder:
        found = decode.load_autoencoder(autoencoder, model.experiment.latents)
        model = dataclasses.replace(model, autoencoder=found)
    if auto_checkpoint:
        model = dataclasses.replace(model, weak=_load(auto_checkpoint, "", mesh))
    return model


def _of_this_machine(experiment: Experiment) -> Experiment:
    """Without the attention kernel that the machine of the training was asked for, which may not be here."""
    return dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, attention="auto"))


def _load(checkpoint: str | os.PathLike, ema: str, mesh: Mesh) -> Pretrained:
    directory, step = ckpt.find(checkpoint)
    chosen: dict[str, object] = {}

    def wanted(meta: dict) -> dict[str, object]:
        experiment = chosen["experiment"] = _of_this_machine(bind(Experiment, meta["config"]))
        name = chosen["ema"] = ema or experiment.ema.names[0]
        if name not in experiment.ema.names:
            raise UserError(f"ema={name!r} must be one of {', '.join(experiment.ema.names)}, the averages in "
                            f"{str(directory)!r}")
        return {f"ema_{name}": with_shardings(dit.shapes(experiment.model), mesh)}

    with ckpt.Checkpoints(directory, read_only=True) as reader:
        found = reader.restore_newest(wanted, step)
    if found is None:
        raise UserError(f"checkpoint={str(checkpoint)!r} must hold a saved step; give the --workdir of a run")
    items, meta = found
    item = f"ema_{chosen['ema']}"
    digest = hashlib.sha256(json.dumps(meta["arrays"][item], sort_keys=True).encode()).hexdigest()
    return Pretrained(chosen["experiment"], items[item], mesh, meta["step"], chosen["ema"], digest,
                      tuple(meta["labels"]))
