"""Kernels that are gathered once for both passes, where FSDP has split them.

Without this the partitioner gathers a kernel where a matmul reads it: in the forward pass, and
again in the backward pass. Gathered once, it is kept in the compute dtype in between.
"""

from collections.abc import Iterable, Sequence
from functools import partial

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsr_jax.core.typing import Array
from dsr_jax.parallel.axes import Constrain

_FSDP = "fsdp"


def gather_once(
    matrix: Array,
    shape: Sequence[int],
    axes: Sequence[str | None],
    num_inputs: int,
    constrain: Constrain,
) -> Array:
    """Returns a kernel that is whole along the mesh's `fsdp`, and whose gradient is split again.

    The gradient of the matrix is reduce-scattered; that of the kernel behind a reshape, with heads
    of a size that fills no tile, a TPU's compiler would all-reduce.

    Args:
      matrix: Kernel in the compute dtype [in, out], both flattened.
      shape: Shape of the kernel, of `num_inputs` input dimensions and the output dimensions.
      axes: Its logical axes.
      num_inputs: Number of input dimensions.
      constrain: Rules and mesh; without a mesh, or with rules that do not split the kernel, or
        split another dimension than the first of inputs or outputs, the matrix is returned as it
        is.
    """
    mesh = constrain.mesh
    if mesh is None:
        return matrix
    spec = constrain.fitted_spec(tuple(shape), axes)
    entries = [_splitting(entry, mesh) for entry in spec]
    inputs, outputs = entries[:num_inputs], entries[num_inputs:]
    split = inputs[0], outputs[0]
    if any((*inputs[1:], *outputs[1:])) or not any(_FSDP in entry for entry in split):
        return matrix
    whole = (tuple(axis for axis in entry if axis != _FSDP) for entry in split)
    return _gathered(_sharding(mesh, whole), _sharding(mesh, split), matrix)


def _splitting(entry: tuple[str, ...] | str | None, mesh: Mesh) -> tuple[str, ...]:
    """Returns the mesh axes of an entry that have more than one device."""
    axes = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
    return tuple(axis for axis in axes if mesh.shape[axis] > 1)


def _sharding(mesh: Mesh, entries: Iterable[tuple[str, ...]]) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*(entry or None for entry in entries)))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered(whole: NamedSharding, split: NamedSharding, kernel: Array) -> Array:
    return jax.lax.with_sharding_constraint(kernel, whole)


def _forward(whole: NamedSharding, split: NamedSharding, kernel: Array) -> tuple[Array, None]:
    return _gathered(whole, split, kernel), None


def _backward(whole: NamedSharding, split: NamedSharding, _: None, grad: Array) -> tuple[Array]:
    return (jax.lax.with_sharding_constraint(grad, split),)


_gathered.defvjp(_forward, _backward)
