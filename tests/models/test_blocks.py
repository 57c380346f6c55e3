"""Stacks of blocks: the same numbers in a loop and unrolled, with and without remat."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.trees import flatten_names
from dsr_jax.models.blocks import make_stack
from dsr_jax.models.kernels import save_attention

DEPTH, WIDTH = 2, 16


def inputs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in ((2, 5, WIDTH), (2, WIDTH)))


@functools.cache
def params() -> Any:
    """Random parameters, since the modulation's zeros of the initialization switch blocks off."""
    shapes = jax.eval_shape(lambda: stack().init(jax.random.key(0), *inputs(), None))["params"]
    leaves, tree = jax.tree.flatten(nn.unbox(shapes))
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(
        tree, [jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32) for leaf in leaves]
    )


def stack(remat: str = "none", unroll: str = "none") -> nn.Module:
    return make_stack(DEPTH, WIDTH, remat, "blocks", num_heads=2, unroll=unroll)


@functools.cache
def compiled(remat: str, unroll: str) -> Any:
    def gradients(p: Any) -> tuple[Any, Any]:
        def total(p: Any) -> tuple[jax.Array, Any]:
            network = stack(remat, unroll)
            (out, _), sown = network.apply({"params": p}, *inputs(), None, mutable="intermediates")
            return jnp.sum(jnp.sin(out)), sown

        return jax.grad(total, has_aux=True)(p)

    return jax.jit(gradients).lower(params()).compile()


@pytest.mark.parametrize(
    "remat", ["full", *(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "dots"))]
)
def test_gradients_and_sown_values_are_those_of_the_loop(remat: str) -> None:
    looped, unrolled = (
        flatten_names(compiled(*c)(params())) for c in [("none", "none"), (remat, "full")]
    )
    assert set(looped) == set(unrolled) and any("block_out" in name for name in looped)
    for name, value in looped.items():
        assert value.shape == unrolled[name].shape and value.shape[0] == DEPTH
        scale = np.abs(value).max() + 1e-6
        np.testing.assert_allclose(unrolled[name] / scale, value / scale, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_an_unrolled_backward_pass_recomputes() -> None:
    """The compiler must not find the recomputed values among those of the forward pass."""
    kept, recomputed = (
        compiled(remat, "full").cost_analysis()["flops"] for remat in ("none", "full")
    )
    # Forward and backward pass are 1 + 2; all of the forward pass once more but its last matmul.
    assert 1.2 < recomputed / kept < 1.34


def test_a_loop_has_one_block_and_an_unrolled_stack_all() -> None:
    assert " while(" in compiled("none", "none").as_text()
    assert " while(" not in compiled("full", "full").as_text()


@pytest.mark.parametrize("width", [32, 64])
def test_a_cpu_unrolls_wide_networks(width: int) -> None:
    x, condition = jnp.zeros((1, 2, width)), jnp.zeros((1, width))
    network = make_stack(DEPTH, width, "none", "blocks", num_heads=2)
    program = str(jax.make_jaxpr(lambda: network.init(jax.random.key(0), x, condition, None))())
    assert (f"unroll={DEPTH}" in program) == (width == 64)


@pytest.mark.parametrize(
    ("key", "names"), [("remat", "none, dots, full"), ("unroll", "auto, none, full")]
)
def test_unknown_names_are_refused(key: str, names: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}='some' is unknown\n.*{names}"):
        stack(**{key: "some"})


def test_residuals_of_cudnn_are_saved() -> None:
    """cuDNN's forward pass is a primitive of JAX without a checkpoint name."""
    primitive = fused_attention_stablehlo._dot_product_attention_fwd_p_wrapper
    backward = fused_attention_stablehlo._dot_product_attention_bwd_p_wrapper
    assert save_attention(primitive) and not save_attention(backward)
