"""The choices of every platform give the same numbers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsr_jax.core.typing import PyTree
from dsr_jax.models import elementwise, inception, kernels, layers, rope
from dsr_jax.models.inception import convolve
from dsr_jax.models.kernels import attend
from dsr_jax.models.layers import SplitDense
from dsr_jax.models.tuning import TUNING, tuning
from dsr_jax.parallel.axes import Constrain, make_rules
from dsr_jax.parallel.mesh import MeshShape, make_mesh

PLATFORMS = ("gpu", "tpu")


def use(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the modules choose as on another platform."""
    for module in (elementwise, inception, kernels, layers, rope):
        monkeypatch.setattr(module, "tuning", lambda: TUNING[platform])


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def test_this_process_has_the_choices_of_a_cpu() -> None:
    assert tuning() is TUNING["cpu"]


@pytest.mark.parametrize("platform", PLATFORMS)
def test_gated_residual(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = normal(2, 5, 8), normal(2, 1, 8, seed=1), normal(2, 5, 8, seed=2)

    def gradients() -> tuple[jax.Array, ...]:
        def total(*args: jax.Array) -> jax.Array:
            return jnp.sum(elementwise.gated_residual(*args) ** 2)

        return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*args)

    want = gradients()
    use(platform, monkeypatch)
    for got, wanted in zip(gradients(), want, strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_gated_residual_stays_split_over_devices(
    platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = normal(8, 5, 16), normal(8, 1, 16, seed=1), normal(8, 5, 16, seed=2)
    mesh = make_mesh(MeshShape(2, 4))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    constrain = Constrain(make_rules("fsdp"), mesh)

    def gradients(*args: jax.Array) -> tuple[jax.Array, ...]:
        total = lambda *args: jnp.sum(elementwise.gated_residual(*args, constrain) ** 2)  # noqa: E731
        return jax.grad(total, argnums=(0, 1, 2))(*args)

    want = jax.jit(gradients)(*args)
    use(platform, monkeypatch)
    split = tuple(jax.device_put(arg, rows) for arg in args)
    compiled = jax.jit(lambda *args: gradients(*args)).lower(*split).compile()
    assert "all-gather" not in compiled.as_text()
    for got, wanted in zip(compiled(*split), want, strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_rotation(platform: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, tables = normal(2, 7, 2, 12).astype(dtype), rope.rope_tables(12, 2, 3)

    def rotated(x: jax.Array) -> jax.Array:
        return rope.rotate(x, *map(jnp.asarray, tables))

    want, back = jax.vjp(rotated, x)
    use(platform, monkeypatch)
    got, ours = jax.vjp(rotated, x)
    np.testing.assert_array_equal(got, want)
    # One rounding to the dtype apart, of numbers up to 4.
    limit = 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        ours(want)[0].astype(jnp.float32), back(want)[0].astype(jnp.float32), rtol=0, atol=limit
    )


@pytest.mark.parametrize("platform", PLATFORMS)
def test_fused_kernels(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = SplitDense(3, (2, 4), ("embed", "heads", None)), normal(2, 5, 8)
    # Its biases are 0 at first.
    params = jax.tree.map(lambda p: p + normal(*p.shape), layer.init(jax.random.key(1), x))

    def total(params: PyTree, x: jax.Array) -> jax.Array:
        q, k, v = layer.apply(params, x)
        return jnp.sum(jnp.sin(q) * k + v**2)

    want = jax.value_and_grad(total, argnums=(0, 1))(params, x)
    use(platform, monkeypatch)
    got = jax.value_and_grad(total, argnums=(0, 1))(params, x)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_convolutions_and_blocks_of_queries(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images, kernel, q = normal(1, 9, 9, 2), normal(3, 3, 2, 4), normal(1, 300, 2, 8)
    want = convolve(images, kernel, 2, "VALID"), attend(q, q, q, "einsum")
    use(platform, monkeypatch)
    got = convolve(images, kernel, 2, "VALID"), attend(q, q, q, "einsum")
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
