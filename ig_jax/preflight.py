"""Compile a run for a machine that need not be present, and report whether it fits and what it will cost.

  python -m ig_jax.preflight --config=configs/sit_imagenet256.py:XL --target=v5e-256
  python -m ig_jax.preflight --config=configs/sit_imagenet256.py:XL --config.data.batch_size=1024 --target=gpu:h200:8

Targets: tpu:v5e:16x16, tpu:v6e:8x8 or, as Google names slices, v5e-256, v6e-64, v5p-128 and v4-32 (the last two count
two cores a chip); gpu:h200:8, gpu:h100:8, gpu:a100:8, a3-highgpu-8g, p5.48xlarge; cpu:8; and other sizes. A kind of
device without a size, as in gpu:h100, is one device.
The train step and the sampler are those that `train` and `sample` compile; nothing runs and no array is allocated.
The compiler for TPUs comes with jax[tpu], the one for GPUs with jax[cuda12]: pip install 'ig_jax[preflight]' installs
both.
Exit code 0 when everything fits, 4 when something does not.
"""

import dataclasses
import sys
from typing import Any

import jax
from absl import flags

from ig_jax.base import cli
from ig_jax.base.errors import check
from ig_jax.base.files import append_lines, local_path
from ig_jax.base.progress import waiting
from ig_jax.config import files as config_files
from ig_jax.forecast import report
from ig_jax.forecast.targets import compile_quickly, open_target

FLAGS = config_files.ConfigFlags("Config file of the experiment, as for train; override any key: --config.mesh.fsdp=8.")
_at: dict[str, Any] = {"flag_values": FLAGS}
TARGET = flags.DEFINE_list("target", [], "One machine or several, such as v5e-16,gpu:h200:8.", **_at)
SAMPLE_BATCH = flags.DEFINE_integer(
    "sample_batch", 64, "Images in one batch of the sampler, on all devices; 0 leaves the sampler out.", **_at
)
QUICK = flags.DEFINE_bool(
    "quick",
    False,
    "Compile for TPUs about five times quicker: nearly the same memory, more exchanged, a pessimistic estimate.",
    **_at,
)
RESULTS = flags.DEFINE_string("results", "", "File to which one JSON line for each target is appended.", **_at)

DOES_NOT_FIT = 4


def main() -> None:
    experiment = FLAGS.experiment()
    check(bool(TARGET.value), "--target", ",".join(TARGET.value), "at least one machine", "see --help")
    check(SAMPLE_BATCH.value >= 0, "--sample_batch", SAMPLE_BATCH.value, "at least 1, or 0 for no sampler")
    jax.config.update("jax_platforms", "cpu")  # the devices of this machine are not used
    if QUICK.value:
        compile_quickly()
    results = local_path(RESULTS.value, "--results") if RESULTS.value else None
    if results:
        append_lines(results, [])
    fits = True
    for target in [open_target(name) for name in TARGET.value]:
        with waiting(f"compiling {experiment.name} for {target.name}"):
            found = report.forecast(experiment, target, SAMPLE_BATCH.value)
        print(found.page(), flush=True)
        if results:
            append_lines(results, [dataclasses.asdict(found) | {"fits": found.fits}])
        fits = fits and found.fits
    if not fits:
        sys.exit(DOES_NOT_FIT)


if __name__ == "__main__":
    cli.run(main, FLAGS, __doc__)
