"""Steps that leave the state as it is: batches that are not finite, or that a config names."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dsr_jax.core.trees import flatten_names
from dsr_jax.core.typing import Array, Batch, Metrics, PyTree

AnyStep = Callable[[Any, Batch, PyTree], tuple[Any, Metrics]]

_CHECKED = ("loss", "grad_norm", "discriminator_loss")


def skip_batches(step: AnyStep, *, nonfinite: bool, steps: Sequence[int] = ()) -> AnyStep:
    """Wraps a step so that some batches change nothing but the number of steps done.

    Parameters, EMA weights, moments and their counts stay as they are. Whether a batch is skipped
    follows from its loss and gradients, which are equal on all processes.

    Args:
      step: The step, not compiled.
      nonfinite: Skips batches whose loss or gradients are not finite.
      steps: Numbers, from 1, of further steps to skip.

    Returns:
      The step itself where nothing is skipped; otherwise one whose metrics have "skipped", a bool.
    """
    if not nonfinite and not steps:
        return step

    def guarded(state: Any, batch: Batch, variables: PyTree = None) -> tuple[Any, Metrics]:
        new, metrics = step(state, batch, variables)
        skipped = jnp.any(state.step + 1 == jnp.asarray(steps or (-1,), jnp.int32))
        if nonfinite:
            values = jnp.stack([metrics[name] for name in _CHECKED if name in metrics])
            skipped |= ~jnp.all(jnp.isfinite(values))
        kept = jax.tree.map(lambda old, moved: jnp.where(skipped, old, moved), state, new)
        kept = dataclasses.replace(kept, step=new.step)
        # The state before was finite, or the run would have ended.
        return kept, {**metrics, "finite": metrics["finite"] | skipped, "skipped": skipped}

    return guarded


def array_norms(tree: PyTree) -> dict[str, Array]:
    """Returns the norm of every array by name; of the arrays of stacked blocks, one per block."""
    return {
        name: jnp.sqrt(jnp.sum(jnp.square(leaf), axis=tuple(range(_is_stacked(name), leaf.ndim))))
        for name, leaf in flatten_names(tree).items()
    }


def _is_stacked(name: str) -> bool:
    return any(part.startswith("blocks") for part in name.split("/")[:-1])
