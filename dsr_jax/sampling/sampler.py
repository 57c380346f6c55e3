"""Sampler from noise to images as one compiled function: guidance, solver, decoder, uint8 cast.

Source: DSR sample_ddp.py; spec denoiser 6 and 7.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.rng import normal_per_sample, sample_keys, stream_key
from dsr_jax.core.typing import Array, Denoiser, Params, PyTree
from dsr_jax.diffusion.guidance import autoguidance, check_interval, classifier_free, strength_in
from dsr_jax.diffusion.objectives import Objective
from dsr_jax.diffusion.samplers import (
    Sampler,
    SamplingProblem,
    SolverOptions,
    find_sampler,
    time_grid,
)
from dsr_jax.sampling.images import UINT8_MODES, to_uint8
from dsr_jax.sampling.job import Samples

ApplyFn = Callable[[Params, Array, Array, Array], Array]
"""`(params, x [B, h, w, C], t [B], labels [B]) -> out [B, h, w, C]`."""

PrepareFn = Callable[[Params], Params]
"""Returns parameters in the form in which many evaluations read them faster."""

DeviceSampleFn = Callable[[Params, Params | None, PyTree, Array, Array], Samples]
"""`(params, guide's params, space variables, global indices [B], labels [B]) -> Samples`, of arrays
on devices."""

SampleFn = Callable[[Params, PyTree, np.ndarray, np.ndarray], Samples]
"""`(params, space variables, global indices [B], labels [B]) -> Samples`, of NumPy arrays that are
the same on every host."""


class Conditioner(NamedTuple):
    """How a sampler makes a network's conditions from what the caller gives in place of labels.

    Attributes:
      prepare: `(params, tokens [B, L]) -> condition`, any tree of arrays [B, ...], once per batch.
      drop: Returns the condition of the unguided prediction.
      present: `tokens -> bool [B]`: the images of other samples are black.
    """

    prepare: Callable[[Params, Array], Any]
    drop: Callable[[Any], Any]
    present: Callable[[Array], Array]


@dataclass(frozen=True)
class SamplerSettings:
    """Solver, guidance and cast of one file of samples; all of it is part of their recipe.

    Attributes:
      method: Name in `samplers.SAMPLERS`, or "package.module:function".
      num_points: Points of the time grid, one more than solver steps.
      guidance: Scale of classifier-free guidance or autoguidance, 1 for none.
      guidance_channels: Guides only the first so many channels of the latent, 0 for all of them.
      interval: Times (t = 0 data, 1 noise) in which guidance is on.
      open_interval: Leaves out the interval's ends, but never t = 1.
      time_shift: Factor on the odds of t, as in training.
      time_range: Lowest and highest time of training, () for the prediction's own.
      seed: Seed of the noise.
      uint8: Cast of the images, see `to_uint8`.
      rtol: Relative tolerance of dopri5.
      atol: Absolute tolerance of dopri5.
      sde_form: Diffusion coefficient of the SDE methods.
      sde_norm: Scale of the diffusion coefficient.
      last_step: Last step of the SDE methods.
      last_step_size: Size of the last step in t.
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
        find_sampler(self.method)
        check_interval(self.interval)
        if self.uint8 not in UINT8_MODES:
            raise ConfigError(
                f"config.sample.uint8={self.uint8!r} is unknown",
                f"choose from {', '.join(UINT8_MODES)}",
            )

    @property
    def options(self) -> SolverOptions:
        """Settings of the solver alone."""
        return SolverOptions(**{name: getattr(self, name) for name in SolverOptions._fields})

    def recipe(self) -> dict[str, Any]:
        """Returns the settings that have an effect, as JSON values."""
        values = dataclasses.asdict(self)
        unused = set(SolverOptions._fields) - set(find_sampler(self.method).options)
        if self.guidance == 1:
            unused |= {"interval", "open_interval", "guidance_channels"}
        # Settings that older recipes do not have are left out where they change nothing.
        unused |= {
            name
            for name in ("time_range", "open_interval", "guidance_channels")
            if not values[name]
        }
        return {name: value for name, value in values.items() if name not in unused}


def make_device_sampler(
    apply_fn: ApplyFn,
    objective: Objective,
    settings: SamplerSettings,
    decode: Callable[[PyTree, Array], Array],
    *,
    latent_shape: tuple[int, int, int],
    null_label: int,
    guide_fn: ApplyFn | None = None,
    conditioner: Conditioner | None = None,
    prepare: tuple[PrepareFn, PrepareFn] = (lambda params: params, lambda params: params),
    xla_options: Mapping[str, Any] = MappingProxyType({}),
    sharding: NamedSharding | None = None,
) -> DeviceSampleFn:
    """Builds the jitted function that samples one batch; it compiles once per batch size.

    Noise is keyed by each sample's global index (streams "sample_noise" and "sample_sde"), so a
    sample does not depend on its batch, the mesh or the number of hosts, up to the rounding of
    matmuls of other shapes.

    Args:
      apply_fn: The denoiser.
      objective: Turns its output into velocities and scores.
      settings: Solver and guidance.
      decode: `(space variables, latents [B, h, w, C]) -> images [B, H, W, c]` in [0, 1].
      latent_shape: Height, width and channels of one latent.
      null_label: Label of "no class".
      guide_fn: The weaker denoiser of autoguidance; None for classifier-free guidance.
      conditioner: Makes conditions from token sequences, which then take the place of labels.
      prepare: For denoiser and guide, what is done to their parameters before the first step.
      xla_options: Options of its compiler.
      sharding: Splits the batch over devices; None for one device.

    Raises:
      ConfigError: If the settings cannot work.
    """
    sampler = find_sampler(settings.method)
    grid = _grid(objective, settings, sampler)
    null = conditioner.drop if conditioner else null_label
    guided = _guide(apply_fn, guide_fn, settings, null)

    def sample(
        params: Params, guide: Params | None, variables: PyTree, indices: Array, labels: Array
    ) -> Samples:
        noise, step_noise = _noise(settings.seed, indices, latent_shape)
        condition = conditioner.prepare(params, labels) if conditioner else labels
        predict = guided(prepare[0](params), None if guide is None else prepare[1](guide))
        problem = SamplingProblem(
            lambda x, t: predict(x, t, condition),
            objective,
            objective.path.noise_scale * noise,
            jnp.asarray(grid),
            step_noise,
            settings.options,
        )
        latents = sampler.run(problem)
        images = decode(variables, latents)
        shown = conditioner.present(labels) if conditioner else None
        return _samples(latents, images, shown, indices, settings.uint8, sharding)

    return jax.jit(sample, compiler_options=dict(xla_options) or None)


