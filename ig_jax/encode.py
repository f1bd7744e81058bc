"""Encode images into latents that ig_jax.train reads, or copy a folder of latents into the same form.

  python -m ig_jax.encode --images=ILSVRC --autoencoder=runs/sd_vae --out=latents
  python -m ig_jax.encode --from=vae-sd --out=latents

--images is a folder of class folders, Kaggle's ILSVRC download, ImageNet's tars (read in place), parquet files,
webdataset tars, or tfds:NAME. Rerun the same command to finish a killed one: the bytes are those of an uninterrupted
run. The folder holds ArrayRecord shards, dataset_info.json for TFDS, card.json that describes them, and check.png.
"""

import os
from typing import Any

from absl import flags

from ig_jax.base import cli
from ig_jax.base.errors import check

# What needs JAX is imported late: each decoding process imports this module.
FLAGS = flags.FlagValues()
_at: dict[str, Any] = {"flag_values": FLAGS}
IMAGES = flags.DEFINE_string("images", None, "Folder, tar, pattern of files, or tfds:NAME.", **_at)
FROM = flags.DEFINE_string("from", None, "Folder of latents, in any form that ig_jax.train reads.", **_at)
SOURCE = flags.DEFINE_string("source", "auto", "Its form, a config.data.source; auto recognises it.", **_at)
AUTOENCODER = flags.DEFINE_string("autoencoder", None, "Directory that ig_jax.convert has written.", **_at)
OUT = flags.DEFINE_string("out", None, "Folder of the shards.", **_at)
SPLIT = flags.DEFINE_string("split", "train", "train, validation, or a TFDS split.", **_at)
SIZE = flags.DEFINE_integer("size", 256, "Pixels along each side of the centre crop.", **_at)
NUM = flags.DEFINE_integer("num", 0, "This many images, evenly spaced over the source; 0 is all.", **_at)
FLIP = flags.DEFINE_enum("flip", "both", ["both", "none"], "Whether to encode the mirrored images too.", **_at)
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16"], "Of the stored numbers.", **_at)
COMPUTE = flags.DEFINE_enum("compute", "float32", ["float32", "bfloat16"], "Of the encoder's convolutions.", **_at)
STAGE = flags.DEFINE_enum(
    "stage", "moments", ["moments", "latents"], "Mean and std, sampled anew at each step, or one sample.", **_at
)
SKIP = flags.DEFINE_bool("skip_broken", False, "Leave out images that cannot be decoded; the card lists them.", **_at)
SHARD = flags.DEFINE_integer("shard_size", 8192, "Images of the source in one shard.", **_at)
BATCH = flags.DEFINE_integer("batch_size", 32, "Images encoded at a time on each device.", **_at)
WORKERS = flags.DEFINE_integer("workers", 0, "Decoding processes of this process; 0 is one for each core.", **_at)
cli.define_launch(FLAGS)


def main() -> None:
    for flag, least in ((SIZE, 1), (NUM, 0), (SHARD, 1), (BATCH, 1), (WORKERS, 0)):
        check(least <= flag.value < 2**31, f"--{flag.name}", flag.value, f"at least {least} and less than 2^31")
    given = (IMAGES.value or "", FROM.value or "")
    check(bool(given[0]) != bool(given[1]), "(--images, --from)", given, "one of them, not none or two")
    cli.required(OUT)
    if not FROM.value:
        cli.required(AUTOENCODER)
    from ig_jax.parallel import processes  # late: brings JAX, and bad input should fail at once

    with processes.together(FLAGS):
        copy_folder() if FROM.value else encode_images()


def encode_images() -> None:
    """--images: decode, encode, check."""
    from ig_jax.data.images.opening import open_images
    from ig_jax.encoding import encoder, finishing
    from ig_jax.encoding.folder import Folder
    from ig_jax.encoding.images import Settings, summary, write_shards
    from ig_jax.parallel import processes

    first = processes.is_first()
    images = open_images(IMAGES.value, SPLIT.value)
    if NUM.value:
        check(NUM.value <= len(images), "--num", NUM.value, f"at most {len(images)}, the images of {images.source}")
        images = images.some(NUM.value)
    found = encoder.load(AUTOENCODER.value)
    settings = Settings(
        size=SIZE.value,
        stage=STAGE.value,
        dtype=DTYPE.value,
        compute=COMPUTE.value,
        mirrored=FLIP.value == "both",
        split=SPLIT.value,
        shard_size=SHARD.value,
        batch_size=BATCH.value,
        skip_broken=SKIP.value,
        workers=WORKERS.value or len(os.sched_getaffinity(0)),
    )
    folder = Folder(OUT.value, SPLIT.value, len(images), SHARD.value)
    if first:
        print(summary(folder, images, found, settings), flush=True)
    folder.begin(settings.plan(images, found), settings.layout(found).size)
    if folder.is_complete():
        if first:
            print(f"nothing to do: {folder.path} already holds these latents")
        return
    write_shards(folder, images, found, settings)
    processes.wait_for_all("all shards are written")
    if first:
        print(finishing.finish(folder, images, found, settings, IMAGES.value), flush=True)
    processes.wait_for_all("the card is written")


def copy_folder() -> None:
    """--from: the numbers of another folder, in shards of ours."""
    from ig_jax.encoding import copying
    from ig_jax.encoding.folder import Folder
    from ig_jax.parallel import processes

    of_images = (AUTOENCODER, SIZE, NUM, FLIP, DTYPE, COMPUTE, STAGE, SKIP, BATCH, WORKERS)
    given = [f"--{flag.name}" for flag in of_images if flag.present]
    check(not given, "--from", FROM.value, f"given without {', '.join(given)}", "the folder decides these")
    source = copying.open_latents(FROM.value, SOURCE.value, SPLIT.value)
    folder = Folder(OUT.value, SPLIT.value, len(source), SHARD.value)
    result = copying.copy(source, folder, SPLIT.value, SHARD.value)
    if processes.is_first():
        print(result, flush=True)
    processes.wait_for_all("the card is written")


if __name__ == "__main__":
    cli.run(main, FLAGS, __doc__)
