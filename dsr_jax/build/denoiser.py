"""Builds the denoiser that a config names, and reads converted weights for it."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from dsr_jax.build.fine_tuning import (
    Adaptation,
    adaptation_hints,
    check_positions,
    names_of_record,
)
from dsr_jax.build.remat import first_policy
from dsr_jax.build.text_to_image import add_language_model
from dsr_jax.config import ConfigDict, base_config, has_text, trains_decoder
from dsr_jax.convert.files import load_converted
from dsr_jax.core.errors import ConfigError, ConversionError
from dsr_jax.core.trees import flatten_names
from dsr_jax.core.typing import Array, Params
from dsr_jax.data.class_map import names_by_label, read_class_map
from dsr_jax.models.denoiser import Denoiser
from dsr_jax.models.precision import Precision
from dsr_jax.models.registry import config_fields, denoiser_class, denoiser_name
from dsr_jax.parallel.axes import Constrain
from dsr_jax.spaces import InputSpace
from dsr_jax.training.optimizers import Optimizer
from dsr_jax.training.state import TrainState, create_state

# Config keys of the constructor arguments outside the section `model`.
_CONFIG_KEYS = {
    "num_registers": "registers.num",
    "register_start": "registers.start",
    "register_gate": "registers.gate",
    "register_condition": "registers.condition",
    "num_classes": "data.num_classes",
    "input_size": "side of the space's latents",
    "in_channels": "channels of the space's latents",
    "connector": "language.connector",
    "understanding": "language.understanding",
}


def make_model(
    config: ConfigDict, space: InputSpace, constrain: Constrain | None = None
) -> Denoiser:
    """Returns the denoiser for the latents of `space`.

    Raises:
      ConfigError: If the name is unknown, a key that the denoiser lacks is not at its default, or
        sizes do not fit each other.
    """
    if trains_decoder(config):
        raise ConfigError(
            f"config.decoder.hidden_size={config.decoder.hidden_size}: no denoiser is trained",
            "use python -m dsr_jax.train_decoder, or set it to 0",
        )
    height, width, channels = space.latent_shape
    if height != width:
        raise ConfigError(f"latents of {height} x {width} are not square")
    kind = denoiser_class(config.model.name)
    gather = constrain if config.sharding.gather_once else None
    precision = Precision(config.precision.compute, config.precision.residual, gather)
    shared: dict[str, Any] = {
        "input_size": height,
        "in_channels": channels,
        "num_classes": config.data.num_classes,
        "precision": precision,
        "constrain": constrain or Constrain(),
    }
    settings = _model_settings(config, kind)
    model: Denoiser
    if has_text(config):
        model = add_language_model(config, kind, shared, settings)
    else:
        model = kind(**shared, **settings)
    model.check_sizes()
    return model


def _model_settings(config: ConfigDict, kind: type[Denoiser]) -> dict[str, Any]:
    """Returns the constructor arguments in config.model and config.registers.

    Raises:
      ConfigError: If a key that the denoiser does not have differs from its default.
    """
    fields, defaults, name = config_fields(kind), base_config().model, config.model.name
    settings = {}
    text = has_text(config)
    for key, value in config.model.items():
        if key.startswith("condition_") and not text:
            # Without text, a denoiser has classes, whose rows are as wide as its tokens.
            if value != defaults[key]:
                raise ConfigError(
                    f"config.model.{key}={value!r} without text",
                    f"leave it at {defaults[key]!r}, or set config.language.hidden_size",
                )
        elif key in fields:
            settings[key] = first_policy("model.remat", value) if key == "remat" else value
        elif key != "name" and value != defaults[key]:
            raise ConfigError(
                f"config.model.{key}={value!r}, but {name} has no such setting",
                f"leave it at {defaults[key]!r}, or choose another config.model.name",
            )
    if "num_registers" in {field.name for field in dataclasses.fields(kind)}:
        section = config.registers
        return settings | {
            "num_registers": section.num,
            "register_start": section.start,
            "register_gate": section.gate,
            "register_condition": section.condition,
        }
    if config.registers.num:
        raise ConfigError(
            f"config.registers.num={config.registers.num}, but {name} has no registers",
            "set config.registers.num=0",
        )
    return settings


def restore_converted(
    folder: str,
    model: Denoiser,
    abstract: Params,
    adapt: Callable[[dict[str, Any]], Adaptation] = lambda record: Adaptation(),
) -> tuple[Params, dict[str, Any]]:
    """Reads converted weights onto the devices.

    Args:
      folder: The converted model.
      model: The config's model.
      abstract: Shapes and shardings of the parameters.
      adapt: Returns how to adapt the weights that a record describes.

    Returns:
      Parameters, and the record of the conversion.

    Raises:
      ConversionError: If their kind or sizes differ from the config's model.
    """
    params, record = load_converted(folder)
    family = denoiser_name(type(model))
    if record["family"] != family:
        raise ConversionError(
            f"{folder} holds a {record['family']}, but config.model.name={family!r}",
            f"name a folder that python -m dsr_jax.convert {family} wrote",
        )
    adaptation = adapt(record)
    sizes = _differing_sizes(record["model"], model, adaptation.adapted_sizes)
    differing = [f"{_key_of(name)}: {old} -> {new}" for name, (old, new) in sizes.items()]
    adapted = adaptation(params, model)
    shapes, wanted = (
        {name: leaf.shape for name, leaf in flatten_names(tree).items()}
        for tree in (adapted, abstract)
    )
    differing += [
        f"{name}: {shapes.get(name, 'absent')} -> {wanted.get(name, 'absent')}"
        for name in {**shapes, **wanted}
        if shapes.get(name) != wanted.get(name)
    ]
    if differing:
        raise ConversionError(
            f"{folder} holds a model of sizes that differ (converted -> config):\n    "
            + "\n    ".join(differing[:8]),
            "use the config of that model, or set keys with --config.KEY=VALUE"
            + "".join(f"; to fine-tune, {hint}" for hint in [adaptation_hints(sizes)] if hint),
        )

    def place(leaf: np.ndarray, like: jax.ShapeDtypeStruct) -> Array:
        return jax.device_put(leaf.astype(like.dtype), like.sharding)

    return jax.tree.map(place, adapted, abstract), record


def _differing_sizes(
    stored: Mapping[str, Any], model: Any, adapted: Collection[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Returns (stored size, the model's) of those that differ and have an effect, by name.

    The sizes of a network within the model have its name in front, as in "language.depth".
    """
    unused = {*adapted, *(model.unused_sizes() if isinstance(model, Denoiser) else ())}
    found: dict[str, tuple[Any, Any]] = {}
    for name, value in stored.items():
        if name in unused:
            continue
        own = denoiser_name(type(model)) if name == "name" else getattr(model, name)
        if isinstance(own, nn.Module):
            inner = _differing_sizes(value, own)
            found |= {f"{name}.{below}": pair for below, pair in inner.items()}
        elif value != own:
            found[name] = (value, own)
    return found


