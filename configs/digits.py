"""8x8 handwritten digits, the built-in data: SiT, 6 blocks, width 64, one intermediate head after block 2.

python -m ig_jax.train --config=configs/digits.py --workdir=runs/digits
hardware   2 CPU cores
time       about 1.5 minutes (1,100 steps)
expect     IG 2 to 2.5 brings FD-CNN to about half of what the same weights reach without it (README)
:runlocal  200 steps, about 20 seconds, to see that everything works
:plain     the same network without the head, to compare with or to add one later (configs/retrofit.py)
"""

import ml_collections

from ig_jax.config import files as config_files
from ig_jax.models import zoo


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """`arg`: "" for the full run, "runlocal" for a short one, "plain" without a head."""
    head, form = config_files.words(arg, ("head", "plain"), ("full", "runlocal"))
    runlocal = form == "runlocal"
    config = ml_collections.ConfigDict()
    config.name = "digits"
    config.seed = 0
    config.init = dict(checkpoint="", ema="")
    config.model = dict(
        **zoo.FAMILIES["sit"],
        input_size=8,
        channels=1,
        patch_size=2,
        depth=6,
        width=64,
        num_heads=2,
        mlp_ratio=4.0,
        num_classes=10,
        inter_depth=(2,),
        dtype="float32",
        scan_blocks=False,
        remat="none",
    )
    config.latents = dict(name="pixels", shift=(0.0,), scale=(1.0,), uint8_rule="half")
    config.process = dict(kind="linear", prediction="velocity", time="uniform", time_mean=0.0, time_std=1.0)
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
        name="adamw",
        learning_rate=2e-3,
        schedule="constant",
        warmup_steps=100,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.0,
        clip_norm=1.0,
        accumulate=1,
        train_only=(),
    )
    config.ema = dict(decays=(0.999,), warmup=True)
    config.data = dict(
        source="tfds",
        name="ig_digits",
        folder="",
        split="train",
        test_split="test",
        batch_size=128,
        pad=0,
        in_memory=True,
        holds="pixels",
        dtype="uint8",
        mirrored=False,
    )
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.run = dict(
        steps=200 if runlocal else 1100,
        log_every=50,
        checkpoint_every=100 if runlocal else 500,
        keep_checkpoints=2,
        preview_every=100 if runlocal else 500,
        preview_images=40,
    )
    # The scale was chosen on FD-CNN at 1,100 steps (README); on ImageNet start from the paper's presets.
    config.sample = dict(
        solver="heun", steps=25, ig_scale=2.0, cfg_scale=1.0, ig_interval=(0.0, 1.0), cfg_interval=(0.0, 1.0)
    )
    if head == "plain":
        config.name = "digits_plain"
        config.model.inter_depth = ()
        config.loss.inter_weight = ()
        config.sample.ig_scale = 1.0
    return config
