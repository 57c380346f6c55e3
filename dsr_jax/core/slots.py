"""Image slots in token sequences, on devices: first slot, and whether the image is an answer.

Source: Scale-RAE; spec t2i 2.2.
"""

import jax.numpy as jnp

from dsr_jax.core.prompts import IGNORED, IMAGE_SLOT
from dsr_jax.core.typing import Array


def first_slot(tokens: Array) -> Array:
    """Returns the position [B] of the first image slot of tokens [B, L], 0 if there is none."""
    return jnp.argmax(tokens == IMAGE_SLOT, axis=1)


def is_answer(tokens: Array, targets: Array | None = None) -> Array:
    """Returns which samples [B] ask for an image instead of showing one, bool.

    An image is asked for if the position before its first slot is supervised.

    Args:
      tokens: [B, L].
      targets: [B, L]; None if all images are asked for.
    """
    answers = jnp.any(tokens == IMAGE_SLOT, axis=1)
    if targets is None:
        return answers
    before = jnp.maximum(first_slot(tokens) - 1, 0)[:, None]
    return answers & (jnp.take_along_axis(targets, before, axis=1)[:, 0] != IGNORED)
