"""Conversion of published PyTorch weights into checkpoints, and of checkpoints into weight files; torch is not needed.

  python -m ig_jax.convert --from=SiT-XL-2.pt --out=runs/sit-xl       .pt, .pth or .safetensors -> checkpoint
  python -m ig_jax.convert --to=sit-xl.pt --checkpoint=runs/sit-xl    checkpoint -> .pt, .pth or .safetensors
  python -m ig_jax.convert --thin=runs/digits [--out=runs/small]      removes what only training needs

Knows SiT, DiT and LightningDiT, with or without an intermediate head, and the SD-VAE and VA-VAE autoencoders,
by the names and shapes of their tensors, and the InceptionV3 of FID for `evaluate` (pytorch-fid's .pth, TensorFlow's
.pb, NVIDIA's .pt, jax-fid's pickle). The checkpoint holds the EMA and everything that `sample` needs. A file is only
read: nothing in it is executed.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from ig_jax.base import cli
from ig_jax.base.buckets import is_remote
from ig_jax.base.errors import UserError, check
from ig_jax.base.files import atomic_directory, file_size, local_path, user_path
from ig_jax.interop import hub
from ig_jax.weightfiles.files import open_weights
from ig_jax.weightfiles.sets import choose, holds

# Names of a tensor that shows where a network begins: those of the releases and those of diffusers.
DENOISERS = ("x_embedder.proj.weight", "pos_embed.proj.weight")
AUTOENCODERS = ("encoder.conv_in.weight",)
INCEPTIONS = {"Conv2d_1a_3x3.conv.weight", "Conv2d_1a_3x3.conv.kernel", "conv/conv2d_params", "layers.conv.weight"}

FLAGS = flags.FlagValues()
_text = functools.partial(flags.DEFINE_string, flag_values=FLAGS)
_count = functools.partial(flags.DEFINE_integer, flag_values=FLAGS)
FROM = _text("from", None, "Published weights: a file, an index of shards, a folder, or hf:OWNER/NAME/FILE.")
OUT = _text("out", None, "New directory to write the checkpoint to.")
WHICH = _text("which", "ema", "ema for the average, model for the raw weights, or the place of a set in the file.")
FAMILY = _text("family", "", "sit, dit or lightningdit; needed where the tensors fit two of them.")
NUM_HEADS = _count("num_heads", 0, "Attention heads; needed where neither tensors nor a published size show them.")
INTER_DEPTH = _count("inter_depth", 0, "Blocks before the intermediate head; by default as stored, or else 8.")
INPUT_SIZE = _count("input_size", 0, "Latent pixels along an edge where nothing shows them (diffusers); by default 32.")
LATENT_STATS = _text("latent_stats", "", "latents_stats.pt, the mean and std of each channel of VA-VAE latents.")
NAME = _text("name", "", "Name of the experiment; by default that of the file.")
TO = _text("to", None, "New .pt, .pth or .safetensors file to export to; a folder for diffusers' pipeline.")
THIN = _text("thin", None, "Work directory, or one of its steps, to keep no more of than sampling needs; --out copies.")
CHECKPOINT = _text("checkpoint", None, "Work directory, one of its steps, or autoencoder directory to export.")
EMA = _text("ema", "", "EMA to export, by its decay; by default the first.")


def main() -> None:
    given = (FROM.value, TO.value, THIN.value)
    usage = "--from=FILE --out=DIR imports, --to=FILE --checkpoint=DIR exports, --thin=RUN thins"
    check(len(list(filter(None, given))) == 1, "(--from, --to, --thin)", given, "one of them", usage)
    for flag in (NUM_HEADS, INTER_DEPTH, INPUT_SIZE):
        check(flag.value >= 0, f"--{flag.name}", flag.value, "at least 1")
    if FROM.value:
        import_file(FROM.value, path_of(OUT))
    elif THIN.value:
        thin(THIN.value)
    else:
        export_file(path_of(TO), path_of(CHECKPOINT))


def path_of(flag: flags.FlagHolder) -> Path:
    """The path that a flag must give."""
    return user_path(cli.required(flag), f"--{flag.name}")


def import_file(place: str, out: Path) -> None:
    """Convert a published file, or diffusers' folder of one, into the new directory `out`, complete or not at all."""
    check_new(out)
    file, origin = hub.located(place, "--from")
    pipeline = file if (file / "model_index.json").is_file() else None
    with contextlib.ExitStack() as stack:
        job = stack.enter_context(opened(pipeline / "transformer" if pipeline else file, origin))
        print(job.describe(), flush=True)
        content: Any = job.read()
        directory = stack.enter_context(atomic_directory(out))
        job.write(directory, content)
        if pipeline and (pipeline / "vae").is_dir():
            job = stack.enter_context(opened(pipeline / "vae", origin))
            print(job.describe(), flush=True)
            job.write(directory / "autoencoder", job.read())
    print(f"wrote {out}")


