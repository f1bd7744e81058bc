"""Machines by name, as devices to compile for; none of them has to be here.

  tpu:v5e:16x16   tpu:v5p:4x4x4   tpu:v6e:8x8     chips of one slice
  gpu:h200:8      gpu:h100:8      gpu:a100:8      GPUs of one box
  cpu:8                                           virtual devices of this machine
"""

import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from ig_jax.errors import UserError, check
from ig_jax.parallel.chips import CHIPS, Chip

TPUS = {"v5e": "v5litepod-{}", "v5p": "v5p-{}", "v6e": "v6e-{}"}  # accelerator types; v5p counts two cores a chip
GPUS = {"a100": (8, 0), "h100": (9, 0), "h200": (9, 0)}  # compute capability
MODULES = {"tpu": ("libtpu", "jax[tpu]"), "gpu": ("jax_plugins.xla_cuda12", "jax[cuda12]")}
EXAMPLES = "tpu:v5e:4x4, tpu:v5p:4x4x4, tpu:v6e:8x8, gpu:h200:8, gpu:h100:8, gpu:a100:8 or cpu:8"
FULL_BOX = 8  # GPUs behind one NVLink switch


@dataclasses.dataclass(frozen=True)
class Target:
    """One machine: its name, its devices to compile for, and the datasheet of one (None for a CPU)."""

    name: str
    devices: tuple
    chip: Chip | None

    @property
    def compiler_options(self) -> dict[str, str]:
        """What XLA must be told because there is no device to time its choices on.

        Without timings its own GPU matrix products can choose tiles that do not fit; the library's always do.
        """
        if self.devices[0].platform != "gpu":
            return {}
        return {"xla_gpu_autotune_level": "0", "xla_gpu_enable_triton_gemm": "False"}


def open_target(name: str) -> Target:
    """The machine of that name.  Raises: UserError for an unknown one, or wheels that are not installed."""
    kind, _, rest = name.partition(":")
    check(kind in ("tpu", "gpu", "cpu"), "--target", name, f"one such as {EXAMPLES}")
    if kind == "cpu":
        check(bool(re.fullmatch(r"[1-9]\d*", rest)), "--target", name, "cpu and a number of devices, such as cpu:8")
        return Target(name, _cpu_devices(name, int(rest)), None)
    model, _, size = rest.partition(":")
    known, form = (TPUS, r"\d+x\d+(x\d+)?") if kind == "tpu" else (GPUS, r"[1-9]\d*")
    check(model in known and bool(re.fullmatch(form, size)), "--target", name, f"one such as {EXAMPLES}")
    _check_installed(name, kind)
    devices = _tpu_devices(name, model, size) if kind == "tpu" else _gpu_devices(name, model, int(size))
    return Target(name, devices, CHIPS[model])


def _check_installed(name: str, kind: str) -> None:
    module, wheels = MODULES[kind]
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of the package around it
        found = None
    if found is None:
        raise UserError(f"--target={name!r} needs the compiler in {wheels}, which is not installed; "
                        f"pip install 'ig_jax[preflight]', or '{wheels}' alone")


def _cpu_devices(name: str, count: int) -> tuple:
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # JAX has started already, with the devices it has
        pass
    devices = jax.devices("cpu")
    check(len(devices) >= count, "--target", name, f"at most the {len(devices)} CPU devices of this process")
    return tuple(devices[:count])


def _tpu_devices(name: str, model: str, size: str) -> tuple:
    chips = math.prod(map(int, size.split("x")))
    accelerator = TPUS[model].format(2 * chips if model == "v5p" else chips)
    # libtpu asks the machine around it for these, and waits long where there is none; its lock guards chips, of
    # which a compilation holds none.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE=accelerator,
                      ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    return _topology(name, platform="tpu", topology_name=f"{model}:{size}")


def _gpu_devices(name: str, model: str, count: int) -> tuple:
    shape = f"1x{-(-count // FULL_BOX)}x{min(count, FULL_BOX)}"
    check(count <= FULL_BOX or count % FULL_BOX == 0, "--target", name, f"whole boxes of {FULL_BOX} GPUs")
    return _topology(name, platform="cuda", topology_name=shape, topology=shape, target_config=_gpu_config(model))


def _topology(name: str, **description) -> tuple:
    try:
        return tuple(topologies.get_topology_desc(**description).devices)
    except Exception as error:  # of many kinds; each says which part of the description it cannot be
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--target={name!r} must be a machine that its compiler knows ({reason[:120]}); "
                        f"give one such as {EXAMPLES}") from error


def _gpu_config(model: str) -> str:
    """XLA's description of a GPU that is not here. Source: NVIDIA's datasheets and tuning guides."""
    chip, (major, minor) = CHIPS[model], GPUS[model]
    shared, block, multiprocessors, l2, clock = {
        "a100": (167_936, 166_912, 108, 40 << 20, 1.41),
        "h100": (233_472, 232_448, 132, 50 << 20, 1.98),
        "h200": (233_472, 232_448, 132, 50 << 20, 1.98),
    }[model]
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
