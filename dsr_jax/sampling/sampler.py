"""From noise to images in one compiled function: guidance, solver, decoder, cast to uint8.

Source: DSR sample_ddp.py; spec denoiser 6 and 7.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.rng import normal_per_sample, sample_keys, stream_key
from dsr_jax.core.typing import Array, Params, PyTree
from dsr_jax.diffusion.guidance import classifier_free
from dsr_jax.diffusion.objectives import Objective
from dsr_jax.diffusion.samplers import ODE_METHODS, SDE_METHODS, sample_ode, sample_sde, time_grid
from dsr_jax.sampling.images import UINT8_MODES, to_uint8
from dsr_jax.sampling.job import Samples

_SDE = "sde-"
METHODS = ("heun", *ODE_METHODS, *(_SDE + method for method in SDE_METHODS))

ApplyFn = Callable[[Params, Array, Array, Array], Array]
"""`(params, x [B, h, w, C], t [B], labels [B]) -> out [B, h, w, C]`."""

DrawFn = Callable[[Params, PyTree, Array, Array], Samples]
"""`(params, space variables, global indices [B], labels [B]) -> Samples`, of arrays on devices."""

SampleFn = Callable[[Params, PyTree, np.ndarray, np.ndarray], Samples]
"""`(params, space variables, global indices [B], labels [B]) -> Samples`; same on every host."""


@dataclass(frozen=True)
class SamplerSettings:
    """How samples are drawn; all of it belongs into their recipe.

    Attributes:
      method: One of METHODS: an ODE solver, or "sde-euler", "sde-heun".
      num_points: Points of the time grid, one more than solver steps.
      guidance: Scale of classifier-free guidance, 1 for none.
      guidance_channels: Guides only the first so many channels of the latent, 0 for all of them.
      interval: Times (t = 0 data, 1 noise) in which guidance is on.
      open_interval: Leaves out the interval's ends, but never t = 1.
      time_shift: Factor on the odds of t, as in training.
      time_range: Lowest and highest time of training, () for the prediction's own.
      seed: Of the noise.
      uint8: Cast of the images, see `to_uint8`.
      rtol: Relative tolerance of dopri5.
      atol: Absolute tolerance of dopri5.
      sde_form: Diffusion coefficient of the SDE methods.
      sde_norm: Its scale.
      last_step: Last step of the SDE methods.
      last_step_size: Its size in t.
    """

    method: str = "euler"
    num_points: int = 50
    guidance: float = 1.0
    guidance_channels: int = 0
    interval: tuple[float, float] = (0.0, 1.0)
    open_interval: bool = False
    time_shift: float = 1.0
    time_range: tuple[float, ...] = ()
    seed: int = 0
    uint8: str = "truncate"
    rtol: float = 1e-3
    atol: float = 1e-6
    sde_form: str = "sigma"
    sde_norm: float = 1.0
    last_step: str = "mean"
    last_step_size: float = 0.04

    def __post_init__(self) -> None:
        for value, known, name in (
            (self.method, METHODS, "method"),
            (self.uint8, UINT8_MODES, "uint8 mode"),
        ):
            if value not in known:
                raise ConfigError(
                    f"unknown sampling {name} {value!r}", f"choose from {', '.join(known)}"
                )

    @property
    def is_sde(self) -> bool:
        """Whether noise is added along the way."""
        return self.method.startswith(_SDE)

    def recipe(self) -> dict[str, Any]:
        """The settings that have an effect, as JSON values."""
        values = dataclasses.asdict(self)
        unused = set()
        if not self.is_sde:
            unused |= {"sde_form", "sde_norm", "last_step", "last_step_size"}
        if self.method != "dopri5":
            unused |= {"rtol", "atol"}
        if self.guidance == 1:
            unused |= {"interval", "open_interval", "guidance_channels"}
        # Younger settings: left out where they change nothing, as recipes were before them.
        unused |= {
            name
            for name in ("time_range", "open_interval", "guidance_channels")
            if not values[name]
        }
        return {name: value for name, value in values.items() if name not in unused}


def make_draw_fn(
    apply_fn: ApplyFn,
    objective: Objective,
    settings: SamplerSettings,
    decode: Callable[[PyTree, Array], Array],
    *,
    latent_shape: tuple[int, int, int],
    null_label: int,
    sharding: NamedSharding | None = None,
) -> DrawFn:
    """Builds the jitted function that draws one batch; it compiles once per batch size.

    Noise is keyed by each sample's global index (streams "sample_noise" and "sample_sde"), so a
    sample does not depend on its batch, the mesh or the number of hosts, up to the rounding of
    products of other shapes.

    Args:
      apply_fn: The denoiser.
      objective: Turns its output into velocities and scores.
      settings: How to draw.
      decode: `(space variables, latents [B, h, w, C]) -> images [B, H, W, c]` in [0, 1].
      latent_shape: Height, width and channels of one latent.
      null_label: Label of "no class".
      sharding: Splits the batch over devices; None for one device.

    Raises:
      ConfigError: If the settings cannot work.
    """
    grid = _grid(objective, settings)

    @jax.jit
    def draw(params: Params, variables: PyTree, indices: Array, labels: Array) -> Samples:
        noise_key = stream_key(settings.seed, "sample_noise")
        noise = normal_per_sample(sample_keys(noise_key, indices), latent_shape)
        noise = objective.path.noise_scale * noise
        guided = classifier_free(
            lambda x, t, y: apply_fn(params, x, t, y),
            settings.guidance,
            null_label,
            settings.interval,
            settings.guidance_channels or None,
            settings.open_interval,
        )

        def predict(x: Array, t: Array) -> Array:
            return guided(x, t, labels)

        latents = _integrate(predict, objective, settings, noise, grid, indices)
        images = decode(variables, latents)
        finite = jnp.isfinite(latents).all(axis=(1, 2, 3)) & jnp.isfinite(images).all(
            axis=(1, 2, 3)
        )
        pixels = to_uint8(images, settings.uint8)
        if sharding is None:
            return Samples(pixels, finite, indices)
        whole = NamedSharding(sharding.mesh, PartitionSpec())
        constrain = jax.lax.with_sharding_constraint
        pixels, indices = (constrain(x, sharding) for x in (pixels, indices))
        return Samples(pixels, constrain(finite, whole), indices)

    return draw


def make_sample_fn(draw: DrawFn, sharding: NamedSharding | None = None) -> SampleFn:
    """Puts `draw`, with the sharding of its batch, before arrays that every host holds whole."""

    def sample(
        params: Params, variables: PyTree, indices: np.ndarray, labels: np.ndarray
    ) -> Samples:
        return draw(params, variables, _place(indices, sharding), _place(labels, sharding))

    return sample


def _grid(objective: Objective, settings: SamplerSettings) -> np.ndarray:
    """The times that the solver passes, on the host: a constant of the program."""
    last_step = None
    if settings.is_sde:
        last_step = 0.0 if settings.last_step == "none" else settings.last_step_size
    times = time_grid(
        settings.num_points,
        objective.path.name,
        objective.prediction,
        settings.time_shift,
        last_step=last_step,
        time_range=settings.time_range,
    )
    return np.asarray(times)


def _integrate(
    predict: Callable[[Array, Array], Array],
    objective: Objective,
    settings: SamplerSettings,
    noise: Array,
    times: np.ndarray,
    indices: Array,
) -> Array:
    """Runs the solver from noise [B, ...] to latents [B, ...]."""
    grid = jnp.asarray(times)
    if not settings.is_sde:
        return sample_ode(
            lambda x, t: objective.velocity(predict(x, t), x, t),
            noise,
            grid,
            settings.method,
            rtol=settings.rtol,
            atol=settings.atol,
        )

    def step_noise(step: Array) -> Array:
        keys = sample_keys(stream_key(settings.seed, "sample_sde", step), indices)
        return normal_per_sample(keys, noise.shape[1:])

    return sample_sde(
        predict,
        objective,
        noise,
        grid,
        step_noise,
        method=settings.method.removeprefix(_SDE),
        form=settings.sde_form,
        norm=settings.sde_norm,
        last_step=settings.last_step,
        last_step_size=settings.last_step_size,
    )


def _place(array: np.ndarray, sharding: NamedSharding | None) -> Array:
    """Puts an array that every host holds whole onto the devices."""
    if sharding is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
