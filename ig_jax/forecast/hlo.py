"""A compiled program as its text says it: instructions with their sizes, and how often each one runs.

XLA's own cost analysis sees the body of a loop once, and says nothing about collectives; the text has both.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

# Bytes of one element; "token" and "opaque" hold nothing.
ITEM_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
    "u64": 8, "f64": 8, "c64": 8, "c128": 16, "token": 0, "opaque": 0, "s4": 0.5, "u4": 0.5,
} | {kind: 1 for kind in ("f8e4m3fn", "f8e5m2", "f8e4m3b11fnuz", "f8e4m3fnuz", "f8e5m2fnuz", "f8e4m3", "f8e3m4")}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_NAMED = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"(?:(ENTRY) )?%?([\w.\-]+) \(.*\) -> .* \{$")
_BODY, _CONDITION = (rf"{name}=%?([\w.\-]+)" for name in ("body", "condition"))
_CALLED = re.compile(r"\b(?:calls|body|to_apply|branch_computations|true_computation|false_computation)="
                     r"(\{[^}]*\}|%?[\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's value, as one device holds it."""

    dtype: str
    shape: tuple[int, ...]
    layout: str

    @property
    def bytes(self) -> int:
        """Bytes of its elements, without the padding of tiles."""
        return int(math.prod(self.shape) * ITEM_BYTES[self.dtype])

    @property
    def on_chip(self) -> bool:
        """Whether it lives in a TPU's vector memory, memory space 1, rather than in HBM."""
        return "S(1)" in self.layout


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # of its value; several for a tuple
    operands: tuple[str, ...]
    attributes: str

    @property
    def bytes(self) -> int:
        """Bytes of its value."""
        return sum(array.bytes for array in self.arrays)

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations it runs."""
        names = [re.findall(r"[\w.\-]+", match) for match in _CALLED.findall(self.attributes)]
        return tuple(name for group in names for name in group)

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression over the attributes."""
        found = re.search(pattern, self.attributes)
        return found and found[1]


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
    """A module's computations by name, each with its instructions in order."""

    computations: dict[str, Computation]
    entry: str

    def runs(self) -> Iterator[tuple[Computation, Instruction, int]]:
        """(computation, instruction, times it runs in one call), not descending into fusions and reducers."""
        yield from self._runs(self.entry, 1)

    def _runs(self, name: str, times: int) -> Iterator[tuple[Computation, Instruction, int]]:
        computation = self.computations[name]
        for instruction in computation.values():
            yield computation, instruction, times
            if instruction.opcode == "while":
                yield from self._runs(instruction.attribute(_BODY), times * self.trips(instruction))
            elif instruction.opcode == "conditional":  # as if each branch ran: an upper bound
                for branch in instruction.called:
                    yield from self._runs(branch, times)
            elif instruction.opcode in ("call", "async-start"):
                yield from self._runs(instruction.called[0], times)

    def trips(self, loop: Instruction) -> int:
        """Iterations of a while loop: the compiler's note, or its counter's limit over its step, from 0.

        1 for a loop that ends when its data say so, as an adaptive solver's.
        """
        known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"')
        if known:
            return int(known)
        condition, body = (self.computations[loop.attribute(part)] for part in (_CONDITION, _BODY))
        ends = list(condition.values())[-1]
        sides = [condition[name] for name in ends.operands]
        if ends.opcode != "compare" or [side.opcode for side in sides] != ["get-tuple-element", "constant"]:
            return 1
        advanced = body[list(body.values())[-1].operands[int(sides[0].attribute(r"index=(\d+)"))]]
        steps = [body[name] for name in advanced.operands if body[name].opcode == "constant"]
        return -(-_constant(sides[1]) // _constant(steps[0])) if steps else 1

    def inner(self, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
        """Every instruction of the computations that one runs, whatever their depth."""
        for name in instruction.called:
            computation = self.computations[name]
            for inner in computation.values():
                yield computation, inner
                yield from self.inner(inner)


def parse(text: str) -> Program:
    """The program of a compiled module's text (jax.stages.Compiled.as_text)."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (named := _NAMED.match(line)):
            current[named[1]] = _instruction(named[1], re.sub(r"/\*[^*]*\*/", "", line[named.end():]))
    return Program(computations, entry)


def _instruction(name: str, rest: str) -> Instruction:
    """An instruction from the text behind its name: value, opcode(operands), attributes."""
    value_end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    value, rest = rest[:value_end], rest[value_end:].lstrip()
    opening = rest.index("(")
    end = _closing(rest, opening)
    operands, attributes = rest[opening + 1 : end - 1], rest[end:]
    opcode = rest[:opening]
    if opcode in ("constant", "parameter"):
        return Instruction(name, opcode, arrays_of(value), (), f"({operands}){attributes}")
    return Instruction(name, opcode, arrays_of(value), tuple(re.findall(r"%([\w.\-]+)", operands)), attributes)


def _constant(instruction: Instruction) -> int:
    return int(instruction.attribute(r"^\((-?\d+)\)"))


def _closing(text: str, opening: int) -> int:
    """The place just behind the parenthesis that closes the one at `opening`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"unbalanced parentheses in {text[:80]}")


def arrays_of(value: str) -> tuple[Array, ...]:
    """The arrays of a printed value such as f32[8,16]{1,0} or a tuple of them."""
    return tuple(
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), layout or "")
        for dtype, shape, layout in _ARRAY.findall(value)
    )
