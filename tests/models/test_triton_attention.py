"""Attention that reads the fused projection, interpreted on a CPU, beside plain attention."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals
from jax.sharding import NamedSharding, PartitionSpec

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.typing import Array
from dsr_jax.models.attention import Attention, Rope
from dsr_jax.models.blocks import REMAT_POLICIES
from dsr_jax.models.dit import LightningDiT
from dsr_jax.models.kernels import ATTENTION_RESIDUALS, attend
from dsr_jax.models.precision import Precision
from dsr_jax.models.rope import rope_tables, rotate
from dsr_jax.models.triton_attention import attend_packed
from dsr_jax.models.triton_kernels import tiles
from dsr_jax.parallel.axes import Constrain, make_rules
from dsr_jax.parallel.mesh import MeshShape, make_mesh
from tests.tiny_denoisers import random_params

HEADS = 2


def make_inputs(length: int, channels: int) -> list[Array]:
    """Fused projection of two samples, its bias, and weights of the output in a loss."""
    shapes = (2, length, 3, HEADS, channels), (3, HEADS, channels), (2, length, HEADS, channels)
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def grid_rope(length: int, channels: int) -> Rope:
    """Rotation of the largest grid of `length` tokens, behind tokens that are not rotated."""
    grid = int(length**0.5)
    cos, sin = rope_tables(channels, grid, length - grid**2)
    return jnp.asarray(cos), jnp.asarray(sin)


def plain(qkv: Array, bias: Array | None, rope: Rope | None) -> Array:
    """The same by separate steps."""
    whole = qkv if bias is None else qkv + bias.astype(qkv.dtype)
    q, k, v = (whole[:, :, i] for i in range(3))
    if rope is not None:
        q, k = (rotate(x.astype(jnp.float32), *rope).astype(qkv.dtype) for x in (q, k))
    return attend(q, k, v, "einsum")


def run(function: Any, qkv: Array, bias: Array | None, rope: Rope | None, weights: Array) -> list:
    """Values and gradients of a loss."""

    def loss(qkv: Array, bias: Array | None) -> tuple[Array, Array]:
        out = function(qkv, bias, rope)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    positions = (0,) if bias is None else (0, 1)
    gradients, out = jax.jit(jax.grad(loss, positions, has_aux=True))(qkv, bias)
    return [np.asarray(x, np.float32) for x in (out, *gradients)]


def distances(got: list[np.ndarray], want: list[np.ndarray]) -> list[float]:
    """Largest errors relative to the largest value."""
    pairs = zip(got, want, strict=True)
    return [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs]


@pytest.mark.parametrize(
    ("length", "channels", "biased", "rotated"),
    [(292, 72, True, True), (17, 8, False, False)],
)
def test_values_and_gradients_are_those_of_separate_steps(
    length: int, channels: int, biased: bool, rotated: bool
) -> None:
    qkv, bias, weights = make_inputs(length, channels)
    case = (qkv, bias if biased else None, grid_rope(length, channels) if rotated else None)
    assert max(distances(run(attend_packed, *case, weights), run(plain, *case, weights))) < 1e-5


def test_bfloat16_is_as_close_to_float32_as_separate_steps() -> None:
    qkv, bias, weights = make_inputs(100, 72)
    case = (qkv.astype(jnp.bfloat16), bias, grid_rope(100, 72))
    exact = run(plain, case[0].astype(jnp.float32), *case[1:], weights)
    ours, theirs = (
        distances(run(function, *case, weights), exact) for function in (attend_packed, plain)
    )
    # The bias is rounded less, other sums are in another order.
    assert all(a < 1.5 * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


def test_heads_are_covered_by_tiles_of_powers_of_two() -> None:
    found = {channels: tiles(channels) for channels in (8, 36, 64, 72, 96, 120, 128)}
    assert found == {
        8: ((0, 16),),
        36: ((0, 32), (32, 16)),
        64: ((0, 64),),
        72: ((0, 64), (64, 16)),
        96: ((0, 64), (64, 32)),
        120: ((0, 128),),
        128: ((0, 128),),
    }


TINY: dict[str, Any] = dict(
    input_size=4,
    in_channels=3,
    hidden_size=32,
    depth=2,
    num_heads=2,
    num_classes=5,
    num_registers=4,
    register_start=0,
)


def test_a_denoiser_has_the_same_loss_gradients_and_telemetry() -> None:
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 3))
    inputs = x, jnp.linspace(0.1, 0.9, 2), jnp.arange(2)
    params = random_params(LightningDiT(**TINY))

    def results(kernel: str) -> list[Array]:
        apply: Any = LightningDiT(**TINY, attention=kernel).apply

        def loss(params: Any) -> tuple[Array, Any]:
            outputs = apply({"params": params}, *inputs, mutable=["intermediates"])
            telemetry = outputs[1]["intermediates"]["blocks_reg"]["attn"]["qk"]
            return jnp.mean(jnp.square(outputs[0] - x)), telemetry

        return jax.tree.leaves(jax.jit(jax.value_and_grad(loss, has_aux=True))(params))

    for got, want in zip(results("triton"), results("xla"), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * float(np.abs(want).max()))


@pytest.mark.parametrize(("remat", "kept"), [("dots", 2), ("full", 0)])
def test_rematerialization_keeps_output_and_log_sums(
    remat: str, kept: int, capsys: pytest.CaptureFixture[str]
) -> None:
    qkv, bias, _ = make_inputs(17, 8)

    def block(qkv: Array, bias: Array) -> Array:
        return jnp.sum(jnp.sin(attend_packed(qkv, bias, None)))

    print_saved_residuals(jax.checkpoint(block, policy=REMAT_POLICIES[remat]), qkv, bias)
    assert capsys.readouterr().out.count(f"named '{ATTENTION_RESIDUALS}'") == kept


def test_eight_devices_compute_what_one_does() -> None:
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    layer = Attention(num_heads=4, kernel="triton")
    x = jax.random.normal(jax.random.key(0), (8, 17, 32))
    rope = rope_tables(8, 4, 1)
    params = nn.unbox(layer.init(jax.random.key(1), x, rope))
    params = jax.tree.map(lambda p: p + 0.1, params)

    def gradients(constrain: Constrain, x: Array) -> Any:
        apply: Any = layer.clone(constrain=constrain).apply

        def loss(params: Any, x: Array) -> Array:
            return jnp.sum(jnp.square(apply(params, x, rope)))

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)

    want = gradients(Constrain(), x)
    split = jax.device_put(x, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    got = gradients(Constrain(make_rules("fsdp"), mesh), split)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(np.abs(b).max()))


@pytest.mark.parametrize(
    ("attributes", "key"),
    [
        ({"use_qknorm": True}, "model.use_qknorm"),
        ({"kv_bias": True}, "model.attn_kv_bias"),
        ({"gated": (0, 1)}, "registers.gate"),
    ],
)
def test_unsupported_attention_is_refused(attributes: dict[str, Any], key: str) -> None:
    layer = Attention(num_heads=2, kernel="triton", **attributes)
    with pytest.raises(ConfigError, match=f"'triton' with config.{key}.*\n.*attention=auto"):
        layer.init(jax.random.key(0), jnp.zeros((1, 4, 16)))


def test_wide_heads_and_networks_without_a_fused_projection_are_refused() -> None:
    with pytest.raises(ConfigError, match="heads of 256 channels.*\n.*auto"):
        attend_packed(jnp.zeros((1, 4, 3, 1, 256)), None, None)
    q = jnp.zeros((1, 4, 1, 8))
    with pytest.raises(ConfigError, match="fused projection.*\n.*auto"):
        attend(q, q, q, "triton")


def test_the_compute_dtype_is_that_of_the_result() -> None:
    layer = Attention(num_heads=2, kernel="triton", precision=Precision("bfloat16"))
    x = jnp.zeros((1, 4, 16))
    shape = jax.eval_shape(lambda: layer.init_with_output(jax.random.key(0), x)[0])
    assert shape.dtype == jnp.bfloat16
