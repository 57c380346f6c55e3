"""Test-time registers as a pure function of a block's hidden MLP units.

A few hidden units, the *register neurons*, cause the outlier tokens of a pretrained ViT. Moving
their activations from the patches to an extra token that is dropped at the end removes the outliers
without training. The intervention is an argument of the network: a mask with one row per block.

Source: Jiang et al. 2025, "Vision Transformers Don't Need Trained Registers"; DSR ttreg; spec
encoder 5.
"""

import flax.struct
import jax.numpy as jnp
import numpy as np

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.typing import Array

NORMAL_VALUES = ("zero", "mean", "only_outliers", "same")


@flax.struct.dataclass(kw_only=True)
class Intervention:
    """Moves the activations of some units to registers. The defaults are the published setting.

    Attributes:
      mask: True for register neurons: [L, M], or [M] of one block inside the scan over depth. One
        mask serves the recursive case, too: it marks the units of all rounds.
      num_registers: Test-time registers R: zeros after the patches, without position.
      scale: Factor on the value that registers receive; a tuple has one factor per register.
      normal_values: Values of these units on patches: "zero"; "mean" over the patches of an image;
        "only_outliers", which replaces values above mean + standard deviation by the mean; or
        "same", which leaves them.
      shared_maximum: All units of a block give the registers one value, the signed maximum over all
        of them and all tokens (as published); else each unit its own (the original test-time
        registers).
      spare_first_token: Token 0 keeps its activations, as published. It is the class token where
        there is one; for SigLIP it is the top left patch, whose outliers therefore remain.
      append: False overwrites the last R patches instead of appending registers, which is what the
        second pass of the released search does (spec encoder 14.2).  # DSR-compat
      max_units: Upper bound on the marked units of a block, so that the maximum is taken over these
        few columns. Derived if `mask` is a NumPy array; None takes it over all units.
    """

    mask: Array | np.ndarray
    num_registers: int = flax.struct.field(pytree_node=False, default=1)
    scale: float | tuple[float, ...] = flax.struct.field(pytree_node=False, default=1.0)
    normal_values: str = flax.struct.field(pytree_node=False, default="zero")
    shared_maximum: bool = flax.struct.field(pytree_node=False, default=True)
    spare_first_token: bool = flax.struct.field(pytree_node=False, default=True)
    append: bool = flax.struct.field(pytree_node=False, default=True)
    max_units: int | None = flax.struct.field(pytree_node=False, default=None)

    def __post_init__(self) -> None:
        if self.max_units is None and isinstance(self.mask, np.ndarray):
            object.__setattr__(self, "max_units", int(self.mask.sum(axis=-1).max()))
        if self.num_registers < 1:
            raise ConfigError(
                f"num_registers={self.num_registers} is not positive", "use 1 or more"
            )
        if self.normal_values not in NORMAL_VALUES:
            raise ConfigError(
                f"normal_values={self.normal_values!r} is unknown",
                f"choose from {', '.join(NORMAL_VALUES)}",
            )
        if isinstance(self.scale, tuple) and len(self.scale) != self.num_registers:
            raise ConfigError(
                f"scale={self.scale} for num_registers={self.num_registers}",
                "give one factor per register, or one for all",
            )

    @property
    def appended(self) -> int:
        """Number of rows that the intervention adds to the sequence."""
        return self.num_registers if self.append else 0

    def append_registers(self, tokens: Array) -> Array:
        """Appends the registers to tokens [B, S, D]."""
        if not self.append:
            return tokens
        return jnp.pad(tokens, ((0, 0), (0, self.num_registers), (0, 0)))

    def __call__(self, activations: Array) -> Array:
        """Moves the units' activations to the registers.

        Args:
          activations: Hidden MLP units of one block after the nonlinearity [B, S, M]; the last R
            rows are the registers. `mask` must be that block's [M].

        Returns:
          Input of the block's output projection [B, S, M]. Unmarked units are unchanged.
        """
        rows = activations.shape[1]
        row = jnp.arange(rows)[:, None]
        moved = self._moved(activations)
        scale = jnp.asarray(self.scale, activations.dtype)
        # [B, 1, M] or, with a factor for each register, [B, S, M] whose last R rows are used.
        if scale.ndim:
            scale = jnp.pad(scale, (rows - self.num_registers, 0))[:, None]
        kept = self._normal(activations)
        changed = jnp.where(row < rows - self.num_registers, kept, moved * scale)
        touched = jnp.broadcast_to(self.mask, (rows, self.mask.shape[0]))
        if self.spare_first_token:
            touched = touched & (row > 0)
        return jnp.where(touched, changed, activations)

    def _moved(self, activations: Array) -> Array:
        """Returns the value that registers receive [B, 1, M or 1]."""
        mask, shared = jnp.asarray(self.mask), self.shared_maximum
        if self.max_units is None:
            return _signed_maximum(activations, mask, shared)
        # With a few columns the compiler computes the nonlinearity of the others only once, fused
        # into the matmul that reads them.
        units = jnp.nonzero(mask, size=max(self.max_units, 1), fill_value=0)[0]
        values = _signed_maximum(activations[..., units], mask[units], shared)
        if shared:
            return values
        return jnp.zeros_like(activations[:, :1]).at[..., units].set(values)

    def _normal(self, activations: Array) -> Array:
        """Returns the values of the patches, broadcast over [B, S, M]."""
        if self.normal_values == "zero":
            return jnp.zeros((), activations.dtype)
        if self.normal_values == "same":
            return activations
        first = int(self.spare_first_token)
        patches = activations[:, first : activations.shape[1] - self.num_registers]
        mean = patches.mean(axis=1, keepdims=True)
        if self.normal_values == "mean":
            return mean
        std = patches.std(axis=1, keepdims=True, ddof=1)
        return jnp.where(activations > mean + std, mean, activations)


def _signed_maximum(activations: Array, mask: Array, shared: bool) -> Array:
    """Returns the signed value of greatest magnitude over all tokens of an image [B, 1, M or 1].

    Of equal magnitudes the positive one counts. If no unit is marked, the result is not used.
    """
    if not shared:
        high, low = (f(activations, axis=1, keepdims=True) for f in (jnp.max, jnp.min))
    else:
        # Zero is a neutral element only for a maximum of positives and a minimum of negatives.
        infinity = jnp.asarray(jnp.inf, activations.dtype)
        marked = mask[None, None]
        high = jnp.max(jnp.where(marked, activations, -infinity), axis=(1, 2), keepdims=True)
        low = jnp.min(jnp.where(marked, activations, infinity), axis=(1, 2), keepdims=True)
    return jnp.where(jnp.abs(high) >= jnp.abs(low), high, low)
