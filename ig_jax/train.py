"""Train a diffusion transformer with internal guidance; the same command again resumes.

  python -m ig_jax.train --config=configs/digits.py --workdir=runs/digits [--config.key=value ...]
"""

from pathlib import Path

from absl import flags

from ig_jax import cli, config_files
from ig_jax.config import Experiment, bind
from ig_jax.parallel import processes

FLAGS = flags.FlagValues()
CONFIG = config_files.define_flag(
    "Config file of the experiment, with an argument after a colon (configs/digits.py:runlocal). Override any key: "
    "--config.run.steps=2000.", FLAGS)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of this run: checkpoints, metrics.jsonl, TensorBoard logs, previews.",
    flag_values=FLAGS,
)


def main() -> None:
    experiment = bind(Experiment, cli.required(CONFIG))
    workdir = cli.required(WORKDIR)
    processes.check_alone("train")
    cli.quiet_libraries()
    _keep_compilations(workdir)
    from ig_jax.training.loop import (
        train,  # late: brings Orbax and grain, and bad input should fail at once
    )

    train(experiment, workdir)


def _keep_compilations(workdir: str) -> None:
    """Compile once for all starts of a run; whoever has set JAX_COMPILATION_CACHE_DIR keeps that."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(Path(workdir).expanduser().absolute() / "compilations"))
        # The digests of a restored state alone are dozens of programs of less than JAX's least time, a second.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


if __name__ == "__main__":
    cli.run(main, FLAGS, __doc__)
