"""Interpolation paths between data and noise, and conversions between kinds of prediction.

The time convention of the whole package: t = 0 is data, t = 1 is noise,
x_t = alpha(t) x1 + sigma(t) x0 with x1 the data and x0 standard normal. SiT and JiT run time the
other way; `flip_time` translates at their border.

Source: DSR stage2/transport/path.py; spec denoiser 5.2.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.typing import Array

DIFFUSION_FORMS = ("sigma", "linear", "decreasing", "increasing-decreasing", "constant", "SBDM")


def expand(t: Array, x: Array) -> Array:
    """Reshapes t [B] so that it broadcasts over x [B, ...]."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def flip_time(function: Callable[..., Array], prediction: str = "velocity") -> Callable[..., Array]:
    """Translates a network between the two conventions: t -> 1 - t, and velocities v -> -v.

    Args:
      function: `(x, t, *args) -> prediction` in one convention.
      prediction: Kind of prediction; data, noise and score do not depend on the direction.

    Returns:
      The same network in the other convention.
    """
    sign = -1 if prediction == "velocity" else 1

    def flipped(x: Array, t: Array, *args: Array) -> Array:
        return sign * function(x, 1 - t, *args)

    return flipped


@dataclass(frozen=True)
class Path:
    """Coefficients of one path and the identities that follow from them.

    Attributes:
      name: "linear", "gvp", "vp" or "vp-consistent".
      alpha: Weight of the data, as a function of t [B].
      sigma: Weight of the noise.
      d_alpha: Derivative of alpha.
      d_sigma: Derivative of sigma.
      beta: Replaces what `drift` derives from the coefficients by `(beta x / 2, beta / 2)`.
      noise_scale: Standard deviation of the noise, which sigma contains, and with which sampling
        starts.
    """

    name: str
    alpha: Callable[[Array], Array]
    sigma: Callable[[Array], Array]
    d_alpha: Callable[[Array], Array]
    d_sigma: Callable[[Array], Array]
    beta: Callable[[Array], Array] | None = None
    noise_scale: float = 1.0

    def scaled(self, noise_scale: float) -> "Path":
        """Returns the same path to noise of another standard deviation.

        Raises:
          ConfigError: If that is not positive, or the drift does not follow the coefficients.
        """
        if noise_scale == self.noise_scale:
            return self
        if noise_scale <= 0 or self.beta is not None:
            raise ConfigError(
                f"config.objective.noise_scale={noise_scale} on the path {self.name!r}",
                "use a positive scale, and 1 with the path 'vp'",
            )
        factor = noise_scale / self.noise_scale
        return dataclasses.replace(
            self,
            sigma=lambda t: factor * self.sigma(t),
            d_sigma=lambda t: factor * self.d_sigma(t),
            noise_scale=noise_scale,
        )

    def interpolate(self, x1: Array, x0: Array, t: Array) -> tuple[Array, Array]:
        """Returns x_t and its velocity u_t, both shaped like the data x1 [B, ...]."""
        at = expand(t, x1)
        xt = self.alpha(at) * x1 + self.sigma(at) * x0
        return xt, self.d_alpha(at) * x1 + self.d_sigma(at) * x0

    def drift(self, x: Array, t: Array) -> tuple[Array, Array]:
        """Returns `(a x, b)` such that the velocity is `a x + b * score`; b has the shape of t."""
        at = expand(t, x)
        if self.beta is not None:
            return self.beta(at) * x / 2, self.beta(at) / 2
        ratio = self.d_alpha(at) / self.alpha(at)
        return ratio * x, ratio * self.sigma(at) ** 2 - self.sigma(at) * self.d_sigma(at)

    def velocity_from_score(self, score: Array, x: Array, t: Array) -> Array:
        """Returns the probability-flow velocity at x."""
        mean, factor = self.drift(x, t)
        return mean + factor * score

    def score_from_velocity(self, velocity: Array, x: Array, t: Array) -> Array:
        """Returns the score at x; finite wherever sigma is positive and alpha not constant."""
        at = expand(t, x)
        ratio = self.alpha(at) / self.d_alpha(at)
        sigma = self.sigma(at)
        return (ratio * velocity - x) / (sigma**2 - ratio * self.d_sigma(at) * sigma)

    def score_from_noise(self, noise: Array, t: Array) -> Array:
        """Returns the score that a noise prediction implies."""
        return -noise / self.sigma(expand(t, noise))

    def score_from_data(self, data: Array, x: Array, t: Array) -> Array:
        """Returns the score that a data prediction implies."""
        at = expand(t, x)
        return -(x - self.alpha(at) * data) / self.sigma(at) ** 2

    def diffusion(self, x: Array, t: Array, form: str, norm: float = 1.0) -> Array:
        """Returns the diffusion coefficient of the reverse SDE, broadcastable to x.

        Args:
          x: State [B, ...]; only its rank matters, except for "SBDM".
          t: Time [B].
          form: One of DIFFUSION_FORMS; "inccreasing-decreasing", as the original spells it, too.
          norm: Scale of the form.

        Raises:
          ConfigError: If the form is unknown.
        """
        at = expand(t, x)
        if form == "sigma":
            return norm * self.sigma(at)
        if form == "linear":
            return norm * at
        if form == "decreasing":
            return 0.25 * (norm * jnp.cos(jnp.pi * (1 - at)) + 1) ** 2
        if form in ("increasing-decreasing", "inccreasing-decreasing"):
            return norm * jnp.sin(jnp.pi * (1 - at)) ** 2
        if form == "constant":
            return jnp.full_like(at, norm)
        if form == "SBDM":
            # DSR-compat: the drift's factor is negative in this time direction; kept for
            # comparison with the original only, samplers refuse it.
            return norm * self.drift(x, t)[1]
        raise ConfigError(f"unknown diffusion form {form!r}", f"use {', '.join(DIFFUSION_FORMS)}")


