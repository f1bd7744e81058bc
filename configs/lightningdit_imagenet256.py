"""LightningDiT with one intermediate head on ImageNet 256, in the latents of VA-VAE f16d32.

  python -m ig_jax.train --config=configs/lightningdit_imagenet256.py:XL --workdir=runs/lightningdit_xl
  argument   a size (XL, 1p0B, 1p6B), paper or release, runlocal: "XL,release"; the first of each where none
             is given. The release gives every tensor with two or more dimensions to Muon, the fixed positions
             included (optimizer.muon_routing), samples from the EMA 0.9999 and stops at 3M steps; the paper
             says 0.9995 and 680 epochs. Both EMAs are kept: --ema=0.9999 at sampling
  data       not there yet: config.data names the TFDS data set of latents that `encode` will write,
             normalised with the mean and deviation of each channel, which config.latents must then carry
  hardware   global batch 256. State in float32 (weights, gradient, momentum, two EMAs): 13.6 GB for XL, cut
             over groups of up to 16 devices; memory as for SiT-XL/2 (256 tokens), see sit_imagenet256.py
  time       not measured
  target     FID-50K of XL, random labels (arXiv 2512.24176): 2.42 at 300K steps (60 epochs) with IG alone, at
             680 epochs 1.34 with IG 1.7 alone and 1.19 with the recipe below (IG and CFG). No IG result is
             published for the larger sizes
  :runlocal  the same settings, a small network and the built-in digits: 200 steps, about a minute on 2 cores
"""

import ml_collections

from ig_jax import config_files
from ig_jax.models import zoo


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """`arg`: size, settings and form, as above."""
    size, settings, form = config_files.choices(
        arg, ("XL", "1p0B", "1p6B"), ("paper", "release"), ("full", "runlocal")
    )
    release = settings == "release"
    config = ml_collections.ConfigDict()
    config.name = f"lightningdit_{size.lower()}_imagenet256"
    config.seed = 0
    config.init = dict(checkpoint="", ema="")
    config.model = dict(
        **zoo.named(f"LightningDiT-{size}/1"),
        input_size=16, channels=32, num_classes=1000, dtype="bfloat16", scan_blocks=False, remat="auto",
    )
    # Of latents that are normalised already; to decode samples, set the statistics they were normalised with.
    config.latents = dict(name="va_vae_f16d32", shift=(0.0,) * 32, scale=(1.0,) * 32, uint8_rule="half")
    config.process = dict(kind="linear", prediction="velocity", time="uniform", time_mean=0.0, time_std=1.0)
    config.loss = dict(
        inter_weight=(0.5,), label_drop=0.1,
        accelerate=False, omega=1 / 3, gap_source="ema", start_step=0,
        direction_weight=1.0, direction_intermediate=False,
    )
    config.optimizer = dict(
        name="muon", learning_rate=2e-4, schedule="constant", warmup_steps=0, b1=0.9, b2=0.95, eps=1e-8,
        weight_decay=0.01, clip_norm=1.0, accumulate=-1, train_only=(),
        muon_momentum=0.95, muon_routing="release" if release else "hidden",
    )
    config.ema = dict(decays=(0.9999, 0.9995) if release else (0.9995, 0.9999), warmup=False)
    config.data = dict(
        source="tfds", name="imagenet256_va_vae_f16d32", folder="", split="train", test_split="validation",
        batch_size=256, pad=0, in_memory=False,
    )
    # Sixteen divides every width of the published networks; their state is then below 1 GB on each device.
    config.mesh = dict(data=-1, fsdp=1, tensor=1, fsdp_up_to=16)
    config.run = dict(
        steps=3_000_000 if release else 3_400_000,  # 680 epochs of 5,004 steps
        log_every=100, checkpoint_every=5_000, keep_checkpoints=2, preview_every=0, preview_images=0,
    )
    config.sample = dict(  # 125 grid points are 124 steps
        solver="trapezoid", steps=124, shift=0.3, ig_scale=1.4, cfg_scale=1.45, ig_interval=(0.0, 1.0),
        cfg_interval=(0.0, 0.81),
    )
    return config_files.on_digits(config) if form == "runlocal" else config
