"""Frozen networks of a representation autoencoder on a mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from dsr_jax import build
from dsr_jax import config as configs
from dsr_jax.build.abstract import abstract_space
from dsr_jax.models import kernels


@pytest.mark.parametrize("abstract", [False, True])
def test_frozen_networks_use_the_tpu_kernel_on_a_mesh(
    monkeypatch: pytest.MonkeyPatch, abstract: bool
) -> None:
    config = configs.base_config()
    config.space.update(
        name="rae", encoder="random:tiny", decoder="random:tiny", image_size=32, num_registers=1
    )
    config.data.update(image_size=32, channels=3)
    config.precision.compute = "bfloat16"
    mesh = build.make_mesh(config, jax.devices()[:1])
    make: Any = abstract_space if abstract else build.make_space
    space, variables = make(config, mesh)
    monkeypatch.setattr(kernels, "target_platform", lambda: "tpu")

    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    latents = jax.ShapeDtypeStruct((2, *space.latent_shape), jnp.float32)
    for function, rows in ((space.encode, images), (space.decode, latents)):
        program = str(jax.make_jaxpr(function)(variables, rows))
        assert "shard_map[" in program and "pallas_call[" in program
