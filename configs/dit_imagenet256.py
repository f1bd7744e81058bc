"""DiT with one intermediate head on ImageNet 256 or 512, in the latents of the SD autoencoder.

python -m ig_jax.train --config=configs/dit_imagenet256.py:XL --config.data.folder=DIR --workdir=runs/dit_xl
argument   a size (XL, L, B), paper or plain, 256 or 512, runlocal: "B", "XL,plain,512"; the first of each
           where none is given. There is no release of DiT with IG; plain is the network of
           facebookresearch/DiT, without the head
data       --config.data.folder=DIR, the latents of the SD autoencoder: as for SiT, see sit_imagenet256.py
           (42 GB at 256, 168 GB at 512)
hardware   global batch 256. State in float32 (weights, gradient, two moments, one EMA): 2.6 GB for B,
           9.2 GB for L, 13.6 GB for XL, cut over groups of up to 16 devices; memory as for SiT, see
           sit_imagenet256.py
time       not measured
target     FID-50K, DDPM with 250 steps: with IG at 400K steps about 27 for B and 11 for L (arXiv
           2512.24176). Plain XL with CFG 1.5: 2.27 at 256 after 7M steps, 3.04 at 512 after 3M
           (arXiv 2212.09748)
:runlocal  the same settings, a small network and the built-in digits: 200 steps, about a minute on 2 cores
"""

import ml_collections

from ig_jax.config import files as config_files
from ig_jax.config import published


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """`arg`: size, settings, resolution and form, as above."""
    size, variant, pixels, form = config_files.words(
        arg, ("XL", "L", "B"), ("paper", "plain"), ("256", "512"), ("full", "runlocal")
    )
    settings = published.settings(f"DiT-{size}/2", head=variant == "paper", pixels=int(pixels))
    config = ml_collections.ConfigDict(settings)
    return config_files.on_digits(config) if form == "runlocal" else config
