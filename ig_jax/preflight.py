"""Compile a run for a machine that need not be here, and say whether it fits and what it will cost.

  python -m ig_jax.preflight --config=configs/sit_imagenet256.py:XL --target=tpu:v5e:16x16
  python -m ig_jax.preflight --config=configs/sit_imagenet256.py:XL --target=gpu:h200:8 --suggest --config.data.batch_size=1024

Targets: tpu:v5e:16x16, tpu:v5p:4x4x4, tpu:v6e:8x8, gpu:h200:8, gpu:h100:8, gpu:a100:8, cpu:8, and any other size. The train
step and the sampler are the very ones that `train` and `sample` build; nothing is run, no array is made. A TPU's
compiler comes with jax[tpu], a GPU's with jax[cuda12]: pip install 'ig_jax[preflight]' brings both.
Exit code 0 when everything fits, 4 when something does not.
"""

import json
import sys
from pathlib import Path

from absl import flags

from ig_jax import cli, config_files
from ig_jax.config import Experiment, bind
from ig_jax.errors import UserError, check
from ig_jax.files import append_lines

FLAGS = flags.FlagValues()
_at = {"flag_values": FLAGS}
CONFIG = config_files.define_flag(
    "Config file of the experiment, as for train; override any key: --config.mesh.fsdp=8.", FLAGS)
TARGET = flags.DEFINE_list("target", [], "One machine or several, such as tpu:v5e:4x4,gpu:h200:8.", **_at)
SAMPLE_BATCH = flags.DEFINE_integer(
    "sample_batch", 64, "Images in one pass of the sampler, over all devices; 0 leaves the sampler out.", **_at)
QUICK = flags.DEFINE_bool(
    "quick", False, "Let a TPU's compiler make the least effort: seven times quicker, near the same memory and bytes; "
    "what it overlaps and fuses differs, and so does the estimate.", **_at)
SUGGEST = flags.DEFINE_bool(
    "suggest", False, "Where the train step does not fit, compile changes that could make it fit.", **_at)
RESULTS = flags.DEFINE_string(
    "results", "", "File that one JSON line for each target is appended to; --table prints them.", **_at)
TABLE = flags.DEFINE_string("table", "", "Print the results of such a file as a table, and compile nothing.", **_at)

DOES_NOT_FIT = 4
LEAST_EFFORT = -1.0


def main() -> None:
    if TABLE.value:
        print(_table(Path(TABLE.value).expanduser()))
        return
    experiment = bind(Experiment, cli.required(CONFIG))
    check(bool(TARGET.value), "--target", ",".join(TARGET.value), "at least one machine", "see --help")
    check(SAMPLE_BATCH.value >= 0, "--sample_batch", SAMPLE_BATCH.value, "at least 1, or 0 for no sampler")
    import jax

    jax.config.update("jax_platforms", "cpu")  # whatever is here is not what is compiled for
    if QUICK.value:
        jax.config.update("jax_exec_time_optimization_effort", LEAST_EFFORT)
    from ig_jax.forecast.targets import open_target

    results = Path(RESULTS.value).expanduser() if RESULTS.value else None
    if results:
        append_lines(results, [])
    targets = [open_target(name) for name in TARGET.value]
    fits = [_forecast(experiment, target, results) for target in targets]
    if not all(fits):
        sys.exit(DOES_NOT_FIT)


def _forecast(experiment: Experiment, target, results: Path | None) -> bool:
    """Print one page; whether everything fits."""
    from ig_jax.forecast import report, suggest
    from ig_jax.progress import waiting

    with waiting(f"compiling {experiment.name} for {target.name}"):
        found = report.forecast(experiment, target, SAMPLE_BATCH.value)
    print(found.page(), flush=True)
    if not found.train.fits:
        print("to make it fit\n" + "\n".join(f"  {line}" for line in suggest.knobs(experiment, target, found)))
        if SUGGEST.value:
            print(suggest.tried(experiment, target), flush=True)
    if results:
        append_lines(results, [found.as_json()])
    return found.fits


def _table(file: Path) -> str:
    from ig_jax.forecast.table import markdown

    try:
        return markdown([json.loads(line) for line in file.read_text().splitlines()])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"--table={str(file)!r} cannot be read ({error}); give a file that --results wrote") from error


if __name__ == "__main__":
    cli.run(main, FLAGS, __doc__)
