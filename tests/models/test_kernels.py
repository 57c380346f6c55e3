"""Attention by each kernel that runs on a CPU: values, gradients, segments, and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.typing import Array
from dsr_jax.models import kernels
from dsr_jax.models.kernels import attend
from dsr_jax.models.segments import Segments, pad_lengths
from dsr_jax.parallel.axes import Constrain, make_rules
from dsr_jax.parallel.mesh import MeshShape, make_mesh

KERNELS = ("einsum", "xla", "splash")


def make_inputs(length: int, keys: int, *, batch: int = 2, heads: int = 2) -> list[Array]:
    """Queries, keys and values with 8 channels a head."""
    keys_of = jax.random.split(jax.random.key(0), 3)
    return [
        jax.random.normal(key, (batch, count, heads, 8))
        for key, count in zip(keys_of, (length, keys, keys), strict=True)
    ]


def by_hand(q: Array, k: Array, v: Array, segments: Segments | None = None) -> Array:
    """The definition, without any of the kernels' devices."""
    scores = np.einsum("blhk,bmhk->bhlm", q, k) / np.sqrt(q.shape[-1])
    if segments is not None:
        same = np.asarray(segments.q)[:, None, :, None] == np.asarray(segments.kv)[:, None, None]
        scores = np.where(same, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhlm,bmhk->blhk", weights / weights.sum(-1, keepdims=True), v)


def packed(length: int) -> Segments:
    """Two sequences and padding, packed differently in each sample."""
    ends = np.array([[length // 3, length - 5], [length // 2, length - 1]])
    numbers = (np.arange(length) >= ends[..., None]).sum(1)
    return Segments(jnp.asarray(numbers, jnp.int32), jnp.asarray(numbers, jnp.int32))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("length", "keys"), [(128, 128), (36, 37), (300, 640)])
def test_every_kernel_computes_attention(kernel: str, length: int, keys: int) -> None:
    q, k, v = make_inputs(length, keys)
    np.testing.assert_allclose(attend(q, k, v, kernel), by_hand(q, k, v), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_causal_attention_with_grouped_queries(kernel: str) -> None:
    q, _, _ = make_inputs(40, 40, heads=4)
    _, k, v = make_inputs(40, 40, heads=2)
    got = attend(q, k, v, kernel, causal=True)
    scores = np.einsum("blhk,bmhk->bhlm", q, np.repeat(k, 2, axis=2)) / np.sqrt(q.shape[-1])
    scores = np.where(np.tril(np.ones((40, 40), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    want = np.einsum("bhlm,bmhk->blhk", weights, np.repeat(v, 2, axis=2))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("length", [40, 300])
def test_segments_do_not_see_each_other(kernel: str, length: int) -> None:
    q, k, v = make_inputs(length, length)
    segments = packed(length)
    got = attend(q, k, v, kernel, segments=segments)
    np.testing.assert_allclose(got, by_hand(q, k, v, segments), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["einsum", "splash"])
@pytest.mark.parametrize(("length", "mask"), [(300, False), (40, True)])
def test_gradients_agree(kernel: str, length: int, mask: bool) -> None:
    inputs, weights = make_inputs(length, length), make_inputs(length, length)[1]
    segments = packed(length) if mask else None

    def gradients(kernel: str) -> list[Array]:
        def loss(q: Array, k: Array, v: Array) -> Array:
            return jnp.sum(weights * attend(q, k, v, kernel, segments=segments))

        return jax.grad(loss, (0, 1, 2))(*inputs)

    for got, want in zip(gradients(kernel), gradients("xla"), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_query_without_keys_stays_finite(kernel: str) -> None:
    q, k, v = make_inputs(4, 4)
    segments = Segments(jnp.full((2, 4), 3), jnp.zeros((2, 4), jnp.int32))

    def loss(q: Array) -> Array:
        return attend(q, k, v, kernel, segments=segments).sum()

    value, gradient = jax.value_and_grad(loss)(q)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_splash_runs_on_each_device_alone() -> None:
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    q, k, v = make_inputs(36, 36, batch=4, heads=4)
    spec = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
    placed = [jax.device_put(x, spec) for x in (q, k, v)]
    constrain = Constrain(make_rules("fsdp"), mesh)
    got = jax.jit(lambda *x: attend(*x, "splash", constrain=constrain))(*placed)
    assert got.sharding.is_equivalent_to(spec, got.ndim)
    np.testing.assert_allclose(got, by_hand(q, k, v), rtol=1e-5, atol=1e-5)


def test_padding_hides_itself_only_where_keys_have_some() -> None:
    q, k, v = make_inputs(5, 8)
    *lengths, segments = pad_lengths(q, k, v, None, 8)
    assert [x.shape[1] for x in lengths] == [8, 8, 8] and segments is None
    *_, segments = pad_lengths(q, k, v, None, 16)
    assert segments is not None and segments.mask.sum() == 2 * (5 * 8 + 11 * 8)


def test_the_kernel_suits_platform_dtype_and_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = Constrain(make_rules("fsdp"), make_mesh(MeshShape()))
    bf16, wide, odd = (
        jnp.zeros((8, 4, heads, channels), jnp.bfloat16)
        for heads, channels in ((2, 72), (1, 512), (2, 36))
    )
    found = {}
    for platform in ("cpu", "gpu", "tpu"):
        monkeypatch.setattr(kernels, "target_platform", lambda platform=platform: platform)
        found[platform] = [
            kernels._choose(*case)
            for case in (
                (bf16, mesh),
                (bf16, None),
                (wide, mesh),
                (odd, mesh),
                (bf16.astype("float32"), mesh),
            )
        ]
    assert found == {
        "cpu": ["einsum"] * 5,
        "gpu": ["cudnn", "cudnn", "xla", "xla", "xla"],
        "tpu": ["splash", "xla", "xla", "splash", "xla"],
    }


@pytest.mark.parametrize(("channels", "dtype"), [(36, "bfloat16"), (64, "float32")])
def test_cudnn_is_refused_for_what_it_does_not_support(channels: int, dtype: str) -> None:
    q = jnp.zeros((2, 4, 2, channels), dtype)
    with pytest.raises(ConfigError, match="cuDNN supports bfloat16.*\n.*auto"):
        attend(q, q, q, "cudnn")


def test_an_unknown_kernel_is_named() -> None:
    with pytest.raises(ConfigError, match="attention='flash'.*\n.*splash"):
        attend(*make_inputs(4, 4), "flash")
