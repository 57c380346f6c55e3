"""The dtype policy has a single list of float32 ops."""

import jax.numpy as jnp
import pytest

from dsr_jax.core.errors import ConfigError
from dsr_jax.models.precision import FLOAT32_OPS, Precision


def test_matmuls_are_cast_and_float32_ops_widened() -> None:
    policy = Precision("bfloat16")
    assert policy.to_compute(jnp.ones(2)).dtype == jnp.bfloat16
    for name in FLOAT32_OPS:
        assert policy.to_float32(name, jnp.ones(2, jnp.bfloat16)).dtype == jnp.float32


def test_unknown_names_raise() -> None:
    with pytest.raises(KeyError, match="softmx"):
        Precision().to_float32("softmx", jnp.ones(2))
    with pytest.raises(ConfigError, match="float16"):
        Precision("float16")


def test_residual_stream_has_a_dtype_of_its_own() -> None:
    assert Precision("bfloat16").to_residual(jnp.ones(2)).dtype == jnp.float32
    assert Precision(residual="bfloat16").to_residual(jnp.ones(2)).dtype == jnp.bfloat16
    with pytest.raises(ConfigError, match=r"config\.precision\.residual='half'"):
        Precision(residual="half")
