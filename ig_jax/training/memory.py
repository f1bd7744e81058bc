"""What the backward pass has to keep, and the remat policy that keeps as much as a device has room for."""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import Mesh

from ig_jax.models.dit import DiTConfig
from ig_jax.parallel.chips import chip_of
from ig_jax.parallel.mesh import batch_shards

def with_remat(model: DiTConfig, layout, mesh: Mesh, images: int) -> DiTConfig:
    return dataclasses.replace(model, remat="none") if model.remat == "auto" else model
