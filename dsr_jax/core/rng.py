"""Random streams as pure functions of (seed, stream name, step, global sample index).

No random state is stored or passed on: each random number is a function of its coordinates. So a
resumed run, or one on another number of hosts, devices or micro-batches, uses the same noise for
the same sample.
"""

import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dsr_jax.core.typing import Array

GENERATOR = "threefry2x32"
"""JAX's generator, whose bits are the same on every backend and mesh."""


def pin_generator() -> None:
    """Makes JAX use GENERATOR, regardless of the environment.

    `JAX_DEFAULT_PRNG_IMPL` or `JAX_THREEFRY_PARTITIONABLE` would otherwise silently change the
    weights, noise and times of a run.
    """
    jax.config.update("jax_default_prng_impl", GENERATOR)
    jax.config.update("jax_threefry_partitionable", True)


def generator() -> str:
    """Returns the description of the random generator for provenance."""
    partitionable = jax.config.jax_threefry_partitionable  # type: ignore[attr-defined]
    return f"{GENERATOR}, {'partitionable' if partitionable else 'not partitionable'}"


def root_key(seed: int) -> Array:
    """Returns the key of a seed for GENERATOR, regardless of JAX's default."""
    return jax.random.key(seed, impl=GENERATOR)


def stream_key(seed: int, stream: str, step: int | Array | None = None) -> Array:
    """Returns the key of a named stream, optionally at one step.

    Args:
      seed: Seed of the run.
      stream: Name such as "noise"; hashed with CRC-32, which is stable across Python processes
        (`hash(str)` is not).
      step: Training step or sampler step; may be traced.
    """
    key = jax.random.fold_in(root_key(seed), zlib.crc32(stream.encode()))
    return key if step is None else jax.random.fold_in(key, step)


def sample_keys(key: Array, indices: Array) -> Array:
    """Returns one key per sample [B], from the global indices [B] of the samples."""
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.asarray(indices))


def normal_per_sample(keys: Array, shape: Sequence[int], dtype: jnp.dtype = jnp.float32) -> Array:
    """Returns standard normals [B, *shape]; row b depends only on `keys[b]`."""
    return jax.vmap(lambda key: jax.random.normal(key, tuple(shape), dtype))(keys)


def uniform_per_sample(keys: Array, shape: Sequence[int] = ()) -> Array:
    """Returns uniforms in [0, 1) of shape [B, *shape]; row b depends only on `keys[b]`."""
    return jax.vmap(lambda key: jax.random.uniform(key, tuple(shape)))(keys)
