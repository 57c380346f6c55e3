"""Builds the objects that a config names: mesh, space, data, objective, optimizer, step."""

import ast
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dsr_jax.build.rae import make_rae
from dsr_jax.build.text_to_image import (
    check_targets,
    make_text_denoise_fn,
    make_text_model,
    make_text_source,
)
from dsr_jax.build.vae import make_vae
from dsr_jax.config import ConfigDict, has_text
from dsr_jax.core.errors import ConfigError
from dsr_jax.core.typing import Array, Batch, Params, PyTree
from dsr_jax.data.base import Source
from dsr_jax.data.latents import CachedLatents
from dsr_jax.data.pipeline import make_batches, record_numbers
from dsr_jax.data.sources import check_label_table
from dsr_jax.data.sources import make_source as open_source
from dsr_jax.diffusion.objectives import Objective
from dsr_jax.diffusion.objectives import make_objective as objective_by_name
from dsr_jax.diffusion.paths import flip_time
from dsr_jax.diffusion.time_sampling import TimeSampler
from dsr_jax.diffusion.time_sampling import make_time_sampler as time_sampler_by_name
from dsr_jax.diffusion.token_weights import TokenWeights
from dsr_jax.models.denoiser import Denoiser
from dsr_jax.models.text_to_image import TextToImage
from dsr_jax.models.tuning import tuning
from dsr_jax.parallel import mesh as meshes
from dsr_jax.parallel import shardings
from dsr_jax.parallel.axes import Rules
from dsr_jax.parallel.axes import make_rules as rules_by_name
from dsr_jax.spaces import RAE, InputSpace, PixelSpace
from dsr_jax.training import skipping
from dsr_jax.training.optimizers import LearningRate, Optimizer, ParamGroup
from dsr_jax.training.state import TrainState, make_reshard
from dsr_jax.training.step import TrainStep
from dsr_jax.training.text_step import TextStep

Step = TypeVar("Step", bound=Callable[..., Any])


def set_precision(config: ConfigDict) -> None:
    """Sets the precision of float32 matmuls for the whole process."""
    name = config.precision.matmul
    jax.config.update("jax_default_matmul_precision", None if name == "default" else name)


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh of `devices` (default: all), after checking that the batch divides over it."""
    mesh = meshes.make_mesh(meshes.MeshShape(**config.mesh.to_dict()), devices)
    section, rules = config.data, make_rules(config)
    meshes.check_batch(section.global_batch, mesh, rules, accumulate=config.optim.accumulate)
    return mesh


def make_rules(config: ConfigDict) -> Rules:
    """Returns the rules that map logical axes to mesh axes."""
    return rules_by_name(config.sharding.rules, config.sharding.overrides)


def make_space(config: ConfigDict, mesh: Mesh | None = None) -> tuple[InputSpace, PyTree]:
    """Returns the input space and its frozen variables.

    Args:
      config: Experiment config.
      mesh: Mesh over which the variables are replicated; None leaves them in host memory.

    Raises:
      ConfigError: If the space's name is unknown.
    """
    if config.space.name == "pixels":
        return PixelSpace(config.data.image_size, config.data.channels), {}
    if config.space.name == "rae":
        return make_rae(config, mesh)
    if config.space.name == "vae":
        return make_vae(config, mesh)
    raise ConfigError(
        f"config.space.name={config.space.name!r} is unknown", "choose from pixels, rae, vae"
    )


def make_objective(config: ConfigDict) -> Objective:
    """Returns the objective: what the denoiser predicts, and its loss."""
    section = config.objective
    return objective_by_name(
        section.path,
        section.prediction,
        section.loss_weight,
        noise_scale=section.noise_scale,
        clip_target=section.clip_target,
    )


def make_token_weights(config: ConfigDict) -> TokenWeights | None:
    """Returns the weights of the tokens' losses; None if all are equal."""
    section = config.objective
    weights = TokenWeights(
        section.outlier_norm,
        section.norm_shift,
        section.norm_shift_logit_normal,
        section.time_shift,
    )
    return weights if weights.outlier_norm or weights.norm_shift else None


