"""Steps that leave the state as it is: batches that are not finite, or that a config names."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dsr_jax.core.trees import flatten_names
from dsr_jax.core.typing import Array, Batch, Metrics, PyTree

AnyStep = Callable[[Any, Batch, PyTree], tuple[Any, Metrics]]


def skip_batches(step: AnyStep, *, nonfinite: bool, steps: Sequence[int] = ()) -> AnyStep:
    """Wraps a step so that some batches change nothing but the number of steps done.

    Parameters, EMA weights, moments and their counts stay as they are. Whether a batch is skipped
    follows from its metrics, which are equal on all processes.

    Args:
      step: The step, not compiled.
      nonfinite: Skips batches whose metric "finite" is False: losses, gradients or the parameters
        that they lead to are not finite.
      steps: Numbers, from 1, of further steps to skip.

    Returns:
      The step itself where nothing is skipped; otherwise one whose metrics have "skipped", a bool,
      and are those of the step that was not done if it is True.
    """
    if not nonfinite and not steps:
        return step

    def guarded(state: Any, batch: Batch, variables: PyTree = None) -> tuple[Any, Metrics]:
        new, metrics = step(state, batch, variables)
        skipped = jnp.any(state.step + 1 == jnp.asarray(steps or (-1,), jnp.int32))
        if nonfinite:
            skipped |= ~metrics["finite"]
        kept = jax.tree.map(lambda old, moved: jnp.where(skipped, old, moved), state, new)
        return dataclasses.replace(kept, step=new.step), {**metrics, "skipped": skipped}

    return guarded


def array_norms(tree: PyTree) -> dict[str, Array]:
    """Returns the norm of every array by name; of the arrays of stacked blocks, one per block."""
    return {
        name: jnp.sqrt(jnp.sum(jnp.square(leaf), axis=tuple(range(_is_stacked(name), leaf.ndim))))
        for name, leaf in flatten_names(tree).items()
    }


def _is_stacked(name: str) -> bool:
    """Whether an array belongs to a stack of blocks: "blocks_reg", "enc_blocks", "layers"."""
    parts = name.split("/")[:-1]
    return any(part == "layers" or "blocks" in part.split("_") for part in parts)
