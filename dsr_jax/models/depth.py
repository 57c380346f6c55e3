"""How a depth of blocks is cut into stacks where other tokens join; plain data, no network."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Stack:
    """A scanned run of blocks.

    Attributes:
      name: Its name, or path, in the parameter tree.
      first: Number of its first block.
      end: Number behind its last.
    """

    name: str
    first: int
    end: int


def cut_depth(depth: int, joins: Mapping[str, int], prefix: str = "") -> tuple[Stack, ...]:
    """The stacks of a depth: the number of tokens is the same all along each of them.

    Args:
      depth: Number of blocks.
      joins: First block of every kind of tokens that joins the patches, by the kind's name.
      prefix: Put before the stacks' names.

    Returns:
      `blocks` alone where nothing joins. Else `blocks_pre`, up to the first join, and from each
      join on `blocks_KIND`; kinds that join before the same block share the last one's stack.
    """
    if not joins:
        return (Stack(f"{prefix}blocks", 0, depth),)
    begins = [("pre", 0), *sorted(joins.items(), key=lambda join: join[1])]
    ends = [*(first for _, first in begins[1:]), depth]
    return tuple(
        Stack(f"{prefix}blocks_{kind}", first, end)
        for (kind, first), end in zip(begins, ends, strict=True)
        if first < end
    )
