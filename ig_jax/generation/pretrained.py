"""A trained model from its checkpoint directory alone, on one device or a mesh.

Example:

    model = pretrained.load("runs/digits")
    images = model.sample([0, 1, 2, 3], ig_scale=2.0)  # uint8 (4, H, W, C)
    out = model(model.latents([0, 1]), t=0.5, y=3)  # out.final, out.intermediate
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ig_jax.base.errors import check
from ig_jax.base.files import local_path
from ig_jax.base.progress import LINE, Progress
from ig_jax.base.schema import bind
from ig_jax.base.versions import versions
from ig_jax.checkpoints import steps as ckpt
from ig_jax.config import published, stored
from ig_jax.config.experiment import Experiment, Trained
from ig_jax.diffusion import paths
from ig_jax.diffusion.integration import FixedGrid
from ig_jax.diffusion.recipe import Recipe
from ig_jax.generation import decode, likelihood, sampler, trajectories
from ig_jax.generation.captions import strength
from ig_jax.models import dit
from ig_jax.optim.ema import EmaConfig
from ig_jax.parallel import processes
from ig_jax.parallel.mesh import make_mesh
from ig_jax.parallel.sharding import batch_sharding, tree_shardings, with_shardings

RAW = "raw"  # the name of the weights themselves among the averages
PREDICTIONS = ("velocity", "data", "noise")


@dataclasses.dataclass(frozen=True, repr=False)
class Pretrained:
    """A network with its weights, and everything needed to sample from it.

    Attributes:
        experiment: the network, its process, averages and recipe.
        params: float32 arrays by their names.
        mesh: devices that hold them.
        step: of the checkpoint.
        ema: which average, by its decay, or RAW.
        digest: sha256 over the digests of all arrays, stored with every result.
        class_names: one for each class.
        autoencoder: decodes the latents; None for a model of pixels, or where none was given.
        second: the weaker checkpoint of autoguidance.
        encoder: digest of the autoencoder that encoded its images in the step, "" for another model.
        config: all settings stored with the weights, those of its training too, in sections.
    """

    experiment: Trained
    params: dict[str, jax.Array]
    mesh: Mesh
    step: int
    ema: str
    digest: str
    class_names: tuple[str, ...]
    autoencoder: decode.Autoencoder | None = None
    second: "Pretrained | None" = None
    encoder: str = ""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in self.params.values())
        return f"Pretrained({self.experiment.name}, step {self.step}, EMA {self.ema}, {count:,} parameters)"

    def __call__(self, x: jax.Array, t: Any, y: Any, predict: str = "velocity") -> dit.DiTOutput:
        """Both predictions at latents x (B, H, W, C) float32, sigma-times t and labels y, each one or (B,).

        predict: "velocity" (dx/dt, towards the noise), "data" or "noise"; a model of DiT's chain predicts noise alone.
        May be traced: by jit, grad, vmap, jvp.  Raises: UserError that names x, t or y.
        """
        e, count = self.experiment, jnp.shape(x)[:1]
        native = ("noise",) if e.process.chain else PREDICTIONS
        check(predict in native, "predict", predict, f"one of {', '.join(native)} for this model")
        x, t, y = jnp.asarray(x, jnp.float32), jnp.asarray(t, jnp.float32), jnp.asarray(y)
        t, y = (jnp.broadcast_to(value, count) if value.ndim == 0 else value for value in (t, y))
        if not isinstance(y, jax.core.Tracer) and jnp.issubdtype(y.dtype, jnp.integer):
            self._checked(np.asarray(y).ravel(), "y")
        dit.check_inputs(e.model, x, t, y)
        out = sampler.Program.of(self.recipe, e.model, e.process).network(e.model, self.params)(x, t, y)
        if predict == native[0]:
            return out
        return jax.tree.map(lambda head: paths.convert(e.process.kind, "velocity", predict, head, x, t), out)

    @property
    def recipe(self) -> Recipe:
        """The recipe of the config in the checkpoint."""
        return self.experiment.sample

    @property
    def second_model(self) -> dit.DiTConfig | None:
        """The network of the second checkpoint."""
        return self.second.experiment.model if self.second else None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images."""
        model = self.experiment.model
        return decode.image_shape((model.input_size, model.input_size, model.channels), self.autoencoder)

    @functools.cached_property
    def decode(self) -> Callable[[jax.Array], jax.Array]:
        """Latents (B, h, w, c) float32 -> images uint8 (B, H, W, C).  Raises: UserError without its autoencoder."""
        return decode.make_decoder(self.mesh, self.experiment.latents, self.autoencoder)

    def to_images(self, latents: np.ndarray) -> np.ndarray:
        """Images uint8 (N, H, W, C) of any number of latents (N, h, w, c) float32 on the host."""
        rows = self._rows(len(latents))
        return np.asarray(self.decode(sampler.on_devices(latents[rows], batch_sharding(self.mesh))))[: len(latents)]

    def class_name(self, label: int) -> str:
        """The name of a class; the null label has none."""
        return self.class_names[label] if label < len(self.class_names) else "no class"

    def check(self, recipe: Recipe) -> None:
        """Raise UserError when the recipe does not fit this model."""
        recipe.check_model(self.experiment.model, self.second_model)
        if self.second is not None:
            process, other = self.experiment.process, self.second.experiment.process
            expected = f"that of the checkpoint, {vars(process)}"
            check(other == process, "auto_checkpoint process", vars(other), expected)

    def check_images(self) -> None:
        """Raise UserError when the latents cannot be decoded, or their images cannot be written."""
        decode.check_decodable(self.experiment.latents, self.autoencoder)
        decode.check_drawable(self.image_shape[-1], "images", "sample with --save=latents")

    def program(self, recipe: Recipe) -> sampler.Program:
        """The program that samples by a recipe.  Raises: UserError when it does not fit this model."""
        self.check(recipe)
        return sampler.Program.of(recipe, self.experiment.model, self.experiment.process, self.second_model)

    def _second_params(self, program: sampler.Program) -> dict[str, jax.Array]:
        return self.second.params if self.second and program.second else {}

    def batches(
        self,
        recipe: Recipe,
        labels: Sequence[int],
        *,
        seed: int = 0,
        batch_size: int = 64,
        indices: np.ndarray | None = None,
    ) -> Iterator[sampler.Batch]:
        """Batches of latents of the samples `indices` (by default 0, 1, ...), one for each label."""
        program = self.program(recipe)
        check(0 <= seed < 2**31, "seed", seed, "in [0, 2^31)")
        check(batch_size >= 1, "batch_size", batch_size, "at least 1 image")
        classes = self._checked(labels)
        return sampler.sample_latents(
            program,
            self.params,
            self._second_params(program),
            recipe.scales,
            mesh=self.mesh,
            seed=seed,
            labels=classes,
            indices=np.arange(len(classes)) if indices is None else indices,
            batch_size=batch_size,
        )

    def _checked(self, labels: Sequence[int] | np.ndarray, name: str = "labels") -> np.ndarray:
        found, null = np.asarray(labels), self.experiment.model.num_classes
        whole = found.ndim == 1 and (np.issubdtype(found.dtype, np.integer) or not found.size)
        check(whole, name, found.tolist(), "a list of whole numbers")
        outside = found[(found < 0) | (found > null)].tolist()
        check(not outside, name, outside, f"classes in 0..{null - 1}, or {null} for none")
        return found.astype(np.int32)

    def decoded(self, recipe: Recipe, labels: Sequence[int], **asked: Any) -> Iterator[tuple[np.ndarray, jax.Array]]:
        """Batches (indices (b,), images uint8 (B, H, W, C) on the devices, B >= b); `asked` as `batches`.

        Raises: UserError as `batches`, and for samples that are not finite.
        """
        for batch in self.batches(recipe, labels, **asked):
            sampler.check_finite(sampler.local_rows(batch.latents, len(batch.indices))[1], recipe)
            yield batch.indices, self.decode(batch.latents)

    def images(
        self,
        recipe: Recipe,
        labels: Sequence[int],
        *,
        seed: int = 0,
        batch_size: int = 64,
        progress: Progress | None = None,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batches (indices (b,), images uint8 (b, H, W, C)), on every process, counted by `progress`.

        Raises: UserError for labels, a seed or a batch size out of range, and for samples that are not finite.
        """
        for indices, images in self.decoded(recipe, labels, seed=seed, batch_size=batch_size):
            yield indices, processes.whole(images)[: len(indices)]
            if progress and processes.is_first():
                progress.advance(len(indices))
                progress.show(every=LINE)

    def sample(
        self,
        labels: Sequence[int],
        recipe: Recipe | None = None,
        *,
        seed: int = 0,
        batch_size: int = 64,
        progress: Progress | None = None,
        **changes: Any,
    ) -> np.ndarray:
        """Images uint8 (N, H, W, C), one for each label, by the recipe of the checkpoint or another.

        changes: of the recipe, such as ig_scale=2.0.  Raises: as `images`, and UserError for a change it does not have.
        """
        recipe = self._changed(recipe, changes)
        batches = self.images(recipe, labels, seed=seed, batch_size=batch_size, progress=progress)
        return np.concatenate([np.empty((0, *self.image_shape), np.uint8), *(sampled for _, sampled in batches)])

    def latents(
        self,
        labels: Sequence[int],
        recipe: Recipe | None = None,
        *,
        noise: np.ndarray | None = None,
        seed: int = 0,
        batch_size: int = 64,
        **changes: Any,
    ) -> np.ndarray:
        """Normalised latents float32 (N, h, w, c), one for each label; recipe, seed and changes as `sample`.

        noise: what to start from, (N, h, w, c), all at once, instead of the noise of the seed.
        """
        recipe = self._changed(recipe, changes)
        if noise is not None:
            program = self.program(recipe)
            integrate = sampler.make_sampler(self.mesh, program, given=True)
            return self._run(integrate, recipe, program, "noise", noise, labels, seed)[0]
        found = self.batches(recipe, labels, seed=seed, batch_size=batch_size)
        return np.concatenate([np.asarray(batch.latents)[: len(batch.indices)] for batch in found])

    def trajectory(
        self, labels: Sequence[int], recipe: Recipe | None = None, *, seed: int = 0, **changes: Any
    ) -> trajectories.Trajectory:
        """The latents before every step, and what both heads denoise them to; one program."""
        recipe = self._changed(recipe, changes)
        return trajectories.follow(self.program(recipe), self.params, recipe.scales, self._checked(labels), seed)

    def _changed(self, recipe: Recipe | None, changes: dict[str, Any]) -> Recipe:
        return (recipe or self.recipe).replace(**changes)

    def save(self, directory: str | os.PathLike) -> None:
        """A checkpoint that `load` and every command read; its weights become the only average.

        Raises: UserError when it cannot be written.
        """
        decay = 0.0 if self.ema == RAW else float(self.ema)  # an average of decay 0 is the weights themselves
        e = dataclasses.replace(self.experiment, ema=EmaConfig((decay,), warmup=False))
        meta: dict[str, Any] = {
            "config": self.config | e.as_dict(),
            "data": {},
            "labels": list(self.class_names),
            "versions": versions(),
            "devices": jax.device_count(),
        }
        items = {f"ema_{e.ema.names[0]}": self.params}
        ckpt.write_step(local_path(directory, "directory") / "checkpoints", self.step, items, meta)

    def metadata(self, recipe: Recipe, **asked: Any) -> dict:
        """The metadata of samples as JSON: what decides them, with what was `asked` for, and how they are made."""
        e, keeps_latents = self.experiment, asked.get("save") == ["latents"]
        second = self.second if self.program(recipe).second else None
        found = asked | {
            "checkpoint": self._identity(),
            "second": second._identity() if second else None,
            "autoencoder": self.autoencoder.digest if self.autoencoder and not keeps_latents else None,
            "recipe": recipe.flat(),
            "grid": recipe.grid(e.process.kind),
            "evaluations_per_image": recipe.evaluations_per_image(e.process.kind, e.model, self.second_model),
            "latents": dataclasses.asdict(e.latents),
            "versions": versions(),
            "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
            "processes": jax.process_count(),
            "finished": None,
        }
        return json.loads(json.dumps(found))

    def _identity(self) -> dict:
        return {"digest": self.digest, "step": self.step, "ema": self.ema, "experiment": self.experiment.name}

    def summary(self, recipe: Recipe) -> str:
        """Checkpoint, devices, solver and guidance, in a few lines."""
        e = self.experiment
        count = recipe.evaluations_per_image(e.process.kind, e.model, self.second_model)
        cost = f"{count:g} evaluations per image" if count else "as many evaluations as the tolerance takes"
        lines = [
            f"checkpoint  step {self.step}, EMA {self.ema}, sha256 {self.digest[:12]}",
            f"devices     {jax.device_count()} x {jax.devices()[0].device_kind}, {jax.process_count()} process(es)",
            f"solver      {recipe.solver.name}, {recipe.steps} steps, {cost}",
        ]
        for name, rule in recipe.rules.items():
            if not rule.off:
                lines.append(f"{name:<11} {strength(rule)}")
        return "\n".join(lines)

    def to_noise(self, recipe: Recipe, latents: np.ndarray, labels: Sequence[int]) -> np.ndarray:
        """The noise (N, H, W, C) float32 that the recipe's ODE takes to these latents, by running it in reverse.

        latents: normalised, float32.
        Raises: UserError for a solver of an SDE.
        """
        check(recipe.solver.reversible, "solver", recipe.solver.name, "one of an ODE, which runs both ways")
        program = dataclasses.replace(self.program(recipe), reverse=True)
        integrate = sampler.make_sampler(self.mesh, program, given=True)
        return self._run(integrate, recipe, program, "latents", latents, labels)[0]

    def log_likelihood(
        self,
        x: np.ndarray,
        y: int | Sequence[int],
        *,
        probes: int = 1,
        solver: str = "trapezoid",
        steps: int = 50,
        seed: int = 0,
        **guidance: Any,
    ) -> likelihood.Likelihood:
        """Log-densities of normalised latents x (N, h, w, c) under the ODE of labels y, N or one for all; all at once.

        probes: random directions along which the divergence is measured, whose mean over probes and seeds is exact (the
        noise of one has the size of the Jacobian); 0 for all directions, h w c times the work. solver: of the ODE, on a
        fixed grid. guidance: none, or such as ig_scale=2.0, whose flow has a density too.
        Raises: UserError for another solver, and for shapes and labels that do not fit.
        """
        check(probes >= 0, "probes", probes, "at least 1, or 0 for the exact divergence")
        recipe, labels = Recipe.of({"solver": solver, "steps": steps} | guidance), np.broadcast_to(y, len(x))
        fits = isinstance(recipe.solver, FixedGrid) and recipe.solver.reversible
        check(fits, "solver", solver, "one of an ODE on a fixed grid, such as trapezoid")
        program, e = self.program(recipe), self.experiment
        run = likelihood.make(self.mesh, program, probes)
        nats, noise = self._run(run, recipe, program, "x", x, labels, seed)
        level = np.log2(127.5) if e.latents.name == "pixels" else 0.0  # from_uint8 divides levels by 127.5
        return likelihood.Likelihood(nats, level - nats / (np.log(2) * math.prod(program.shape)), noise)

    def _run(
        self,
        compiled: Callable[..., tuple],
        recipe: Recipe,
        program: sampler.Program,
        name: str,
        start: np.ndarray,
        labels: Sequence[int] | np.ndarray,
        seed: int = 0,
    ) -> list[np.ndarray]:
        """What the compiled program makes of `start` (N, h, w, c), which the caller knows under `name`."""
        start, wanted = np.asarray(start, np.float32), (len(labels), *program.shape)
        check(start.shape == wanted, name, start.shape, f"of the shape {wanted}")
        rows, placed = self._rows(len(labels)), batch_sharding(self.mesh)
        arrays = rows, self._checked(labels)[rows], start[rows]
        indices, classes, x = (sampler.on_devices(array, placed) for array in arrays)
        weights = self.params, self._second_params(program)
        found = compiled(*weights, np.uint32(seed), indices, classes, recipe.scales, x)
        return [np.asarray(array)[: len(labels)] for array in found]

    def _rows(self, count: int) -> np.ndarray:
        """The rows 0 .. count - 1, the last one repeated until the devices divide them."""
        return np.minimum(np.arange(sampler.padded(count, self.mesh)), count - 1)


def load(
    checkpoint: str | os.PathLike,
    *,
    weights: str = "ema",
    ema: str = "",
    mesh: Mesh | None = None,
    autoencoder: str | os.PathLike | None = None,
    auto_checkpoint: str | os.PathLike | None = None,
) -> Pretrained:
    """The newest complete step under `checkpoint` (a work directory, its checkpoints, or one step), on any mesh.

    weights: "ema", of which only the one named by its decay is read ("" for the first), or "raw". `autoencoder` is the
    directory of a latent model's decoder, by default that which encoded its images in the step, if it is there, "" for
    none; `auto_checkpoint` is the weaker model of autoguidance.
    Raises: UserError for a missing, damaged or foreign checkpoint, or an EMA it does not have.
    """
    check(weights in ("ema", RAW), "weights", weights, f"ema or {RAW}")
    check(weights == "ema" or not ema, "ema", ema, f"left out with weights={RAW!r}")
    mesh = make_mesh() if mesh is None else mesh
    model = _load(checkpoint, RAW if weights == RAW else ema, mesh)
    own = model.config.get("run", {}).get("autoencoder", "")
    given = own if autoencoder is None and model.encoder else autoencoder
    if given and (autoencoder or local_path(given, "autoencoder").is_dir()):
        found = decode.load_autoencoder(given, model.experiment.latents)
        expected = f"the one that encoded its images in training, {model.encoder[:12]}"
        check(model.encoder in ("", found.digest), "autoencoder", str(given), expected)
        model = dataclasses.replace(model, autoencoder=found)
    if auto_checkpoint:
        model = dataclasses.replace(model, second=_load(auto_checkpoint, "", mesh))
    return model


def _load(checkpoint: str | os.PathLike, ema: str, mesh: Mesh) -> Pretrained:
    chosen: dict[str, Any] = {}

    def wanted(meta: dict) -> dict[str, object]:
        e = stored.network(meta, checkpoint)
        # This machine may not have the attention kernel that the model was trained with.
        e = chosen["experiment"] = dataclasses.replace(e, model=dataclasses.replace(e.model, attention="auto"))
        name, names = ema or e.ema.names[0], e.ema.names
        check(name in (*names, RAW), "ema", name, f"one of {', '.join(names)}, the averages in {str(checkpoint)!r}")
        chosen["ema"] = name
        return {_item(name): with_shardings(dit.shapes(e.model), mesh)}

    items, meta = ckpt.open_newest(checkpoint, wanted)
    item = _item(chosen["ema"])
    digest = hashlib.sha256(json.dumps(meta["arrays"][item], sort_keys=True).encode()).hexdigest()
    labels, encoder = tuple(meta["labels"]), meta.get("data", {}).get("encoder", "").split(" ")[0]
    found = items[item], mesh, meta["step"], chosen["ema"], digest, labels
    return Pretrained(chosen["experiment"], *found, encoder=encoder, config=meta["config"])


def _item(ema: str) -> str:
    """The part of a checkpoint that holds an average, or the weights."""
    return "params" if ema == RAW else f"ema_{ema}"


def build(
    name: str, *, key: jax.Array, pixels: int = 256, head: bool = True, mesh: Mesh | None = None, **model: Any
) -> Pretrained:
    """A published network, such as "SiT-S/2", with newly initialised weights and the settings of its paper.

    pixels: of the images it is for; head: with an intermediate head; model: other values of DiTConfig, such as
    num_classes=10.  Raises: UserError for an unknown name, size or value.
    """
    sections = published.settings(name, pixels=pixels, head=head)
    e = bind(Experiment, sections | {"model": sections["model"] | model})
    mesh = make_mesh() if mesh is None else mesh
    new = jax.jit(functools.partial(dit.init, e.model), out_shardings=tree_shardings(dit.shapes(e.model), mesh))
    classes = tuple(map(str, range(e.model.num_classes)))
    return Pretrained(e, new(key), mesh, 0, e.ema.names[0], "", classes, config=e.as_dict())
