"""Classifier-free guidance and autoguidance, each as one function of the network.

Source: DSR lightningDiT.py and DDT.py (forward_with_cfg, forward_with_autoguidance), SiT models.py,
JiT denoiser.py; spec denoiser 1.14, 2.5, 10.1, 11.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.typing import Array, Denoiser
from dsr_jax.diffusion.paths import expand

Interval = tuple[float, float]

Strength = Callable[[Array], Array]
"""`t [B] -> guidance scale`, one per sample [B] or one for the whole batch []."""

_ROUNDING = 1e-6


def drop_labels(labels: Array, u: Array, probability: float, null_label: int) -> Array:
    """Replaces labels [B] by the null label where the uniform number u [B] is below probability."""
    return jnp.where(u < probability, null_label, labels)


def check_interval(interval: tuple[float, ...]) -> Interval:
    """Returns a guidance interval as (low, high).

    Raises:
      ConfigError: If it is not two increasing times.
    """
    if len(interval) != 2 or not interval[0] < interval[1]:
        raise ConfigError(
            f"config.sample.interval={tuple(interval)} is no guidance interval",
            "use (LOW,HIGH) with LOW < HIGH, for example (0.1,0.9)",
        )
    return (interval[0], interval[1])


def strength_in(scale: float, interval: Interval = (0.0, 1.0), open_ends: bool = False) -> Strength:
    """Returns a guidance scale that is `scale` inside the interval and 1 outside, per sample.

    Args:
      scale: 1 is the prediction without guidance.
      interval: Times (t = 0 data, 1 noise), both ends included, in which guidance is on.
      open_ends: Leaves out both ends of the interval, as JiT does, however 1 - t was rounded; but
        never pure noise, t = 1.

    Raises:
      ConfigError: If the interval is empty.
    """
    low, high = check_interval(interval)

    def strength(t: Array) -> Array:
        if open_ends:
            inside = (t > low + _ROUNDING) & ((t < high - _ROUNDING) | (high >= 1))
        else:
            inside = (t >= low) & (t <= high)
        return jnp.where(inside, scale, 1.0)

    return strength


def classifier_free(
    apply_fn: Denoiser,
    strength: Strength,
    null_label: int | Callable[[Any], Any],
    channels: int | None = None,
) -> Denoiser:
    """Guides away from the unconditional prediction.

    Conditional and unconditional rows run as one batch of 2B in which each sample's two rows are
    neighbors, so that both stay on the device that holds the sample.

    Args:
      apply_fn: The network, `(x, t, labels) -> out`.
      strength: Guidance scale by time, see `strength_in`.
      null_label: Label of "no class"; or a function from conditions of another kind, any tree of
        arrays [B, ...], to those of the unconditional prediction.
      channels: Guides only the first so many channels, as SiT does with 3 of 4.
    """

    def guided(x: Array, t: Array, labels: Any) -> Array:
        null = null_label(labels) if callable(null_label) else jnp.full_like(labels, null_label)
        both = apply_fn(
            _interleave(x, x), _interleave(t, t), jax.tree.map(_interleave, labels, null)
        )
        pairs = both.reshape(-1, 2, *both.shape[1:])  # [B, 2, h, w, C]
        conditional, unconditional = pairs[:, 0], pairs[:, 1]
        mixed = _extrapolate(conditional, unconditional, strength(t))
        if channels is None:
            return mixed
        return jnp.concatenate([mixed[..., :channels], conditional[..., channels:]], axis=-1)

    return guided


def autoguidance(apply_fn: Denoiser, guide_fn: Denoiser, strength: Strength) -> Denoiser:
    """Guides away from a weaker model's prediction for the same label.

    Args:
      apply_fn: The network.
      guide_fn: A smaller or less trained one.
      strength: Guidance scale by time, see `strength_in`.
    """

    def guided(x: Array, t: Array, labels: Array) -> Array:
        return _extrapolate(apply_fn(x, t, labels), guide_fn(x, t, labels), strength(t))

    return guided


def _interleave(first: Array, second: Array) -> Array:
    """Rows [2B, ...] in the order first[0], second[0], first[1], second[1], ..."""
    return jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])


def _extrapolate(strong: Array, weak: Array, strength: Array) -> Array:
    """Returns `weak + strength * (strong - weak)`, for strength [B] or []."""
    return weak + expand(strength, strong) * (strong - weak)
