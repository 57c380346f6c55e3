"""Division of a network's blocks into scanned stacks, where tokens are inserted.

Plain data, no network.
"""

from collections.abc import Mapping
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
