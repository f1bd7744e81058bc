"""Rematerialisation and micro-batches that make a train step fit into device memory.

remat="auto" and accumulate=-1 leave both to the machine, so that one config runs on a slice with 16 GB per chip and
on a GPU with 141 GB. Only rounding depends on the choice.
"""

import dataclasses
import itertools
import math

import jax
import numpy as np
from jax.sharding import Mesh

from ig_jax.models import kernels
from ig_jax.models.dit import DiTConfig
from ig_jax.parallel.hardware import usable_memory
from ig_jax.parallel.mesh import batch_shards
from ig_jax.parallel.sharding import platform_of

# Bytes of one block's activations per token and unit of width: those kept until the backward pass, and those that one
# block needs in addition while it runs. Attention scores are counted separately. Measured on SiT-XL/2 in bfloat16, as
# compiled (2026-11-25): with 4 and 8 blocks for v5p; for H200 the larger of that and the whole network with 256 images.
KEPT = {"tpu": {"none": 34, "dots": 40, "full": 4}, "cuda": {"none": 58, "dots": 38, "full": 20}}
WORKING = {"none": 40, "dots": 40, "full": 85}
WHOLE = 8  # bytes per parameter during a step, however it is sharded: a gathered copy and a gradient to be summed
SCORES = 6  # bytes of one attention score in float32 and bfloat16, where XLA's kernel keeps them
MARGIN = 0.9  # of the memory, since this only estimates what the compiler will use
SMALLEST_MICRO_BATCH = 16  # images per device, below which matrix products no longer fill a chip


@dataclasses.dataclass(frozen=True)
class Fit:
    """The choice: a remat policy and a number of micro-batches."""

    remat: str
    accumulate: int


def fitted(model: DiTConfig, accumulate: int, layout, inputs, mesh: Mesh, batch: int) -> Fit:
    """The fastest choice that fits, among those that the config leaves open; the smallest one where none fits.

    layout, inputs: the state, and a batch with its encoder, as ShapeDtypeStruct with shardings; batch: images per step.
    Encoding comes before the network and keeps less: it takes few images at a time. Hardware that is not in
    parallel/hardware.py, CPUs included, recomputes nothing.
    """
    limit = usable_memory(mesh.devices.flat[0])
    if limit is None:
        return Fit("none" if model.remat == "auto" else model.remat, max(accumulate, 1))
    choices = list(_choices(model, accumulate, max(batch // batch_shards(mesh), 1)))
    state = device_bytes((layout, inputs)) + WHOLE * sum(math.prod(leaf.shape) for leaf in layout.params.values())
    for choice, images in choices:
        if state + activation_bytes(dataclasses.replace(model, remat=choice.remat), images, mesh) < MARGIN * limit:
            return choice
    return choices[-1][0]


def _choices(model: DiTConfig, accumulate: int, local: int):
    """(choice, images of one micro-batch on a device), from the fastest to the smallest."""
    micro_batches = (
        [accumulate]
        if accumulate > 0
        else [n for n in range(1, local + 1) if local % n == 0 and (n == 1 or local // n >= SMALLEST_MICRO_BATCH)]
    )
    open_remats = [("none", "dots"), ("full",)] if model.remat == "auto" else [(model.remat,)]
    for remats in open_remats:
        for n, remat in itertools.product(micro_batches, remats):
            yield Fit(remat, n), local // n


def activation_bytes(model: DiTConfig, images: int, mesh: Mesh) -> int:
    """Estimated bytes on a device, in addition to the state, for a micro-batch of `images`."""
    tokens, platform = model.side**2, platform_of(mesh.devices.flat[0])
    kept = tokens * model.width * KEPT.get(platform, KEPT["cuda"])[model.remat]
    working = tokens * model.width * WORKING[model.remat]
    kernel = kernels.attention_kernel(
        model.attention, platform=platform, dtype=model.dtype, head_dim=model.width // model.num_heads
    )
    scores = 0 if kernel == "cudnn" else SCORES * model.num_heads * tokens**2
    kept, working = kept + (scores if model.remat == "none" else 0), working + scores
    return images * (model.depth * kept + working)


def device_bytes(layout) -> int:
    """Bytes on one device of arrays laid out as ShapeDtypeStruct with shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(layout)
    )
