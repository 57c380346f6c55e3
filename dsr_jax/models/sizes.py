"""Checks that the sizes of a network fit each other."""

import math

from dsr_jax.core.errors import ConfigError


def check_heads(hidden_size: int, num_heads: int, use_rope: bool, prefix: str = "") -> None:
    """Checks that the width divides into heads, and each head into rope's pairs of two axes.

    Args:
      hidden_size: Width D.
      num_heads: Heads H.
      use_rope: Whether heads are rotated.
      prefix: Prefix of the two keys in the config.

    Raises:
      ConfigError: Naming the keys and a value that would do.
    """
    unit = num_heads * (4 if use_rope else 1)
    if hidden_size % unit or hidden_size % 4:
        raise ConfigError(
            f"config.model.{prefix}hidden_size={hidden_size} does not divide into "
            f"{prefix}num_heads={num_heads} "
            f"heads{' of a multiple of 4 channels, as rope needs' if use_rope else ''}",
            f"use a multiple of {math.lcm(unit, 4)}",
        )


def check_registers(num_registers: int, register_start: int, depth: int) -> None:
    """Checks that registers form a square grid and that their first block exists.

    Raises:
      ConfigError: Naming the key and a value that would do.
    """
    if not num_registers:
        return
    side = math.isqrt(max(num_registers, 0))
    if side * side != num_registers:
        raise ConfigError(
            f"config.registers.num={num_registers} is not a square number: registers have the "
            "positions of a square grid",
            f"use {side * side or 1} or {(side + 1) ** 2}",
        )
    if not 0 <= register_start < depth:
        raise ConfigError(
            f"config.registers.start={register_start} is not one of blocks 0..{depth - 1}",
            "the paper starts at block 4 of 12 and at block 8 of 28",
        )
