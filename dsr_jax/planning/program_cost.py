"""FLOPs, memory traffic and communication of a compiled program on one device, by part."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from dsr_jax.planning.hlo import Array, Computation, Instruction, Program

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
REST = "the rest"


@dataclass(frozen=True)
class Collective:
    """Collective operation of one kind and size.

    Attributes:
      kind: One of COLLECTIVES.
      group: Number of participating devices, or of slices for network "DCN".
      bytes: Size of the whole array that is gathered, reduced or sent, on one device.
      network: "ICI" within a TPU slice, "DCN" between slices.
    """

    kind: str
    group: int
    bytes: int
    network: str = "ICI"

    @property
    def wire_bytes(self) -> float:
        """Bytes that each device sends, with a ring algorithm."""
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.bytes
        share = (self.group - 1) / max(self.group, 1)
        return self.bytes * share * (2 if self.kind == "all-reduce" else 1)


@dataclass
class Cost:
    """Cost of a part of a program, on one device.

    Attributes:
      flops: FLOPs of matmuls and convolutions.
      hbm_bytes: Bytes read from and written to main memory by the instructions.
      collectives: Number of executions of each collective.
      unknown_loops: Loops of unknown trip count, counted once.
    """

    flops: float = 0
    hbm_bytes: float = 0
    collectives: Counter[Collective] = field(default_factory=Counter)
    unknown_loops: int = 0

    def add(self, other: Cost, times: int = 1) -> None:
        """Adds another part's cost, multiplied by `times`."""
        self.flops += times * other.flops
        self.hbm_bytes += times * other.hbm_bytes
        for collective, count in other.collectives.items():
            self.collectives[collective] += times * count
        self.unknown_loops += other.unknown_loops

    @property
    def wire_bytes(self) -> float:
        """Bytes that the device sends within its slice."""
        return self._sent("ICI")

    @property
    def dcn_bytes(self) -> float:
        """Bytes that the device sends to other slices."""
        return self._sent("DCN")

    def _sent(self, network: str) -> float:
        return sum(
            count * collective.wire_bytes
            for collective, count in self.collectives.items()
            if collective.network == network
        )


@dataclass(frozen=True)
class Part:
    """Scanned stack of layers, or the rest of the program.

    Attributes:
      name: Name such as "forward blocks_reg".
      trips: Trip count of the loop.
      cost: Total cost of all trips.
    """

    name: str
    trips: int
    cost: Cost


def split_program(program: Program) -> list[Part]:
    """Splits a program into its scanned stacks, in program order, and the rest."""
    found, rest = [], Cost()
    for instruction in program.entry:
        cost = _cost(program, program.entry, instruction)
        # The compiler adds its own loops over the shards of a matmul.
        if instruction.opcode == "while" and instruction.op_name.endswith("/while"):
            name = _scan_name(program, instruction)
            found.append(Part(name, program.trips(instruction) or 1, cost))
        else:
            rest.add(cost)
    return [*found, Part(REST, 1, rest)]


def total(parts: list[Part]) -> Cost:
    """Returns the sum of all parts."""
    cost = Cost()
    for part in parts:
        cost.add(part.cost)
    return cost


def _scan_name(program: Program, loop: Instruction) -> str:
    """Returns the direction and the Flax name of the loop's body."""
    (body,) = loop.called("body")
    within = re.compile(r"/while/body/(?:(?:closed_call|checkpoint|rematted_computation)/)*(\w+)/")
    names = Counter(
        found.group(1)
        for instruction in program.computations[body]
        if (found := within.search(instruction.op_name))
    )
    network = re.search(r"^jit\(\w+\)/(?:\w+\()*(\w+)", loop.op_name)
    direction = "backward" if "transpose(" in loop.op_name else "forward"
    words = [direction, network.group(1) if network else "", *(n for n, _ in names.most_common(1))]
    return " ".join(filter(None, words))


def _cost(program: Program, computation: Computation, instruction: Instruction) -> Cost:
    """Returns the cost of an instruction of `computation`, including computations it calls."""
    cost = Cost(hbm_bytes=_hbm_bytes(program, computation, instruction))
    if instruction.opcode == "while":
        trips = program.trips(instruction)
        cost.add(_body_cost(program, instruction.called("body")), trips or 1)
        cost.unknown_loops += trips is None
    elif instruction.opcode in ("call", "conditional"):
        cost.add(_body_cost(program, instruction.called("to_apply")))
        cost.add(_body_cost(program, instruction.called("branch_computations")))
    for where, inner in _with_fused(program, computation, instruction):
        cost.flops += _flops(where, inner)
        if found := _collective(program, where, inner):
            cost.collectives[found] += 1
    return cost


