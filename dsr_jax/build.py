"""From a config to the objects it names: the one place that knows all packages.

Entry points call these functions; nothing else does.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dsr_jax.build_rae import file_digests, make_rae
from dsr_jax.config import ConfigDict, architecture
from dsr_jax.convert.files import load_converted
from dsr_jax.core.errors import ConfigError, ConversionError
from dsr_jax.core.rng import stream_key
from dsr_jax.core.trees import flatten_names
from dsr_jax.core.typing import Array, Batch, Params, PyTree
from dsr_jax.data.pipeline import make_batches
from dsr_jax.data.sources import Source
from dsr_jax.data.sources import make_source as open_source
from dsr_jax.diffusion.objectives import Objective
from dsr_jax.diffusion.objectives import make_objective as objective_by_name
from dsr_jax.diffusion.time_sampling import TimeSampler
from dsr_jax.diffusion.time_sampling import make_time_sampler as time_sampler_by_name
from dsr_jax.models.blocks import mlp_width
from dsr_jax.models.dit import LightningDiT
from dsr_jax.models.precision import Precision
from dsr_jax.parallel import mesh as meshes
from dsr_jax.parallel import shardings
from dsr_jax.parallel.axes import Constrain, Rules
from dsr_jax.parallel.axes import make_rules as rules_by_name
from dsr_jax.sampling.sampler import SampleFn, SamplerSettings, make_sample_fn
from dsr_jax.spaces import InputSpace, PixelSpace
from dsr_jax.telemetry import flops
from dsr_jax.training.optimizers import LearningRate, Optimizer
from dsr_jax.training.state import TrainState, create_state
from dsr_jax.training.step import TrainStep, make_train_step

# Where a config holds the constructor arguments that are not in its section `model`.
_CONFIG_KEYS = {
    "num_registers": "registers.num",
    "register_start": "registers.start",
    "num_classes": "data.num_classes",
    "input_size": "side of the space's latents",
    "in_channels": "channels of the space's latents",
}


def set_precision(config: ConfigDict) -> None:
    """Sets the arithmetic of float32 products for the whole process."""
    name = config.precision.matmul
    jax.config.update("jax_default_matmul_precision", None if name == "default" else name)


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `devices` (default: all there are); checks that the batch divides over it."""
    mesh = meshes.make_mesh(meshes.MeshShape(**config.mesh.to_dict()), devices)
    meshes.check_batch(config.data.global_batch, mesh, accumulate=config.optim.accumulate)
    return mesh


def make_rules(config: ConfigDict) -> Rules:
    """Where logical axes lie on the mesh."""
    return rules_by_name(config.sharding.rules, config.sharding.overrides)


def make_space(config: ConfigDict, mesh: Mesh | None = None) -> tuple[InputSpace, PyTree]:
    """The input space and its frozen variables.

    Args:
      config: The config.
      mesh: Its devices get a copy of the variables each; None leaves them in host memory.

    Raises:
      ConfigError: If the space's name is unknown.
    """
    if config.space.name == "pixels":
        return PixelSpace(config.data.image_size, config.data.channels), {}
    if config.space.name == "rae":
        return make_rae(config, mesh)
    raise ConfigError(f"config.space.name={config.space.name!r}", "choose from pixels, rae")


def make_model(
    config: ConfigDict, space: InputSpace, constrain: Constrain | None = None
) -> LightningDiT:
    """The denoiser for the latents of `space`.

    Raises:
      ConfigError: If the model's name is unknown or its sizes do not fit each other.
    """
    settings = config.model.to_dict()
    name = settings.pop("name")
    if name != "lightningdit":
        raise ConfigError(f"config.model.name={name!r}", "choose from lightningdit")
    height, width, channels = space.latent_shape
    if height != width:
        raise ConfigError(f"latents of {height} x {width} are not square")
    model = LightningDiT(
        input_size=height,
        in_channels=channels,
        num_classes=config.data.num_classes,
        num_registers=config.registers.num,
        register_start=config.registers.start,
        precision=Precision(config.precision.compute),
        constrain=constrain or Constrain(),
        **settings,
    )
    model.check_sizes()
    return model


