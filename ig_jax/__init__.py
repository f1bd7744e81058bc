"""Internal Guidance for Diffusion Transformers in JAX and Flax (arXiv 2512.24176).

    import ig_jax
    model = ig_jax.load("runs/digits")
    images = model.sample([0, 1, 2, 3], ig_scale=2.0)

`python -m ig_jax` lists the commands. What stands here is imported at its first use;
__init__.pyi tells editors and type checkers of it.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["DiTConfig", "DiTOutput", "Pretrained", "Recipe", "build", "configs", "load"]

_HOMES = {
    "DiTConfig": "models.dit",
    "DiTOutput": "models.dit",
    "Pretrained": "generation.pretrained",
    "Recipe": "diffusion.recipe",
    "build": "generation.pretrained",
    "load": "generation.pretrained",
}


def __getattr__(name: str) -> Any:
    if name == "configs":
        return importlib.import_module("ig_jax.config.shipped")
    if name not in _HOMES:
        raise AttributeError(f"module 'ig_jax' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"ig_jax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
