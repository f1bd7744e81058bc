"""Sample images from a checkpoint directory, with every solver and guidance.

  python -m ig_jax.sample --checkpoint=runs/digits --out=runs/digits/samples --num=64 --ig_scale=2 --cfg_scale=1.25
  python -m ig_jax.sample --checkpoint=runs/xl --out=runs/xl/50k --num=50000 --preset=sit-xl-ig-cfg --labels=random

Writes 000000.png ..., samples.npz (arr_0 uint8 (N, H, W, 3), arr_1 labels) and recipe.json into OUT, and OUT_grid.png,
so that all pictures in OUT are samples. Rerun the same command to resume a killed one, or with a larger --num to add
images to a finished folder. Image i depends on (checkpoint, recipe, seed, i) alone, up to rounding when the batch size
or the devices change. A scale is a number (1 is off), a table over sigma 0:1,0.3:2,1:1.5 or a schedule cosine:1,2;
intervals are lo,hi in sigma-time (t = 0 data, t = 1 noise).
"""

import jax
import numpy as np
from absl import flags

from ig_jax.base import cli
from ig_jax.base.errors import UserError, check
from ig_jax.base.schema import bind
from ig_jax.diffusion.presets import PRESETS
from ig_jax.generation import decode, sampler
from ig_jax.generation.flags import define_request, recipe_flags, requested
from ig_jax.generation.folder import Folder
from ig_jax.generation.writer import write_samples
from ig_jax.models.latents import LatentScaling
from ig_jax.parallel import processes
from ig_jax.parallel.mesh import make_mesh

FLAGS = flags.FlagValues()
define_request(FLAGS, 64, "Images.")
SAVE = flags.DEFINE_list("save", "png,npz", "png, npz, both, or latents (to decode later).", flag_values=FLAGS)
DECODE = flags.DEFINE_string("decode", None, "Folder of saved latents to decode; no checkpoint.", flag_values=FLAGS)
cli.define_launch(FLAGS)
OF_CHECKPOINT = ("checkpoint", "num", "seed", "labels", "ema", "auto_checkpoint", "preset")


def main() -> None:
    with processes.together(FLAGS):
        sample()


def sample() -> None:
    """Sample, or decode, what the flags ask for."""
    if DECODE.value:
        check(jax.process_count() == 1, "processes", jax.process_count(), "1 to decode latents")
        return decode_latents(Folder(DECODE.value, 1, ("latents",)))
    protocol = "random" if FLAGS.preset else "balanced"  # the FID of a preset was measured on random labels
    request = requested(FLAGS, "samples", SAVE.value, lambda model: (FLAGS.num, protocol))
    folder, model, recipe = request.folder, request.model, request.recipe
    if is_finished(folder, request.metadata, request.labels):
        return
    keeps_latents = folder.save == ("latents",)
    if not keeps_latents:
        model.check_images()
        folder.check_space(model.image_shape)
    if processes.is_first():
        print(model.summary(recipe), flush=True)
        if FLAGS.preset:
            print(PRESETS[FLAGS.preset].summary(FLAGS.preset), flush=True)
    labels, given = request.labels, dict(seed=request.seed, batch_size=request.batch_size)
    write_samples(
        folder,
        request.metadata,
        labels,
        lambda indices: model.batches(recipe, labels[indices], indices=indices, **given),
        decode=(lambda latents: latents) if keeps_latents else model.decode,
        check=lambda latents: sampler.check_finite(latents, recipe),
    )


def is_finished(folder: Folder, metadata: dict, labels: np.ndarray) -> bool:
    """Whether there is nothing to do.  Raises: UserError for a folder of something else."""
    finished = folder.is_finished(metadata, labels)
    if finished and processes.is_first():
        print(f"nothing to do: {folder.path} already holds these images")
    return finished


def decode_latents(source: Folder) -> None:
    """Decode a folder of saved latents; needs only that folder and the autoencoder."""
    out = cli.required(FLAGS["out"])
    given = [f"--{name}" for name in (*OF_CHECKPOINT, *recipe_flags()) if FLAGS[name].present]
    check(not given, "--decode", DECODE.value, f"given without {', '.join(given)}", "the folder decides these")
    check(FLAGS.batch_size >= 1, "--batch_size", FLAGS.batch_size, "at least 1")
    found = source.metadata() if source.path.is_dir() else None
    if found is None or found["save"] != ["latents"] or not found["finished"]:
        raise UserError(name="--decode", value=DECODE.value, expected="a finished folder that --save=latents wrote")
    check("latents" not in SAVE.value, "--save", "latents", "png, npz or both to decode")
    scaling, mesh = bind(LatentScaling, found["latents"], "latents"), make_mesh()
    autoencoder = decode.load_autoencoder(FLAGS.autoencoder, scaling) if FLAGS.autoencoder else None
    decoder, labels = decode.make_decoder(mesh, scaling, autoencoder), source.labels()
    folder = Folder(out, len(labels), SAVE.value)
    folder.check_space(decode.image_shape(source.read(0).shape, autoencoder))
    digest = autoencoder.digest if autoencoder else None
    metadata = found | dict(kind="decode", save=list(folder.save), finished=None, autoencoder=digest)
    if not is_finished(folder, metadata, labels):
        read = lambda indices: sampler.read_latents(source.read, indices, mesh=mesh, batch_size=FLAGS.batch_size)
        write_samples(folder, metadata, labels, read, decode=decoder)


if __name__ == "__main__":
    cli.run(main, FLAGS, __doc__)
