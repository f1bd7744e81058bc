"""Runs of several processes: how a process finds the others, and how all of them leave when one does.

The launcher says who takes part, in this order: IG_JAX_PROCESSES, IG_JAX_PROCESS and IG_JAX_COORDINATOR
(launch/local.sh); JAX_COORDINATOR_ADDRESS, NNODES and NODE_RANK (xpk on GPUs); whatever JAX itself recognises (Open
MPI, SLURM, TPU VMs, GKE, several slices, Indexed Jobs of Kubernetes). Without any of it, one process runs alone.
"""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np
from absl import flags
from jax._src import clusters  # private: the only list of launchers that JAX recognises
from jax.experimental import multihost_utils

from ig_jax.base import cli, signals
from ig_jax.base.errors import PEER_FAILED, UserError, check, one_line
from ig_jax.parallel import peers

T = TypeVar("T")
NAMES = ("IG_JAX_PROCESSES", "IG_JAX_PROCESS", "IG_JAX_COORDINATOR")
XPK = ("NNODES", "NODE_RANK", "JAX_COORDINATOR_ADDRESS")
# What a launcher says of the number of processes; more than one of them must have been joined.
PROMISES = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES")


@dataclasses.dataclass(frozen=True)
class Place:
    """What a launcher says of one process."""

    count: int
    index: int
    coordinator: str  # host:port of process 0
    said_by: str  # where the count was read
    devices: tuple[int, ...] | None = None  # of this host that the process gets, None for all


@contextlib.contextmanager
def together(values: flags.FlagValues) -> Iterator[None]:
    """Join the other processes of this run, before anything uses a device; whatever ends one of them ends all.

    Raises: UserError for an incomplete environment, or for another number of processes or devices than expected.
    """
    jax.config.update("jax_default_prng_impl", "threefry2x32")  # whatever the environment says: a seed is a seed
    jax.config.update("jax_threefry_partitionable", True)
    place = found()
    if place is not None and place.count > 1:
        _join(place, values)
    count = jax.process_count() if place is not None or values.expect_processes else 1
    said, expected = ("--expect_processes", values.expect_processes) if values.expect_processes else _promised(place)
    check(count == expected, "processes", count, f"{expected} as {said} says", "start all of them with one launcher")
    if values.expect_devices:
        fix = "look for a host that did not join, or for devices that are in use"
        check(
            jax.device_count() == values.expect_devices, "devices", jax.device_count(), f"{values.expect_devices}", fix
        )
    with sharing_fate():
        yield


@contextlib.contextmanager
def sharing_fate() -> Iterator[None]:
    """End all processes where the block fails in one; contexts around it, which may wait for peers, are not left."""
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1 or getattr(error, "agreed", False):
            raise
        if isinstance(error, jax.errors.JaxRuntimeError):  # a collective without a peer; its note says more
            time.sleep(peers.NOTICE)
            line = f"an exchange with other processes failed ({one_line(error)})"
            peers.LEAVING.acquire()
            print(f"ig_jax: error: {line}", file=sys.stderr, flush=True)
            peers.leave(line, PEER_FAILED)
        peers.LEAVING.acquire()
        peers.leave(cli.verdict(error)[0], cli.report(error))


def found() -> Place | None:
    """The place of this process in its run, None where no launcher says so.

    Raises: UserError for a launcher that has set only a part.
    """
    for names in (NAMES, XPK):
        values = [os.environ.get(name, "") for name in names]
        if any(values[:2]):
            return _explicit(names, *values)
    check(
        not os.environ.get(NAMES[2]), NAMES[2], os.environ.get(NAMES[2]), f"set together with {' and '.join(NAMES[:2])}"
    )
    kinds = (c for c in clusters.ClusterEnv._cluster_types if not c.opt_in_only_method and c is not clusters.K8sCluster)
    cluster = next((c for c in kinds if c.is_env_present()), None)
    if cluster is None and "JOB_COMPLETION_INDEX" in os.environ:  # a pod that is no part of a job runs alone
        cluster = clusters.K8sCluster
        fix = 'pip install "jax[k8s]"'
        check(cluster.is_env_present(), "JOB_COMPLETION_INDEX", os.environ["JOB_COMPLETION_INDEX"], "readable", fix)
    if cluster is None:
        return None
    count = cluster.get_process_count()
    if count == 1:
        return Place(1, 0, "", cluster.name)
    address = cluster.get_coordinator_address(60, os.environ.get("JAX_COORDINATOR_PORT"))
    return Place(count, cluster.get_process_id(), address, cluster.name, _devices(cluster, count))


