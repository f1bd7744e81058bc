"""SiT with one intermediate head on ImageNet 256 or 512, in the latents of the SD autoencoder.

python -m ig_jax.train --config=configs/sit_imagenet256.py:XL --config.data.folder=DIR --workdir=runs/sit_xl
argument   a size (XL, L, B), paper or release, 256 or 512, runlocal: "B", "XL,release", "XL,512"; the first
           of each where none is given. The release puts the head of B after block 8, the paper after
           block 4; it trains XL for 4.1M steps
data       --config.data.folder=DIR, the latents of the SD autoencoder in any form of ig_jax/data/README.md. From
           ImageNet as it was downloaded (moments in bfloat16 of both mirrors: 42 GB at 256, 168 GB at 512):
           python -m ig_jax.encode --images=ILSVRC --autoencoder=runs/sd_vae --out=DIR --size=256
           Encoding both mirrors is 0.69 EFLOP: reckoned at 40 % of the datasheet 0.5 h on one H200 or 10 minutes on
           16 v5e with --compute=bfloat16, and 7 h or 1 h in float32. Decoding takes 1.9 core hours (measured rate).
           Without the disk for latents, the step encodes: --config.data.source=images --config.data.folder=ILSVRC
           --config.run.autoencoder=runs/sd_vae
hardware   global batch 256. State in float32 (weights, gradient, two moments, one EMA): 2.6 GB for B,
           9.2 GB for L, 13.6 GB for XL, cut over groups of up to 16 devices (config.mesh.fsdp_up_to). A step keeps,
           recomputes or splits what fits: XL with batch 256 and 1024 fits 16 v5e, one H200 and all above
           (compiled, not run; the table is in README.md, and python -m ig_jax.preflight makes it for yours)
time       not measured
target     FID-50K, random labels, SDE with 250 steps, paper settings (arXiv 2512.24176):
           B at 400K steps 16.19 with the recipe below; L at 400K steps about 8.5;
           XL at 400K steps 5.31 and at 4M steps 1.75 with IG alone, 1.46 with the recipe below (and CFG).
           No IG result is published at 512; plain SiT-XL/2 with CFG 1.5 reaches 2.62 (arXiv 2401.08740)
:runlocal  the same settings, a small network and the built-in digits: 200 steps, about a minute on 2 cores
"""

import ml_collections

from ig_jax.config import files as config_files
from ig_jax.config import published


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """`arg`: size, settings, resolution and form, as above."""
    size, variant, pixels, form = config_files.words(
        arg, ("XL", "L", "B"), ("paper", "release"), ("256", "512"), ("full", "runlocal")
    )
    settings = published.settings(f"SiT-{size}/2", release=variant == "release", pixels=int(pixels))
    config = ml_collections.ConfigDict(settings)
    return config_files.on_digits(config) if form == "runlocal" else config
