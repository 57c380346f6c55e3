"""Element-wise parts with their own backward passes, beside the same formulas as JAX differentiates
them, and the dtypes of blocks with a bfloat16 residual stream."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.models.denoiser import Denoiser
from dsr_jax.models.dit import LightningDiT
from dsr_jax.models.dit_dh import DiTDH
from dsr_jax.models.elementwise import gated_residual, scaled_norm, silu_product
from dsr_jax.models.jit import JiT
from dsr_jax.models.layers import LayerNorm
from dsr_jax.models.precision import Precision
from dsr_jax.models.sit import SiT

B, L, D = 2, 5, 8


def _normal(index: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(index), shape)


def _check_gradients(ours: Any, plain: Any, *args: Any) -> None:
    weights = _normal(9, *plain(*args).shape)

    def weighted(function: Any) -> Any:
        return lambda *args: jnp.sum(function(*args) * weights)

    positions = tuple(i for i, x in enumerate(args) if x is not None)
    got, want = (
        jax.value_and_grad(weighted(function), argnums=positions)(*args)
        for function in (ours, plain)
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", [(B, 1, D), (B, L, D), (D,), None])
def test_norm_has_the_gradients_of_its_formula(
    center: bool, scaled: bool, shape: tuple[int, ...] | None
) -> None:
    x, scale = _normal(0, B, L, D) + 1, _normal(3, D) if scaled else None
    factor, offset = (None, None) if shape is None else (_normal(1, *shape), _normal(2, *shape))

    def plain(x: Any, scale: Any, factor: Any, offset: Any) -> Any:
        x = x - x.mean(-1, keepdims=True) if center else x
        x = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
        x = x if scale is None else x * scale
        return x if factor is None else x * (1 + factor) + offset

    def ours(*args: Any) -> Any:
        return scaled_norm(*args, 1e-6, center, "float32")

    _check_gradients(ours, plain, x, scale, factor, offset)


def test_an_affine_norm_is_modulated_behind_its_bias() -> None:
    shapes = (B, L, D), (D,), (D,), (B, 1, D), (B, 1, D)
    x, scale, bias, shift, factor = (_normal(i, *shape) for i, shape in enumerate(shapes))
    params = {"params": {"scale": scale, "bias": bias}}
    plain = LayerNorm(affine=True).apply(params, x)
    modulated = LayerNorm(affine=True).apply(params, x, shift, factor)
    np.testing.assert_allclose(modulated, plain * (1 + factor) + shift, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(B, 1, D), (B, L, D)])
def test_gated_residual_has_the_gradients_of_its_formula(shape: tuple[int, ...]) -> None:
    args = _normal(0, B, L, D), _normal(1, *shape), _normal(2, B, L, D)
    _check_gradients(gated_residual, lambda x, gate, y: x + gate * y, *args)


def test_silu_product_has_the_gradients_of_its_formula() -> None:
    args = _normal(0, B, L, D), _normal(1, B, L, D)
    _check_gradients(silu_product, lambda a, b: a * jax.nn.sigmoid(a) * b, *args)


@pytest.mark.parametrize("rows", [1, L])
def test_parts_keep_their_inputs_alone(rows: int) -> None:
    x, vector = (_normal(i, B, n, D).astype(jnp.bfloat16) for i, n in enumerate((L, rows)))

    def part(x: jax.Array, vector: jax.Array, scale: jax.Array) -> jax.Array:
        y = scaled_norm(x, scale, vector, vector, 1e-6, False, "bfloat16")
        return gated_residual(x, vector, silu_product(y, y))

    kept = jax.tree.leaves(jax.vjp(part, x, vector, _normal(2, D))[1])
    large = [leaf.dtype for leaf in kept if leaf.shape == x.shape]
    assert large and set(large) == {jnp.dtype("bfloat16")}


SIZES: dict[str, Any] = {"input_size": 4, "in_channels": 8, "num_classes": 3, "depth": 2}
SIZES |= {"hidden_size": 32, "num_heads": 2, "num_registers": 4, "patch_size": 1}
MODELS = (
    LightningDiT(**SIZES),
    DiTDH(**SIZES, decoder_hidden_size=64, decoder_depth=1, decoder_num_heads=2),
    SiT(**SIZES),
    JiT(**SIZES, bottleneck_dim=8, num_class_tokens=2, class_token_start=1),
)


def _equations(jaxpr: Any) -> Iterator[Any]:
    """Yields the equations of a program and of its loops, but not those inside custom gradients."""
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name in ("scan", "jit", "pjit", "closed_call", "remat", "checkpoint"):
            inner = equation.params["jaxpr"]
            yield from _equations(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("model", MODELS, ids=lambda model: type(model).__name__)
def test_blocks_with_bfloat16_residual_hold_no_float32_tokens(model: Denoiser) -> None:
    inputs = jnp.ones((B, 4, 4, 8)), jnp.full(B, 0.5), jnp.zeros(B, jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)

    def wide_tokens(precision: Precision) -> set[str]:
        apply = model.clone(precision=precision).apply
        program = jax.make_jaxpr(apply)(shapes, *inputs)
        blocks = [e for e in program.jaxpr.eqns if e.primitive.name == "scan"]
        assert blocks
        return {
            equation.primitive.name
            for block in blocks
            for equation in _equations(block.params["jaxpr"].jaxpr)
            for out in equation.outvars
            if out.aval.ndim == 3
            and out.aval.shape[0] == B
            and out.aval.shape[1] >= 16
            and out.aval.shape[2] in (32, 64)
            and out.aval.dtype == jnp.float32
        }

    # The head's scales and shifts of each token are float32 where they enter the fused norm.
    allowed = {"convert_element_type", "add", "mul", "broadcast_in_dim"}
    found = wide_tokens(Precision("bfloat16", "bfloat16"))
    assert found <= (allowed if isinstance(model, DiTDH) else set())
    assert "custom_vjp_call" in wide_tokens(Precision("bfloat16"))


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS, ids=lambda model: type(model).__name__)
def test_bfloat16_residual_is_near_float32(model: Denoiser) -> None:
    inputs = _normal(3, B, 4, 4, 8), jnp.array([0.2, 0.9]), jnp.array([0, 2])
    params = jax.jit(model.init)(jax.random.key(0), *inputs)
    leaves, tree = jax.tree.flatten(params)
    moved = [leaf + 0.1 * _normal(i, *leaf.shape) for i, leaf in enumerate(leaves)]
    params = jax.tree.unflatten(tree, moved)
    outputs = [
        jax.jit(model.clone(precision=precision).apply)(params, *inputs)
        for precision in (Precision(), Precision("bfloat16", "bfloat16"))
    ]
    assert outputs[1].dtype == jnp.float32
    scale = jnp.abs(outputs[0]).max()
    assert 0 < jnp.abs(outputs[0] - outputs[1]).max() < 0.06 * scale
