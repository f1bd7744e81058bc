"""DiT with one intermediate head on ImageNet 256 or 512, in the latents of the SD autoencoder.

  python -m ig_jax.train --config=configs/dit_imagenet256.py:XL --workdir=runs/dit_xl
  argument   a size (XL, L, B), paper or plain, 256 or 512, runlocal: "B", "XL,plain,512"; the first of each
             where none is given. There is no release of DiT with IG; plain is the network of
             facebookresearch/DiT, without the head
  data       not there yet: config.data names the TFDS data set of latents that `encode` will write
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

from ig_jax import config_files
from ig_jax.models import zoo


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """`arg`: size, settings, resolution and form, as above."""
    size, settings, pixels, form = config_files.choices(
        arg, ("XL", "L", "B"), ("paper", "plain"), ("256", "512"), ("full", "runlocal")
    )
    plain = settings == "plain"
    config = ml_collections.ConfigDict()
    config.name = f"dit_{size.lower()}_imagenet{pixels}"
    config.seed = 0
    config.init = dict(checkpoint="", ema="")
    config.model = dict(
        **zoo.named(f"DiT-{size}/2"),
        input_size=int(pixels) // 8, channels=4, num_classes=1000, dtype="bfloat16", scan_blocks=False,
        remat="auto",
    )
    config.latents = dict(name="sd_vae", shift=(0.0,) * 4, scale=(0.18215,) * 4, uint8_rule="sit")
    config.process = dict(kind="gaussian", prediction="noise", time="uniform", time_mean=0.0, time_std=1.0)
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
    config.run = dict(
        steps=(7_000_000 if pixels == "256" else 3_000_000) if plain else 400_000,
        log_every=100, checkpoint_every=5_000, keep_checkpoints=2, preview_every=0, preview_images=0,
    )
    # The paper gives no w for DiT: the one it uses for SiT-B/2 without an interval.
    config.sample = dict(
        solver="ddpm", steps=250, ig_scale=1.9, cfg_scale=1.0, ig_interval=(0.0, 1.0), cfg_interval=(0.0, 1.0),
    )
    if form == "runlocal":
        config_files.on_digits(config)
    if plain:
        config.model.inter_depth = ()
        config.loss.inter_weight = ()
        config.sample.update(ig_scale=1.0, cfg_scale=1.5)
    return config
