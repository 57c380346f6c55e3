"""Kernels gathered once for both passes: the program's collectives, and the same numbers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsr_jax import build
from dsr_jax import config as configs
from dsr_jax.models.gathering import gather_once
from dsr_jax.models.layers import linear
from dsr_jax.models.precision import Precision
from dsr_jax.parallel.axes import Constrain, make_rules
from dsr_jax.parallel.mesh import MeshShape, make_mesh

DIGITS = str(Path(__file__).parents[2] / "configs" / "digits.py")
AXES = ("embed", "mlp")


def loss(first: jax.Array, second: jax.Array, x: jax.Array, constrain: Constrain | None) -> float:
    """Of two layers, whose kernels are gathered once if `constrain` is given."""
    if constrain is not None:
        first, second = (
            gather_once(first, first.shape, AXES, 1, constrain),
            gather_once(second, second.shape, AXES[::-1], 1, constrain),
        )
    return jnp.mean(jnp.square(jnp.tanh(x @ first) @ second))


@pytest.mark.parametrize("shape", [MeshShape(1, 8), MeshShape(2, 4), MeshShape(2, 2, 2)])
def test_gradients_stay_split_and_are_the_same(shape: MeshShape) -> None:
    mesh, rules = make_mesh(shape), make_rules("fsdp")
    constrain = Constrain(rules, mesh)
    keys = jax.random.split(jax.random.key(0), 3)
    specs = PartitionSpec("fsdp", "tensor"), PartitionSpec("tensor", "fsdp")
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    split = tuple(NamedSharding(mesh, spec) for spec in specs)
    first, second = (
        jax.device_put(jax.random.normal(key, size), sharding)
        for key, size, sharding in zip(keys, ((16, 32), (32, 16)), split, strict=False)
    )
    x = jax.device_put(jax.random.normal(keys[2], (16, 16)), rows)

    def gradients(constrain: Constrain | None) -> tuple[jax.Array, ...]:
        grad = jax.grad(lambda *args: loss(*args, constrain), argnums=(0, 1))
        return jax.jit(grad, out_shardings=split)(first, second, x)

    for ours, theirs, sharding in zip(gradients(constrain), gradients(None), split, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
        assert ours.sharding.is_equivalent_to(sharding, 2)


def test_a_kernel_is_gathered_once() -> None:
    mesh, rules = make_mesh(MeshShape(1, 8)), make_rules("fsdp")
    split, rows = (NamedSharding(mesh, PartitionSpec("fsdp")),) * 2
    kernel = jax.ShapeDtypeStruct((128, 256), jnp.float32, sharding=split)
    x = jax.ShapeDtypeStruct((4096, 128), jnp.float32, sharding=rows)

    def gathers(constrain: Constrain | None) -> int:
        grad = jax.grad(lambda w, x: loss(w, w.T, x, constrain), argnums=(0, 1))
        compiled = jax.jit(grad, out_shardings=(split, rows)).lower(kernel, x).compile()
        return compiled.as_text().count(" all-gather(")

    assert (gathers(Constrain(rules, mesh)), gathers(None)) == (1, 2)


@pytest.mark.parametrize("rules", ["replicated", "zero1"])
def test_what_is_not_split_is_left_alone(rules: str) -> None:
    kernel = jnp.ones((16, 32))
    constrain = Constrain(make_rules(rules), make_mesh(MeshShape(2, 4)))
    assert gather_once(kernel, kernel.shape, AXES, 1, constrain) is kernel
    assert gather_once(kernel, kernel.shape, AXES, 1, Constrain()) is kernel


def test_a_dimension_within_the_outputs_that_is_split_leaves_the_kernel_alone() -> None:
    """Flattened, heads behind a count are not one contiguous part for each device."""
    kernel, shape = jnp.ones((16, 24)), (16, 3, 4, 2)
    axes = ("embed", None, "heads", "head_dim")
    constrain = Constrain(make_rules("fsdp"), make_mesh(MeshShape(2, 2, 2)))
    assert gather_once(kernel, shape, axes, 1, constrain) is kernel
    constrain = Constrain(make_rules("fsdp"), make_mesh(MeshShape(2, 4)))
    assert gather_once(kernel, shape, axes, 1, constrain) is not kernel


def test_kernels_of_tokens_are_gathered_and_those_of_samples_are_not() -> None:
    precision = Precision(gather=Constrain(make_rules("fsdp"), make_mesh(MeshShape(1, 8))))
    kernel = jnp.ones((16, 32))

    def constrained(x: jax.Array) -> bool:
        layer = lambda kernel: linear(x, kernel, None, 1, precision, AXES)  # noqa: E731
        return "sharding_constraint" in str(jax.make_jaxpr(layer)(kernel))

    assert constrained(jnp.ones((8, 4, 16))) and not constrained(jnp.ones((8, 16)))


def test_the_config_gathers_the_kernels_of_the_denoiser() -> None:
    config = configs.load(DIGITS, ["--config.sharding.gather_once=True"])
    constrain = Constrain(make_rules("fsdp"), make_mesh(MeshShape(1, 8)))
    model = build.make_model(config, build.make_space(config)[0], constrain)
    assert model.precision.gather is constrain