def forward_flops(model: LightningDiT) -> int:
    """FLOPs of one evaluation of the denoiser on one sample."""
    ratio, width = model.mlp_ratio, model.hidden_size
    channels = model.in_channels * model.patch_size**2
    return flops.dit_forward_flops(
        hidden=width,
        depth=model.depth,
        mlp_hidden=mlp_width(width, ratio, model.use_swiglu),
        tokens=(model.input_size // model.patch_size) ** 2,
        patch_inputs=channels,
        patch_outputs=channels * (2 if model.learn_sigma else 1),
        num_registers=model.num_registers,
        register_start=model.register_start,
        use_swiglu=model.use_swiglu,
        attn_kv_bias=model.attn_kv_bias,
    )


def make_objective(config: ConfigDict) -> Objective:
    """What the denoiser predicts, and its loss."""
    section = config.objective
    return objective_by_name(section.path, section.prediction, section.loss_weight)


def make_time_sampler(config: ConfigDict) -> TimeSampler:
    """The distribution of training times."""
    section = config.objective
    return time_sampler_by_name(
        section.time_distribution, section.path, section.prediction, section.time_shift
    )


def make_optimizer(config: ConfigDict) -> Optimizer:
    """AdamW with its schedule."""
    section = config.optim
    rate = LearningRate(
        base=section.lr,
        schedule=section.schedule,
        final=section.final_lr,
        warmup_steps=section.warmup_steps,
        decay_end_steps=section.decay_end_steps,
        warmup_from_zero=section.warmup_from_zero,
    )
    return Optimizer(
        rate,
        b1=section.b1,
        b2=section.b2,
        eps=section.eps,
        weight_decay=section.weight_decay,
        clip_norm=section.clip_norm,
        freeze=section.freeze,
    )


def make_source(config: ConfigDict, split: str | None = None) -> Source:
    """The data set; `split` replaces the config's."""
    section = config.data
    return open_source(
        section.source,
        image_size=section.image_size,
        channels=section.channels,
        root=section.root or None,
        split=split or section.split,
        num_classes=section.num_classes,
        on_corrupt=section.on_corrupt,
    )


def global_batches(
    config: ConfigDict, source: Source, sharding: NamedSharding
) -> Callable[[int], Iterator[Batch]]:
    """Returns `batches(first step)`, which yields global batches for ever."""
    section = config.data

    def batches(start_step: int) -> Iterator[Batch]:
        for batch in make_batches(
            source,
            config.seed,
            section.global_batch,
            start_step=start_step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            flip=section.flip,
            workers=section.workers,
        ):
            # Devices have no 64-bit integers; 32 unsigned bits last for four billion samples.
            indexed = {**batch, "index": batch["index"].astype(np.uint32)}
            yield shardings.host_to_global(indexed, sharding)

    return batches


def init_params(model: nn.Module, space: InputSpace, seed: int) -> Any:
    """Initial parameters in Flax's logical-axis boxes; trace it, or run it under jit."""
    x = jnp.zeros((1, *space.latent_shape))
    key = stream_key(seed, "params")
    return model.init(key, x, jnp.zeros((1,)), jnp.zeros((1,), jnp.int32))["params"]


def abstract_params(model: nn.Module, space: InputSpace, mesh: Mesh, rules: Rules) -> Params:
    """Shapes and shardings of the parameters, without making any."""
    return _with_shardings(jax.eval_shape(lambda: init_params(model, space, 0)), rules, mesh)


def _with_shardings(boxed: PyTree, rules: Rules, mesh: Mesh) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.unbox(boxed),
        shardings.make_shardings(boxed, rules, mesh),
    )


def make_state(
    config: ConfigDict,
    model: nn.Module,
    space: InputSpace,
    optimizer: Optimizer,
    mesh: Mesh,
    rules: Rules,
) -> tuple[TrainState, Callable[[], TrainState]]:
    """Returns the training state's shapes and shardings, and a function that makes the first one.

    No array exists before the function runs, and then each device makes its own part only.

    Raises:
      MeshError: If FSDP is asked for but leaves most bytes whole.
    """

    def init() -> TrainState:
        return create_state(init_params(model, space, config.seed), optimizer, config.ema.decays)

    abstract = _with_shardings(jax.eval_shape(init), rules, mesh)
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    if mesh.shape["fsdp"] > 1 and config.sharding.rules == "fsdp":
        shardings.check_sharded(abstract.params, layout.params)
    return abstract, jax.jit(lambda: nn.unbox(init()), out_shardings=layout)


