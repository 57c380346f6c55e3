"""The state of a run of stage 1: the arrays of the decoder and of the discriminator."""

import dataclasses

import flax.struct
import jax.numpy as jnp

from dsr_jax.core.typing import Array, Params, PyTree
from dsr_jax.training.optimizers import Optimizer
from dsr_jax.training.state import TrainState, create_state


@flax.struct.dataclass(kw_only=True)
class DiscriminatorState:
    """The discriminator's part of the state.

    Attributes:
      step: Number of updates so far, which determines the learning rate.
      params: Parameters of its heads.
      spectral: Singular vectors of its kernels.
      opt_state: Moments.
    """

    step: Array
    params: Params
    spectral: PyTree
    opt_state: PyTree


@flax.struct.dataclass(kw_only=True)
class DecoderState(TrainState):
    """All arrays of a run of stage 1: the decoder's, and the discriminator's if there is one."""

    discriminator: DiscriminatorState | None = None


def discriminator_optimizer(optimizer: Optimizer) -> Optimizer:
    """Returns the decoder's optimizer without the settings that name the decoder's parameters."""
    return dataclasses.replace(optimizer, freeze=(), groups=())


def create_decoder_state(
    params: Params,
    heads: tuple[Params, PyTree] | None,
    optimizer: Optimizer,
    ema_decays: tuple[float, ...],
) -> DecoderState:
    """Returns the state before the first step.

    Args:
      params: The decoder's parameters, also boxed.
      heads: Parameters and singular vectors of the discriminator; None for none.
      optimizer: Optimizer of both networks.
      ema_decays: One set of EMA weights of the decoder per decay.
    """
    discriminator = None
    if heads is not None:
        discriminator = DiscriminatorState(
            step=jnp.zeros((), jnp.int32),
            params=heads[0],
            spectral=heads[1],
            opt_state=discriminator_optimizer(optimizer).init(heads[0]),
        )
    return DecoderState(
        **vars(create_state(params, optimizer, ema_decays)), discriminator=discriminator
    )
