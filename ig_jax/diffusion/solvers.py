"""Every solver by name."""

from ig_jax.diffusion import gaussian_samplers, samplers

SOLVERS: dict[str, type] = samplers.SOLVERS | gaussian_samplers.SOLVERS
