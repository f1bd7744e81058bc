"""Bytes that devices exchange in one run of a compiled program, by kind of collective and mesh axes."""

import dataclasses
import math
import re
from collections import Counter

import numpy as np
from jax.sharding import Mesh

from ig_jax.forecast.hlo import Instruction, Program

SLICES = "slices"  # the axes of what goes over the network between TPU slices
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective: its kind, the mesh axes it goes over, and its size on each device."""

    kind: str
    axes: str  # such as "fsdp" or "data+fsdp"
    members: int  # devices of one group
    bytes: int  # of its input on one device; of an all-gather's output
    times: int  # it runs in one run of the program

    @property
    def sent(self) -> float:
        """Bytes that one device sends in one run, by the ring or torus algorithm that moves the least."""
        share = (self.members - 1) / self.members
        return self.times * self.bytes * {"all-reduce": 2 * share, "collective-permute": 1}.get(self.kind, share)


def collectives(program: Program, mesh: Mesh) -> list[Collective]:
    """All collectives of one run of the program, those inside loops and fusions included."""
    found: dict[str, Collective] = {}  # in fusions by channel: a TPU spreads one over several of them
    for computation, instruction, times in program.runs():
        places = [(computation, instruction)]
        if instruction.opcode == "fusion":
            places += program.inner(instruction)
        for where, inner in places:
            kind = inner.opcode.removesuffix("-start")
            if between := inner.attribute(r'_xla_megascale_transfer_type="(\w+)"') if kind == "send" else None:
                kind, size = between.lower().replace("_", "-"), where[inner.operands[0]].bytes
                found[inner.name] = Collective(kind, SLICES, _slices(inner), size, times)
                continue
            if kind in KINDS:
                if kind == "all-reduce" and inner is not instruction and "scatter" in instruction.attributes:
                    kind = "reduce-scatter"  # on a TPU: an all-reduce fused with the slice that a device keeps
                groups = _groups(inner, mesh.size)
                members = groups.shape[-1] if kind != "collective-permute" else mesh.size
                size = sum(where[name].bytes for name in inner.operands) * (members if kind == "all-gather" else 1)
                shared = inner.attribute(r"channel_id=(\d+)") if inner is not instruction else ""
                found[shared or inner.name] = Collective(kind, _axes(groups, mesh), members, size, times)
    return [exchange for exchange in found.values() if exchange.members > 1]


def _slices(send: Instruction) -> int:
    """How many slices take part, from a target such as "{1,2}x{0:3}"."""
    first = send.attribute(r'_xla_megascale_target="\{([\d,:]+)\}')
    ranges = [part.split(":") for part in (first or "0").split(",")]
    return sum(int(ends[-1]) - int(ends[0]) + 1 for ends in ranges)


def moved(exchanges: list[Collective]) -> dict[str, dict[str, int]]:
    """Bytes of one run as {kind: {axes: bytes}}."""
    totals: dict[str, Counter[str]] = {}
    for exchange in exchanges:
        totals.setdefault(exchange.kind, Counter())[exchange.axes] += exchange.bytes * exchange.times
    return {kind: dict(axes) for kind, axes in totals.items()}


def _groups(instruction: Instruction, devices: int) -> np.ndarray:
    """The groups that exchange: (groups, members) positions in the mesh."""
    text = instruction.attributes
    if found := re.search(r"(?:source_target_pairs|replica_groups)=\{(\{[\d,{}]*\})\}", text):
        return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])])
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, tiles, order = ([int(n) for n in part.split(",")] if part else None for part in found.groups())
        return np.arange(devices).reshape(tiles).transpose(order).reshape(shape)
    if found := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? *"
        r"\{([^}]*)\}",
        text,
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        over = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", found[4])]
        order = [int(n) for n in found[3].split(",")] if found[3] else None
        tiles = [int(n) for n in (found[2] or str(devices)).split(",")]
        grid = np.arange(devices).reshape(tiles).transpose(order).reshape(list(sizes.values()))
        grid = np.moveaxis(grid, over, range(grid.ndim - len(over), grid.ndim))
        return grid.reshape(-1, math.prod(grid.shape[grid.ndim - len(over) :]))
    if "replica_groups={}" not in text:
        raise ValueError(f"replica groups in an unknown form: {text[:200]}")
    return np.arange(devices)[None]


def _axes(groups: np.ndarray, mesh: Mesh) -> str:
    """The axes of the mesh along which the members of a group differ."""
    places = np.stack(np.unravel_index(groups, mesh.devices.shape))
    varies = (places != places[..., :1]).any(axis=(1, 2))
    return "+".join(axis for axis, differs in zip(mesh.axis_names, varies) if differs) or "all"