def _explicit(names: tuple[str, ...], count: str, index: str, address: str) -> Place:
    if ":" not in address and "JAX_COORDINATOR_PORT" in os.environ:
        address += f":{os.environ['JAX_COORDINATOR_PORT']}"
    if not (count.isdigit() and index.isdigit() and ":" in address and int(index) < int(count)):
        expected, fix = "a count, an index below it and host:port", "start with launch/local.sh, or set all three"
        raise UserError(name=", ".join(names), value=[count, index, address], expected=expected, fix=fix)
    return Place(int(count), int(index), address, names[0])


def _devices(cluster, count: int) -> tuple[int, ...] | None:
    """The one GPU of a task that shares its node with others; all of them where it is alone or sees only its own."""
    given = os.environ.get("JAX_LOCAL_DEVICE_IDS", "")
    if given:
        return None if given == "all" else tuple(int(number) for number in given.split(","))
    local = cluster.get_local_process_id()
    nodes = os.environ.get("SLURM_STEP_NUM_NODES") or os.environ.get("SLURM_NNODES") or "1"
    shares = int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", 0)) > 1 or count > int(nodes)
    only_its_own = len(os.environ.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1
    return (local,) if local is not None and shares and not only_its_own else None


def _promised(place: Place | None) -> tuple[str, int]:
    """(who says so, the number of processes): the launcher that was joined, or one that was not."""
    if place is not None:
        return place.said_by, place.count
    for name in PROMISES:
        value = os.environ.get(name, "")
        count = int(value) if value.isdigit() else len([host for host in value.split(",") if host])
        if count > 1:
            return name, count
    return "nothing", 1


def _join(place: Place, values: flags.FlagValues) -> None:
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, and knows no other signal
    os.environ.pop("JAX_LOCAL_DEVICE_IDS", None)  # read above; JAX does not understand "all"
    missing = UserError(
        f"{place.coordinator} did not gather {place.count} processes in {values.init_timeout} s (this is process "
        f"{place.index}, {place.said_by} says how many)",
        name="processes",
        value=place.coordinator,
        expected=f"the address of process 0, which all {place.count} processes can reach",
        fix="look for the one that was not started, or has no such address",
    )
    with peers.within(values.init_timeout + 5, str(missing)):  # JAX aborts the process without a line
        try:
            jax.distributed.initialize(
                place.coordinator,
                place.count,
                place.index,
                list(place.devices) if place.devices else None,
                cluster_detection_method="deactivate",
                initialization_timeout=values.init_timeout + 30,
                heartbeat_timeout_seconds=values.heartbeat_timeout + 15,  # later than our own, whose line is clear
                shutdown_timeout_seconds=values.shutdown_timeout,
            )
        except RuntimeError as error:
            raise UserError(f"{missing}: {one_line(error)}", name="processes", value=place.coordinator) from error
    signals.farewells.append(peers.leave)
    peers.watch(values.heartbeat_timeout)


def check_alone(what: str) -> None:
    """Raise UserError if a launcher has started several processes of `what`, which runs in one."""
    place = found()
    count = 1 if place is None else place.count
    check(count == 1, "processes", count, f"1 for {what}", "it uses all devices of one host")


def is_first() -> bool:
    """Whether this is process 0, the one that writes files."""
    return jax.process_index() == 0


def from_first(array: np.ndarray) -> np.ndarray:
    """The array of process 0, on all processes; shape and dtype must agree."""
    if jax.process_count() == 1:
        return array
    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def wait_for_all(name: str) -> None:
    """Return once every process has called this."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def whole(array: jax.Array) -> np.ndarray:
    """An array that lies on the devices of all processes, on every process."""
    return np.asarray(array if jax.process_count() == 1 else multihost_utils.process_allgather(array, tiled=True))


def first_alone(action: Callable[[], T]) -> T:
    """`action()`, in process 0 before the others: it makes files that the others find."""
    if not is_first():
        wait_for_all("the first is done")
    result = action()
    if is_first():
        wait_for_all("the first is done")
    return result
