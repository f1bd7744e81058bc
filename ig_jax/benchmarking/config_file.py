"""A config file without flags around it; apart because it brings ml_collections and the data."""

import importlib.util
from pathlib import Path

from ig_jax.config import Experiment, bind
from ig_jax.errors import UserError, check


def experiment_of(path: str) -> Experiment:
    """The experiment of configs/NAME.py[:argument].

    Raises: UserError for a file that cannot be loaded or an experiment that is not whole.
    """
    file, _, argument = path.partition(":")
    check(Path(file).is_file(), "--config", path, "an existing config file, with an argument after a colon")
    spec = importlib.util.spec_from_file_location("config", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(argument)
    except Exception as error:  # a config file is arbitrary Python
        raise UserError(f"--config={path!r}: {error}") from error
    return bind(Experiment, config)
