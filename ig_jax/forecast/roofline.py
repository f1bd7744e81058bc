"""FLOPs and memory traffic of a compiled program, and a roofline estimate of its time on a chip.

Each instruction takes the longer of its matrix products at the chip's rate and its bytes at the chip's bandwidth; the
bytes that devices exchange are added, as if none of that time were hidden. Nothing runs, so two digits are meant.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ig_jax.forecast.collectives import SLICES, Collective
from ig_jax.forecast.hlo import Array, Computation, Instruction, Program
from ig_jax.parallel.hardware import Chip

# Shares of the datasheet that large products and copies reach: 790 of 989 TFLOP/s and 4.3 of 4.8 TB/s, measured on an
# H200, and 798 of 989 on an H100. Assumed for every chip; none of the others has been measured.
PRODUCTS = 0.8
BANDWIDTH = 0.9
LINK = 0.8  # not measured
ASSUMPTIONS = (
    f"products at {PRODUCTS:.0%} and memory at {BANDWIDTH:.0%} of the datasheet, links and the network between "
    f"slices at {LINK:.0%} (that of v4 left out, several boxes of GPUs taken for one); collectives not hidden; "
    "launch gaps, data and host left out"
)

# Instructions that move nothing: names for existing arrays, and the ends of what was counted at its start.
FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota"),
    *("partition-id", "replica-id", "opt-barrier", "after-all", "async-start", "async-update", "async-done"),
)
ATTENTION = "__cudnn$fmha"
LIBRARY = ("__cublas$", ATTENTION)  # beginnings of the names of library calls that are products
# Products of attention: scores and values forward; scores again and one for each gradient and each of its factors
# backward. Each is 2 x tokens FLOPs for one element of the output.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5


class Cost(NamedTuple):
    """The cost of all runs of one instruction on one device."""

    flops: float  # of its matrix products
    traffic: float  # bytes read and written in device memory
    dtype: str  # of the products' operands; "" without products


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one run of a program on all devices."""

    products: float  # instructions bound by matrix products
    memory: float  # instructions bound by memory
    exchange: float  # collectives
    floor: float  # the products alone at the full rate of the datasheet

    @property
    def seconds(self) -> float:
        """All of it, one after the other."""
        return self.products + self.memory + self.exchange


def estimate(costs: Iterable[Cost], exchanges: Iterable[Collective], chip: Chip) -> Estimate:
    """The roofline estimate of one device's instructions and exchanges."""
    products = memory = floor = 0.0
    for cost in costs:
        compute = cost.flops / (chip.bfloat16 if cost.dtype == "bf16" else chip.float32)
        moving = cost.traffic / (BANDWIDTH * chip.bandwidth)
        floor += compute
        if compute / PRODUCTS >= moving:
            products += compute / PRODUCTS
        else:
            memory += moving
    within, between = LINK * chip.link, LINK * (chip.network or math.inf)
    exchange = sum(each.sent / (between if each.axes == SLICES else within) for each in exchanges)
    return Estimate(products, memory, exchange, floor)


def costs(program: Program, tokens: int) -> Iterator[Cost]:
    """The cost of every instruction; `tokens` N of one image, for attention in a library call."""
    for computation, instruction, times in program.runs():
        if instruction.opcode in FREE or instruction.opcode.endswith("-done"):
            continue
        fused = instruction.opcode == "fusion"
        inside = program.inner(instruction) if fused else [(computation, instruction)]
        products = [
            (where, inner)
            for where, inner in inside
            if inner.opcode in ("dot", "convolution") or _call_target(inner).startswith(LIBRARY)
        ]
        flops = sum(_flops(where, inner, tokens) for where, inner in products)
        dtype = _operands(*products[0])[0].dtype if products else ""
        yield Cost(times * flops, times * _traffic(program, computation, instruction), dtype)


