"""Internal Guidance for Diffusion Transformers in JAX and Flax (arXiv 2512.24176)."""

__version__ = "0.1.0"
