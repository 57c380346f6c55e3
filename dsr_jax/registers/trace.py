"""Runs an encoder on one batch and returns the activations of its blocks."""

from typing import NamedTuple

from dsr_jax.core.typing import Array, Params
from dsr_jax.models.intervention import Intervention
from dsr_jax.models.vit import ViT


class Trace(NamedTuple):
    """Activations of one batch; rows S are prefix tokens, patches, test-time registers.

    Attributes:
      tokens: Patch tokens after the final norm [B, T, D].
      outputs: Output of each block [L, B, S, D].
      activations: Hidden MLP units after the nonlinearity and the intervention [L, B, S, M].
    """

    tokens: Array
    outputs: Array
    activations: Array


def trace_encoder(
    model: ViT, params: Params, pixels: Array, intervention: Intervention | None = None
) -> Trace:
    """Encodes normalized images [B, H, W, 3], with test-time registers if given."""
    out, sown = model.apply(
        {"params": params}, pixels, intervention=intervention, mutable=["intermediates"]
    )
    blocks = sown["intermediates"]["blocks"]
    return Trace(out.tokens, blocks["block_out"][0], blocks["mlp"]["mlp_act"][0])
