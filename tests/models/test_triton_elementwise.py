"""Element-wise parts as Triton kernels, interpreted, beside the same parts by XLA."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.models import elementwise, triton_rows, triton_swiglu
from dsr_jax.models.triton_norm import NormKernel, branch_norm, residual, residual_norm
from dsr_jax.models.triton_swiglu import swiglu
from dsr_jax.parallel.axes import Constrain

B = 2
WIDE, HALF = "float32", "bfloat16"


@pytest.fixture(autouse=True)
def small_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs for each sample, the last of which have rows and units that do not exist."""
    monkeypatch.setattr(triton_rows, "MOST_ROWS", 10)
    monkeypatch.setattr(triton_swiglu, "_UNITS", 16)


def _normal(index: int, *shape: int, dtype: str = WIDE) -> jax.Array:
    return jax.random.normal(jax.random.key(index), shape).astype(dtype)


def _tokens(index: int, length: int, width: int, dtype: str) -> jax.Array:
    return (_normal(index, B, length, width) + 0.5).astype(dtype)


def _values(function: Callable[..., Any], *args: Any) -> list[jax.Array]:
    """Returns the results and the gradients of all arguments."""
    shapes = jax.tree.leaves(jax.eval_shape(function, *args))
    weights = [_normal(90 + i, *shape.shape) for i, shape in enumerate(shapes)]

    def weighted(*args: Any) -> tuple[Any, Any]:
        outputs = jax.tree.leaves(function(*args))
        sums = (jnp.sum(w * y.astype(WIDE)) for w, y in zip(weights, outputs, strict=True))
        return sum(sums, jnp.zeros(())), outputs

    positions = tuple(range(len(args)))
    grads, outputs = jax.jit(jax.grad(weighted, positions, has_aux=True))(*args)
    return [*outputs, *grads]


def _check(kernel: Callable[..., Any], plain: Callable[..., Any], *args: Any) -> None:
    """Compares results and gradients with XLA's; errors are relative to the largest value.

    In bfloat16 both round, XLA's path more often: no result is further from that in float32 than
    XLA's, but for one rounding of the result.
    """
    got, want = (_values(function, *args) for function in (kernel, plain))
    exact = _values(plain, *(x.astype(WIDE) for x in args))
    for ours, theirs, true in zip(got, want, exact, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        largest = jnp.abs(true).max()
        error, allowed = (jnp.abs(x.astype(WIDE) - true).max() for x in (ours, theirs))
        bits = 2**-8 if any(x.dtype == HALF for x in args) else 1e-5
        assert error <= allowed + bits * largest


def _norm(x: jax.Array, multiplier: jax.Array, shift: jax.Array, how: NormKernel) -> jax.Array:
    factor, shift = multiplier[:, None] - 1, shift[:, None]
    return elementwise.scaled_norm(x, None, factor, shift, how.epsilon, how.center, how.dtype)


def _sum(x: jax.Array, y: jax.Array, gate: jax.Array, offset: jax.Array) -> jax.Array:
    # XLA's path adds the bias to y; here gate * bias is its own argument.
    total = elementwise.gated_residual(x, gate[:, None], y)
    return elementwise.gated_residual(total, offset[:, None], jnp.ones_like(y))


@pytest.mark.parametrize(
    ("length", "width", "center", "dtype"),
    [(17, 24, False, WIDE), (37, 72, True, WIDE), (3, 1152, False, HALF), (17, 24, True, HALF)],
)
def test_norms_and_residual_sums(length: int, width: int, center: bool, dtype: str) -> None:
    x, y = (_tokens(i, length, width, dtype) for i in range(2))
    gate, offset, multiplier, shift = (_normal(i, B, width) for i in range(2, 6))

    def kernels(x: Any, y: Any, *vectors: Any) -> Any:
        how = NormKernel(1e-6, center, x.dtype.name)
        x, h = branch_norm(x, vectors[0], vectors[1], how)
        x, h = residual_norm(x, y * h, *vectors[2:6], how)
        return residual(x, h, *vectors[6:], how)

    def plain(x: Any, y: Any, *vectors: Any) -> Any:
        how = NormKernel(1e-6, center, x.dtype.name)
        h = _norm(x, vectors[0], vectors[1], how)
        x = _sum(x, y * h, *vectors[2:4])
        return _sum(x, _norm(x, vectors[4], vectors[5], how), *vectors[6:])

    vectors = multiplier, shift, gate, offset, shift, multiplier, offset, gate
    _check(kernels, plain, x, y, *vectors)


@pytest.mark.parametrize(("length", "width", "dtype"), [(17, 24, WIDE), (37, 72, HALF)])
def test_swiglu_adds_the_bias(length: int, width: int, dtype: str) -> None:
    raw, bias = _normal(0, B, length, 2, width, dtype=dtype), _normal(1, 2, width)

    def plain(raw: Any, bias: Any) -> Any:
        gate, value = (raw[:, :, i] + bias[i].astype(raw.dtype) for i in range(2))
        return elementwise.silu_product(gate, value)

    _check(lambda *args: swiglu(*args, Constrain()), plain, raw, bias)


def test_a_norm_of_another_dtype_than_the_stream() -> None:
    how = NormKernel(1e-6, False, HALF)
    x, (multiplier, shift) = _normal(0, B, 17, 24), (_normal(i, B, 24) for i in (1, 2))
    kept, h = branch_norm(x, multiplier, shift, how)
    assert kept is x or (kept == x).all()
    assert h.dtype == HALF
    np.testing.assert_array_equal(h, _norm(x, multiplier, shift, how))


@pytest.mark.parametrize("width", [24, 128, 130, 1152, 2730, 3072])
def test_pieces_cover_all_channels_once(width: int) -> None:
    pieces = triton_rows.make_pieces(width)
    covered = [p.start + i for p in pieces for i in range(p.valid)]
    assert covered == list(range(width))
    assert all(p.size & (p.size - 1) == 0 for p in pieces)
    assert sum(p.size for p in pieces) < width + 128


@pytest.mark.parametrize("length", [1, 16, 17, 256, 257, 292, 128 * 292])
def test_programs_have_all_rows(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_rows, "MOST_ROWS", 128)
    programs, rows = triton_rows.split_rows(length)
    assert (programs - 1) * rows < length <= programs * rows and rows <= 128