@contextlib.contextmanager
def opened(file: Path, origin: dict) -> Iterator[Any]:
    """The import of one published file, which is open while the context lasts."""
    with open_weights(file) as weights:
        which, path = WHICH.value, weights.source.path
        if (tensors := weights.joined()).keys() & INCEPTIONS:
            from ig_jax.interop import importing, inception_weights

            source = importing.source_of(weights.paths, origin)
            yield inception_weights.InceptionImport.of(path, tensors, source)
            return
        if holds(weights, DENOISERS):
            chosen = choose(weights, which, DENOISERS)
        else:  # an autoencoder has one set
            chosen = choose(weights, "" if which == "ema" and holds(weights, AUTOENCODERS) else which, AUTOENCODERS)
        from ig_jax.interop import importing  # late: JAX takes seconds, a damaged file is refused before

        choices = importing.Choices(
            which="ema" if chosen.average or which == "ema" else "model",
            family=FAMILY.value,
            num_heads=NUM_HEADS.value,
            inter_depth=INTER_DEPTH.value,
            latent_stats=LATENT_STATS.value,
            name=NAME.value or path.stem,
            input_size=INPUT_SIZE.value,
            place=chosen.label,
            outside=chosen.outside,
            paths=weights.paths,
            origin=origin,
        )
        try:
            job = importing.prepare(path, weights.metadata, chosen.tensors, choices)
        except UserError as error:
            raise error.at(str(file)) from error
        yield job


def export_file(file: Path, checkpoint: Path) -> None:
    """Convert a checkpoint into the new published file or pipeline folder `file`, complete or not at all."""
    suffixes = (".pt", ".pth", ".safetensors")
    check(file.suffix in ("", *suffixes), "--to", str(file), f"a {', '.join(suffixes)}, or a folder for diffusers")
    check(not file.exists(), "--to", str(file), "a new file", "it exists; choose another")
    from ig_jax.interop import exporting

    if not file.suffix:
        with atomic_directory(file) as folder:
            exporting.write_pipeline(folder, checkpoint, EMA.value)
        print(f"wrote {file}")
        return
    form = exporting.published_form(checkpoint, EMA.value)
    form.write(file)
    print(f"wrote {file}: {len(form.tensors)} tensors, {file_size(file) / 1e6:,.1f} MB")


def thin(run: str) -> None:
    """Remove from a run, or leave out of a copy of its newest step, what only training needs."""
    from ig_jax.checkpoints import thinning  # late, as above
    from ig_jax.training.workdir import Lease

    out = local_path(OUT.value, "--out") if OUT.value else None
    with contextlib.ExitStack() as stack:
        if out:
            check_new(out)
        elif (local_path(run, "--thin") / "checkpoints").is_dir():  # of a run that goes on
            stack.enter_context(Lease(local_path(run, "--thin")))
        removed, left = thinning.thin(run, out)
    print(
        f"{out or run}: {removed / 1e6:,.1f} MB {'left out' if out else 'removed'}, {left / 1e6:,.1f} MB there. It "
        "samples as before; training cannot go on from it, but another run can start: --config.init.checkpoint"
    )


def check_new(out: Path) -> None:
    """Raise UserError unless `out` can be made, or is empty."""
    if not is_remote(out):
        there = next(path for path in (out, *out.parents) if path.exists())
        check(there.is_dir() and os.access(there, os.W_OK), "--out", str(out), "a directory that can be written")
    check(not out.exists() or not any(out.iterdir()), "--out", str(out), "a new or empty directory", "choose another")


if __name__ == "__main__":
    cli.run(main, FLAGS, __doc__)
