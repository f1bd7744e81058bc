"""Machines by name, as devices to compile for without having them.

The chips of one or more TPU slices, the GPUs of one or more machines, or virtual devices of this machine's CPU.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from ig_jax.base.errors import UserError, check, one_line
from ig_jax.parallel.hardware import CHIPS, Chip

# Accelerator type of a slice, cores that it counts for each chip, dimensions of its mesh.
TPUS = {"v4": ("v4-{}", 2, 3), "v5e": ("v5litepod-{}", 1, 2), "v5p": ("v5p-{}", 2, 3), "v6e": ("v6e-{}", 1, 2)}
# The clouds' names of whole machines: Google's "a3-highgpu-8g", where the number is that of the GPUs, and Amazon's.
MACHINES = {"a2-ultragpu": "a100", "a3-highgpu": "h100", "a3-megagpu": "h100", "a3-ultragpu": "h200"}
MACHINES |= {"p4de.24xlarge": "a100", "p5.48xlarge": "h100", "p5e.48xlarge": "h200", "p5en.48xlarge": "h200"}
# Compute capability; shared memory of a multiprocessor and of a block, multiprocessors, L2 cache, clock in GHz.
GPUS = {
    "a100": ((8, 0), 167_936, 166_912, 108, 40 << 20, 1.41),
    "h100": ((9, 0), 233_472, 232_448, 132, 50 << 20, 1.98),
    "h200": ((9, 0), 233_472, 232_448, 132, 50 << 20, 1.98),
}
MODULES = {"tpu": ("libtpu", "jax[tpu]"), "gpu": ("jax_plugins.xla_cuda12", "jax[cuda12]")}
EXAMPLES = "v5e-16, 2xv5e-16 for two slices, v4-32, tpu:v5p:4x4x4, gpu:h100:8, a3-ultragpu-8g or cpu:8"
FULL_BOX = 8  # GPUs on one NVLink switch


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine: its name, its devices to compile for, and the datasheet of one of them (None for a CPU)."""

    name: str
    devices: tuple
    chip: Chip | None

    @property
    def compiler_options(self) -> dict[str, str | bool]:
        """Options of XLA for compiling without a GPU to time its choices on.

        Without timings, XLA's own matrix products can choose tiles that do not fit; the library's always fit.
        """
        if self.devices[0].platform != "gpu":
            return {}
        return {"xla_gpu_autotune_level": "0", "xla_gpu_enable_triton_gemm": "False"}


def open_target(name: str) -> Target:
    """Open the machine of that name.

    Raises: UserError for an unknown machine, or when its compiler is not installed.
    """
    found = re.fullmatch(r"([1-9]\d*)x(.+)", name)
    slices, one = (int(found[1]), found[2]) if found else (1, name)
    kind, model, size = described(one)
    check(kind == "tpu" or slices == 1, "--target", name, "slices of a TPU, such as 2xv5e-16", "count all GPUs or CPUs")
    known = (f"{slices}x" if slices > 1 else "") + ":".join(filter(None, (kind, model, size)))
    if kind == "cpu":
        return Target(known, _cpu_devices(name, int(size)), None)
    _check_installed(name, kind)
    devices = _tpu_devices(name, model, size, slices) if kind == "tpu" else _gpu_devices(name, model, int(size))
    return Target(known, devices, CHIPS[model])


def described(name: str) -> tuple[str, str, str]:
    """("cpu", "", count), ("gpu", model, count) or ("tpu", model, shape); one device where none are counted.

    "v5e-16" and "v5litepod-16" are 16 chips; "v4-32" and "v5p-32" are 16 too, since those names count cores.
    """
    if found := re.fullmatch(rf"(?:tpu:)?(v5litepod|{'|'.join(TPUS)})-(\d+)", name):
        model = found[1].replace("litepod", "e")
        return "tpu", model, _slice(name, model, int(found[2]))
    if (found := re.fullmatch(r"([\w-]+)-(\d)g|[\w.]+", name)) and (found[1] or name) in MACHINES:
        return "gpu", MACHINES[found[1] or name], found[2] or str(FULL_BOX)
    tpus, gpus = "|".join(TPUS), "|".join(GPUS)
    count, shape = r"(?::([1-9]\d*))?", r"(?::([1-9]\d*(?:x[1-9]\d*){1,2}))?"
    forms = rf"(cpu)(){count}", rf"(tpu):({tpus}){shape}", rf"(gpu):({gpus}){count}"
    matches = [found.groups() for form in forms if (found := re.fullmatch(form, name))]
    check(bool(matches), "--target", name, f"one such as {EXAMPLES}")
    kind, model, size = matches[0]
    return kind, model, size or ("x".join("1" * TPUS[model][2]) if kind == "tpu" else "1")


