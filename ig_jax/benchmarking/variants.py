"""Which workers a group of cases needs: ours of every case, and the peers of the same precision."""

import functools
import os

from ig_jax.benchmarking import peer, peer_numbers
from ig_jax.benchmarking.cases import Case
from ig_jax.benchmarking.compare import Variant
from ig_jax.benchmarking.worker import Worker


def variants_of(command: str, group: list[Case], peers: tuple[bool, ...], cache: str) -> list[Variant]:
    """Ours of each case and after it a peer for each of `peers` (whether it is compiled), once a precision.

    `cache` is an empty directory for compiled programs: a worker that comes back finds its own there.
    """
    found: list[Variant] = []
    for case in group:
        start = functools.partial(start_ours, command, case, JAX_COMPILATION_CACHE_DIR=cache)
        found.append(Variant(case.label, case, start))
        for compiled in peers:
            name = "diffusers compiled" if compiled else "diffusers eager"
            label = f"{case.name} b{case.batch} {case.model.dtype} {name}"
            if label not in [variant.label for variant in found]:
                found.append(Variant(label, case, functools.partial(start_peer, command, case, compiled), name))
    return found


def start_ours(command: str, case: Case, **variables: str) -> Worker:
    """A worker with our program of a case, and more environment variables."""
    return Worker(_make_ours, command, case, environment=environment(case) | variables)


def start_peer(command: str, case: Case, compiled: bool) -> Worker:
    """A worker with the peer's."""
    numbers = peer_numbers.numbers(case, command)
    return Worker(_make_peer, command, numbers, compiled, environment=environment(case))


def _make_ours(command: str, case: Case):
    from ig_jax.benchmarking import runners  # late: the peer's worker needs none of it

    return runners.MAKERS[command](case)


def _make_peer(command: str, numbers: dict, compiled: bool):
    return peer.MAKERS[command](numbers, compiled)


def environment(case: Case) -> dict[str, str]:
    """Threads that wait asleep, since another framework may have its turn; as many host devices as the case
    wants.
    """
    variables = {"OMP_WAIT_POLICY": "passive"}
    if case.devices:
        kept = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in flag]
        variables["XLA_FLAGS"] = " ".join([*kept, f"--xla_force_host_platform_device_count={case.devices}"])
    return variables
