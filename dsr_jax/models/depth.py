"""Division of a network's blocks into scanned stacks, where tokens are inserted, and their rows.

Plain data, no network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stack:
    """A scanned run of consecutive blocks.

    Attributes:
      name: Name, or path, of the stack in the parameter tree.
      first: Index of its first block.
      end: Index after its last block.
    """

    name: str
    first: int
    end: int


def split_into_stacks(
    depth: int, insertions: Mapping[str, int], prefix: str = ""
) -> tuple[Stack, ...]:
    """Splits a depth into stacks, each with the same number of tokens from end to end.

    Args:
      depth: Number of blocks.
      insertions: For every kind of inserted tokens, the index of the first block that sees them.
      prefix: Put before the names of the stacks.

    Returns:
      `blocks` alone where nothing is inserted. Otherwise `blocks_pre`, up to the first insertion,
      and `blocks_KIND` from each insertion on; kinds that are inserted before the same block share
      the stack of the last one.
    """
    if not insertions:
        return (Stack(f"{prefix}blocks", 0, depth),)
    begins = [("pre", 0), *sorted(insertions.items(), key=lambda insertion: insertion[1])]
    ends = [*(first for _, first in begins[1:]), depth]
    return tuple(
        Stack(f"{prefix}blocks_{kind}", first, end)
        for (kind, first), end in zip(begins, ends, strict=True)
        if first < end
    )


@dataclass(frozen=True)
class TokenRows:
    """Rows of the tokens in a stack: inserted tokens in front, patches behind them.

    Attributes:
      stack: The stack.
      patches: Row of the first patch.
      registers: Row of the first register, and number of registers.
    """

    stack: Stack
    patches: int
    registers: tuple[int, int]


def token_rows(
    stacks: Sequence[Stack], insertions: Mapping[str, tuple[int, int]]
) -> tuple[TokenRows, ...]:
    """Returns the rows of tokens in each stack.

    Args:
      stacks: Result of `split_into_stacks`.
      insertions: For every kind of inserted tokens, the index of the first block that sees them and
        their number; "reg" are the registers. Each kind is put in front of the rows that are there.
    """
    found, patches, registers = [], 0, (0, 0)
    for stack in stacks:
        for kind, (first, count) in insertions.items():
            if first == stack.first:
                patches += count
                first_row = 0 if kind == "reg" else registers[0] + count * bool(registers[1])
                registers = (first_row, count if kind == "reg" else registers[1])
        found.append(TokenRows(stack, patches, registers))
    return tuple(found)
