"""The loss of every head on images that are not trained on, with the same times and noise in every run."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ig_jax.base.errors import UserError
from ig_jax.config.experiment import Experiment
from ig_jax.data.sources import Source
from ig_jax.diffusion.loss import Objective
from ig_jax.parallel.sharding import from_local_rows, local_row_numbers, on_mesh, replicated
from ig_jax.training.hooks import Hook, Moment
from ig_jax.training.state import Params
from ig_jax.training.step import prepare

IMAGES = 1024  # at most, and at least one batch; they stay on the devices
SEED = 0  # of the images, their times and their noise, whatever the seed of the run: runs compare
FIX = "set data.test_split to a split that is not trained on (encode --split=validation makes one)"


def held_out(e: Experiment, mesh: Mesh, training: Source, encoder: dict[str, Params]) -> Hook:
    """The first average's losses on a fixed sample of data.test_split, in the records.

    It is the plain loss, without dropped labels and the accelerated target: what is compared is the network.
    encoder: what `prepare` needs beside the arrays of a batch.
    Raises: UserError without such a split.
    """
    split, size, ema = e.data.test_split, e.data.batch_size, e.ema.names[0]
    try:
        source = e.open_split(split)
    except UserError as error:
        problem = f"run.evaluate_every={e.run.evaluate_every} needs images to hold out: {error}"
        raise UserError(problem, name="run.evaluate_every", value=e.run.evaluate_every, fix=FIX) from error
    if source.spec.identity.replace(f":{split}", "") == training.spec.identity.replace(f":{e.data.split}", ""):
        raise UserError(name="data.test_split", value=split, expected="another part of the data than data.split")
    count = max(1, min(IMAGES, len(source)) // size)
    rows = np.resize(np.random.default_rng(SEED).permutation(len(source)), (count, size))
    own = local_row_numbers(mesh, size)
    batches = [
        {name: from_local_rows(part, mesh, size) for name, part in source.gather(chosen[own]).items()}
        for chosen in rows
    ]
    losses = _losses(e, mesh, source)

    def action(moment: Moment) -> None:
        average = moment.state.ema[ema]
        # One after another: reductions of several programs at once can wait for each other on the devices of a CPU.
        found = [jax.device_get(losses(average, batch | encoder, index)) for index, batch in enumerate(batches)]
        means = {f"held_out/{name}": float(np.mean([one[name] for one in found])) for name in found[0]}
        moment.records.write(moment.step, means)

    return Hook(e.run.evaluate_every, action, patience=10, spends="evaluation")


def _losses(e: Experiment, mesh: Mesh, source: Source) -> Callable[[Params, dict[str, Any], int], dict]:
    """The terms of the loss by name, of a batch whose noise belongs to its index."""
    plain = dataclasses.replace(e.loss, accelerate=False, label_drop=0.0)
    objective = Objective(dataclasses.replace(e.model, remat="none"), e.process, plain)

    def losses(params, batch, index):
        with on_mesh(mesh):
            noisy = objective.noised(prepare(source.spec, batch, SEED, index), batch["label"], SEED, index)
            terms = objective(params, params, noisy, jnp.int32(0))[1]
        return {name.removeprefix("loss/"): value for name, value in terms.items() if name.startswith("loss/")}

    return jax.jit(losses, out_shardings=replicated(mesh))
