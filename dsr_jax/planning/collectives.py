"""Collective operations of a compiled program: kind, participants, bytes, network."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from dsr_jax.planning.hlo import Computation, Instruction, Program

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)


@dataclass(frozen=True)
class Collective:
    """Collective operation of one kind and size.

    Attributes:
      kind: One of COLLECTIVES.
      group: Number of participating devices; for network "DCN", of slices or nodes.
      bytes: Size of the whole array that is gathered, reduced or sent, on one device.
      network: "ICI" within a TPU slice or a node of GPUs (there: NVLink), "DCN" between them.
      links: Number of devices of a node whose links to other nodes share the bytes.
    """

    kind: str
    group: int
    bytes: int
    network: str = "ICI"
    links: int = 1

    @property
    def wire_bytes(self) -> float:
        """Bytes that each device sends, with a ring algorithm."""
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.bytes
        fraction = (self.group - 1) / max(self.group, 1) / self.links
        return self.bytes * fraction * (2 if self.kind == "all-reduce" else 1)


def collectives(
    program: Program, computation: Computation, instruction: Instruction
) -> list[Collective]:
    """Returns what an instruction sends: nothing, or one collective for each network it takes.

    Raises:
      ValueError: If the notation of its groups of devices is unknown.
    """
    if instruction.opcode == "send" and instruction.attribute(_TRANSFER):
        return [_between_slices(program, computation, instruction)]
    kind = instruction.opcode.removesuffix("-start")
    # A collective that overlaps with several fusions appears in each of them.
    piece = instruction.attribute(r'"async_collective_fusion_config":\{"flag_start":"(-?\d+)"')
    if kind not in COLLECTIVES or piece not in ("", "-1"):
        return []
    operands = sum(array.bytes for array in computation.operand_arrays(instruction))
    results = sum(array.bytes for array in instruction.arrays)
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        results -= operands  # The result includes the operands.
    # In TPU programs a reduce-scatter is an all-reduce of which each device takes its slice.
    if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    size = results if kind == "all-gather" else operands
    if program.gpus and program.slices > 1:
        return _among_nodes(program, instruction, kind, size)
    return [Collective(kind, _group_size(instruction), size)]


_TRANSFER = r'_xla_megascale_transfer_type="(\w+)"'


def _between_slices(
    program: Program, computation: Computation, instruction: Instruction
) -> Collective:
    """Returns the collective of a transfer to the host, whose runtime connects the slices.

    The compiler lists the slices if all participate; otherwise all are assumed to.
    """
    kind = instruction.attribute(_TRANSFER).lower().replace("_", "-")
    named = instruction.attribute(r'_xla_megascale_target="\{([\d,]+)\}')
    group = len(named.split(",")) if named else program.slices
    size = computation.operand_arrays(instruction)[0].bytes
    return Collective(kind, group, size * group if kind == "all-gather" else size, "DCN")


def _among_nodes(
    program: Program, instruction: Instruction, kind: str, size: int
) -> list[Collective]:
    """Returns a collective of GPUs as one over NVLink, one over the nodes' network, or both.

    Between nodes only what another node needs is sent once, over the links of all participants of
    a node; in an all-to-all each of them has bytes of its own for every other device.
    """
    if kind == "collective-permute":
        pairs = np.array(_pairs(instruction)) // program.gpus
        crosses = bool((pairs[:, 0] != pairs[:, 1]).any())
        return [Collective(kind, len(pairs), size, "DCN" if crosses else "ICI")]
    members = _members(instruction)
    nodes = len(set(members // program.gpus))
    each = len(members) // nodes
    found = [Collective(kind, len(members), size)] if each > 1 else []
    if nodes > 1:
        links = 1 if kind.endswith("all-to-all") else each
        found.append(Collective(kind, nodes, size, "DCN", links))
    return found


def _group_size(instruction: Instruction) -> int:
    pairs = _pairs(instruction)
    return len(pairs) if pairs else len(_members(instruction))


def _pairs(instruction: Instruction) -> list[tuple[int, int]]:
    """Returns the (source, target) devices of a permutation; [] for other collectives."""
    listed = instruction.attribute(r"source_target_pairs=\{(.*?)\}\}")
    return [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)", listed)]


def _members(instruction: Instruction) -> np.ndarray:
    """Returns the devices of the first group, from any of XLA's notations.

    Raises:
      ValueError: If the notation is unknown.
    """
    text = instruction.attributes
    if found := re.search(r"replica_groups=(\[\d+,\d+\])(<=\S*?)(?:, |$)", text):
        return _iota(found.group(1), found.group(2))[0]
    if listed := instruction.attribute(r"replica_groups=\{\{([\d,]+)\}"):
        return np.array(_numbers(listed))
    if found := re.search(r"replica_groups=mesh\[(.*?)\](.*?)\{(.*?)\}", text):
        return _mesh_groups(*found.groups())[0]
    raise ValueError(f"unknown notation of groups in {instruction.name}: {text[:200]}")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _iota(shape: str, origin: str) -> np.ndarray:
    """Returns the array of a notation such as [4,2]<=[2,4]T(1,0): counted, transposed, reshaped."""
    found = re.match(r"(?:<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?", origin)
    if found is None:
        raise ValueError(f"unknown notation of devices: {origin!r}")
    sizes = _numbers(found.group(1))
    devices = np.arange(math.prod(sizes)).reshape(sizes)
    if found.group(2):
        devices = devices.transpose(_numbers(found.group(2)))
    return devices.reshape(_numbers(shape.strip("[]")))


def _mesh_groups(axes: str, origin: str, chosen: str) -> np.ndarray:
    """Returns the groups along some axes of a mesh, of which an axis 'a':(2)4 is a part.

    That is 4 of the devices along 'a', each 1 / (2 x 4) of the axis from the next.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    listed = re.search(r"device_ids=\((.*)\)", origin)
    shape = ",".join(map(str, sizes.values()))
    devices = _iota(shape, listed.group(1) if listed else f"[{math.prod(sizes.values())}]")
    parts: list[int] = []
    grouped: list[int] = []
    wanted = {
        name: (int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", chosen)
    }
    for name, size in sizes.items():
        before, within = wanted.get(name, (size, 1))
        if name in wanted:
            grouped.append(len(parts) + 1)
        parts += [before, within, size // (before * within)]
    rest = [axis for axis in range(len(parts)) if axis not in grouped]
    width = math.prod(parts[axis] for axis in grouped)
    return devices.reshape(parts).transpose(*rest, *grouped).reshape(-1, width)
