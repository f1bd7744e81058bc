"""Train a diffusion transformer with internal guidance; the same command again resumes.

python -m ig_jax.train --config=configs/digits.py --workdir=runs/digits [--config.key=value ...]
python -m ig_jax.train --workdir=runs/digits
"""

from ig_jax.base import signals

if __name__ == "__main__":  # first: the imports take seconds
    signals.leave_at_once()

from pathlib import Path
from typing import Any

from absl import flags
from jax.sharding import Mesh

from ig_jax.base import cli
from ig_jax.base.compilations import keep_compilations
from ig_jax.config import files as config_files
from ig_jax.config.experiment import Experiment
from ig_jax.parallel import processes

FLAGS = config_files.ConfigFlags(
    "Config file of the experiment, with an argument after a colon (configs/digits.py:runlocal), or another run "
    "(runs/digits), for its settings; by default the settings of the run in --workdir, which is resumed. Override any "
    "key: --config.run.steps=2000."
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of this run: checkpoints, metrics.jsonl, TensorBoard logs, previews.", flag_values=FLAGS
)
cli.define_launch(FLAGS)


def main() -> None:
    experiment = FLAGS.experiment(WORKDIR.value)
    workdir = cli.required(WORKDIR)
    cli.quiet_libraries()
    keep_compilations(workdir)
    # Late: brings Orbax and grain, and bad input should fail at once.
    from ig_jax.training.loop import train

    with processes.together(FLAGS):
        train(experiment, workdir, evaluation=evaluation)
    signals.ignore()


def evaluation(e: Experiment, mesh: Mesh, directory: Path) -> list[Any]:
    """The hooks that measure samples while training, whose imports a run without them does not wait for."""
    if not e.run.evaluate_every:
        return []
    from ig_jax.evaluation import while_training

    return while_training.hooks(e, mesh, directory)


if __name__ == "__main__":
    cli.run(main, FLAGS, __doc__)
