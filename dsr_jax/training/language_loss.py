"""Cross-entropy of next tokens, with logits at supervised positions only.

Source: transformers ForCausalLMLoss; spec t2i 3 and 6.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsr_jax.core.prompts import IGNORED
from dsr_jax.core.typing import Array


class LanguageLoss(NamedTuple):
    """Sums over each sample.

    Attributes:
      total: Sums of the cross-entropies [B].
      tokens: Numbers of supervised tokens [B], float32.
    """

    total: Array
    tokens: Array


def supervised(targets: Array) -> Array:
    """Returns whether a token is predicted by the position before it, bool [B, L - 1]."""
    return targets[:, 1:] != IGNORED


def language_loss(
    logits: Callable[[Array], Array], hidden: Array, targets: Array, max_targets: int
) -> LanguageLoss:
    """Sums the cross-entropies of supervised tokens, each given the positions before it.

    Args:
      logits: Function from hidden states [..., D] to logits [..., V].
      hidden: Hidden states [B, L, D].
      targets: Tokens [B, L], IGNORED where there is no loss.
      max_targets: Logits are computed at so many positions of each sample, which must be enough
        for its supervised tokens; 0 for all positions. The result is the same, and without the
        logits of a whole vocabulary at every position much smaller.
    """
    mask, wanted, hidden = supervised(targets), targets[:, 1:], hidden[:, :-1]
    if 0 < max_targets < mask.shape[1]:
        # Stable: supervised positions come first, in their order.
        chosen = jnp.argsort(~mask, axis=1, stable=True)[:, :max_targets]
        mask, wanted = (jnp.take_along_axis(x, chosen, axis=1) for x in (mask, wanted))
        hidden = jnp.take_along_axis(hidden, chosen[..., None], axis=1)
    log_probs = jax.nn.log_softmax(logits(hidden).astype(jnp.float32), axis=-1)
    wanted = jnp.where(mask, wanted, 0)
    picked = jnp.take_along_axis(log_probs, wanted[..., None], axis=-1)[..., 0]
    entropies = -jnp.sum(jnp.where(mask, picked, 0), axis=1)
    return LanguageLoss(entropies, jnp.sum(mask, axis=1, dtype=jnp.float32))
