"""Losses of a generator and its discriminator, and the weight that balances them.

Source: RAE stage1/disc, VQGAN (Esser et al. 2021); spec encoder 8.
"""

import jax
import jax.numpy as jnp

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.typing import Array

LOSSES = ("hinge", "vanilla")


def check_loss(name: str) -> None:
    """Checks the name of a discriminator's loss.

    Raises:
      ConfigError: If it is unknown.
    """
    if name not in LOSSES:
        raise ConfigError(
            f"config.gan.loss={name!r} is unknown", f"choose from {', '.join(LOSSES)}"
        )


def discriminator_loss(name: str, real: Array, fake: Array) -> Array:
    """Returns the discriminator's loss, a scalar.

    Args:
      name: "hinge" or "vanilla".
      real: Logits for real images, of any shape.
      fake: For generated ones.
    """
    check_loss(name)
    push = jax.nn.relu if name == "hinge" else jax.nn.softplus
    margin = 1.0 if name == "hinge" else 0.0
    return 0.5 * (jnp.mean(push(margin - real)) + jnp.mean(push(margin + fake)))


def generator_loss(fake: Array) -> Array:
    """Returns the generator's loss, for either discriminator loss: minus the mean logit."""
    return -jnp.mean(fake)


def accuracy(real: Array, fake: Array) -> Array:
    """Returns the fraction of positions whose real logit exceeds the generated one."""
    return jnp.mean(real > fake)


def adaptive_weight(reconstruction: Array, gan: Array, limit: float, eps: float = 1e-6) -> Array:
    """Returns the weight that scales the GAN's last-layer gradient to the reconstruction's norm.

    Args:
      reconstruction: Gradient of the reconstruction loss with respect to the last layer's kernel.
      gan: That of the generator's loss.
      limit: Largest weight.
      eps: Added to the norm that divides.
    """
    ratio = jnp.linalg.norm(reconstruction) / (jnp.linalg.norm(gan) + eps)
    return jax.lax.stop_gradient(jnp.clip(ratio, 0, limit))


def to_signed(images: Array) -> Array:
    """Maps [0, 1] to [-1, 1]."""
    return 2 * images - 1


def quantize(images: Array) -> Array:
    """Clips images in [-1, 1] and rounds them to 256 levels, as files would hold them."""
    return jnp.round((jnp.clip(images, -1, 1) + 1) * 127.5) / 127.5 - 1
