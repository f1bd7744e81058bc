"""Several processes as one run: the only place that reads what a launcher put into the environment.

  IG_JAX_PROCESSES    how many there are
  IG_JAX_PROCESS      which one this is, 0 for the first
  IG_JAX_COORDINATOR  host:port of the first

Without them one process runs alone. launch/local.sh sets them.
"""

import os

import jax
import numpy as np
from jax.experimental import multihost_utils

from ig_jax.errors import UserError, check

NAMES = ("IG_JAX_PROCESSES", "IG_JAX_PROCESS", "IG_JAX_COORDINATOR")
TIMEOUT = 120  # seconds to wait for the others at the start


def initialize() -> None:
    """Join the other processes of this run; call before anything touches a device.

    Raises: UserError for an environment that is not whole, or when the others do not come.
    """
    values = [os.environ.get(name, "") for name in NAMES]
    if not any(values):
        return
    processes, process, coordinator = values
    numbers = processes.isdigit() and process.isdigit()
    if not (numbers and coordinator and int(process) < int(processes)):
        raise UserError(f"{', '.join(NAMES)}={values} must be a count, a number below it and host:port; "
                        "start with launch/local.sh, or set all three")
    try:
        jax.distributed.initialize(coordinator, int(processes), int(process), initialization_timeout=TIMEOUT)
    except RuntimeError as error:
        raise UserError(f"{NAMES[2]}={coordinator!r} did not gather {processes} processes in {TIMEOUT} s: "
                        f"{str(error).splitlines()[0]}") from error


def check_alone(what: str) -> None:
    """Raise UserError where a launcher has started several processes of something that runs in one."""
    count = os.environ.get(NAMES[0], "1")
    check(count == "1", NAMES[0], count, f"1 for {what}", "it uses all devices of one host")


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def from_first(array: np.ndarray) -> np.ndarray:
    """What the first process holds, on all of them: arrays of one shape and dtype."""
    if jax.process_count() == 1:
        return array
    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def wait_for_all(name: str) -> None:
    """Go on when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
