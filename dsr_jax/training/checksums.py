"""Checksums of sharded arrays, computed on their devices, and of their records."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.core.trees import flatten_names
from dsr_jax.core.typing import Array, PyTree
from dsr_jax.parallel.shardings import fetch


def sum_bits(array: Array) -> Array:
    """Sums an array's bits, weighted by odd numbers so that order counts; uint32 []."""
    if array.dtype.itemsize == 4:
        bits = jax.lax.bitcast_convert_type(array, jnp.uint32)
    elif array.dtype.itemsize == 2:
        bits = jax.lax.bitcast_convert_type(array, jnp.uint16).astype(jnp.uint32)
    else:
        bits = array.astype(jnp.uint32)
    strides = np.cumprod((1, *bits.shape[:0:-1]))[::-1]
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, stride in zip(range(bits.ndim), strides, strict=False):
        iota = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        place = place + iota * jnp.uint32(stride % 2**32)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


@jax.jit
def _sums(leaves: list[Array]) -> Array:
    """Returns the checksums of several arrays [n]."""
    return jnp.stack([sum_bits(leaf) for leaf in leaves])


def checksums(tree: PyTree) -> dict[str, int]:
    """Sums every array's bits on the devices that hold them; the mesh makes no difference."""
    flat = flatten_names(tree)
    return dict(zip(flat, fetch(_sums(list(flat.values()))).tolist(), strict=True))


def record_checksum(record: Mapping[str, Any]) -> int:
    """Sums up a record of JSON values; the order of keys makes no difference."""
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())
