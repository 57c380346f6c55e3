"""Classifier-free guidance and autoguidance, each as one batched evaluation.

Source: DSR lightningDiT.py and DDT.py (forward_with_cfg, forward_with_autoguidance), SiT models.py,
JiT denoiser.py; spec denoiser 1.14, 2.5, 10.1, 11.
"""

from collections.abc import Sequence

import jax.numpy as jnp

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.typing import Array, Denoiser
from dsr_jax.diffusion.paths import expand

Interval = tuple[float, float]

_ROUNDING = 1e-6


def drop_labels(labels: Array, u: Array, probability: float, null_label: int) -> Array:
    """Replaces labels [B] by the null label where the uniform draw u [B] is below probability."""
    return jnp.where(u < probability, null_label, labels)


def _strength(t: Array, scale: float, interval: Interval, open_ends: bool = False) -> Array:
    """Guidance scale per sample: `scale` inside the interval, 1 outside.

    Without its ends, the interval holds no grid point at an end however 1 - t was rounded, except
    that of pure noise, t = 1.
    """
    low, high = interval
    if not low < high:
        raise ConfigError(f"guidance interval {interval}", "use (low, high) with low < high")
    if open_ends:
        inside = (t > low + _ROUNDING) & ((t < high - _ROUNDING) | (high >= 1))
    else:
        inside = (t >= low) & (t <= high)
    return jnp.where(inside, scale, 1.0)


def classifier_free(
    apply_fn: Denoiser,
    scale: float,
    null_label: int,
    interval: Interval = (0.0, 1.0),
    channels: int | None = None,
    open_ends: bool = False,
) -> Denoiser:
    """Guides away from the unconditional prediction.

    Conditional and unconditional halves run as one batch of 2B.

    Args:
      apply_fn: The network, `(x, t, labels) -> out`.
      scale: 1 is the plain conditional prediction.
      null_label: Label of "no class".
      interval: Times (t = 0 data, 1 noise), both ends included, in which guidance is on.
      channels: Guides only the first so many channels, as SiT does with 3 of 4.
      open_ends: Leaves out both ends of the interval, as JiT does, but never pure noise.

    Raises:
      ConfigError: If the interval is empty.
    """
    if scale == 1:
        return apply_fn

    def guided(x: Array, t: Array, labels: Array) -> Array:
        nulls = jnp.full_like(labels, null_label)
        both = apply_fn(
            jnp.concatenate([x, x]), jnp.concatenate([t, t]), jnp.concatenate([labels, nulls])
        )
        conditional, unconditional = jnp.split(both, 2)
        strength = expand(_strength(t, scale, interval, open_ends), x)
        mixed = unconditional + strength * (conditional - unconditional)
        if channels is None:
            return mixed
        return jnp.concatenate([mixed[..., :channels], conditional[..., channels:]], axis=-1)

    _strength(jnp.zeros(()), scale, interval)
    return guided


def classifier_free_off(
    apply_fn: Denoiser,
    scale: float,
    null_label: int,
    off_intervals: Sequence[Interval] = (),
    off_scale: float = 0.0,
) -> Denoiser:
    """The official LightningDiT's guidance, whose intervals switch guidance off.

    DSR-compat: the half-open intervals are tested on the first sample's time only, and inside
    them the prediction is conditional, or guided by `off_scale` if that exceeds 1.

    Args:
      apply_fn: The network, `(x, t, labels) -> out`.
      scale: Guidance scale outside the intervals.
      null_label: Label of "no class".
      off_intervals: Pairs low <= t < high.
      off_scale: Scale inside the intervals.
    """
    inside_scale = off_scale if off_scale > 1 else 1.0

    def guided(x: Array, t: Array, labels: Array) -> Array:
        nulls = jnp.full_like(labels, null_label)
        both = apply_fn(
            jnp.concatenate([x, x]), jnp.concatenate([t, t]), jnp.concatenate([labels, nulls])
        )
        conditional, unconditional = jnp.split(both, 2)
        strength = _off_strength(t, scale, off_intervals, inside_scale)
        return unconditional + strength * (conditional - unconditional)

    return guided


def _off_strength(
    t: Array, scale: float, off_intervals: Sequence[Interval], inside_scale: float
) -> Array:
    """The scale that the first sample's time selects."""
    inside = jnp.zeros((), bool)
    for low, high in off_intervals:
        inside |= (t[0] >= low) & (t[0] < high)
    return jnp.where(inside, inside_scale, scale)


def autoguidance(
    apply_fn: Denoiser,
    guide_fn: Denoiser,
    scale: float,
    interval: Interval = (0.0, 1.0),
) -> Denoiser:
    """Guides away from a weaker model's prediction for the same label.

    Args:
      apply_fn: The network.
      guide_fn: A smaller or less trained one.
      scale: 1 is the network alone.
      interval: Times, both ends included, in which guidance is on.

    Raises:
      ConfigError: If the interval is empty.
    """
    if scale == 1:
        return apply_fn

    def guided(x: Array, t: Array, labels: Array) -> Array:
        strong, weak = apply_fn(x, t, labels), guide_fn(x, t, labels)
        return weak + expand(_strength(t, scale, interval), x) * (strong - weak)

    _strength(jnp.zeros(()), scale, interval)
    return guided


def autoguidance_off(
    apply_fn: Denoiser,
    guide_fn: Denoiser,
    scale: float,
    off_intervals: Sequence[Interval] = (),
    off_scale: float = 0.0,
) -> Denoiser:
    """The official LightningDiT's autoguidance; intervals as in `classifier_free_off`."""
    inside_scale = off_scale if off_scale > 1 else 1.0

    def guided(x: Array, t: Array, labels: Array) -> Array:
        strong, weak = apply_fn(x, t, labels), guide_fn(x, t, labels)
        return weak + _off_strength(t, scale, off_intervals, inside_scale) * (strong - weak)

    return guided
