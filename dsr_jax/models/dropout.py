"""Dropout with one random key per sample: independent of batch size, mesh and restarts.

Source: JiT model_jit.py; spec denoiser 11.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.core.rng import uniform_per_sample
from dsr_jax.core.typing import Array

ATTENTION_OUTPUT, MLP_HIDDEN = 0, 1
"""The sites of a block where dropout acts, each with its own random bits."""


@flax.struct.dataclass
class Dropout:
    """Dropout of one layer, or of all layers of a scan with a leading axis on both arrays.

    Attributes:
      keys: One key per sample [B].
      rate: Fraction of values set to zero, a scalar.
    """

    keys: Array
    rate: Array

    def __call__(self, x: Array, site: int) -> Array:
        """Zeroes values of [B, ...] and scales the others up to keep the mean."""

        def drop(x: Array) -> Array:
            keys = jax.vmap(lambda key: jax.random.fold_in(key, site))(self.keys)
            kept = uniform_per_sample(keys, x.shape[1:]) >= self.rate
            return jnp.where(kept, (x / (1 - self.rate)).astype(x.dtype), 0)

        # Most layers have rate 0; the branch saves their random bits.
        return jax.lax.cond(self.rate > 0, drop, lambda x: x, x)

    def layers(self, first: int, end: int) -> "Dropout":
        """Returns the dropout of layers first..end-1."""
        return Dropout(self.keys[first:end], self.rate[first:end])


def middle_half(depth: int, rate: float) -> np.ndarray:
    """Returns rates [depth]: `rate` from a quarter to three quarters of the depth, 0 elsewhere.

    DSR-compat: the quarter is rounded down before it is tripled, as in JiT.
    """
    quarter = depth // 4
    layers = np.arange(depth)
    return np.where((layers >= quarter) & (layers < 3 * quarter), rate, 0.0).astype(np.float32)


def make_dropout(keys: Array, rates: np.ndarray) -> Dropout:
    """Returns the dropout of all layers.

    Args:
      keys: One key per sample [B].
      rates: One rate per layer [L].
    """

    def of_layer(layer: Array) -> Array:
        return jax.vmap(lambda key: jax.random.fold_in(key, layer))(keys)

    return Dropout(jax.vmap(of_layer)(jnp.arange(len(rates))), jnp.asarray(rates))
