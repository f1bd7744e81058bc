"""The experiment that stands in a converted checkpoint: the network as read, the rest as its paper had it.

A sampler reads model, latents, process and sample; the other sections are valid settings to train on from.
"""

import dataclasses

from ig_jax.generation.presets import PLAIN, PRESETS
from ig_jax.interop.claims import Claims
from ig_jax.models.autoencoder_config import SD_VAE, VA_VAE
from ig_jax.models.dit_config import DiTConfig

ARITHMETIC = dict(dtype="float32", scan_blocks=False, remat="none")  # that of the published numbers

# How each family is sampled, by (family, whether it has an intermediate head): the preset of its paper, with
# guidance where that has none.
_PUBLISHED = {name: preset.recipe for name, preset in PRESETS.items()}
_RECIPES = {
    ("sit", True): _PUBLISHED["sit-xl-ig-cfg"],
    ("sit", False): _PUBLISHED["sit"] | dict(cfg_scale=1.5),
    ("lightningdit", True): _PUBLISHED["lightningdit-ig-cfg"],
    ("lightningdit", False): _PUBLISHED["lightningdit"] | dict(cfg_scale=1.45, cfg_interval=(0.0, 0.81)),
    ("dit", True): _PUBLISHED["dit"] | dict(ig_scale=1.4, cfg_scale=1.5),
    ("dit", False): _PUBLISHED["dit"] | dict(cfg_scale=1.5),
}
# SiT narrower than XL: the paper has IG alone, on high and middle noise (FID 16.19 of SiT-B/2 at 80 epochs).
_SMALL_SIT = dict(solver="sde", steps=250, ig_scale=2.3, ig_interval=(0.3, 1.0))
_XL_WIDTH = 1152


def experiment(
    name: str, family: str, model: DiTConfig, latents: dict, claims: Claims, ema_decay: float
) -> dict:
    """The config of a converted checkpoint, for config.bind.

    latents: LatentScaling.to_json(); ema_decay: of the average that was converted, 0 for the raw weights.
    """
    heads, lightning = len(model.inter_depth), family == "lightningdit"
    return {
        "name": name,
        "seed": 0,
        "init": dict(checkpoint="", ema=""),
        "model": dataclasses.asdict(model),
        "latents": latents,
        "process": dict(
            kind="gaussian" if family == "dit" else claims.path or "linear",
            prediction="noise" if family == "dit" else claims.prediction or "velocity",
            time="uniform", time_mean=0.0, time_std=1.0,
        ),
        "loss": dict(
            inter_weight=(0.5,) * heads, label_drop=0.1,
            accelerate=False, omega=1 / 3, gap_source="ema", start_step=0,
            direction_weight=float(lightning and model.channels > 1), direction_intermediate=False,
        ),
        "optimizer": dict(
            name="adamw", train_only=(), learning_rate=2e-4 if lightning else 1e-4, schedule="constant", warmup_steps=0,
            b1=0.9, b2=0.95 if lightning else 0.999, eps=1e-8, weight_decay=0.0, clip_norm=1.0, accumulate=1,
        ),
        "ema": dict(decays=(ema_decay,), warmup=False),
        "data": dict(
            source="tfds", name=_data_set(model, latents["name"]), folder="", split="train",
            test_split="validation", batch_size=256, pad=0, in_memory=False,
        ),
        "mesh": dict(data=-1, fsdp=1, tensor=1),
        "run": dict(
            steps=claims.step + 1, log_every=100, checkpoint_every=10_000, keep_checkpoints=2,
            preview_every=0, preview_images=0,
        ),
        "sample": recipe(family, model.width, bool(heads)),
    }


def _data_set(model: DiTConfig, latents: str) -> str:
    """What configs/ call the ImageNet latents that such a network was trained on."""
    factor = {"sd_vae": SD_VAE.factor, "va_vae_f16d32": VA_VAE.factor}.get(latents)
    return f"imagenet{model.input_size * factor}_{latents}" if factor and model.num_classes == 1000 else "unknown"


def recipe(family: str, width: int, head: bool) -> dict:
    """The paper's way of sampling this family and width."""
    small = family == "sit" and head and width < _XL_WIDTH
    return PLAIN | (_SMALL_SIT if small else _RECIPES[family, head])
