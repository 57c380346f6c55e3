"""Bytes that the instructions of a compiled program read from and write to main memory."""

from __future__ import annotations

from collections.abc import Iterable

from dsr_jax.planning.hlo import Array, Computation, Instruction, Program

_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while"),
    *("conditional", "call", "partition-id", "replica-id", "iota", "opt-barrier"),
}
"""Opcodes of instructions without memory traffic of their own."""


def runs(instruction: Instruction) -> bool:
    """Whether the device executes something for an instruction: a kernel, a copy, a collective."""
    code = instruction.opcode
    allocation = code == "custom-call" and not instruction.operands
    return code not in _FREE and not code.endswith(("-done", "-update")) and not allocation


def hbm_bytes(program: Program, computation: Computation, instruction: Instruction) -> float:
    """Returns the bytes that an instruction of `computation` moves from and to main memory."""
    code, results = instruction.opcode, instruction.arrays
    if not runs(instruction):
        return 0
    operands = computation.operand_arrays(instruction)
    if code == "fusion":
        return _fusion_bytes(program, computation, instruction, results)
    if code == "fusion-start":  # Its result includes the operands.
        return _fusion_bytes(program, computation, instruction, results[len(operands) :])
    if code in ("send", "recv"):
        return results[0].stored_bytes * results[0].in_hbm
    if code.startswith(("slice", "dynamic-slice", "gather")):
        moved = min((a.stored_bytes for a in results if a.shape), default=0)
        return moved * (operands[0].in_hbm + any(a.in_hbm for a in results[:2]))
    if code == "dynamic-update-slice":
        return operands[1].stored_bytes * (operands[0].in_hbm + operands[1].in_hbm)
    if code.endswith("-start"):
        results = results[:1] if code == "copy-start" else results[len(operands) :] or results
    return _stored(program, (*operands, *results))


def _stored(program: Program, arrays: Iterable[Array]) -> float:
    """Returns the bytes of the arrays in main memory, without scratch space of GPU libraries."""
    return float(
        sum(
            array.stored_bytes
            for array in arrays
            if array.in_hbm and not (program.gpus and _is_scratch(array))
        )
    )


def _is_scratch(array: Array) -> bool:
    return array.dtype in ("s8", "u8") and len(array.shape) == 1


def _fusion_bytes(
    program: Program,
    computation: Computation,
    instruction: Instruction,
    results: tuple[Array, ...],
) -> float:
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
    for element, array in zip(elements, results, strict=False):
        whole = _stored(program, [array])
        moved += min(whole, _bytes_written(program, fused, element)) if whole else 0
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
