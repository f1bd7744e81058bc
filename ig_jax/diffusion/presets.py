"""Published sampling recipes by name, with the FID they reached; intervals are in our clock.

All are for class-conditional ImageNet 256x256 and 50,000 samples of random classes. A LightningDiT interval
that begins at its time 0.19 ends at sigma 0.81 here, and its 125 grid points are 124 steps.
"""

import dataclasses

from ig_jax.base.errors import check
from ig_jax.diffusion.recipe import Recipe
from ig_jax.models.dit import DiTConfig


@dataclasses.dataclass(frozen=True)
class Preset:
    """A recipe in its flat form, the family it is for, and the FID it reached."""

    family: str
    recipe: dict
    fid: float
    source: str
    weights: str = ""  # where the published network lies, as `convert --from` takes it; "" where there is none

    def summary(self, name: str) -> str:
        """One line on the published result and the weights that reached it."""
        weights = f"; weights {self.weights}" if self.weights else ""
        return f"preset      {name}: FID {self.fid} published, {self.source}{weights}"


# The published autoencoder of latents by the name of their scaling, and the statistics that VA-VAE's need.
AUTOENCODERS = {
    "sd_vae": "hf:stabilityai/sd-vae-ft-ema/diffusion_pytorch_model.safetensors",
    "va_vae_f16d32": "hf:hustvl/vavae-imagenet256-f16d32-dinov2/vavae-imagenet256-f16d32-dinov2.pt",
}
VA_VAE_STATS = "hf:hustvl/vavae-imagenet256-f16d32-dinov2/latents_stats.pt"
# The folders of the release, each with one weight file, and files of the plain networks.
_SIT_IG, _LIGHTNINGDIT_IG = (f"hf:CVLUESTC/Internal-Guidance/{folder}" for folder in ("SiT", "Lightningdit"))
_SIT_FILE = "hf:nyu-visionx/SiT-collections/SiT-XL-2-256.pt"
_LIGHTNINGDIT_FILE = "hf:hustvl/lightningdit-xl-imagenet256-800ep/lightningdit-xl-imagenet256-800ep.pt"

_IG = "arXiv 2512.24176"
_CODE = f"{_IG}, CVL-UESTC/Internal-Guidance"
_SIT = dict(solver="sde", steps=250)
_SIT_B_IG = _SIT | dict(ig_scale=2.3, ig_interval=(0.3, 1.0))
_SIT_CFG = _SIT | dict(ig_scale=1.4, cfg_scale=1.35, cfg_interval=(0.0, 0.7))
_PLAIN = dict(solver="euler", steps=249, shift=0.3)
_HEUN = dict(solver="trapezoid", steps=124, shift=0.3)
_HEUN_CFG = _HEUN | dict(ig_scale=1.4, cfg_scale=1.45, cfg_interval=(0.0, 0.81))

# The paper names no w for SiT-XL/2 without CFG; 1.4 is what its release script uses.
PRESETS = {
    "sit": Preset("sit", _SIT | dict(diffusion_form="sigma"), 8.3, "SiT-XL/2, 7M steps: arXiv 2401.08740", _SIT_FILE),
    "sit-b-ig": Preset("sit", _SIT_B_IG, 16.19, f"SiT-B/2 + IG on high and middle noise, 80 epochs: {_IG}"),
    "sit-xl-ig": Preset("sit", _SIT | dict(ig_scale=1.4), 1.75, f"SiT-XL/2 + IG, 800 epochs: {_IG}", _SIT_IG),
    "sit-xl-ig-cfg": Preset("sit", _SIT_CFG, 1.46, f"SiT-XL/2 + IG + CFG, 800 epochs: {_CODE}", _SIT_IG),
    "lightningdit": Preset(
        "lightningdit", _PLAIN, 2.17, "LightningDiT-XL/1, 800 epochs: arXiv 2501.01423", _LIGHTNINGDIT_FILE
    ),
    "lightningdit-ig": Preset(
        "lightningdit", _HEUN | dict(ig_scale=1.7), 1.34, f"LightningDiT-XL/1 + IG, 680 epochs: {_IG}", _LIGHTNINGDIT_IG
    ),
    "lightningdit-ig-cfg": Preset(
        "lightningdit", _HEUN_CFG, 1.19, f"LightningDiT-XL/1 + IG + CFG, 680 epochs: {_CODE}", _LIGHTNINGDIT_IG
    ),
    "dit": Preset(
        "dit", dict(solver="ddpm", steps=250), 9.62, "DiT-XL/2, 7M steps: arXiv 2212.09748", "hf:facebook/DiT-XL-2-256"
    ),
}


def family_of(model: DiTConfig) -> str:
    """The published family of a network, recognised by what its sizes share."""
    if model.norm == "rmsnorm" and model.rope:
        return "lightningdit"
    return "dit" if model.sigma_channels == "variance" else "sit"


def preset(name: str, model: DiTConfig) -> Recipe:
    """The recipe of a preset.  Raises: UserError for an unknown name or a model of another family."""
    check(name in PRESETS, "preset", name, f"one of {', '.join(PRESETS)}")
    chosen, family = PRESETS[name], family_of(model)
    fitting = ", ".join(key for key, value in PRESETS.items() if value.family == family)
    expected = f"one for {family}, the family of this checkpoint"
    check(chosen.family == family, "preset", name, expected, f"those are {fitting}")
    return Recipe.of(chosen.recipe)