def attention_kernel(program: Program) -> str:
    """The attention kernel that was compiled in: "cudnn" (with its forward and backward calls), "pallas" or "xla"."""
    targets = [_call_target(instruction) for _, instruction, _ in program.runs()]
    fused = [target for target in targets if target.startswith(ATTENTION)]
    if fused:
        backward = sum("Backward" in target for target in fused)
        return f"cudnn ({len(fused) - backward} forward, {backward} backward)"
    return "pallas" if "tpu_custom_call" in targets else "xla"


def _call_target(instruction: Instruction) -> str:
    return instruction.attribute(r'custom_call_target="([^"]*)"')


def _operands(computation: Computation, instruction: Instruction) -> list[Array]:
    return [array for name in instruction.operands for array in computation[name].arrays]


def _flops(computation: Computation, instruction: Instruction, tokens: int) -> float:
    out, operands = instruction.arrays[0], _operands(computation, instruction)
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, out, *operands[:2])
    if ATTENTION in instruction.attributes:
        products = BACKWARD_PRODUCTS if "Backward" in instruction.attributes else FORWARD_PRODUCTS
        return products * 2 * math.prod(out.shape) * tokens
    contracted = instruction.attribute(r'(?:lhs_contracting_dims=\{|"lhs_contracting_dimensions":\[)([^\]}]*)')
    sides = [operands[0].shape[int(n)] for n in re.findall(r"\d+", contracted)]
    return 2 * math.prod(out.shape) * math.prod(sides)


def _convolution_flops(instruction: Instruction, out: Array, given: Array, kernel: Array) -> float:
    """FLOPs of a convolution, as which a TPU writes every product; its padding is not multiplied."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels, instruction.attributes
    left, right, result = labels.groups()
    flops = 2 * math.prod(out.shape[result.index(label)] for label in "bf") * kernel.shape[right.index("i")]
    spatial = [label for label in result if label.isdigit()]

    def window(name: str, default: str) -> list[str]:
        found = instruction.attribute(rf"window=\{{[^}}]*\b{name}=([\dx_\-]+)")
        return re.findall(r"-?\d+(?:_-?\d+)?", found) or [default] * len(spatial)

    strides, pads = window("stride", "1"), window("pad", "0_0")
    dilations, kernel_dilations = window("lhs_dilate", "1"), window("rhs_dilate", "1")
    for n, label in enumerate(spatial):
        outs = np.arange(out.shape[result.index(label)])[:, None] * int(strides[n])
        taps = np.arange(kernel.shape[right.index(label)])[None] * int(kernel_dilations[n])
        place, dilation = outs + taps - int(pads[n].split("_")[0]), int(dilations[n])
        inside = (place >= 0) & (place <= (given.shape[left.index(label)] - 1) * dilation) & (place % dilation == 0)
        flops *= int(inside.sum())
    return flops


def _traffic(program: Program, computation: Computation, instruction: Instruction) -> float:
    """Bytes read and written in device memory: whole operands, except where only slices of one are used."""
    fused = instruction.opcode == "fusion"
    body = program.computations[instruction.called[0]] if fused else computation
    root = list(body.values())[-1] if fused else instruction
    if root.opcode == "dynamic-update-slice":  # in place: only the update is written
        return 2 * body[root.operands[1]].bytes
    written = instruction.bytes_in_memory
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * written
    given = [computation[name] for name in instruction.operands]
    if not fused:
        return written + sum(operand.bytes_in_memory for operand in given)
    return written + sum(_read(body, position, operand.bytes_in_memory) for position, operand in enumerate(given))


def _read(body: Computation, position: int, whole: int) -> int:
    """Bytes that a fusion reads of the operand at `position`: its slices where it uses nothing else of it."""
    parameters = (i for i in body.values() if i.opcode == "parameter" and i.attributes.startswith(f"({position})"))
    name = next((parameter.name for parameter in parameters), None)
    users = [i for i in body.values() if name in i.operands]
    if users and all(user.opcode in ("dynamic-slice", "slice", "gather") for user in users):
        return min(whole, sum(user.bytes for user in users))
    return whole
