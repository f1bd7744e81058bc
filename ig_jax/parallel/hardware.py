"""Accelerators by datasheet: what a roofline, a memory check and a utilisation are stated against.

Sources: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e), NVIDIA's A100, H100 and H200 datasheets (SXM, dense products).
"""

import dataclasses
import os

import jax

GB = 10**9
GIB = 2**30
TERA = 10**12


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them; bytes, FLOP/s, bytes/s."""

    name: str
    kinds: tuple[str, ...]  # beginnings of jax.Device.device_kind
    memory: int  # bytes; of a TPU what its compiler gives to a program
    bandwidth: float  # of that memory, bytes/s
    bfloat16: float  # dense matrix products, FLOP/s
    float32: float  # the same at JAX's default precision for float32 operands
    link: float  # bytes/s that one device sends to its neighbours in the same slice or box, all links
    network: float | None = None  # bytes/s that one device sends to other slices; None where no datasheet says so


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", ("TPU v4",), int(30.75 * GIB), 1228 * GB, 275 * TERA, 275 * TERA, 300 * GB),
        Chip(
            "v5e", ("TPU v5 lite", "TPU v5e"), int(15.75 * GIB), 819 * GB, 197 * TERA, 197 * TERA, 200 * GB, 3.125 * GB
        ),
        Chip("v5p", ("TPU v5p", "TPU v5"), int(95.74 * GIB), 2765 * GB, 459 * TERA, 459 * TERA, 600 * GB, 6.25 * GB),
        Chip(
            "v6e", ("TPU v6 lite", "TPU v6e"), int(31.25 * GIB), 1640 * GB, 918 * TERA, 918 * TERA, 448 * GB, 12.5 * GB
        ),
        Chip(
            "a100-40gb",
            ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
            40 * 10**9,
            1555 * GB,
            312 * TERA,
            156 * TERA,
            300 * GB,
        ),
        Chip("a100", ("NVIDIA A100",), 80 * 10**9, 2039 * GB, 312 * TERA, 156 * TERA, 300 * GB),
        Chip("h100", ("NVIDIA H100",), 80 * 10**9, 3350 * GB, 989 * TERA, 494 * TERA, 450 * GB),
        Chip("h200", ("NVIDIA H200",), 141 * 10**9, 4800 * GB, 989 * TERA, 494 * TERA, 450 * GB),
    )
}


def chip_of(device_kind: str) -> Chip | None:
    """The datasheet of a jax.Device.device_kind, the first that fits; None for one not listed, a CPU among them."""
    return next((c for c in CHIPS.values() if device_kind.startswith(c.kinds)), None)


PREALLOCATED = "XLA_PYTHON_CLIENT_MEM_FRACTION"


def usable_memory(device: jax.Device) -> int | None:
    """Bytes of a device that a run gets, None where its datasheet is not listed.

    JAX takes three quarters of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
    """
    chip = chip_of(device.device_kind)
    if chip is None:
        return None
    return int(chip.memory * float(os.environ.get(PREALLOCATED, "0.75"))) if device.platform == "gpu" else chip.memory
