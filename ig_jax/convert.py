"""Bring published PyTorch weights here, or take weights back; torch is not needed.

  python -m ig_jax.convert --from=SiT-XL-2.pt --out=runs/sit-xl       .pt, .pth or .safetensors -> checkpoint
  python -m ig_jax.convert --to=sit-xl.pt --checkpoint=runs/sit-xl    checkpoint -> .pt, .pth or .safetensors

Knows SiT, DiT and LightningDiT, with or without an intermediate head, and the SD-VAE and VA-VAE autoencoders,
by the names and shapes of their tensors. The checkpoint holds the EMA and everything that `sample` needs. A
file is only ever read: nothing in it is executed.
"""

import os
from pathlib import Path

from absl import flags

from ig_jax import cli
from ig_jax.errors import UserError, check
from ig_jax.files import atomic_directory
from ig_jax.interop import plans
from ig_jax.interop.weight_files import open_weights

FLAGS = flags.FlagValues()
_define = {"flag_values": FLAGS}
FROM = flags.DEFINE_string("from", None, "Published weight file to import.", **_define)
OUT = flags.DEFINE_string("out", None, "New directory to write the checkpoint to.", **_define)
WHICH = flags.DEFINE_enum("which", "ema", ["ema", "model"], "The average, or the raw weights.", **_define)
FAMILY = flags.DEFINE_string("family", "", "sit, dit or lightningdit, where the tensors fit two.", **_define)
NUM_HEADS = flags.DEFINE_integer(
    "num_heads", 0, "Attention heads, where the width is that of no published size.", **_define)
INTER_DEPTH = flags.DEFINE_integer(
    "inter_depth", 0, "Blocks run before the intermediate head; 8, as in the release, where neither you nor "
    "the file says it.", **_define)
LATENT_STATS = flags.DEFINE_string(
    "latent_stats", "", "latents_stats.pt, the mean and std of each channel of VA-VAE latents.", **_define)
NAME = flags.DEFINE_string("name", "", "Name of the experiment; that of the file where not given.", **_define)
TO = flags.DEFINE_string("to", None, "New weight file to export to, .pt, .pth or .safetensors.", **_define)
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "What to export: a work directory, one of its steps, or an autoencoder.", **_define)
EMA = flags.DEFINE_string("ema", "", "EMA to export, by its decay; the first where not given.", **_define)


def main() -> None:
    files = (FROM.value, TO.value)
    check(bool(files[0]) != bool(files[1]), "(--from, --to)", files, "one file, not none or two",
          "--from=FILE --out=DIR imports, --to=FILE --checkpoint=DIR exports")
    for flag in (NUM_HEADS, INTER_DEPTH):
        check(flag.value >= 0, f"--{flag.name}", flag.value, "at least 1")
    if FROM.value:
        import_file(Path(FROM.value).expanduser(), Path(cli.required(OUT)).expanduser().absolute())
    else:
        export_file(Path(TO.value).expanduser().absolute(), Path(cli.required(CHECKPOINT)).expanduser())


def import_file(file: Path, out: Path) -> None:
    """Convert a published file into the new directory `out`, which appears whole or not at all."""
    check_new(out)
    choices = plans.Choices(WHICH.value, FAMILY.value, NUM_HEADS.value, INTER_DEPTH.value, LATENT_STATS.value,
                            NAME.value or file.stem)
    with open_weights(file) as weights:
        tensors = weights.state_dict(choices.which)
        try:
            plan = plans.plan(file, weights.metadata, tensors, choices)
            from ig_jax import importing  # late: brings JAX, and a file of other tensors should fail at once

            job = importing.prepare(plan)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
        print(plan.describe(), flush=True)
        content = job.read()
    with atomic_directory(out) as directory:
        job.write(directory, content)
    print(f"wrote {out}")


def export_file(file: Path, checkpoint: Path) -> None:
    """Convert a checkpoint into the new published file `file`, which appears whole or not at all."""
    check(file.suffix in (".pt", ".pth", ".safetensors"), "--to", str(file), "a .pt, .pth or .safetensors")
    check(not file.exists(), "--to", str(file), "a new file", "it exists; choose another")
    from ig_jax import exporting

    form = exporting.published_form(checkpoint, EMA.value)
    form.write(file)
    print(f"wrote {file}: {len(form.tensors)} tensors, {file.stat().st_size / 1e6:,.1f} MB")


def check_new(out: Path) -> None:
    """Raise UserError unless `out` can be made, or is empty."""
    there = next(path for path in (out, *out.parents) if path.exists())
    check(there.is_dir() and os.access(there, os.W_OK), "--out", str(out), "a directory that can be written")
    check(there != out or not any(out.iterdir()), "--out", str(out), "a new or empty directory",
          "it holds something; choose another")


if __name__ == "__main__":
    cli.run(main, FLAGS, __doc__)
