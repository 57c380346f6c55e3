"""Builds the compiled sampler from `config.sample`, and the recipe of its samples."""

import dataclasses
from typing import Any, cast

from jax.sharding import Mesh, NamedSharding

from dsr_jax.build.experiment import make_denoise_fn, make_objective
from dsr_jax.build.guide import Guide, find_guide, guide_recipe
from dsr_jax.build.rae import file_digests
from dsr_jax.build.text_to_image import make_conditioner
from dsr_jax.config import ConfigDict, architecture, precision_recipe
from dsr_jax.core.errors import ConfigError
from dsr_jax.models.denoiser import Denoiser
from dsr_jax.models.text_to_image import TextToImage
from dsr_jax.models.tuning import tuning
from dsr_jax.parallel import shardings
from dsr_jax.parallel.axes import Rules
from dsr_jax.sampling.batch import fixed_batch, whole_batch
from dsr_jax.sampling.sampler import (
    ArraySampler,
    DeviceSampleFn,
    SamplerSettings,
    make_device_sampler,
)
from dsr_jax.spaces import InputSpace


def sampler_settings(config: ConfigDict) -> SamplerSettings:
    """Returns solver and guidance of `config.sample`."""
    section, times = config.sample, {"time_shift", "time_range"}
    names = {field.name for field in dataclasses.fields(SamplerSettings)} - times
    return SamplerSettings(
        **{name: config.objective[name] for name in times},
        **{name: section[name] for name in names},
    )


def sampling_batch(config: ConfigDict, devices: int) -> int:
    """Returns config.sample.batch, or what takes its place without a choice by memory, as a
    multiple of the number of devices."""
    return whole_batch(fixed_batch(config.sample.batch), devices)


def make_sampler(
    config: ConfigDict, model: Denoiser, space: InputSpace, mesh: Mesh, rules: Rules
) -> ArraySampler:
    """Builds a compiled function from parameters, indices and labels to images.

    The weights of an autoguidance's guide are read here.
    """
    sharding = shardings.batch_sharding(mesh, rules)
    guide = find_guide(config, space, mesh, rules)
    sample = compile_sampler(config, model, space, sharding, guide)
    return ArraySampler(sample, guide.restore() if guide else None, sharding)


def compile_sampler(
    config: ConfigDict,
    model: Denoiser,
    space: InputSpace,
    sharding: NamedSharding,
    guide: Guide | None,
) -> DeviceSampleFn:
    """Builds what `make_sampler` runs: a jitted function of arrays with the batch's `sharding`."""
    prediction, mesh = config.objective.prediction, cast(Mesh, sharding.mesh)
    if guide and isinstance(model, TextToImage):
        raise ConfigError(
            f"config.sample.autoguidance={config.sample.autoguidance!r} for a model of text",
            "leave it empty: config.sample.guidance leads away from the dropped text",
        )
    return make_device_sampler(
        make_denoise_fn(model, prediction),
        make_objective(config),
        sampler_settings(config),
        space.decode,
        latent_shape=space.latent_shape,
        null_label=config.data.num_classes,
        guide_fn=make_denoise_fn(guide.model, prediction) if guide else None,
        conditioner=make_conditioner(model) if isinstance(model, TextToImage) else None,
        prepare=(model.unstacked, guide.model.unstacked if guide else model.unstacked),
        xla_options=dict(tuning(mesh.devices.flat[0].platform).sampler_options),
        sharding=sharding,
    )


def sampling_recipe(config: ConfigDict, step: int | None, ema: str | None) -> dict[str, Any]:
    """Returns what decides a checkpoint's images, besides their indices and labels."""
    guide, settings = guide_recipe(config), architecture(config)
    if not config.space.shift:
        # Jobs of earlier versions, which must continue, do not record it.
        settings.pop("config.space.shift", None)
    return {
        "step": step,
        "ema": ema,
        "sampler": sampler_settings(config).recipe(),
        **({"autoguidance": guide} if guide else {}),
        "objective": {key: config.objective[key] for key in ("path", "prediction", "noise_scale")},
        "precision": precision_recipe(config),
        "architecture": settings | file_digests(config),
    }
