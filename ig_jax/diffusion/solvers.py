"""Every solver by name."""

from ig_jax.diffusion import adaptive, gaussian_samplers, samplers
from ig_jax.diffusion.integration import SOLVERS

MODULES = (samplers, adaptive, gaussian_samplers)  # importing them registers their solvers

__all__ = ["MODULES", "SOLVERS"]