def make_time_sampler(config: ConfigDict) -> TimeSampler:
    """Returns the distribution of training times."""
    section = config.objective
    return time_sampler_by_name(
        section.time_distribution,
        section.path,
        section.prediction,
        section.time_shift,
        section.time_range,
    )


def make_optimizer(config: ConfigDict) -> Optimizer:
    """Returns AdamW with its schedule."""
    section = config.optim
    rate = LearningRate(
        base=section.lr,
        schedule=section.schedule,
        final=section.final_lr,
        warmup_steps=section.warmup_steps,
        decay_end_steps=section.decay_end_steps,
        warmup_from_zero=section.warmup_from_zero,
        warmup_offset=section.warmup_offset,
    )
    return Optimizer(
        rate,
        b1=section.b1,
        b2=section.b2,
        eps=section.eps,
        groups=[ParamGroup(*group) for group in section.groups],
        weight_decay=section.weight_decay,
        clip_norm=section.clip_norm,
        freeze=section.freeze,
    )


def make_source(
    config: ConfigDict, split: str | None = None, random_crops: bool = False, slots: int = 0
) -> Source:
    """Opens the data set.

    Args:
      config: Experiment config.
      split: Replaces the config's.
      random_crops: Leaves images larger if `global_batches` is to crop them randomly; otherwise
        they have the config's size.
      slots: With text, image slots of a token sequence, `TextToImage.num_slots`.
    """
    section = config.data
    if has_text(config):
        return make_text_source(config, slots, split)
    if section.latents:
        latents = CachedLatents(section.latents)
        check_label_table(latents, section.num_classes)
        return latents
    larger = section.crop_from if random_crops else 0
    return open_source(
        section.source,
        image_size=larger or section.image_size,
        fit="resize_shorter_side" if larger else "center_crop",
        channels=section.channels,
        root=section.root or None,
        split=split or section.split,
        num_classes=section.num_classes,
        class_map=section.class_map,
        on_corrupt=section.on_corrupt,
    )


def global_batches(
    config: ConfigDict, source: Source, sharding: NamedSharding
) -> Callable[[int], Iterator[Batch]]:
    """Returns `batches(first step)`, which yields global batches indefinitely.

    Each process reads the rows that its devices hold.
    """
    section = config.data
    rows = shardings.process_rows(sharding, section.global_batch)

    def read(start_step: int) -> Iterator[Any]:
        return make_batches(
            source,
            config.seed,
            section.global_batch,
            start_step=start_step,
            rows=rows,
            flip=section.flip and not section.latents,
            crop=section.image_size if section.crop_from and not section.latents else 0,
            workers=section.workers,
        )

    limit = config.objective.max_targets if has_text(config) else 0
    rows_from = check_targets(read, limit) if limit else read

    def batches(start_step: int) -> Iterator[Batch]:
        for batch in rows_from(start_step):
            # Devices have no 64-bit integers; 32 unsigned bits last for four billion samples.
            indexed = {**batch, "index": batch["index"].astype(np.uint32)}
            yield shardings.host_to_global(indexed, sharding, section.global_batch)

    return batches


def make_denoise_fn(model: Denoiser, prediction: str = "velocity") -> Callable[..., Array]:
    """Returns the model as a function `(params, x, t, labels) -> out`, where t = 0 is data.

    A model of text takes a condition in place of labels, see `build.text_to_image`.

    A further argument, one random key per sample, switches dropout on.

    Args:
      model: The network; its time is reversed if `reversed_time`.
      prediction: The quantity that it predicts.
    """

    if isinstance(model, TextToImage):
        return make_text_denoise_fn(model)

    def apply(params: Params, x: Array, t: Array, labels: Array, *dropout_keys: Array) -> Array:
        network: Any = functools.partial(model.apply, {"params": params})
        if model.reversed_time:
            network = flip_time(network, prediction)
        return network(x, t, labels, *dropout_keys)

    return apply


