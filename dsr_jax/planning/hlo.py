"""Parser for the text of a compiled XLA program: instructions, loops and their trip counts.

XLA's own cost analysis counts the body of a loop once, and so all scanned blocks as one. Trip
counts allow a cost model to multiply each computation by the loops around it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_DTYPE_BITS: Mapping[str, int] = {
    **{"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "f8e4m3fn": 8, "f8e5m2": 8},
    **{"s16": 16, "u16": 16, "f16": 16, "bf16": 16, "s32": 32, "u32": 32, "f32": 32},
    **{"s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128},
}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"%([\w.\-]+)")
_TILE = re.compile(r"([\d,]+):T\(([\d,]+)\)")
_TPU_OTHER_MEMORY = re.compile(r"S\(\d+\)")
_GPU_OTHER_MEMORY = re.compile(r"S\(5\)")
"""Memory spaces that are not the chip's main memory: on GPUs the host's alone, since S(1) is what
NCCL has registered."""
_CALLED = re.compile(r"\b(calls|body|condition|to_apply|branch_computations)=(\{[^}]*\}|%[\w.\-]+)")


@dataclass(frozen=True)
class Array:
    """Shape of one array.

    Attributes:
      dtype: XLA's name of the dtype.
      shape: Sizes of the dimensions.
      in_hbm: False if the compiler keeps the array in the chip's fast memory, or on the host.
      padded: Sizes rounded up to the TPU's tiles; None without tiles.
    """

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool = True
    padded: tuple[int, ...] | None = None

    @property
    def bytes(self) -> int:
        """Bytes without the padding of tiles; 0 for tokens and other non-numeric types."""
        return math.prod(self.shape) * _DTYPE_BITS.get(self.dtype, 0) // 8

    @property
    def stored_bytes(self) -> int:
        """Bytes with the padding of tiles, which the chip also reads and writes."""
        sizes = self.shape if self.padded is None else self.padded
        return math.prod(sizes) * _DTYPE_BITS.get(self.dtype, 0) // 8


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: Name of the instruction.
      opcode: XLA's opcode.
      arrays: Shapes of the result, one per element of a tuple.
      operands: Names of the operands, in order.
      attributes: Rest of the line.
      is_root: Whether it is the computation's result.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def called(self, kind: str) -> list[str]:
        """Returns the names of the computations that it calls as `kind`: "calls", "body", ..."""
        return [
            name
            for found, names in _CALLED.findall(self.attributes)
            for name in _NAME.findall(names)
            if found == kind
        ]

    def attribute(self, pattern: str) -> str:
        """Returns the group of a regular expression in the attributes, "" without a match."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else ""

    @property
    def target(self) -> str:
        """Target of a custom call; "" for other instructions."""
        return self.attribute(r'custom_call_target="([^"]*)"')

    @property
    def op_name(self) -> str:
        """Origin in the traced program; "" if unknown."""
        return self.attribute(r'op_name="([^"]*)"')


@dataclass(frozen=True)
class Computation:
    """Named list of instructions."""

    name: str
    instructions: Mapping[str, Instruction]

    @property
    def root(self) -> Instruction:
        """Instruction whose result is that of the computation."""
        return next(i for i in reversed(list(self)) if i.is_root)

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    def step(self, element: int) -> int:
        """Returns what a loop with this body adds to an element of its state; 1 if unknown."""
        root = self.root
        result = self.instructions.get(root.operands[element]) if root.opcode == "tuple" else None
        while result and result.opcode in ("copy", "bitcast"):
            result = self.instructions.get(result.operands[0])
        if result is None or result.opcode != "add":
            return 1
        added = [self.instructions[name] for name in result.operands if name in self.instructions]
        steps = [i.attribute(r"^(\d+)") for i in added if i.opcode == "constant"]
        return max(1, int(steps[0])) if steps and steps[0] else 1

    def operand_arrays(self, instruction: Instruction) -> list[Array]:
        """Returns the shapes of the operands of one of its instructions."""
        return [
            array
            for name in instruction.operands
            if name in self.instructions
            for array in self.instructions[name].arrays
        ]

    def users(self, name: str) -> list[Instruction]:
        """Returns the instructions that read `name`."""
        return [i for i in self if name in i.operands]

    def parameters(self) -> list[Instruction]:
        """Returns its parameters, in order."""
        found = [i for i in self if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.attribute(r"^(\d+)") or 0))