def _body_cost(program: Program, names: list[str]) -> Cost:
    cost = Cost()
    for name in names:
        body = program.computations[name]
        for instruction in body:
            cost.add(_cost(program, body, instruction))
    return cost


def _with_fused(
    program: Program, computation: Computation, instruction: Instruction
) -> Iterator[tuple[Computation, Instruction]]:
    """Yields the instruction, and those of its fusions and asynchronous calls."""
    yield computation, instruction
    for name in instruction.called("calls"):
        for inner in program.computations[name]:
            yield from _with_fused(program, program.computations[name], inner)


def _collective(
    program: Program, computation: Computation, instruction: Instruction
) -> Collective | None:
    if instruction.opcode == "send" and instruction.attribute(_TRANSFER):
        return _between_slices(program, computation, instruction)
    kind = instruction.opcode.removesuffix("-start")
    # A collective that overlaps with several fusions appears in each of them.
    piece = instruction.attribute(r'"async_collective_fusion_config":\{"flag_start":"(-?\d+)"')
    if kind not in COLLECTIVES or piece not in ("", "-1"):
        return None
    operands = sum(array.bytes for array in _operands(computation, instruction))
    results = sum(array.bytes for array in instruction.arrays)
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        results -= operands  # The result includes the operands.
    # In TPU programs a reduce-scatter is an all-reduce of which each device takes its slice.
    if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    size = results if kind == "all-gather" else operands
    return Collective(kind, _group_size(instruction), size)


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
    size = _operands(computation, instruction)[0].bytes
    return Collective(kind, group, size * group if kind == "all-gather" else size, "DCN")


def _group_size(instruction: Instruction) -> int:
    """Returns the number of communicating devices, from any of XLA's notations.

    Raises:
      ValueError: If the notation is unknown.
    """
    if pairs := instruction.attribute(r"source_target_pairs=\{(.*?)\}\}"):
        return pairs.count("{")
    if iota := instruction.attribute(r"replica_groups=\[\d+,(\d+)\]"):
        return int(iota)
    if listed := instruction.attribute(r"replica_groups=\{\{([\d,]+)\}"):
        return len(listed.split(","))
    mesh = instruction.attribute(r"replica_groups=mesh\[(.*?)\]")
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh))
    axes = instruction.attribute(r"replica_groups=mesh\[.*?\][^{]*\{(.*?)\}")
    chosen = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes)
    if not chosen:
        raise ValueError(
            f"unknown notation of groups in {instruction.name}: {instruction.attributes[:200]}"
        )
    return math.prod(int(part or sizes[axis]) for axis, part in chosen)


def _operands(computation: Computation, instruction: Instruction) -> list[Array]:
    return [
        array
        for name in instruction.operands
        if name in computation.instructions
        for array in computation.instructions[name].arrays
    ]


def _flops(computation: Computation, instruction: Instruction) -> float:
    """Returns the FLOPs of a matmul, two per multiply-accumulate; 0 for anything else."""
    if instruction.opcode == "dot":
        lhs = _operands(computation, instruction)[0]
        contracted = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
        depth = math.prod(lhs.shape[int(axis)] for axis in contracted.split(",") if axis)
        return 2 * depth * math.prod(instruction.arrays[0].shape)
    if instruction.opcode == "convolution":
        return _convolution_flops(computation, instruction)
    if instruction.opcode == "custom-call":
        return _attention_flops(computation, instruction)
    return 0


_SPLASH_MATMULS = {"fwd": 2, "dkv": 5}
"""Matmuls of queries x keys x channels in splash's two kernels; dkv computes all gradients."""


def _attention_flops(computation: Computation, instruction: Instruction) -> float:
    """Returns the FLOPs of a splash kernel, which XLA does not count, including padding."""
    kernel = re.match(r"splash_mha_(fwd|dkv)", instruction.name)
    if kernel is None:
        return 0
    # Queries [B, H, L, K] come before keys [B, H, M, K]; all other operands have fewer axes.
    q, k = [a for a in _operands(computation, instruction) if len(a.shape) == 4][:2]
    return 2 * _SPLASH_MATMULS[kernel.group(1)] * math.prod(q.shape) * k.shape[2]


