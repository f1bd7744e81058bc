"""Published sampling recipes by name, with the FID they reached; intervals are in our clock.

All are for class-conditional ImageNet 256x256 and 50,000 samples of random classes. A LightningDiT interval
that begins at its time 0.19 ends at sigma 0.81 here, and its 125 grid points are 124 steps.
"""

import dataclasses
from typing import TYPE_CHECKING

from ig_jax.errors import check
from ig_jax.models.dit_config import DiTConfig

if TYPE_CHECKING:
    from ig_jax.generation.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Preset:
    """A recipe by its fields (those left out are off), the family it is for, and what it gave."""

    family: str
    recipe: dict
    fid: float
    source: str


_SIT = dict(solver="sde", steps=250)
_LIGHTNINGDIT = dict(solver="trapezoid", steps=124, shift=0.3)

PRESETS: dict[str, Preset] = {
    "sit": Preset("sit", _SIT | dict(diffusion_form="sigma"), 8.3, "SiT-XL/2, 7M steps: arXiv 2401.08740"),
    # The paper names no w for XL without CFG; this is the one that its release script uses.
    "sit-xl-ig": Preset("sit", _SIT | dict(ig_scale=1.4), 1.75, "SiT-XL/2 + IG, 800 epochs: arXiv 2512.24176"),
    "sit-xl-ig-cfg": Preset(
        "sit", _SIT | dict(ig_scale=1.4, cfg_scale=1.35, cfg_interval=(0.0, 0.7)), 1.46,
        "SiT-XL/2 + IG + CFG, 800 epochs: arXiv 2512.24176; CVL-UESTC/Internal-Guidance SiT/gen.sh",
    ),
    "lightningdit": Preset(
        "lightningdit", dict(solver="euler", steps=249, shift=0.3), 2.17,
        "LightningDiT-XL/1, 800 epochs, no guidance: arXiv 2501.01423",
    ),
    "lightningdit-ig": Preset(
        "lightningdit", _LIGHTNINGDIT | dict(ig_scale=1.7), 1.34,
        "LightningDiT-XL/1 + IG, 680 epochs: arXiv 2512.24176",
    ),
    "lightningdit-ig-cfg": Preset(
        "lightningdit", _LIGHTNINGDIT | dict(ig_scale=1.4, cfg_scale=1.45, cfg_interval=(0.0, 0.81)), 1.19,
        "LightningDiT-XL/1 + IG + CFG, 680 epochs: arXiv 2512.24176; CVL-UESTC/Internal-Guidance",
    ),
    "dit": Preset("dit", dict(solver="ddpm", steps=250), 9.62, "DiT-XL/2, 7M steps: arXiv 2212.09748"),
}
PLAIN = dict(ig_scale=1.0, cfg_scale=1.0, ig_interval=(0.0, 1.0), cfg_interval=(0.0, 1.0))


def family_of(model: DiTConfig) -> str:
    """Which published family a network belongs to, by what no size changes."""
    if model.norm == "rmsnorm" and model.rope:
        return "lightningdit"
    return "dit" if model.sigma_channels == "variance" else "sit"


def preset(name: str, model: DiTConfig) -> "Recipe":
    """The recipe of a preset.  Raises: UserError for an unknown name or a model of another family."""
    from ig_jax.generation.recipe import (
        Recipe,  # late: brings JAX, and `convert` reads these recipes before that
    )

    check(name in PRESETS, "preset", name, f"one of {', '.join(PRESETS)}")
    chosen, family = PRESETS[name], family_of(model)
    check(chosen.family == family, "preset", name, f"one for {family}, the family of this checkpoint",
          f"those are {', '.join(key for key, value in PRESETS.items() if value.family == family)}")
    return Recipe(**(PLAIN | chosen.recipe))