@dataclass(frozen=True)
class Program:
    """Compiled XLA program.

    Attributes:
      entry: Entry computation.
      computations: All computations by name.
      slices: Number of TPU slices, or of nodes of GPUs, that the program runs on.
      gpus: Number of GPUs of a node; 0 in a TPU's program.
    """

    entry: Computation
    computations: Mapping[str, Computation]
    slices: int = 1
    gpus: int = 0

    def trips(self, loop: Instruction) -> int | None:
        """Returns the trip count of a `while`; None if it depends on data, as in adaptive solvers.

        XLA records it in programs for GPUs and CPUs. In those for TPUs it is that of a loop that
        counts from 0 in equal steps to a constant.
        """
        if recorded := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
            return int(recorded)
        condition = self.computations[loop.called("condition")[0]]
        root, counters = condition.root, [i for i in condition if i.opcode == "get-tuple-element"]
        if root.opcode == "fusion":
            root = self.computations[root.called("calls")[0]].root
        limits = [i.attribute(r"^(\d+)") for i in condition if i.opcode == "constant"]
        counted = root.opcode == "compare" and "direction=LT" in root.attributes
        if not counted or len(limits) != 1 or not limits[0] or len(counters) != 1:
            return None
        body = self.computations[loop.called("body")[0]]
        step = body.step(int(counters[0].attribute(r"index=(\d+)")))
        return math.ceil(int(limits[0]) / step)


def parse(text: str, slices: int = 1, gpus: int = 0) -> Program:
    """Parses `compiled.as_text()`.

    Args:
      text: Text of the program.
      slices: Number of TPU slices, or of nodes of GPUs, that it was compiled for.
      gpus: Number of GPUs of a node; 0 for TPUs.

    Raises:
      ValueError: If the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = None
    lines: dict[str, Instruction] = {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            lines = {}
            computation = Computation(header.group(2), lines)
            computations[computation.name] = computation
            entry = computation if header.group(1) else entry
        elif " = " in line and line.startswith(" "):
            instruction = _instruction(line, _GPU_OTHER_MEMORY if gpus else _TPU_OTHER_MEMORY)
            lines[instruction.name] = instruction
    if entry is None:
        raise ValueError("the text of the program has no ENTRY computation")
    return Program(entry, computations, slices, gpus)


def _instruction(line: str, other_memory: re.Pattern[str]) -> Instruction:
    left, _, right = line.strip().partition(" = ")
    end = _closing(right, 0) if right.startswith("(") else right.index(" ")
    result, rest = right[:end], right[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    last = _closing(rest, len(opcode))
    inside, attributes = rest[len(opcode) + 1 : last - 1], rest[last:].removeprefix(", ")
    operands = tuple(_NAME.findall(inside))
    if not operands:
        attributes = f"{inside}, {attributes}"  # Numbers of parameters, values of constants.
    return Instruction(
        left.removeprefix("ROOT ").removeprefix("%"),
        opcode,
        tuple(_arrays(result, other_memory)),
        operands,
        attributes,
        left.startswith("ROOT "),
    )


def _closing(text: str, start: int) -> int:
    """Returns the position after the bracket that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position + 1
    raise ValueError(f"no end of {text[start : start + 80]!r}")


def _arrays(text: str, other_memory: re.Pattern[str]) -> Iterator[Array]:
    for dtype, sizes, layout in _ARRAY.findall(text):
        shape = tuple(int(size) for size in sizes.split(",") if size)
        yield Array(dtype, shape, not other_memory.search(layout), _padded(shape, layout))


def _padded(shape: tuple[int, ...], layout: str) -> tuple[int, ...] | None:
    """Rounds up the dimensions covered by a layout's tile, as in "2,0,1:T(8,128)(2,1)S(1)"."""
    if not (tile := _TILE.match(layout)):
        return None
    minor_first, edges = (tuple(map(int, found.split(","))) for found in tile.groups())
    sizes = list(shape)
    for dimension, edge in zip(minor_first, reversed(edges), strict=False):
        sizes[dimension] += -sizes[dimension] % edge
    return tuple(sizes)
