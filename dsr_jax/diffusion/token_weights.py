"""Loss weights per token from the norms of the encoder's tokens: the paper's ablation.

Source: DSR train.py (--outlier_token_norm, --token_norm_shift, --logit_normal_scheduler); spec
denoiser 5.5.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.typing import Array
from dsr_jax.diffusion.paths import expand

_EPS = 1e-12
_WEIGHT_RANGE = (0.1, 2.0)
_MAX_LOG_RATIO = 10.0


@dataclass(frozen=True)
class TokenWeights:
    """Settings of the token weights; if all are off, every weight is 1.

    Attributes:
      outlier_norm: Tokens of at least this norm get no loss (tau); 0 masks nothing.
      norm_shift: Reweights as if each token had a time shift in proportion to its norm.
      logit_normal: With norm_shift, also by the ratio of logit-normal densities.
      time_shift: The run's time shift.
    """

    outlier_norm: float = 0.0
    norm_shift: bool = False
    logit_normal: bool = False
    time_shift: float = 1.0

    def __post_init__(self) -> None:
        if self.logit_normal and not self.norm_shift:
            raise ConfigError("logit_normal token weights need norm_shift", "switch both on")
        if self.outlier_norm < 0:
            raise ConfigError(f"outlier_norm={self.outlier_norm}", "use 0 (off) or a norm")

    def __call__(self, token_norm: Array, t: Array) -> Array:
        """Returns weights [B, h, w, 1] of mean 1 over the batch, not differentiated.

        Args:
          token_norm: Norms of the encoder's tokens [B, h, w, 1].
          t: Training times [B].
        """
        weights = jnp.ones_like(token_norm)
        if self.norm_shift:
            weights = self._shift_weights(token_norm, expand(t, token_norm))
        if self.outlier_norm > 0:
            weights *= (token_norm >= 0) & (token_norm < self.outlier_norm)
        return jax.lax.stop_gradient(weights / (jnp.mean(weights) + _EPS))

    def _shift_weights(self, token_norm: Array, t: Array) -> Array:
        flat = jnp.sort(token_norm.reshape(token_norm.shape[0], -1), axis=1)
        # torch.median is the lower of the two middle values.
        median = expand(flat[:, (flat.shape[1] - 1) // 2], token_norm)
        shift = self.time_shift
        own = shift * token_norm / jnp.maximum(median, _EPS)
        weights = _jacobian(own, t) / jnp.maximum(_jacobian(shift, t), _EPS)
        if self.logit_normal:
            ratio = _log_density(_unshift(own, t)) - _log_density(_unshift(shift, t))
            weights *= jnp.exp(jnp.clip(ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))
        return jnp.clip(weights, *_WEIGHT_RANGE)


def _jacobian(shift: Array | float, t: Array) -> Array:
    """Returns the derivative of the inverse time shift at t."""
    return shift / jnp.maximum(shift - (shift - 1) * t, _EPS) ** 2


def _unshift(shift: Array | float, t: Array) -> Array:
    """Returns the time that the shift maps to t."""
    return t / jnp.maximum(shift - (shift - 1) * t, _EPS)


def _log_density(u: Array) -> Array:
    """Returns the log-density of the standard logit-normal distribution."""
    u = jnp.clip(u, _EPS, 1 - _EPS)
    logit = jnp.log(u) - jnp.log1p(-u)
    return -0.5 * logit**2 - 0.5 * jnp.log(2 * jnp.pi) - jnp.log(u) - jnp.log1p(-u)
