"""Initial weights of a new run: the network's own initialisation, or the EMA of another run."""

import jax
from jax.sharding import Mesh

from ig_jax.base.errors import check
from ig_jax.checkpoints import autoencoder as checkpoint
from ig_jax.config.experiment import Experiment, Trained
from ig_jax.data.spec import ENCODER
from ig_jax.diffusion.randomness import Purpose, address
from ig_jax.generation import pretrained
from ig_jax.models import autoencoder, dit, latents
from ig_jax.models.dit import DiTConfig
from ig_jax.parallel.sharding import replicated
from ig_jax.training.state import Params

# Settings that may differ from the checkpoint that a run resumes (ARITHMETIC) or starts from (FREE): they do not
# change the meaning of the weights.
ARITHMETIC = ("inter_head_init", "dtype", "scan_blocks", "remat", "attention")
FREE = ("inter_depth", "num_classes", *ARITHMETIC)
LABELS = "label_embed.table"


def starting_weights(experiment: Experiment, mesh: Mesh) -> Params:
    """The parameters that config.init gives this model, under its names; missing ones are initialised.

    A head keeps its weights if both models have one after the same block. Of another number of classes only the row of
    the null label is kept.
    Raises: UserError when the checkpoint is of another network, process or latent scaling.
    """
    if not experiment.init.checkpoint:
        return {}
    given = pretrained.load(experiment.init.checkpoint, ema=experiment.init.ema, mesh=mesh, autoencoder="")
    check_same_network(experiment, given.experiment, FREE, "config.init.checkpoint")
    weights = renamed_heads(given.params, given.experiment.model, experiment.model)
    fresh = [d for d in experiment.model.inter_depth if d not in given.experiment.model.inter_depth]
    classes, labels = experiment.model.num_classes, ""
    if classes != given.experiment.model.num_classes:
        weights[LABELS] = new_labels(weights[LABELS], experiment)
        labels = (
            f"; new label table for {classes} instead of {given.experiment.model.num_classes} classes, null row kept"
        )
    print(
        f"start       step {given.step} of {experiment.init.checkpoint}, EMA {given.ema}, "
        f"sha256 {given.digest[:12]}" + "".join(f"; new head after block {depth}" for depth in fresh) + labels
    )
    return weights


def encoder_weights(experiment: Experiment, mesh: Mesh) -> dict[str, Params]:
    """What a batch needs in addition to its arrays: the encoder's weights on every device, or nothing."""
    if not experiment.encodes:
        return {}
    params = checkpoint.load(experiment.run.autoencoder, replicated(mesh)).params
    return {ENCODER: autoencoder.of_encoder(params)}


def new_labels(table: jax.Array, experiment: Experiment) -> jax.Array:
    """The initialised label table of this model with the last row, that of the null label, of `table`."""
    key = address(experiment.seed, Purpose.INIT)
    return jax.jit(lambda old: dit.init(experiment.model, key)[LABELS].at[-1].set(old[-1]))(table)


def check_same_network(new: Experiment, old: Trained, free: tuple[str, ...], where: str) -> None:
    """Raise UserError naming the first setting, not in `free`, that gives the weights in `where` another meaning."""
    for name, value in vars(new.model).items():
        stored = getattr(old.model, name)
        check(name in free or value == stored, f"config.model.{name}", value, f"{stored!r}, as in {where}")
    for name in ("kind", "prediction"):  # the distribution of training times is free
        value, stored = getattr(new.process, name), getattr(old.process, name)
        check(value == stored, f"config.process.{name}", value, f"{stored!r}, as in {where}")
    latents.check_same(old.latents, new.latents)


def renamed_heads(params: Params, old: DiTConfig, new: DiTConfig) -> Params:
    """`params` of the model `old` under the names of `new`; heads that `new` lacks are dropped."""
    weights = {name: value for name, value in params.items() if not name.startswith("inter_heads.")}
    for index, depth in enumerate(new.inter_depth):
        if depth in old.inter_depth:
            prefix = f"inter_heads.{old.inter_depth.index(depth)}."
            kept = [name for name in params if name.startswith(prefix)]
            weights |= {f"inter_heads.{index}.{name.removeprefix(prefix)}": params[name] for name in kept}
    return weights
