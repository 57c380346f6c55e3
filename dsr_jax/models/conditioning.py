"""Conditions of a denoiser's tokens: one row for a class label, a row per token for text.

Source: Scale-RAE rae_dit.py; spec t2i 2.5 and 4.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.typing import Array
from dsr_jax.models.layers import add_param, zeros
from dsr_jax.models.precision import Precision

REGISTER_CONDITIONS = ("mean", "time", "learned", "query")
"""Rules for the condition of registers, which have no token of their own in the text."""

FOURIER_SEED = 114514
"""PyTorch's seed of the time's constant frequencies. Source: Scale-RAE; spec t2i 2.5."""


class TextCondition(NamedTuple):
    """What a denoiser gets in place of class labels.

    Attributes:
      rows: One vector per latent token in raster order [B, N, Z]; with the rule "query" then one
        per register [B, N + R, Z].
      dropped: Samples [B] whose rows are replaced by the learned null vector.
    """

    rows: Array
    dropped: Array


def drop_text(condition: TextCondition) -> TextCondition:
    """Returns the condition of the unguided prediction."""
    return condition._replace(dropped=jnp.ones_like(condition.dropped))


def check_register_condition(rule: str) -> None:
    """Checks the name of a rule.

    Raises:
      ConfigError: If it is unknown.
    """
    if rule not in REGISTER_CONDITIONS:
        raise ConfigError(
            f"config.registers.condition={rule!r} is unknown",
            f"choose from {', '.join(REGISTER_CONDITIONS)}",
        )


class TextEmbed(nn.Module):
    """Adds the time to every row of a text condition, and makes rows for registers.

    The rules for registers, none of which is published: "mean" takes the mean of the tokens' rows,
    which is the published rule wherever all rows are equal; "time" nothing but the time; "learned"
    a table; "query" further rows of the language model's queries.

    Attributes:
      num_registers: Registers R.
      rule: A name in REGISTER_CONDITIONS.
      use_silu: Applies SiLU, which every modulation applies again.
      precision: Dtype policy.
    """

    num_registers: int = 0
    rule: str = "mean"
    use_silu: bool = True
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, time: Array, text: TextCondition) -> tuple[Array, Array]:
        """Returns conditions of tokens [B, N, Z] and of registers [B, R, Z], in float32.

        Args:
          time: Embedded times [B, Z].
          text: The text's condition.
        """
        check_register_condition(self.rule)
        count, width = self.num_registers, time.shape[-1]
        null = add_param(self, "dropout_embedding", zeros, ("embed",), (width,))
        dropped = text.dropped.astype(bool)[:, None, None]
        rows = jnp.where(dropped, null, self.precision.to_float32("conditioning", text.rows))
        registers = jnp.zeros((rows.shape[0], 0, width))
        if count and self.rule == "query":
            rows, registers = rows[:, :-count], rows[:, -count:]
        elif count:
            shape = (rows.shape[0], count, width)
            if self.rule == "mean":
                source = jnp.mean(rows, axis=1, keepdims=True)
            elif self.rule == "learned":
                source = add_param(self, "registers", zeros, ("tokens", "embed"), (count, width))
            else:
                source = jnp.zeros(())
            registers = jnp.broadcast_to(source, shape)
        time = self.precision.to_float32("conditioning", time)[:, None]
        activate = jax.nn.silu if self.use_silu else lambda x: x
        return activate(time + rows), activate(time + registers)
