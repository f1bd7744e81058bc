"""Points of the plane on two trees: a DiT of one token, 3 blocks, width 48, an intermediate head after block 1.

python -m ig_jax.train --config=configs/fractal.py --workdir=runs/fractal
hardware   2 CPU cores
time       about a minute (4,096 steps)
expect     the first picture of the README: launch/fractal.sh trains with and without acceleration and draws it
:runlocal  64 steps, a few seconds
"""

import dataclasses

import ml_collections

from ig_jax.config import files as config_files
from ig_jax.data.formats import fractal
from ig_jax.models import zoo


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """`arg`: "" for the full run, "runlocal" for a short one."""
    (form,) = config_files.words(arg, ("full", "runlocal"))
    runlocal = form == "runlocal"
    config = ml_collections.ConfigDict()
    config.name = "fractal_runlocal" if runlocal else "fractal"
    config.seed = 0
    config.init = dict(checkpoint="", ema="")
    config.model = dict(
        **zoo.FAMILIES["sit"],
        input_size=1,
        channels=2,
        patch_size=1,
        depth=3,
        width=48,
        num_heads=1,
        mlp_ratio=4.0,
        num_classes=2,
        inter_depth=(1,),
        dtype="float32",
        scan_blocks=False,
        remat="none",
    )
    config.latents = dataclasses.asdict(fractal.SCALING)
    config.process = dict(kind="linear", prediction="velocity", time="logit_normal", time_mean=-1.0, time_std=1.2)
    config.loss = dict(
        inter_weight=(0.5,),
        label_drop=0.1,
        accelerate=False,
        omega=1 / 3,
        gap_source="ema",
        start_step=0,
        direction_weight=0.0,
        direction_intermediate=False,
    )
    config.optimizer = dict(
        name="muon",  # in 1,000 steps closer to the branches than AdamW in 4,000
        muon_momentum=0.95,
        muon_routing="hidden",
        learning_rate=5e-3,
        schedule="cosine",
        warmup_steps=50,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.0,
        clip_norm=1.0,
        accumulate=1,
        train_only=(),
    )
    config.ema = dict(decays=(0.995,), warmup=True)
    config.data = dict(
        source="fractal",
        name="",
        folder="",
        split="train",
        test_split="test",
        batch_size=256 if runlocal else 1024,
        pad=0,
        in_memory=False,
        holds="latents",
        dtype="float32",
        mirrored=False,
    )
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.run = dict(
        steps=64 if runlocal else 4096,
        log_every=32 if runlocal else 256,
        checkpoint_every=32 if runlocal else 512,
        keep_checkpoints=8,  # among them those of 512 and 4,096 steps, which the picture compares
        preview_every=0,
        preview_images=0,
    )
    config.sample = dict(
        solver="heun", steps=32, ig_scale=2.0, cfg_scale=1.0, ig_interval=(0.0, 1.0), cfg_interval=(0.0, 1.0)
    )
    return config
