"""Adds diffusion registers to a trained denoiser, and removes them.

The depth is split anew where registers are inserted; layers keep their weights. New registers are
initialized as the original's, which changes what the network computes: attention gives every token
some weight, so no choice of registers leaves it as it was. A gate per head, which the original does
not have, does: at 0 a head attends to all but the registers, at 1 as the original's does.

Source: spec denoiser 1.10 and 3.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dsr_jax.convert.denoiser import shapes_of_model
from dsr_jax.convert.rules import stack_layers, unstack_layers
from dsr_jax.core.errors import ConversionError
from dsr_jax.core.rng import stream_key
from dsr_jax.core.trees import flatten_names, unflatten_names
from dsr_jax.core.typing import Params
from dsr_jax.models.embeddings import sincos_2d
from dsr_jax.models.transformer import DiffusionTransformer

_OURS = ("register_tokens", "register_pos_embed", "register_gate")


def add_registers(
    model: DiffusionTransformer,
    params: Mapping[str, Any],
    num: int,
    start: int,
    *,
    scale: float = 1.0,
    gate: bool = False,
    seed: int = 0,
) -> tuple[DiffusionTransformer, Params]:
    """Puts registers into a denoiser that has none.

    Args:
      model: The network.
      params: Parameters of the network.
      num: Number of registers, a square.
      start: First block that gets them.
      scale: Standard deviation of the tokens; the original's is 1.
      gate: Behind a gate that is closed at first, so that the network's output does not change.
      seed: Seed of the tokens.

    Returns:
      The network with registers, and its parameters.

    Raises:
      ConversionError: If it has registers already, or the parameters are not of the network.
      ConfigError: If number and start cannot be.
    """
    if model.num_registers:
        raise ConversionError(
            f"the model has {model.num_registers} registers already",
            "remove them first, with --ablate",
        )
    changed = model.clone(num_registers=num, register_start=start, register_gate=gate)
    changed.check_sizes()
    flat = flatten_names(_recut(params, model, changed))
    for name, shape in shapes_of_model(changed).items():
        if name not in flat and name.endswith(_OURS):
            flat[name] = _start(name, shape, scale, seed)
    return changed, _checked(flat, changed)


def remove_registers(
    model: DiffusionTransformer, params: Mapping[str, Any]
) -> tuple[DiffusionTransformer, Params]:
    """Takes the registers out of a denoiser, which changes what it computes.

    Args:
      model: The network.
      params: Parameters of the network.

    Returns:
      The network without registers, and its parameters.

    Raises:
      ConversionError: If it has none, or the parameters are not of the network.
    """
    if not model.num_registers:
        raise ConversionError("the model has no registers", "leave out --ablate")
    changed = model.clone(num_registers=0, register_start=0, register_gate=False)
    flat = flatten_names(params)
    kept = {name: leaf for name, leaf in flat.items() if not name.endswith(_OURS)}
    return changed, _checked(flatten_names(_recut(unflatten_names(kept), model, changed)), changed)


def _recut(
    params: Mapping[str, Any], old: DiffusionTransformer, new: DiffusionTransformer
) -> dict[str, Any]:
    """Returns the tree with the new network's stacks and otherwise unchanged parameters."""
    stacks = old.stacks()
    names = {stack.name for stack in stacks}
    if absent := sorted(names - set(params)):
        raise ConversionError(f"the parameters lack {', '.join(absent)}", "name their own model")
    others = {name: tree for name, tree in params.items() if name not in names}
    return {**others, **stack_layers(unstack_layers(params, stacks), new.stacks())}


def _start(name: str, shape: tuple[int, ...], scale: float, seed: int) -> np.ndarray:
    """Returns the initial value of a parameter of registers."""
    if name.endswith("register_tokens"):
        return scale * np.asarray(jax.random.normal(stream_key(seed, name), shape))
    if name.endswith("register_pos_embed"):
        return sincos_2d(shape[-1], round(shape[-2] ** 0.5)).reshape(shape)
    return np.zeros(shape, np.float32)


def _checked(flat: Mapping[str, Any], model: DiffusionTransformer) -> Params:
    wanted = shapes_of_model(model)
    wrong = [
        name for name in {**wanted, **flat} if np.shape(flat.get(name, ())) != wanted.get(name)
    ]
    if wrong:
        raise ConversionError(
            f"the parameters are not of the model: {', '.join(wrong[:4])}",
            "name the config, or folder, that they belong to",
        )
    return unflatten_names(dict(flat))
