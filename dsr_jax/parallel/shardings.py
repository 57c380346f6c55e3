"""Shardings of abstract states, and global arrays from host batches."""

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
    """Returns the sharding under which every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, rules: Rules) -> NamedSharding:
    """Returns the sharding that splits the leading dimension as the rules split samples."""
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
    """Returns the fraction of a tree's bytes split over `axis` (1.0 where it has one device)."""
    total = split = 0
    for leaf, sharding in zip(jax.tree.leaves(abstract), jax.tree.leaves(shardings), strict=True):
        size = int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize
        used = {name for entry in sharding.spec for name in np.atleast_1d(entry) if name}
        total += size
        split += size if axis in used or sharding.mesh.shape[axis] == 1 else 0
    return split / max(total, 1)


def check_sharded(
    abstract: PyTree, shardings: PyTree, *, what: str = "parameter", min_fraction: float = 0.9
) -> None:
    """Checks that most bytes, of `what` for the message, are really split over `fsdp`.

    Raises:
      MeshError: If less than `min_fraction` of the bytes are split over `fsdp`, naming the largest
        leaves that are not.
    """
    fraction = sharded_fraction(abstract, shardings)
    if fraction >= min_fraction:
        return
    leaves = flatten_names(abstract)
    whole = [
        (int(np.prod(leaves[name].shape)), name, leaves[name].shape)
        for name, sharding in flatten_names(shardings).items()
        if not any("fsdp" in np.atleast_1d(entry) for entry in sharding.spec if entry)
    ]
    worst = ", ".join(f"{name} {shape}" for _, name, shape in sorted(whole, reverse=True)[:4])
    raise MeshError(
        f"only {fraction:.0%} of the {what} bytes are split over fsdp; whole: {worst}",
        "choose config.mesh.fsdp so that it divides the model width, or a smaller value",
    )


def process_rows(sharding: NamedSharding, size: int, process: int | None = None) -> np.ndarray:
    """Returns the rows of a global batch that the devices of one process hold.

    Rows follow the order of the mesh's devices. On a TPU slice that is not the order of the
    processes, and a row that several processes hold (an axis that does not split the batch reaches
    over processes) belongs to each of them. What a process loads, computes on the host or writes
    of a batch is decided here and nowhere else.

    Args:
      sharding: Sharding of the batch; only the leading dimension is split.
      size: Rows of the global batch.
      process: Index of a process; None for this one.

    Returns:
      int64 [n], ascending, each row once; empty for a process without a device in the mesh.

    Raises:
      MeshError: If the rows do not divide over the devices.
    """
    wanted = jax.process_index() if process is None else process
    try:
        pieces = sharding.devices_indices_map((size,))
    except ValueError as error:
        raise MeshError(
            f"a batch of {size} rows does not divide over the devices of mesh "
            f"{dict(sharding.mesh.shape)} split as {sharding.spec}",
            "use a batch that is a multiple of the number of devices that split it",
        ) from error
    held = {
        index[0].indices(size)[:2]
        for device, index in pieces.items()
        if device.process_index == wanted  # type: ignore[attr-defined]
    }
    rows = [np.arange(first, stop) for first, stop in sorted(held)]
    return np.concatenate([np.zeros(0, np.int64), *rows])


def host_to_global(
    batch: Mapping[str, np.ndarray], sharding: NamedSharding, size: int
) -> dict[str, Array]:
    """Assembles a global batch from the rows that each process has loaded.

    Args:
      batch: Arrays [n, ...]: the rows `process_rows(sharding, size)` of this process, in that
        order.
      sharding: Sharding of the batch; only the leading dimension is split.
      size: Rows of the global batch.

    Returns:
      Arrays [size, ...]; row i is the one that was loaded as row i, on any mesh.

    Raises:
      MeshError: If an array has other than this process's number of rows.
    """
    rows = process_rows(sharding, size)

    def assemble(name: str, value: np.ndarray) -> Array:
        if len(value) != len(rows):
            raise MeshError(
                f"{name!r} has {len(value)} rows; process {jax.process_index()} holds {len(rows)} "
                f"of a batch of {size}",
                "load the rows that process_rows returns",
            )

        def piece(index: Any) -> np.ndarray:
            first, stop, _ = index[0].indices(size)
            # Pieces are sorted and whole, so a device's rows stand next to each other.
            at = int(np.searchsorted(rows, first))
            return value[at : at + stop - first]

        return jax.make_array_from_callback((size, *value.shape[1:]), sharding, piece)

    return {name: assemble(name, value) for name, value in batch.items()}


def check_row_order(found: np.ndarray, wanted: np.ndarray, what: str) -> None:
    """Checks that results came back with the indices of the inputs that they are stored under.

    Args:
      found: [n] indices that went through the devices with the inputs.
      wanted: [n] indices under which the results are to be stored.
      what: Name of the results, for the message.

    Raises:
      MeshError: Naming the first row that belongs to another input.
    """
    found, wanted = (np.asarray(x).astype(np.int64) for x in (found, wanted))
    if found.shape != wanted.shape:
        raise MeshError(f"{what}: {len(found)} results for {len(wanted)} inputs")
    if len(wrong := np.flatnonzero(found != wanted)):
        at = int(wrong[0])
        raise MeshError(
            f"{what}: row {at} is the result of input {found[at]}, not of input {wanted[at]} "
            f"({len(wrong)} of {len(wanted)} rows are misplaced)",
            "every process must load the rows that its devices hold: "
            "dsr_jax.parallel.shardings.process_rows",
        )


def fetch(tree: PyTree) -> PyTree:
    """Returns global arrays as whole NumPy arrays on every process."""

    def to_host(array: Array) -> np.ndarray:
        if array.is_fully_addressable or array.is_fully_replicated:
            return np.asarray(array)
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))

    return jax.tree.map(to_host, tree)