def _key_of(size: str) -> str:
    """Returns the config's key of a size, for messages."""
    if size.startswith("language."):
        return size
    name = size.removeprefix("denoiser.")
    return _CONFIG_KEYS.get(name, f"model.{name}")


def start_from(
    config: ConfigDict,
    model: Denoiser,
    optimizer: Optimizer,
    abstract: TrainState,
    class_names: Sequence[str] = (),
) -> Callable[[], TrainState]:
    """Reads the weights that a new run starts from, config.train.init_from.

    Args:
      config: The config, whose section `train` says how the weights are adapted.
      model: The config's model.
      optimizer: Optimizer, which initializes the moments.
      abstract: The state's shapes and shardings.
      class_names: Class name by label of the training data; empty if unknown.

    Returns:
      A function that makes the initial state, to be called once: parameters and EMA weights are
      those of the folder, moments are new.

    Raises:
      ConversionError: If their kind or sizes differ from the config's model.
      ConfigError: If they cannot be adapted as the config says.
    """
    section = config.train

    def adapt(record: dict[str, Any]) -> Adaptation:
        old_names = names_of_record(record)
        if section.init_class_map:
            old_names = names_by_label(read_class_map(section.init_class_map))
        resampled = check_positions(section.init_positions)
        return Adaptation(section.init_labels, resampled, old_names, class_names, config.seed)

    held = [restore_converted(section.init_from, model, abstract.params, adapt)[0]]
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    make = jax.jit(
        lambda params: create_state(params, optimizer, [float(decay) for decay in abstract.ema]),
        out_shardings=layout,
        donate_argnums=0,
    )
    return lambda: make(held.pop())
