"""Fashion-MNIST, 28x28 padded to 32: SiT, 6 blocks, width 128, patch 4, one intermediate head after block 2.

  python -m ig_jax.train --config=configs/fashion_mnist.py --workdir=runs/fashion
  python -m ig_jax.train --config=configs/fashion_mnist.py --workdir=runs/fashion \\
    --config.data.source=idx --config.data.folder=DIR
  data       TFDS fashion_mnist, downloaded once, or DIR with the four IDX files (Debian's package
             dataset-fashion-mnist has them)
  hardware   2 CPU cores or more, under 1 GB
  time       not measured (10,000 steps, 21 epochs)
  expect     recognisable clothes; no number yet
  :small     the study of RESULTS.md: 16x16 images that launch/fashion.sh makes, width 64, 2,500 steps in 3 minutes
  :runlocal  the same network on the built-in digits padded to 32: 100 steps of 32 images, about a minute
"""

import ml_collections

from ig_jax.config import files as config_files
from ig_jax.models import zoo


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """`arg`: "" for the full run, "small" for 16x16 images, "runlocal" for a short run on the built-in digits."""
    (form,) = config_files.words(arg, ("full", "small", "runlocal"))
    runlocal = form == "runlocal"
    config = ml_collections.ConfigDict()
    config.name = "fashion_mnist_runlocal" if runlocal else "fashion_mnist"
    config.seed = 0
    config.init = dict(checkpoint="", ema="")
    config.model = dict(
        **zoo.FAMILIES["sit"],
        input_size=32,
        channels=1,
        patch_size=4,
        depth=6,
        width=128,
        num_heads=4,
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
        learning_rate=1e-3,
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
        name="ig_digits" if runlocal else "fashion_mnist",
        folder="",
        split="train",
        test_split="test",
        batch_size=32 if runlocal else 128,
        pad=12 if runlocal else 2,
        in_memory=True,
        holds="pixels",
        dtype="uint8",
        mirrored=False,
    )
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.run = dict(
        steps=100 if runlocal else 10_000,
        log_every=50,
        checkpoint_every=50 if runlocal else 1_000,
        keep_checkpoints=2,
        preview_every=50 if runlocal else 1_000,
        preview_images=20 if runlocal else 40,
    )
    config.sample = dict(
        solver="heun", steps=25, ig_scale=2.0, cfg_scale=1.0, ig_interval=(0.0, 1.0), cfg_interval=(0.0, 1.0)
    )
    if form == "small":
        config.name = "fashion_mnist_small"
        config.model.update(input_size=16, width=64, num_heads=2)
        config.optimizer.learning_rate = 2e-3
        config.data.update(source="idx", pad=0)
        config.run.update(steps=2_500, checkpoint_every=500, keep_checkpoints=5, preview_every=0)
        config.sample.update(solver="ab2", steps=20)
    return config
