"""The dtype policy has one list of float32 islands."""

import jax.numpy as jnp
import pytest

from dsr_jax.core.errors import ConfigError
from dsr_jax.models.precision import FP32_ISLANDS, Precision


def test_products_are_cast_and_islands_widened() -> None:
    policy = Precision("bfloat16")
    assert policy.product(jnp.ones(2)).dtype == jnp.bfloat16
    for name in FP32_ISLANDS:
        assert policy.island(name, jnp.ones(2, jnp.bfloat16)).dtype == jnp.float32


def test_unknown_names_raise() -> None:
    with pytest.raises(KeyError, match="softmx"):
        Precision().island("softmx", jnp.ones(2))
    with pytest.raises(ConfigError, match="float16"):
        Precision("float16")