_VP_MIN, _VP_MAX = 0.1, 20.0


def _vp_log_sigma(t: Array) -> Array:
    s = 1 - t
    return -0.25 * s**2 * (_VP_MAX - _VP_MIN) - 0.5 * s * _VP_MIN


def _vp_d_log_sigma(t: Array) -> Array:
    return 0.5 * (1 - t) * (_VP_MAX - _VP_MIN) + 0.5 * _VP_MIN


def _vp_alpha(t: Array) -> Array:
    # 1 - exp(2 log sigma) cancels near t = 1; expm1 keeps its digits.
    return jnp.sqrt(-jnp.expm1(2 * _vp_log_sigma(t)))


def _vp_sigma(t: Array) -> Array:
    return jnp.exp(_vp_log_sigma(t))


def _vp_d_alpha(t: Array) -> Array:
    return -(_vp_sigma(t) ** 2) * _vp_d_log_sigma(t) / _vp_alpha(t)


def _vp_d_sigma(t: Array) -> Array:
    return _vp_sigma(t) * _vp_d_log_sigma(t)


_HALF_PI = math.pi / 2

_PATHS = {
    path.name: path
    for path in (
        Path(
            "linear",
            alpha=lambda t: 1 - t,
            sigma=lambda t: t,
            d_alpha=lambda t: -jnp.ones_like(t),
            d_sigma=lambda t: jnp.ones_like(t),
        ),
        Path(
            "gvp",
            alpha=lambda t: jnp.cos(_HALF_PI * t),
            sigma=lambda t: jnp.sin(_HALF_PI * t),
            d_alpha=lambda t: -_HALF_PI * jnp.sin(_HALF_PI * t),
            d_sigma=lambda t: _HALF_PI * jnp.cos(_HALF_PI * t),
        ),
        # DSR-compat: the original turned the time of the coefficients around but not the drift's,
        # so its noise and score predictions follow a field that does not belong to this path.
        Path(
            "vp",
            _vp_alpha,
            _vp_sigma,
            _vp_d_alpha,
            _vp_d_sigma,
            beta=lambda t: 2 * _vp_d_log_sigma(t),
        ),
        Path("vp-consistent", _vp_alpha, _vp_sigma, _vp_d_alpha, _vp_d_sigma),
    )
}


def get_path(name: str) -> Path:
    """Returns a path by its name, in any case.

    Raises:
      ConfigError: If it is unknown.
    """
    if name.lower() not in _PATHS:
        raise ConfigError(
            f"config.objective.path={name!r} is unknown", f"choose from {', '.join(_PATHS)}"
        )
    return _PATHS[name.lower()]
