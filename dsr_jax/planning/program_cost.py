"""FLOPs, memory traffic and communication of a compiled program on one device, by part."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from dsr_jax.planning.collectives import Collective, collectives
from dsr_jax.planning.hlo import Computation, Instruction, Program
from dsr_jax.planning.matmuls import flops
from dsr_jax.planning.traffic import hbm_bytes, runs

REST = "the rest"


@dataclass
class Cost:
    """Cost of a part of a program, on one device.

    Attributes:
      flops: FLOPs of matmuls and convolutions.
      hbm_bytes: Bytes read from and written to main memory by the instructions.
      collectives: Number of executions of each collective.
      unknown_loops: Loops of unknown trip count, counted once.
      matmul_bytes: Those of `hbm_bytes` that instructions with FLOPs move.
      kernels: Executions of a kernel, a library's function, a copy or a collective.
    """

    flops: float = 0
    hbm_bytes: float = 0
    collectives: Counter[Collective] = field(default_factory=Counter)
    unknown_loops: int = 0
    matmul_bytes: float = 0
    kernels: int = 0

    def add(self, other: Cost, times: int = 1) -> None:
        """Adds another part's cost, multiplied by `times`."""
        self.flops += times * other.flops
        self.hbm_bytes += times * other.hbm_bytes
        self.matmul_bytes += times * other.matmul_bytes
        self.kernels += times * other.kernels
        for collective, count in other.collectives.items():
            self.collectives[collective] += times * count
        self.unknown_loops += other.unknown_loops

    @property
    def wire_bytes(self) -> float:
        """Bytes that the device sends within its slice or node."""
        return self._sent("ICI")

    @property
    def dcn_bytes(self) -> float:
        """Bytes that the device sends to other slices or nodes."""
        return self._sent("DCN")

    def _sent(self, network: str) -> float:
        return sum(
            count * collective.wire_bytes
            for collective, count in self.collectives.items()
            if collective.network == network
        )


@dataclass(frozen=True)
class Part:
    """Stack of layers, or the rest of the program.

    Attributes:
      name: Name such as "forward LightningDiT blocks_reg".
      trips: Number of layers: the trip count of a loop, or the copies in an unrolled program.
      cost: Total cost of all layers.
    """

    name: str
    trips: int
    cost: Cost


def split_program(program: Program) -> list[Part]:
    """Splits a program into its stacks of layers, in order of their first matmuls, and the rest.

    A stack is a loop over its layers, or the instructions of all layers of an unrolled one, which
    their origins in the traced program name.
    """
    costs, computing = dict[str, Cost](), dict[str, None]()
    loops, copies = Counter[str](), dict[str, Counter[tuple]]()
    for instruction, name in _assigned(program):
        cost = _cost(program, program.entry, instruction)
        costs.setdefault(name, Cost()).add(cost)
        if cost.flops:
            computing[name] = None
        if instruction.opcode == "while":
            loops[name] += program.trips(instruction) or 1
        elif cost.flops:
            key = instruction.op_name, instruction.arrays
            copies.setdefault(name, Counter())[key] += 1
    layers = {name: _usual(found.values()) for name, found in copies.items()} | loops
    names = [name for name in computing | dict.fromkeys(costs) if name != REST]
    parts = [Part(name, layers.get(name, 1), costs[name]) for name in names]
    return [*parts, Part(REST, 1, costs.get(REST, Cost()))]


def _usual(counts: Iterable[int]) -> int:
    """Returns the most frequent of some counts, the largest of several."""
    found = Counter(counts)
    return max(found, key=lambda count: (found[count], count))


_CALLS = "closed_call|checkpoint|rematted_computation|eval_jaxpr"
_STACK = re.compile(
    rf"(?:/while/body/(?:(?:{_CALLS})/)*|/(?:(?:{_CALLS})/)+)(?!(?:{_CALLS}|while|body)/)(\w+)/"
)
"""How origins name a layer: behind the loop or the call that JAX traces it in."""


def _assigned(program: Program) -> Iterator[tuple[Instruction, str]]:
    """Yields the instructions of the entry computation, and the part that each belongs to.

    An instruction between layers (which slices their parameters, or stacks their gradients) and
    one of the compiler's own without an origin belong to the layer before.
    """
    origins = [i.op_name for i in program.entry]
    stacks = {origin[: found.start()] for origin in origins if (found := _STACK.search(origin))}
    before = REST
    for instruction, origin in zip(program.entry, origins, strict=True):
        # The compiler adds its own loops over the shards of a matmul.
        if instruction.opcode == "while" and origin.endswith("/while"):
            yield instruction, _loop_name(program, instruction)
            before = REST
            continue
        if found := _STACK.search(origin):
            before = _part_name(origin, found.group(1))
        elif origin and origin.rpartition("/")[0] not in stacks:
            before = REST
        yield instruction, before


def _loop_name(program: Program, loop: Instruction) -> str:
    """Returns the part's name of a loop, by the layer that most of its body's origins name."""
    (body,) = loop.called("body")
    names = Counter(
        found.group(1)
        for instruction in program.computations[body]
        if (found := _STACK.search(instruction.op_name))
    )
    return _part_name(loop.op_name, *(name for name, _ in names.most_common(1)))


def _part_name(origin: str, stack: str = "") -> str:
    """Returns direction, network and Flax name of a stack of layers.

    Where the compiler has combined operations, "jit(step)/(one:another)", the first counts.
    """
    origin = re.sub(r"^(jit\([^)]*\)/)\(", r"\1", origin.partition(":")[0])
    network = re.search(r"^jit\([^)]*\)/(?:\w+\()*(\w+)", origin)
    direction = "backward" if "transpose(" in origin else "forward"
    return " ".join(filter(None, (direction, network.group(1) if network else "", stack)))


def total(parts: list[Part]) -> Cost:
    """Returns the sum of all parts."""
    cost = Cost()
    for part in parts:
        cost.add(part.cost)
    return cost


def _cost(program: Program, computation: Computation, instruction: Instruction) -> Cost:
    """Returns the cost of an instruction of `computation`, including computations it calls."""
    cost = Cost(hbm_bytes=hbm_bytes(program, computation, instruction), kernels=runs(instruction))
    for where, inner in _with_fused(program, computation, instruction):
        cost.flops += flops(where, inner)
        cost.collectives.update(collectives(program, where, inner))
    cost.matmul_bytes = cost.hbm_bytes if cost.flops else 0
    if instruction.opcode == "while":
        trips = program.trips(instruction)
        cost.add(_body_cost(program, instruction.called("body")), trips or 1)
        cost.unknown_loops += trips is None
    elif instruction.opcode in ("call", "conditional"):
        cost.add(_body_cost(program, instruction.called("to_apply")))
        cost.add(_body_cost(program, instruction.called("branch_computations")))
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