def _convolution_flops(computation: Computation, instruction: Instruction) -> float:
    """Returns the FLOPs of a convolution as XLA counts them.

    Padding and gaps between dilated inputs cost nothing. This matters on TPUs, whose compiler turns
    a batched matmul into a convolution over the batch with windows that each contain one input.
    """
    lhs, rhs = _operands(computation, instruction)[:2]
    labels = instruction.attribute(r"dim_labels=(\S+?)(?:,|$)")
    inputs, _, outputs = re.split(r"_|->", labels)
    window = dict(re.findall(r"(\w+)=(\S+)", instruction.attribute(r"window=\{([^}]*)\}")))
    positions = 1
    for axis in sorted(label for label in outputs if label.isdigit()):
        index = int(axis)
        side = lhs.shape[inputs.index(axis)]
        count = instruction.arrays[0].shape[outputs.index(axis)]
        size, stride, holes, dilation = (
            int(window[key].split("x")[index]) if key in window else 1
            for key in ("size", "stride", "lhs_dilate", "rhs_dilate")
        )
        low = int(window["pad"].split("x")[index].split("_")[0]) if "pad" in window else 0
        indices = np.arange(count)[:, None] * stride + np.arange(size) * dilation - low
        inside = (indices >= 0) & (indices <= (side - 1) * holes) & (indices % holes == 0)
        positions *= int(inside.sum())
    groups = 1
    for key in ("feature_group_count", "batch_group_count"):
        groups *= int(instruction.attribute(rf"{key}=(\d+)") or 1)
    batch, features = (lhs.shape[inputs.index(label)] for label in "bf")
    out_features = instruction.arrays[0].shape[outputs.index("f")]
    return 2 * batch * features * out_features * positions / groups


_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while"),
    *("conditional", "call", "partition-id", "replica-id", "iota", "opt-barrier"),
}
"""Opcodes of instructions without memory traffic of their own."""


def _hbm_bytes(program: Program, computation: Computation, instruction: Instruction) -> float:
    """Returns the bytes that an instruction reads from and writes to main memory."""
    code, results = instruction.opcode, instruction.arrays
    allocation = code == "custom-call" and not instruction.operands
    if code in _FREE or code.endswith(("-done", "-update")) or allocation:
        return 0
    if code == "fusion":
        return _fusion_bytes(program, computation, instruction)
    if code in ("send", "recv"):
        return results[0].stored_bytes * results[0].in_hbm
    operands = _operands(computation, instruction)
    if code.startswith(("slice", "dynamic-slice", "gather")):
        moved = min((a.stored_bytes for a in results if a.shape), default=0)
        return moved * (operands[0].in_hbm + any(a.in_hbm for a in results[:2]))
    if code == "dynamic-update-slice":
        return operands[1].stored_bytes * (operands[0].in_hbm + operands[1].in_hbm)
    if code.endswith("-start"):
        results = results[:1] if code == "copy-start" else results[len(operands) :] or results
    return sum(array.stored_bytes for array in (*operands, *results) if array.in_hbm)


def _fusion_bytes(program: Program, computation: Computation, instruction: Instruction) -> float:
    """Returns the bytes of a fusion: only slices that it reads, only parts updated in place."""
    fused = program.computations[instruction.called("calls")[0]]
    moved = 0.0
    for parameter, name in zip(fused.parameters(), instruction.operands, strict=False):
        source = computation.instructions.get(name)
        if source and all(array.in_hbm for array in source.arrays):
            moved += _bytes_read(program, fused, parameter)
    root = fused.root
    elements = (
        [fused.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
    )
    for element, array in zip(elements, instruction.arrays, strict=False):
        if array.in_hbm:
            moved += min(array.stored_bytes, _bytes_written(program, fused, element))
    return moved


def _bytes_read(program: Program, fused: Computation, source: Instruction) -> float:
    whole = float(sum(array.stored_bytes for array in source.arrays))
    read = 0.0
    for user in fused.users(source.name):
        position = user.operands.index(source.name)
        if user.opcode in ("bitcast", "reshape", "get-tuple-element"):
            read += _bytes_read(program, fused, user)
        elif user.opcode in ("dynamic-slice", "slice", "gather") and position == 0:
            read += user.arrays[0].stored_bytes
        elif user.opcode == "fusion":
            inner = program.computations[user.called("calls")[0]]
            read += _bytes_read(program, inner, inner.parameters()[position])
        elif user.opcode != "dynamic-update-slice" or position:
            read += whole
    return min(read, whole)


def _bytes_written(program: Program, fused: Computation, result: Instruction) -> float:
    if result.opcode in ("bitcast", "reshape") and result.operands[0] in fused.instructions:
        return _bytes_written(program, fused, fused.instructions[result.operands[0]])
    if result.opcode == "fusion":
        inner = program.computations[result.called("calls")[0]]
        return _bytes_written(program, inner, inner.root)
    if result.opcode == "dynamic-update-slice":
        return sum(array.stored_bytes for array in fused.instructions[result.operands[1]].arrays)
    return float(sum(array.stored_bytes for array in result.arrays))
