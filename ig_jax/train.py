"""Train a diffusion transformer with internal guidance; the same command again resumes.

python -m ig_jax.train --config=configs/digits.py --workdir=runs/digits [--config.key=value ...]
"""

from ig_jax.base import signals

if __name__ == "__main__":  # first: the imports take seconds
    signals.leave_at_once()

import os

from absl import flags

from ig_jax.base import cli
from ig_jax.base.files import run_path
from ig_jax.config import files as config_files
from ig_jax.parallel import processes

FLAGS = config_files.ConfigFlags(
    "Config file of the experiment, with an argument after a colon (configs/digits.py:runlocal). Override any key: "
    "--config.run.steps=2000."
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of this run: checkpoints, metrics.jsonl, TensorBoard logs, previews.", flag_values=FLAGS
)
cli.define_launch(FLAGS)


def main() -> None:
    experiment = FLAGS.experiment()
    workdir = cli.required(WORKDIR)
    cli.quiet_libraries()
    _keep_compilations(workdir)
    # Late: brings Orbax and grain, and bad input should fail at once.
    from ig_jax.training.loop import train

    with processes.together(FLAGS):
        train(experiment, workdir)


def _keep_compilations(workdir: str) -> None:
    """Cache compilations in the work directory, unless JAX_COMPILATION_CACHE_DIR is set."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(run_path(workdir, "workdir") / "compilations"))
        # The digests of a restored state alone are dozens of programs below JAX's threshold of one second.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


if __name__ == "__main__":
    cli.run(main, FLAGS, __doc__)