def _noise(
    seed: int, indices: Array, shape: tuple[int, int, int]
) -> tuple[Array, Callable[[Array], Array]]:
    """Returns the first noise of samples [B, *shape], and a function to the noise of a step."""

    def step_noise(step: Array) -> Array:
        return normal_per_sample(sample_keys(stream_key(seed, "sample_sde", step), indices), shape)

    first = stream_key(seed, "sample_noise")
    return normal_per_sample(sample_keys(first, indices), shape), step_noise


def _samples(
    latents: Array,
    images: Array,
    shown: Array | None,
    indices: Array,
    uint8: str,
    sharding: NamedSharding | None,
) -> Samples:
    """Casts images [B, H, W, c], and lays the samples out for the host.

    Args:
      latents: [B, h, w, C].
      images: Decoded latents.
      shown: Samples [B] whose images are not black; None for all.
      indices: Global indices [B].
      uint8: Cast of the images.
      sharding: Sharding of the batch; None for one device.
    """
    finite = jnp.isfinite(latents).all(axis=(1, 2, 3)) & jnp.isfinite(images).all(axis=(1, 2, 3))
    pixels = to_uint8(images, uint8)
    if shown is not None:
        pixels = jnp.where(shown[:, None, None, None], pixels, jnp.zeros_like(pixels))
    if sharding is None:
        return Samples(pixels, finite, indices)
    whole = NamedSharding(sharding.mesh, PartitionSpec())
    constrain = jax.lax.with_sharding_constraint
    pixels, indices = (constrain(x, sharding) for x in (pixels, indices))
    return Samples(pixels, constrain(finite, whole), indices)


def _guide(
    apply_fn: ApplyFn,
    guide_fn: ApplyFn | None,
    settings: SamplerSettings,
    null_label: int | Callable[[Any], Any],
) -> Callable[[Params, Params | None], Denoiser]:
    """Returns a function from parameters, and those of the guide, to the guided denoiser."""
    strength = strength_in(settings.guidance, settings.interval, settings.open_interval)

    def guided(params: Params, guide: Params | None) -> Denoiser:
        def network(x: Array, t: Array, labels: Array) -> Array:
            return apply_fn(params, x, t, labels)

        def weaker(x: Array, t: Array, labels: Array) -> Array:
            assert guide is not None and guide_fn is not None
            return guide_fn(guide, x, t, labels)

        if settings.guidance == 1:
            return network
        if guide_fn is not None:
            return autoguidance(network, weaker, strength)
        return classifier_free(network, strength, null_label, settings.guidance_channels or None)

    return guided


class ArraySampler:
    """A `SampleFn`: a sampler that takes NumPy arrays and puts them onto the devices.

    Args:
      sample: Result of `make_device_sampler`.
      guide: Parameters of its guide, on the devices.
      sharding: Sharding of its batch; None for one device.
    """

    def __init__(
        self,
        sample: DeviceSampleFn,
        guide: Params | None = None,
        sharding: NamedSharding | None = None,
    ) -> None:
        self._sample, self._guide, self._sharding = sample, guide, sharding

    def __call__(
        self, params: Params, variables: PyTree, indices: np.ndarray, labels: np.ndarray
    ) -> Samples:
        """Samples one batch."""
        placed = _place(indices, self._sharding), _place(labels, self._sharding)
        return self._sample(params, self._guide, variables, *placed)

    def compile(
        self, params: Params, variables: PyTree, batch: int, row: tuple[int, ...] = ()
    ) -> Any:
        """Returns the program for a batch, which `with_program` runs.

        Args:
          params: Parameters, or their shapes with shardings.
          variables: Variables of the space, likewise.
          batch: Number of samples.
          row: Shape of one sample's labels: [] for a class, [L] for tokens.
        """
        lowerable: Any = self._sample
        indices = jax.ShapeDtypeStruct((batch,), jnp.uint32, sharding=self._sharding)
        labels = jax.ShapeDtypeStruct((batch, *row), jnp.int32, sharding=self._sharding)
        return lowerable.lower(params, self._guide, variables, indices, labels).compile()

    def with_program(self, program: Any) -> "ArraySampler":
        """Returns this sampler with a program in place of its function; for that batch alone."""
        return ArraySampler(program, self._guide, self._sharding)


def _grid(objective: Objective, settings: SamplerSettings, sampler: Sampler) -> np.ndarray:
    """Returns the solver's times, on the host: a constant of the program."""
    if sampler.grid is not None:
        return np.asarray(sampler.grid(settings.num_points, settings.time_shift))
    last_step = None
    if sampler.stochastic:
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


def _place(array: np.ndarray, sharding: NamedSharding | None) -> Array:
    """Puts an array that every host holds whole onto the devices."""
    if sharding is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
