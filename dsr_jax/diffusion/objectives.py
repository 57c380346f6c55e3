"""Objectives: the network's prediction and its loss.

Source: DSR stage2/transport/transport.py; spec denoiser 5.3.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax.numpy as jnp

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.typing import Array
from dsr_jax.diffusion.paths import Path, expand, get_path

PREDICTIONS = ("velocity", "data", "noise", "score")
LOSS_WEIGHTS = ("", "velocity", "likelihood")


class LossTerms(NamedTuple):
    """Losses of one batch.

    Attributes:
      loss: Mean over each sample [B].
      per_element: Squared errors, weighted, shaped like the latent [B, h, w, C].
      prediction: The network's output.
    """

    loss: Array
    per_element: Array
    prediction: Array


@flax.struct.dataclass
class Objective:
    """Path, kind of prediction, and weight of the error.

    Attributes:
      path: Interpolation path.
      prediction: "velocity", "data", "noise" or "score".
      loss_weight: "" (none), "velocity" or "likelihood"; only noise and score use it.
      t_eps: Floor of the denominator that turns a data prediction into a velocity.
      clip_target: The floor applies to the target, too, as in JiT, so that at every time the best
        prediction is the data itself; only for data prediction.
    """

    path: Path = flax.struct.field(pytree_node=False)
    prediction: str = flax.struct.field(pytree_node=False)
    loss_weight: str = flax.struct.field(pytree_node=False, default="")
    t_eps: float = flax.struct.field(pytree_node=False, default=0.05)
    clip_target: bool = flax.struct.field(pytree_node=False, default=False)

    def velocity(self, out: Array, x: Array, t: Array) -> Array:
        """Turns the network's output at (x [B, ...], t [B]) into a velocity."""
        if self.prediction == "velocity":
            return out
        if self.prediction == "data":
            return self._velocity_from_data(out, x, t)
        return self.path.velocity_from_score(self.score(out, x, t), x, t)

    def _velocity_from_data(self, data: Array, x: Array, t: Array) -> Array:
        at = expand(t, x)
        if self.path.name == "linear":
            # DSR-compat: without `clip_target`, the floor applies to the prediction only, so below
            # t_eps the best prediction is not the data itself.
            return (x - data) / jnp.maximum(at, self.t_eps)
        noise = (x - self.path.alpha(at) * data) / jnp.maximum(self.path.sigma(at), self.t_eps)
        return self.path.d_alpha(at) * data + self.path.d_sigma(at) * noise

    def score(self, out: Array, x: Array, t: Array) -> Array:
        """Turns the network's output at (x [B, ...], t [B]) into a score."""
        if self.prediction == "velocity":
            return self.path.score_from_velocity(out, x, t)
        if self.prediction == "data":
            return self.path.score_from_data(out, x, t)
        return self.path.score_from_noise(out, t) if self.prediction == "noise" else out

    def data(self, out: Array, x: Array, t: Array) -> Array:
        """Turns the network's output at (x [B, ...], t [B]) into a prediction of the data."""
        if self.prediction == "data":
            return out
        at = expand(t, x)
        return (x + self.path.sigma(at) ** 2 * self.score(out, x, t)) / self.path.alpha(at)

    def loss(
        self, apply_fn: Callable[[Array, Array], Array], x1: Array, x0: Array, t: Array
    ) -> LossTerms:
        """Noises a batch, predicts and compares.

        Args:
          apply_fn: `(x_t [B, ...], t [B]) -> out`, the network with everything else bound.
          x1: Data [B, ...].
          x0: Standard normal noise, shaped like the data.
          t: Times [B].
        """
        xt, ut = self.path.interpolate(x1, x0, t)
        if self.clip_target:
            ut = self.velocity(x1, xt, t)
        out = apply_fn(xt, t)
        errors = self._errors(out, xt, ut, x0, t)
        return LossTerms(jnp.mean(errors, axis=tuple(range(1, errors.ndim))), errors, out)

    def _errors(self, out: Array, xt: Array, ut: Array, x0: Array, t: Array) -> Array:
        if self.prediction in ("velocity", "data"):
            return jnp.square(self.velocity(out, xt, t) - ut)
        sigma = self.path.sigma(expand(t, xt))
        if self.prediction == "noise":
            errors = jnp.square(out - x0)
        else:
            errors = jnp.square(sigma * out + x0)
        factor = self.path.drift(xt, t)[1]
        if self.loss_weight == "velocity":
            return (factor / sigma) ** 2 * errors
        if self.loss_weight == "likelihood":
            # DSR-compat: negative for the linear path in this time direction.
            return factor / sigma**2 * errors
        return errors


def make_objective(
    path: str,
    prediction: str,
    loss_weight: str | None = "",
    t_eps: float = 0.05,
    *,
    noise_scale: float = 1.0,
    clip_target: bool = False,
) -> Objective:
    """Builds a checked objective from config values.

    Raises:
      ConfigError: For an unknown name, a scale that the path does not take, or a weight or a clip
        that the prediction ignores.
    """
    if prediction not in PREDICTIONS:
        raise ConfigError(
            f"config.objective.prediction={prediction!r} is unknown",
            f"choose from {', '.join(PREDICTIONS)}",
        )
    weight = loss_weight or ""
    if weight not in LOSS_WEIGHTS:
        raise ConfigError(
            f"config.objective.loss_weight={weight!r} is unknown",
            "choose from '', velocity, likelihood",
        )
    if weight and prediction in ("velocity", "data"):
        raise ConfigError(
            f"config.objective.loss_weight={weight!r} has no effect on {prediction} prediction",
            "leave it empty; only noise and score losses are weighted",
        )
    if clip_target and prediction != "data":
        raise ConfigError(
            f"config.objective.clip_target has no effect on {prediction} prediction",
            "leave it False; only a data prediction is divided by the time",
        )
    return Objective(get_path(path).scaled(noise_scale), prediction, weight, t_eps, clip_target)


def bin_losses(
    loss: Array, t: Array, num_bins: int, counted: Array | None = None
) -> tuple[Array, Array]:
    """Sums and counts [num_bins] of per-sample losses [B] over equal bins of t in [0, 1].

    A loss that is no number is so in its own bin alone. Samples of which `counted` [B] is 0 are
    left out.
    """
    index = jnp.clip((t * num_bins).astype(jnp.int32), 0, num_bins - 1)
    member = index[:, None] == jnp.arange(num_bins)  # [B, bins]
    if counted is not None:
        member &= counted[:, None] > 0
    sums = jnp.sum(jnp.where(member, loss[:, None], 0.0), axis=0)
    return sums, jnp.sum(member, axis=0, dtype=jnp.float32)
