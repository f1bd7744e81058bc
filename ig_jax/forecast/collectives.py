"""Bytes that devices exchange in one run of a compiled program, by kind of collective and axis of the mesh."""

import dataclasses
import math
import re
from collections import Counter

import numpy as np
from jax.sharding import Mesh

from ig_jax.forecast.hlo import Computation, Instruction, Program

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
EVERYONE = "all"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange: its kind, the mesh axes it goes over, and its size on each device."""

    kind: str
    axes: str  # such as "fsdp" or "data+fsdp"
    members: int  # devices in one group
    bytes: int  # of what a device puts in; of what it gets out for an all-gather
    times: int  # in one run of the program

    @property
    def sent(self) -> float:
        """Bytes a device sends in one run, by the ring or torus algorithms that move the least."""
        share = (self.members - 1) / self.members
        return self.times * self.bytes * {"all-reduce": 2 * share, "collective-permute": 1}.get(self.kind, share)


def collectives(program: Program, mesh: Mesh) -> list[Collective]:
    """Every exchange of one run of the program, those inside loops and fusions included."""
    found: dict[str, Collective] = {}  # by channel: a TPU spreads one exchange over several fusions
    for computation, instruction, times in program.runs():
        places = [(computation, instruction)]
        if instruction.opcode == "fusion":
            places += program.inner(instruction)
        for where, inner in places:
            kind = inner.opcode.removesuffix("-start")
            if kind in KINDS:
                if kind == "all-reduce" and inner is not instruction and "scatter" in instruction.attributes:
                    kind = "reduce-scatter"  # a TPU fuses it from an all-reduce and the slice a device keeps
                channel = inner.attribute(r"channel_id=(\d+)") or inner.name
                found[channel] = _collective(kind, where, inner, times, mesh)
    return [exchange for exchange in found.values() if exchange.members > 1]


def moved(exchanges: list[Collective]) -> dict[str, dict[str, int]]:
    """{kind: {axes: bytes of one run}}."""
    totals: dict[str, Counter] = {}
    for exchange in exchanges:
        totals.setdefault(exchange.kind, Counter())[exchange.axes] += exchange.bytes * exchange.times
    return {kind: dict(axes) for kind, axes in totals.items()}


def _collective(kind: str, computation: Computation, instruction: Instruction, times: int, mesh: Mesh) -> Collective:
    given = sum(computation[name].bytes for name in instruction.operands)
    groups = _groups(instruction, mesh.size)
    members = groups.shape[-1] if kind != "collective-permute" else mesh.size
    size = given * members if kind == "all-gather" else given
    return Collective(kind, _axes(groups, mesh), members, size, times)


def _groups(instruction: Instruction, devices: int) -> np.ndarray:
    """Who exchanges with whom: [groups, members] of positions in the mesh."""
    text = instruction.attributes
    if found := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", text):
        return _lists(found[1])
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, tiles, order = ([int(n) for n in part.split(",")] if part else None for part in found.groups())
        return np.arange(devices).reshape(tiles).transpose(order).reshape(shape)
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? *"
                          r"\{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        over = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", found[4])]
        order = found[3] and [int(n) for n in found[3].split(",")]
        tiles = [int(n) for n in (found[2] or str(devices)).split(",")]
        grid = np.arange(devices).reshape(tiles).transpose(order or None).reshape(list(sizes.values()))
        grid = np.moveaxis(grid, over, range(grid.ndim - len(over), grid.ndim))
        return grid.reshape(-1, math.prod(grid.shape[grid.ndim - len(over):]))
    if found := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", text):
        return _lists(found[1])
    if "replica_groups={}" not in text:
        raise ValueError(f"a form of groups that is not known: {text[:200]}")
    return np.arange(devices)[None]


def _lists(text: str) -> np.ndarray:
    return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)])


def _axes(groups: np.ndarray, mesh: Mesh) -> str:
    """The axes of the mesh along which the members of a group differ."""
    places = np.stack(np.unravel_index(groups, mesh.devices.shape))
    varies = (places != places[..., :1]).any(axis=(1, 2))
    return "+".join(axis for axis, differs in zip(mesh.axis_names, varies) if differs) or EVERYONE
