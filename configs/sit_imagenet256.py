"""SiT with one intermediate head on ImageNet 256 or 512, in the latents of the SD autoencoder.

  python -m ig_jax.train --config=configs/sit_imagenet256.py:XL --workdir=runs/sit_xl
  argument   a size (XL, L, B), paper or release, 256 or 512, runlocal: "B", "XL,release", "XL,512"; the first
             of each where none is given. The release puts the head of B after block 8, the paper after
             block 4; it trains XL for 4.1M steps
  data       not there yet: config.data names the TFDS data set of latents that `encode` will write
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

from ig_jax import config_files
from ig_jax.models import zoo

# w, s, and where in sigma-time each is on. L: no scale is published with its result, so it takes that of B.
RECIPES = {
    "B": dict(ig_scale=2.3, cfg_scale=1.0, ig_interval=(0.3, 1.0), cfg_interval=(0.0, 1.0)),
    "L": dict(ig_scale=2.3, cfg_scale=1.0, ig_interval=(0.3, 1.0), cfg_interval=(0.0, 1.0)),
    "XL": dict(ig_scale=1.4, cfg_scale=1.35, ig_interval=(0.0, 1.0), cfg_interval=(0.0, 0.7)),
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """`arg`: size, settings, resolution and form, as above."""
    size, settings, pixels, form = config_files.choices(
        arg, ("XL", "L", "B"), ("paper", "release"), ("256", "512"), ("full", "runlocal")
    )
    release = settings == "release"
    config = ml_collections.ConfigDict()
    config.name = f"sit_{size.lower()}_imagenet{pixels}"
    config.seed = 0
    config.init = dict(checkpoint="", ema="")
    config.model = dict(
        **zoo.named(f"SiT-{size}/2"),
        input_size=int(pixels) // 8, channels=4, num_classes=1000, dtype="bfloat16", scan_blocks=False,
        remat="auto",
    )
    if release:
        config.model.inter_depth = (8,)
    config.latents = dict(name="sd_vae", shift=(0.0,) * 4, scale=(0.18215,) * 4, uint8_rule="sit")
    config.process = dict(kind="linear", prediction="velocity", time="uniform", time_mean=0.0, time_std=1.0)
    config.loss = dict(
        inter_weight=(0.5,), label_drop=0.1,
        accelerate=False, omega=1 / 3, gap_source="ema", start_step=0,
        direction_weight=0.0, direction_intermediate=False,
    )
    config.optimizer = dict(
        name="adamw", learning_rate=1e-4, schedule="constant", warmup_steps=0, b1=0.9, b2=0.999, eps=1e-8,
        weight_decay=0.0, clip_norm=1.0, accumulate=-1, train_only=(),
    )
    config.ema = dict(decays=(0.9999,), warmup=False)
    config.data = dict(
        source="tfds", name=f"imagenet{pixels}_sd_vae", folder="", split="train", test_split="validation",
        batch_size=256, pad=0, in_memory=False,
    )
    # Sixteen divides every width of the published networks; their state is then below 1 GB on each device.
    config.mesh = dict(data=-1, fsdp=1, tensor=1, fsdp_up_to=16)
    steps = 400_000 if size != "XL" else 4_100_000 if release else 4_000_000
    config.run = dict(
        steps=steps, log_every=100, checkpoint_every=5_000, keep_checkpoints=2, preview_every=0,
        preview_images=0,
    )
    config.sample = dict(solver="sde", steps=250, **RECIPES[size])
    return config_files.on_digits(config) if form == "runlocal" else config
