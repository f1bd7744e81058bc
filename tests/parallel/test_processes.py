"""Which processes a launcher promises, read from its environment; nothing is started."""

import jax
import numpy as np
import pytest
from absl import flags
from refusal import refused

from ig_jax.base import cli
from ig_jax.parallel import processes
from ig_jax.parallel.processes import Place

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[003-004]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_NUM_NODES": "2",
}
SLURM_PLACE = Place(16, 11, f"node003:{61440 + 1}", "slurm", (3,))


@pytest.mark.parametrize(
    "environment, place",
    [
        ({}, None),
        (
            {"IG_JAX_PROCESSES": "2", "IG_JAX_PROCESS": "1", "IG_JAX_COORDINATOR": "a:1"},
            Place(2, 1, "a:1", "IG_JAX_PROCESSES"),
        ),
        (
            {"NNODES": "4", "NODE_RANK": "3", "JAX_COORDINATOR_ADDRESS": "b", "JAX_COORDINATOR_PORT": "6002"},
            Place(4, 3, "b:6002", "NNODES"),
        ),
        (SLURM, SLURM_PLACE),
        # One task for a node gets all of its GPUs, and so does one that SLURM shows only its own.
        (
            SLURM | {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"},
            Place(2, 1, "node003:61441", "slurm"),
        ),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "3"}, Place(16, 11, "node003:61441", "slurm")),
        (SLURM | {"JAX_LOCAL_DEVICE_IDS": "all"}, Place(16, 11, "node003:61441", "slurm")),
        (SLURM | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, Place(16, 11, "node003:61441", "slurm", (0, 1))),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, Place(1, 0, "", "slurm")),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a pod that is no part of a job
    ],
)
def test_the_place_of_a_process(monkeypatch, environment, place):
    _only(monkeypatch, environment)
    assert processes.found() == place


@pytest.mark.parametrize(
    "environment, name",
    [
        ({"IG_JAX_PROCESSES": "2"}, ", ".join(processes.NAMES)),
        ({"IG_JAX_COORDINATOR": "a:1"}, "IG_JAX_COORDINATOR"),
        ({"IG_JAX_PROCESSES": "2", "IG_JAX_PROCESS": "2", "IG_JAX_COORDINATOR": "a:1"}, ", ".join(processes.NAMES)),
        ({"NNODES": "4", "NODE_RANK": "3"}, ", ".join(processes.XPK)),
    ],
)
def test_half_a_place_is_refused(monkeypatch, environment, name):
    _only(monkeypatch, environment)
    with refused(name):
        processes.found()


@pytest.mark.parametrize(
    "environment, arguments, name, value, expected",
    [
        # A pod or a job that this process would start on alone.
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, [], "processes", 1, "4 as TPU_WORKER_HOSTNAMES says"),
        ({"SLURM_NTASKS": "16"}, [], "processes", 1, "16 as SLURM_NTASKS says"),
        ({}, ["--expect_processes=2"], "processes", 1, "2 as --expect_processes says"),
        ({}, ["--expect_devices=3"], "devices", 8, "3"),
    ],
)
def test_a_part_of_a_run_is_refused(monkeypatch, environment, arguments, name, value, expected):
    _only(monkeypatch, environment)
    with refused(name, value, expected=expected), processes.together(_flags(*arguments)):
        pass


def test_one_process_runs_alone(monkeypatch):
    _only(monkeypatch, {"TPU_WORKER_HOSTNAMES": "localhost"})
    with processes.together(_flags("--expect_processes=1", "--expect_devices=8")):
        processes.check_alone("visualize")


def test_the_environment_does_not_change_the_draws(monkeypatch):
    _only(monkeypatch, {})
    with jax.default_prng_impl("threefry2x32"), jax.threefry_partitionable(True):
        drawn = jax.random.normal(jax.random.key(0), (4,))
    jax.config.update("jax_default_prng_impl", "rbg")  # as JAX_DEFAULT_PRNG_IMPL and JAX_THREEFRY_PARTITIONABLE do
    jax.config.update("jax_threefry_partitionable", False)
    with processes.together(_flags()):
        np.testing.assert_array_equal(jax.random.normal(jax.random.key(0), (4,)), drawn)


def _only(monkeypatch, environment):
    for name in (*SLURM, *processes.NAMES, *processes.XPK, *processes.PROMISES, "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def _flags(*arguments):
    values = flags.FlagValues()
    cli.define_launch(values)
    values(["command", *arguments])
    return values
