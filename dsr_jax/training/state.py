"""The state of a run between two steps: arrays and nothing else."""

from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import optax

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.trees import fill
from dsr_jax.core.typing import Array, Params, PyTree
from dsr_jax.training.optimizers import Optimizer

Reshard = Callable[[PyTree], PyTree]
"""Gives a tree like the parameters another layout."""


@flax.struct.dataclass(kw_only=True)
class TrainState:
    """All arrays that a step reads and writes; model, optimizer and config are closed over.

    Attributes:
      step: Updates done, int32.
      params: Parameters, float32.
      ema: EMA weights, the parameters' exponential moving averages, by decay as in `str(0.9999)`.
      opt_state: Moments of the optimizer.
    """

    step: Array
    params: Params
    ema: dict[str, Params]
    opt_state: PyTree

    def weights(self, ema: str) -> Params:
        """Returns the EMA weights of a decay, the parameters themselves for "none"."""
        return self.params if ema == "none" else self.ema[ema]


def create_state(
    params: Params, optimizer: Optimizer, ema_decays: Sequence[float] = ()
) -> TrainState:
    """Returns the state before the first step.

    Args:
      params: Initial parameters, also inside Flax's logical-axis boxes: EMA weights and moments
        take the boxes over, and with them the shardings.
      optimizer: Makes the moments.
      ema_decays: One set of EMA weights per decay. Each starts as a copy of the parameters (a true
        copy: the step donates its state, and no buffer may be donated twice).

    Raises:
      ConfigError: For a decay outside [0, 1) or given twice.
    """
    for decay in ema_decays:
        if not 0 <= decay < 1 or list(ema_decays).count(decay) > 1:
            raise ConfigError(
                f"config.ema.decays={tuple(ema_decays)} are not distinct decays in [0, 1)",
                "use different decays in [0, 1)",
            )
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema={str(decay): jax.tree.map(jnp.copy, params) for decay in ema_decays},
        opt_state=optimizer.init(params),
    )


def make_reshard(abstract: TrainState) -> Reshard | None:
    """Returns a function that gives a tree like the parameters the layout of their moments.

    None where that layout is the parameters' own. Frozen parameters, which have no moments, keep
    theirs.

    A step under ZeRO-1 applies it to gradients and parameters, so that each device reduces and
    updates its own part only, and the new parameters are gathered afterwards.

    Args:
      abstract: Shapes and shardings of the state.
    """
    moments = optax.tree.get(abstract.opt_state, "mu")
    divided, whole = (
        jax.tree.map(lambda leaf: leaf.sharding, tree) for tree in (moments, abstract.params)
    )
    layout = fill(divided, whole)
    if layout == whole:
        return None
    return lambda tree: jax.lax.with_sharding_constraint(tree, layout)


def update_ema(ema: dict[str, Params], params: Params) -> dict[str, Params]:
    """Moves all EMA weights towards `params`: `ema <- d * ema + (1 - d) * params`.

    From the first step on, without warm-up or bias correction. Source: DSR train.py (update_ema);
    spec denoiser 8.
    """
    return {
        name: optax.incremental_update(params, weights, 1 - float(name))
        for name, weights in ema.items()
    }