def denoiser(model: nn.Module) -> Callable[[Params, Array, Array, Array], Array]:
    """The model as a function `(params, x, t, labels) -> out`."""

    def apply(params: Params, x: Array, t: Array, labels: Array) -> Array:
        out: Any = model.apply({"params": params}, x, t, labels)
        return out

    return apply


def restore_converted(
    folder: str, model: LightningDiT, abstract: Params
) -> tuple[Params, dict[str, Any]]:
    """Reads weights that `dsr_jax.convert` wrote onto the devices.

    Args:
      folder: The converted model.
      model: The config's model.
      abstract: Its parameters' shapes and shardings.

    Returns:
      Parameters, and the record of the conversion.

    Raises:
      ConversionError: If they are of other sizes than the config's model.
    """
    params, record = load_converted(folder)
    if record["family"] != "lightningdit":
        raise ConversionError(
            f"{folder} holds a {record['family']}, not a denoiser",
            "name a folder that python -m dsr_jax.convert lightningdit wrote",
        )
    # Other ratios can give the same widths, and without registers their start means nothing.
    ignored = {"mlp_ratio"} | (set() if model.num_registers else {"register_start"})
    differing = [
        f"{_CONFIG_KEYS.get(name, f'model.{name}')}: {value} -> {getattr(model, name)}"
        for name, value in record["model"].items()
        if name not in ignored and value != getattr(model, name)
    ]
    shapes, wanted = (
        {name: leaf.shape for name, leaf in flatten_names(tree).items()}
        for tree in (params, abstract)
    )
    differing += [
        f"{name}: {shapes.get(name, 'absent')} -> {wanted.get(name, 'absent')}"
        for name in {**shapes, **wanted}
        if shapes.get(name) != wanted.get(name)
    ]
    if differing:
        raise ConversionError(
            f"{folder} holds a model of other sizes than the config (converted -> config):\n    "
            + "\n    ".join(differing[:8]),
            "use the config of that model, or set keys with --config.KEY=VALUE",
        )

    def place(leaf: np.ndarray, like: jax.ShapeDtypeStruct) -> Array:
        return jax.device_put(leaf.astype(like.dtype), like.sharding)

    return jax.tree.map(place, params, abstract), record


def sampler_settings(config: ConfigDict) -> SamplerSettings:
    """Solver and guidance, as config.sample says."""
    section = config.sample
    names = {field.name for field in dataclasses.fields(SamplerSettings)} - {"time_shift"}
    return SamplerSettings(
        time_shift=config.objective.time_shift, **{name: section[name] for name in names}
    )


def make_sampler(
    config: ConfigDict, model: nn.Module, space: InputSpace, mesh: Mesh, rules: Rules
) -> SampleFn:
    """A compiled function from parameters, indices and labels to images."""
    return make_sample_fn(
        denoiser(model),
        make_objective(config),
        sampler_settings(config),
        space.decode,
        latent_shape=space.latent_shape,
        null_label=config.data.num_classes,
        sharding=shardings.batch_sharding(mesh, rules),
    )


def sampling_recipe(config: ConfigDict, step: int | None, ema: str | None) -> dict[str, Any]:
    """What decides the images that a checkpoint gives, besides their indices and labels."""
    return {
        "step": step,
        "ema": ema,
        "sampler": sampler_settings(config).recipe(),
        "objective": {key: config.objective[key] for key in ("path", "prediction")},
        "precision": config.precision.to_dict(),
        "architecture": architecture(config) | file_digests(config),
    }


def make_step(
    config: ConfigDict, model: nn.Module, space: InputSpace, optimizer: Optimizer
) -> TrainStep:
    """The training step, to be compiled by `jit_step`."""
    return make_train_step(
        denoiser(model),
        space.encode,
        make_objective(config),
        make_time_sampler(config),
        optimizer,
        seed=config.seed,
        null_label=config.data.num_classes,
        label_dropout=config.objective.label_dropout,
        accumulate=config.optim.accumulate,
        num_time_bins=config.objective.time_bins,
    )


def jit_step(step: TrainStep, abstract: TrainState, batch: NamedSharding, mesh: Mesh) -> TrainStep:
    """Compiles lazily, with the state's shardings in and out and its buffers donated."""
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    whole = shardings.replicated(mesh)
    return jax.jit(
        step,
        in_shardings=(layout, batch, None),
        out_shardings=(layout, whole),
        donate_argnums=0,
    )
