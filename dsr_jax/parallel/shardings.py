"""From abstract state to shardings, and from host batches to global arrays."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsr_jax.core.errors import MeshError
from dsr_jax.core.trees import flatten_names
from dsr_jax.core.typing import Array, PyTree
from dsr_jax.parallel.axes import Rules, fit_spec, partition_spec


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, rules: Rules) -> NamedSharding:
    """The leading dimension is split as the rules split samples."""
    return NamedSharding(mesh, partition_spec(("act_batch",), rules))


def make_shardings(boxed: PyTree, rules: Rules, mesh: Mesh) -> PyTree:
    """Returns the sharding of every leaf of an abstract tree.

    Args:
      boxed: `jax.eval_shape` of an init function; parameters carry logical axes in Flax's
        `LogicallyPartitioned` boxes, other leaves (step, counters) are replicated.
      rules: A checked rule set.
      mesh: The mesh.

    Returns:
      A tree of `NamedSharding` with the structure of `nn.unbox(boxed)`. A dimension that its mesh
      axes do not divide stays whole; `sharded_fraction` shows what that costs.
    """

    def leaf_sharding(leaf: Any) -> NamedSharding:
        if isinstance(leaf, nn.LogicallyPartitioned):
            spec = partition_spec(leaf.names, rules)
            return NamedSharding(mesh, fit_spec(spec, leaf.value.shape, mesh))
        return replicated(mesh)

    return jax.tree.map(
        leaf_sharding, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    )


def sharded_fraction(abstract: PyTree, shardings: PyTree, axis: str = "fsdp") -> float:
    """Share of a tree's bytes whose sharding uses `axis` (1.0 where the axis has one device)."""
    total = split = 0
    for leaf, sharding in zip(jax.tree.leaves(abstract), jax.tree.leaves(shardings), strict=True):
        size = int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize
        used = {name for entry in sharding.spec for name in np.atleast_1d(entry) if name}
        total += size
        split += size if axis in used or sharding.mesh.shape[axis] == 1 else 0
    return split / max(total, 1)


def check_sharded(
    abstract: PyTree, shardings: PyTree, *, what: str = "parameter", least: float = 0.9
) -> None:
    """Checks that most bytes, of `what` for the message, are really split over `fsdp`.

    Raises:
      MeshError: If less than `least` of the bytes are split over `fsdp`, naming the largest
        leaves that are not.
    """
    share = sharded_fraction(abstract, shardings)
    if share >= least:
        return
    leaves = flatten_names(abstract)
    whole = [
        (int(np.prod(leaves[name].shape)), name, leaves[name].shape)
        for name, sharding in flatten_names(shardings).items()
        if not any("fsdp" in np.atleast_1d(entry) for entry in sharding.spec if entry)
    ]
    worst = ", ".join(f"{name} {shape}" for _, name, shape in sorted(whole, reverse=True)[:4])
    raise MeshError(
        f"only {share:.0%} of the {what} bytes are split over fsdp; whole: {worst}",
        "choose config.mesh.fsdp so that it divides the model width, or a smaller value",
    )


def host_to_global(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, Array]:
    """Assembles global arrays from each process's rows of the batch."""
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }


def fetch(tree: PyTree) -> PyTree:
    """Brings global arrays, whole, to NumPy on every host."""

    def to_host(array: Array) -> np.ndarray:
        if array.is_fully_addressable or array.is_fully_replicated:
            return np.asarray(array)
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))

    return jax.tree.map(to_host, tree)