def _slice(name: str, model: str, count: int) -> str:
    """The shape of the slice that Google names after its count of chips or cores: the nearest to a square or cube."""
    _, cores, dimensions = TPUS[model]
    least, power = cores * (4 if dimensions == 3 else 1), (count // cores).bit_length() - 1
    whole = count >= least and count == cores << power
    check(whole, "--target", name, f"a power of two from {model}-{least} on", "or give the shape: tpu:v5e:4x4")
    sides = (2 ** ((power + n) // dimensions) for n in range(dimensions))
    return "x".join(map(str, sorted(sides, key=lambda side: side == 1)))


def compile_quickly() -> None:
    """Let a TPU's compiler optimize as little as it can, in all of this process."""
    jax.config.update("jax_optimization_level", "O0")


def _check_installed(name: str, kind: str) -> None:
    module, wheels = MODULES[kind]
    parents = module.split(".")[:-1]  # find_spec imports them
    found = all(map(importlib.util.find_spec, [*parents, module]))
    fix = f"pip install 'ig_jax[preflight]', or '{wheels}' alone"
    check(found, "--target", name, f"a target whose compiler ({wheels}) is installed", fix)


def _cpu_devices(name: str, count: int) -> tuple:
    with contextlib.suppress(RuntimeError):  # JAX has started already: its number of devices is fixed
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    check(len(devices) >= count, "--target", name, f"at most the {len(devices)} CPU devices of this process")
    return tuple(devices[:count])


def _tpu_devices(name: str, model: str, size: str, slices: int) -> tuple:
    chips, (accelerator, cores, _) = math.prod(map(int, size.split("x"))), TPUS[model]
    # libtpu would query these from the TPU VM and wait long for an answer. Its lock guards chips; compiling uses none.
    os.environ["TPU_ACCELERATOR_TYPE"] = accelerator.format(cores * chips)
    os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    options: dict[str, Any] = {"chip_config_name": "megacore"} if model == "v4" else {}  # two cores as one device
    if chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    return _topology(name, platform="tpu", topology_name=f"{model}:{size}", num_slices=slices, **options)


def _gpu_devices(name: str, model: str, count: int) -> tuple:
    shape = f"1x{-(-count // FULL_BOX)}x{min(count, FULL_BOX)}"
    check(count <= FULL_BOX or count % FULL_BOX == 0, "--target", name, f"whole boxes of {FULL_BOX} GPUs")
    return _topology(name, platform="cuda", topology_name=shape, topology=shape, target_config=_gpu_config(model))


def _topology(name: str, **description) -> tuple:
    try:
        return tuple(topologies.get_topology_desc(**description).devices)
    except Exception as error:  # of many types; one of a wrong shape talks of bounds that nobody has set
        why = "" if "INVALID_ARGUMENT" in str(error) else f" ({one_line(error, 120)})"
        raise UserError(
            name="--target",
            value=name,
            expected=f"a machine that its compiler knows{why}",
            fix=f"give one such as {EXAMPLES}",
        ) from error


def _gpu_config(model: str) -> str:
    """XLA's description of a GPU.  Source: NVIDIA's datasheets and tuning guides."""
    chip, ((major, minor), shared, block, multiprocessors, l2, clock) = CHIPS[model], GPUS[model]
    return f"""gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
      shared_memory_per_core: {shared} threads_per_core_limit: 2048 core_count: {multiprocessors}
      fpus_per_core: {128 if major == 9 else 64}
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: {int(chip.bandwidth)} l2_cache_size: {l2} clock_rate_ghz: {clock}
      device_memory_size: {chip.memory} shared_memory_per_block_optin: {block}
      cuda_compute_capability {{ major: {major} minor: {minor} }}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
    device_description_str: "NVIDIA {model.upper()}" """
