from ig_jax.config import shipped as configs
from ig_jax.diffusion.recipe import Recipe as Recipe
from ig_jax.generation.pretrained import Pretrained as Pretrained
from ig_jax.generation.pretrained import build as build
from ig_jax.generation.pretrained import load as load
from ig_jax.models.dit import DiTConfig as DiTConfig
from ig_jax.models.dit import DiTOutput as DiTOutput

__all__ = ["DiTConfig", "DiTOutput", "Pretrained", "Recipe", "build", "configs", "load"]
__version__: str
