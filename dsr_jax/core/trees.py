"""Conversion of parameter trees to and from flat dictionaries, and sizes of trees."""

import math
from collections.abc import Mapping
from typing import Any

import jax

from dsr_jax.core.typing import PyTree


def flatten_names(tree: PyTree, sep: str = "/") -> dict[str, Any]:
    """Flattens a tree into `{"blocks/attn/qkv/kernel": leaf}`, in the tree's own order."""
    return {
        jax.tree_util.keystr(path, simple=True, separator=sep): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def unflatten_names(flat: Mapping[str, Any], sep: str = "/") -> dict[str, Any]:
    """Builds a nested dictionary from flat names; the inverse of `flatten_names`.

    Raises:
      ValueError: If one name is both a leaf and a prefix of another.
    """
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split(sep)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"{name!r} is below {parent!r}, which is itself a leaf")
        if last in node:
            raise ValueError(f"{name!r} is given twice, or is also the prefix of another name")
        node[last] = leaf
    return tree


def select(tree: PyTree, wanted: PyTree) -> PyTree:
    """Returns nested dictionaries with only those leaves for which `wanted` is True.

    Args:
      tree: Nested dictionaries; whatever is no dictionary counts as a leaf.
      wanted: The same tree with booleans in place of arrays.
    """
    found = {}
    for key, node in tree.items():
        if isinstance(node, Mapping):
            if below := select(node, wanted[key]):
                found[key] = below
        elif all(jax.tree.leaves(wanted[key])):
            found[key] = node
    return found


def fill(part: PyTree, whole: PyTree) -> PyTree:
    """Returns `part`, a result of `select`, with the leaves of `whole` that it lacks."""
    if not isinstance(whole, Mapping):
        return part
    return {
        key: fill(part.get(key, {} if isinstance(node, Mapping) else node), node)
        for key, node in whole.items()
    }


def count_params(tree: PyTree) -> int:
    """Returns the number of elements in all leaves (arrays or `ShapeDtypeStruct`s)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def tree_bytes(tree: PyTree) -> int:
    """Returns the bytes of all leaves (arrays or `ShapeDtypeStruct`s), before any sharding."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
