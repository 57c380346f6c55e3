"""Weights of a stack of blocks in the form that many evaluations of a sampler read fastest.

In the parameter tree the weights of a stack have a leading layer axis. XLA's GPU backend slices
them, and converts them to the compute dtype, in every evaluation. Here both are done once, before
the solver's loop; and since a condition [B, D] is the same for all blocks, their modulations are
one matmul.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsr_jax.core.typing import Array, Params
from dsr_jax.models.layers import linear
from dsr_jax.models.precision import Precision


class Modulation(NamedTuple):
    """Vectors [B, 6, D] that a block takes in place of its condition."""

    vectors: Array


class UnstackedBlocks(NamedTuple):
    """Takes the place of a stack in the parameter tree.

    Attributes:
      layers: Parameters of each block.
      modulation: Kernel [D, depth, 6, D] and bias [depth, 6, D] of all modulations, which layers
        lack then; None where conditions differ between tokens.
    """

    layers: tuple[Params, ...]
    modulation: Params | None


def unstack(stacked: Params, precision: Precision, *, shared_condition: bool) -> UnstackedBlocks:
    """Returns the blocks of a stack, with linear layers in the compute dtype.

    Args:
      stacked: Parameters of the stack, [depth, ...].
      precision: Dtype policy of the blocks.
      shared_condition: Whether the condition is [B, D], the same for all tokens.
    """
    weights = dict(_to_compute(stacked, precision))
    modulation = weights.pop("adaLN") if shared_condition else None
    if modulation is not None:
        # One matrix for all blocks, whose layout the matmul needs not change.
        modulation = {**modulation, "kernel": jnp.swapaxes(modulation["kernel"], 0, 1)}
    depth = jax.tree.leaves(stacked)[0].shape[0]
    layers = tuple(jax.tree.map(lambda leaf, i=i: leaf[i], weights) for i in range(depth))
    return UnstackedBlocks(layers, modulation)


def run_unstacked(
    block: nn.Module,
    blocks: UnstackedBlocks,
    precision: Precision,
    x: Array,
    condition: Array,
    *inputs: Any,
) -> Array:
    """Runs blocks one after the other; returns the tokens [B, L, D].

    Args:
      block: A `models.blocks.Block` without parent.
      blocks: Its parameters, layer by layer.
      precision: Dtype policy.
      x: Tokens [B, L, D].
      condition: [B, D] where `blocks` has a modulation, else [B, L, Z].
      *inputs: Further inputs of every block.
    """
    conditions: list[Any] = [condition] * len(blocks.layers)
    if blocks.modulation is not None:
        conditions = _modulations(blocks.modulation, condition, precision)
    for layer, own in zip(blocks.layers, conditions, strict=True):
        x, _ = block.apply({"params": layer}, x, own, *inputs)
    return x


def _modulations(weights: Params, condition: Array, precision: Precision) -> list[Any]:
    """Returns the modulation of each block from a condition [B, D]."""
    vectors = linear(jax.nn.silu(condition), weights["kernel"], weights["bias"], 1, precision)
    return [Modulation(vectors[:, i]) for i in range(vectors.shape[1])]


def _to_compute(params: Params, precision: Precision) -> Params:
    """Returns parameters whose linear layers, which compute in that dtype, are stored in it."""
    linear = "kernel" in params
    return {
        name: _to_compute(value, precision)
        if isinstance(value, Mapping)
        else precision.to_compute(value)
        if linear
        else value
        for name, value in params.items()
    }
