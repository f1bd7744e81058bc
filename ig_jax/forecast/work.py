"""What one device does in a compiled program: operations of its matrix products, bytes to and from its memory."""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from ig_jax.forecast.hlo import Array, Computation, Instruction, Program

# Instructions that move nothing: names for what is there, and ends of what was counted at its start.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while", "conditional", "call",
        "partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "async-done", "iota"}
MATMUL = "__cublas$"
ATTENTION = "__cudnn$fmha"
# Products of attention forward (scores, values) and backward (scores again, and one for each gradient and each of
# its factors), each of 2 x tokens operations for one number of the output.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5


@dataclasses.dataclass(frozen=True)
class Work:
    """One instruction's part: floating-point operations of products, bytes of device memory, both times its runs."""

    flops: float
    traffic: float
    dtype: str  # of the products' operands; "" without products


def work(program: Program, tokens: int) -> Iterator[Work]:
    """The work of every instruction that a device runs; `tokens` N of one image, for attention in a library."""
    for computation, instruction, times in program.runs():
        if instruction.opcode in FREE or instruction.opcode.endswith("-done"):
            continue
        products = [(where, inner) for where, inner in _unfolded(program, computation, instruction) if _product(inner)]
        flops = sum(_flops(where, inner, tokens) for where, inner in products)
        dtype = _operands(*products[0])[0].dtype if products else ""
        yield Work(times * flops, times * _traffic(program, computation, instruction), dtype)


def attention_kernels(program: Program) -> str:
    """Which attention was compiled in: "cudnn" (with how often forward and backward), "pallas" or "xla"."""
    targets = [i.attribute(r'custom_call_target="([^"]*)"') or "" for _, i, _ in program.runs()]
    fused = [target for target in targets if target.startswith(ATTENTION)]
    if fused:
        backward = sum("Backward" in target for target in fused)
        return f"cudnn ({len(fused) - backward} forward, {backward} backward)"
    return "pallas" if "tpu_custom_call" in targets else "xla"


def _unfolded(program: Program, computation: Computation, instruction: Instruction):
    return program.inner(instruction) if instruction.opcode == "fusion" else [(computation, instruction)]


def _operands(computation: Computation, instruction: Instruction) -> list[Array]:
    return [array for name in instruction.operands for array in computation[name].arrays]


def _product(instruction: Instruction) -> bool:
    target = instruction.attribute(r'custom_call_target="([^"]*)"') or ""
    return instruction.opcode in ("dot", "convolution") or target.startswith((MATMUL, ATTENTION))


def _flops(computation: Computation, instruction: Instruction, tokens: int) -> float:
    out, operands = instruction.arrays[0], _operands(computation, instruction)
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, out, *operands[:2])
    if ATTENTION in instruction.attributes:
        products = BACKWARD_PRODUCTS if "Backward" in instruction.attributes else FORWARD_PRODUCTS
        return products * 2 * math.prod(out.shape) * tokens
    contracted = (instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
                  or instruction.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]') or "")
    sides = [operands[0].shape[int(n)] for n in re.findall(r"\d+", contracted)]
    return 2 * math.prod(out.shape) * math.prod(sides)


def _convolution_flops(instruction: Instruction, out: Array, given: Array, kernel: Array) -> float:
    """A TPU writes every product as a convolution; its padding is not multiplied."""
    left, right, result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    flops = 2 * math.prod(out.shape[result.index(label)] for label in "bf") * kernel.shape[right.index("i")]
    spatial = [label for label in result if label.isdigit()]
    window = lambda name, default: re.findall(  # noqa: E731
        r"-?\d+(?:_-?\d+)?", instruction.attribute(rf"window=\{{[^}}]*\b{name}=([\dx_\-]+)") or "") or default
    ones = ["1"] * len(spatial)
    strides, pads = window("stride", ones), window("pad", ["0_0"] * len(spatial))
    dilations, kernel_dilations = window("lhs_dilate", ones), window("rhs_dilate", ones)
    for n, label in enumerate(spatial):
        outs = np.arange(out.shape[result.index(label)])[:, None] * int(strides[n])
        taps = np.arange(kernel.shape[right.index(label)])[None] * int(kernel_dilations[n])
        place, dilation = outs + taps - int(pads[n].split("_")[0]), int(dilations[n])
        inside = (place >= 0) & (place <= (given.shape[left.index(label)] - 1) * dilation) & (place % dilation == 0)
        flops *= int(inside.sum())
    return flops


def _traffic(program: Program, computation: Computation, instruction: Instruction) -> float:
    """Bytes read and written in device memory: whole operands, but only the slices that are taken of one."""
    read = [_read(program, computation, instruction, position) for position in range(len(instruction.operands))]
    written = sum(array.bytes for array in instruction.arrays if not array.on_chip)
    if instruction.opcode == "fusion":
        body = program.computations[instruction.called[0]]
        root = list(body.values())[-1]
        if root.opcode == "dynamic-update-slice":  # in place: only what is put in is written
            written, read = 2 * body[root.operands[1]].bytes, [0.0]
    elif instruction.opcode == "dynamic-update-slice":
        written, read = 2 * computation[instruction.operands[1]].bytes, [0.0]
    elif instruction.opcode in ("dynamic-slice", "slice", "gather"):
        read = [written]
    return written + sum(read)


def _read(program: Program, computation: Computation, instruction: Instruction, position: int) -> float:
    given = computation[instruction.operands[position]]
    whole = sum(array.bytes for array in given.arrays if not array.on_chip)
    if instruction.opcode != "fusion" or not whole:
        return whole
    body = program.computations[instruction.called[0]]
    inside = next((i for i in body.values()
                   if i.opcode == "parameter" and i.attributes.startswith(f"({position})")), None)
    users = [i for i in body.values() if inside and inside.name in i.operands]
    if users and all(user.opcode in ("dynamic-slice", "slice", "gather") for user in users):
        return min(whole, sum(user.bytes for user in users))
    return whole
