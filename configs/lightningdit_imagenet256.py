"""LightningDiT with one intermediate head on ImageNet 256, in the latents of VA-VAE f16d32.

python -m ig_jax.train --config=configs/lightningdit_imagenet256.py:XL --config.data.folder=DIR --workdir=runs/ldit
argument   a size (XL, 1p0B, 1p6B), paper or release, runlocal: "XL,release"; the first of each where none
           is given. The release gives every tensor with two or more dimensions to Muon, the fixed positions
           included (optimizer.muon_routing), samples from the EMA 0.9999 and stops at 3M steps; the paper
           says 0.9995 and 680 epochs. Both EMAs are kept: --ema=0.9999 at sampling
data       --config.data.folder=DIR: LightningDiT's shards of latents with latents_stats.pt next to them, or from
           ImageNet as it was downloaded (moments in bfloat16 of both mirrors: 84 GB)
           python -m ig_jax.encode --images=ILSVRC --autoencoder=runs/va_vae --out=DIR --size=256
           The mean and deviation of each channel come with them into config.latents and the checkpoints.
           Encoding both mirrors is 0.35 EFLOP: reckoned at 40 % of the datasheet 15 minutes on one H200 or 5 on
           16 v5e with --compute=bfloat16, and 4 h or 0.5 h in float32. Decoding takes 1.9 core hours (measured rate)
hardware   global batch 256. State in float32 (weights, gradient, momentum, two EMAs): 13.6 GB for XL, cut
           over groups of up to 16 devices; memory as for SiT-XL/2 (256 tokens), see sit_imagenet256.py
time       not measured
target     FID-50K of XL, random labels (arXiv 2512.24176): 2.42 at 300K steps (60 epochs) with IG alone, at
           680 epochs 1.34 with IG 1.7 alone and 1.19 with the recipe below (IG and CFG). No IG result is
           published for the larger sizes
:runlocal  the same settings, a small network and the built-in digits: 200 steps, about a minute on 2 cores
"""

import ml_collections

from ig_jax.config import files as config_files
from ig_jax.config import published


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """`arg`: size, settings and form, as above."""
    size, variant, form = config_files.words(arg, ("XL", "1p0B", "1p6B"), ("paper", "release"), ("full", "runlocal"))
    settings = published.settings(f"LightningDiT-{size}/1", release=variant == "release")
    config = ml_collections.ConfigDict(settings)
    return config_files.on_digits(config) if form == "runlocal" else config
