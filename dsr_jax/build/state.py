"""Builds the state of a run: shapes and shardings first, arrays when they are needed."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import flax.linen as nn
import jax
from jax.sharding import Mesh

from dsr_jax.config import ConfigDict
from dsr_jax.core.rng import stream_key
from dsr_jax.core.typing import Params, PyTree
from dsr_jax.models.text_to_image import initial_inputs
from dsr_jax.parallel import shardings
from dsr_jax.parallel.axes import Rules, make_update_rules
from dsr_jax.spaces import InputSpace
from dsr_jax.training.optimizers import Optimizer
from dsr_jax.training.state import TrainState, create_state

State = TypeVar("State", bound=TrainState)


def init_params(model: nn.Module, space: InputSpace, seed: int) -> Any:
    """Returns initial parameters in Flax's logical-axis boxes; to be run under jit or traced."""
    key = stream_key(seed, "params")
    return model.init(key, *initial_inputs(model, space.latent_shape))["params"]


def abstract_params(model: nn.Module, space: InputSpace, mesh: Mesh, rules: Rules) -> Params:
    """Returns shapes and shardings of the parameters; no array is made."""
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

    No array exists before the function runs; each device then makes only its own shard.

    Raises:
      MeshError: If the rules split the state over fsdp, but most of its bytes are not divisible.
    """

    def init() -> TrainState:
        return create_state(init_params(model, space, config.seed), optimizer, config.ema.decays)

    return shard_state(config, init, mesh, rules)


def shard_state(
    config: ConfigDict, init: Callable[[], State], mesh: Mesh, rules: Rules
) -> tuple[State, Callable[[], State]]:
    """Does what `make_state` promises, for any function that makes a state in Flax's boxes."""
    boxed, section = jax.eval_shape(init), config.sharding
    update = _with_shardings(boxed, make_update_rules(section.rules, section.overrides), mesh)
    whole = _with_shardings(boxed, rules, mesh)
    abstract = dataclasses.replace(whole, ema=update.ema, opt_state=update.opt_state)
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    if mesh.shape["fsdp"] > 1 and section.rules == "fsdp":
        shardings.check_sharded(abstract.params, layout.params)
    elif mesh.shape["fsdp"] > 1 and section.rules == "zero1":
        held = [(tree.opt_state, tree.ema) for tree in (abstract, layout)]
        shardings.check_sharded(*held, what="optimizer and EMA")
    return abstract, jax.jit(lambda: nn.unbox(init()), out_shardings=layout)
