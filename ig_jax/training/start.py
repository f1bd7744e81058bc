"""Where a new run gets its weights: from the network's initialisation, or from another run's average."""

from jax.sharding import Mesh

from ig_jax import pretrained
from ig_jax.config import Experiment
from ig_jax.errors import check
from ig_jax.models import latents
from ig_jax.models.dit import DiTConfig
from ig_jax.training.state import Params

# What may differ between a checkpoint and the run that goes on from it, or starts from it: the weights mean the same.
ARITHMETIC = ("inter_head_init", "dtype", "scan_blocks", "remat", "attention")
FREE = ("inter_depth", *ARITHMETIC)


def starting_weights(experiment: Experiment, mesh: Mesh) -> Params:
    """The parameters that config.init gives this model, under its names; what is missing starts fresh.

    A head keeps its weights when both models have one after the same block.
    Raises: UserError when the checkpoint is of another network, process or latent scaling.
    """
    if not experiment.init.checkpoint:
        return {}
    given = pretrained.load(experiment.init.checkpoint, ema=experiment.init.ema, mesh=mesh)
    check_same_network(experiment, given.experiment, FREE, "config.init.checkpoint")
    weights = renamed_heads(given.params, given.experiment.model, experiment.model)
    fresh = [d for d in experiment.model.inter_depth if d not in given.experiment.model.inter_depth]
    print(f"start       step {given.step} of {experiment.init.checkpoint}, EMA {given.ema}, "
          f"sha256 {given.digest[:12]}" + "".join(f"; new head after block {depth}" for depth in fresh))
    return weights


def check_same_network(new: Experiment, old: Experiment, free: tuple[str, ...], where: str) -> None:
    """Raise UserError naming the first setting that gives the weights `where` another meaning, of those not `free`."""
    for name, value in vars(new.model).items():
        stored = getattr(old.model, name)
        check(name in free or value == stored, f"config.model.{name}", value, f"{stored!r}, as in {where}")
    for name in ("kind", "prediction"):  # at which times a network is trained is free
        value, stored = getattr(new.process, name), getattr(old.process, name)
        check(value == stored, f"config.process.{name}", value, f"{stored!r}, as in {where}")
    latents.check_same(old.latents, new.latents)


def renamed_heads(params: Params, old: DiTConfig, new: DiTConfig) -> Params:
    """`params` of the model `old` under the names of `new`; heads that `new` lacks are left out."""
    weights = {name: value for name, value in params.items() if not name.startswith("inter_heads.")}
    for index, depth in enumerate(new.inter_depth):
        if depth in old.inter_depth:
            prefix = f"inter_heads.{old.inter_depth.index(depth)}."
            kept = [name for name in params if name.startswith(prefix)]
            weights |= {f"inter_heads.{index}.{name.removeprefix(prefix)}": params[name] for name in kept}
    return weights
