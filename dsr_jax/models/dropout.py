"""Dropout whose draws belong to samples, so that batches, meshes and restarts do not change them.

Source: JiT model_jit.py; spec denoiser 11.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.core.rng import uniform_per_sample
from dsr_jax.core.typing import Array

ATTENTION_OUTPUT, MLP_HIDDEN = 0, 1
"""The places of a block where dropout acts, which have draws of their own."""


@flax.struct.dataclass
class Dropout:
    """Dropout of one layer; with a leading axis on both arrays, that of all layers of a scan.

    Attributes:
      keys: One key per sample [B].
      rate: Share of the values that become zero, a scalar; 0 draws nothing.
    """

    keys: Array
    rate: Array

    def __call__(self, x: Array, place: int) -> Array:
        """Zeroes values of [B, ...] and scales the others up, so that the mean stays."""

        def drop(x: Array) -> Array:
            keys = jax.vmap(lambda key: jax.random.fold_in(key, place))(self.keys)
            kept = uniform_per_sample(keys, x.shape[1:]) >= self.rate
            return jnp.where(kept, (x / (1 - self.rate)).astype(x.dtype), 0)

        # Most layers have rate 0; a branch spares them the draws.
        return jax.lax.cond(self.rate > 0, drop, lambda x: x, x)

    def layers(self, first: int, end: int) -> "Dropout":
        """That of layers first..end-1."""
        return Dropout(self.keys[first:end], self.rate[first:end])


def middle_half(depth: int, rate: float) -> np.ndarray:
    """Rates [depth]: `rate` from a quarter of the depth to three quarters of it, 0 elsewhere.

    DSR-compat: the quarter is rounded down before it is tripled, as in JiT.
    """
    quarter = depth // 4
    layers = np.arange(depth)
    return np.where((layers >= quarter) & (layers < 3 * quarter), rate, 0.0).astype(np.float32)


def make_dropout(keys: Array, rates: np.ndarray) -> Dropout:
    """Dropout of all layers.

    Args:
      keys: One key per sample [B].
      rates: One rate per layer [L].
    """

    def of_layer(layer: Array) -> Array:
        return jax.vmap(lambda key: jax.random.fold_in(key, layer))(keys)

    return Dropout(jax.vmap(of_layer)(jnp.arange(len(rates))), jnp.asarray(rates))