def make_step(
    config: ConfigDict,
    model: Denoiser,
    space: InputSpace,
    optimizer: Optimizer,
    abstract: TrainState | None = None,
) -> TrainStep:
    """Returns the training step, to be compiled by `jit_step`.

    Args:
      config: Experiment config.
      model: The denoiser.
      space: The input space.
      optimizer: The optimizer.
      abstract: Shapes and shardings of the state, whose moments say how the update is divided;
        None leaves that to the compiler.

    Raises:
      ConfigError: If tokens are to be weighted by norms that the space does not give.
    """
    weights = make_token_weights(config)
    if weights:
        _check_token_weights(config, space)
    section = config.objective
    parts = (
        make_denoise_fn(model, section.prediction),
        space.encode_with_norms if weights and isinstance(space, RAE) else space.encode,
        make_objective(config),
        make_time_sampler(config),
        optimizer,
    )
    settings: dict[str, Any] = {
        "seed": config.seed,
        "null_label": config.data.num_classes,
        "label_dropout": section.label_dropout,
        "times": section.times,
        "dropout": getattr(model, "dropout", 0.0) > 0,
        "token_weights": weights,
        "accumulate": config.optim.accumulate,
        "num_time_bins": section.time_bins,
        "reshard": make_reshard(abstract) if abstract is not None else None,
    }
    if not isinstance(model, TextToImage):
        return TrainStep(*parts, **settings)
    return TextStep(
        *parts,
        **settings,
        model=make_text_model(model),
        language_weight=section.language_weight,
        diffusion_weight=section.diffusion_weight,
        max_targets=section.max_targets,
    )


def _check_token_weights(config: ConfigDict, space: InputSpace) -> None:
    """Checks that losses can be weighted by the norms of tokens."""
    if not isinstance(space, RAE):
        raise ConfigError(
            f"config.objective weights tokens by their norms, but config.space.name="
            f"{config.space.name!r} has no token norms",
            "set outlier_norm=0.0 and norm_shift=False, or config.space.name=rae",
        )
    if has_text(config):
        raise ConfigError(
            "config.objective weights tokens by their norms, which training on text does not",
            "set outlier_norm=0.0 and norm_shift=False",
        )


def skip_batches(config: ConfigDict, step: Step) -> Step:
    """Returns the step with the config's batches skipped (`training.skipping`)."""
    wrapped: Any = skipping.skip_batches(
        step,
        nonfinite=config.failures.on_nonfinite == "skip",
        steps=tuple(config.train.skip_steps),
    )
    return wrapped


def batch_records(config: ConfigDict, source: Source) -> Callable[[int], Sequence[int]]:
    """Returns a function from a step's number, from 1, to the numbers of its records."""
    size = config.data.global_batch

    def records(step: int) -> Sequence[int]:
        positions = range((step - 1) * size, step * size)
        return record_numbers(len(source), config.seed, positions)

    return records


def xla_options(config: ConfigDict) -> dict[str, Any]:
    """Returns options of XLA's compiler by name.

    Raises:
      ConfigError: If one is not "name=value".
    """
    options = {}
    for option in config.sharding.xla_options:
        name, equals, text = option.partition("=")
        if not equals:
            raise ConfigError(
                f"config.sharding.xla_options holds {option!r}, which has no value",
                "write each option as name=value",
            )
        try:
            options[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[name] = {"true": True, "false": False}.get(text.lower(), text)
    return options


def jit_step(
    step: Step,
    abstract: TrainState,
    batch: NamedSharding,
    mesh: Mesh,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Step:
    """Returns the step under `jax.jit`, with the state's shardings and donated buffers.

    Args:
      step: The step.
      abstract: Shapes and shardings of the state.
      batch: Sharding of the batch.
      mesh: Mesh of devices.
      options: Result of `xla_options`, added to those of the mesh's platform (`models.tuning`).
    """
    options = {**dict(tuning(mesh.devices.flat[0].platform).xla_options), **options}
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    whole = shardings.replicated(mesh)
    compiled: Any = jax.jit(
        step,
        in_shardings=(layout, batch, None),
        out_shardings=(layout, whole),
        donate_argnums=0,
        compiler_options=dict(options) or None,
    )
    return compiled
