"""Whole blocks with Triton kernels, interpreted, beside blocks by XLA alone."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from dsr_jax.core.errors import ConfigError
from dsr_jax.models.blocks import KERNELS, Block
from dsr_jax.models.dit import LightningDiT
from dsr_jax.models.dropout import make_dropout, middle_half
from dsr_jax.models.precision import Precision
from dsr_jax.models.triton_norm import fits_kernels
from dsr_jax.parallel.axes import Constrain, make_rules
from dsr_jax.parallel.mesh import MeshShape, make_mesh

B, L, D = 4, 5, 24
TRITON = "triton"


def _normal(index: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(index), shape)


def _moved(params: Any) -> Any:
    """Away from the initial values, of which some are 0."""
    leaves, tree = jax.tree.flatten(params)
    return jax.tree.unflatten(
        tree, [leaf + 0.1 * _normal(i, *leaf.shape) for i, leaf in enumerate(leaves)]
    )


def _block(**settings: Any) -> tuple[Block, Any, tuple[Any, ...]]:
    """Returns a block, its parameters and inputs."""
    block = Block(num_heads=2, **settings)
    inputs = _normal(0, B, L, D), _normal(1, B, D), None
    params = jax.jit(block.init)(jax.random.key(2), *inputs)
    return block, _moved(params), inputs


def _loss_and_grads(model: Any, params: Any, *inputs: Any) -> Any:
    def loss(params: Any, inputs: Any) -> jax.Array:
        y = jax.tree.leaves(model.apply(params, *inputs))[0]
        return jnp.mean(jnp.sin(y))

    return jax.jit(jax.value_and_grad(loss, allow_int=True))(params, inputs)


def _check_equal(got: Any, want: Any) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert jnp.abs(a - b).max() <= 1e-5 * jnp.abs(b).max()


def _kernel_names(model: Any, params: Any, *inputs: Any, **options: Any) -> str:
    """Returns the traced program, which names the kernels."""
    return str(jax.make_jaxpr(lambda *args: model.apply(*args, **options))(params, *inputs))


def test_a_network_has_the_same_loss_and_gradients() -> None:
    model = LightningDiT(
        input_size=4,
        in_channels=8,
        num_classes=3,
        depth=2,
        hidden_size=D,
        num_heads=2,
    )
    inputs = _normal(3, 2, 4, 4, 8), jnp.array([0.2, 0.9]), jnp.array([0, 2])
    params = _moved(jax.jit(model.init)(jax.random.key(0), *inputs))
    other = model.clone(kernels=TRITON)
    shapes = jax.eval_shape(other.init, jax.random.key(0), *inputs)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    want, got = (_loss_and_grads(m, params, *inputs) for m in (model, other))
    _check_equal(got, want)


def test_gelu_and_layer_norm() -> None:
    block, params, inputs = _block(use_swiglu=False, use_rmsnorm=False)
    want, got = (
        jax.jit(block.clone(kernels=kernels).apply)(params, *inputs) for kernels in KERNELS
    )
    _check_equal(got, want)


def test_devices_compute_the_same() -> None:
    """Samples are split over data and fsdp, hidden units over tensor."""
    block, params, inputs = _block()
    want = _loss_and_grads(block, params, *inputs)
    constrain = Constrain(make_rules("fsdp"), make_mesh(MeshShape(2, 2, 2)))
    split = block.clone(kernels=TRITON, constrain=constrain)
    _check_equal(_loss_and_grads(split, params, *inputs), want)


NORMS = ("norm_kernel", "both_kernel", "residual_kernel")


def test_kernels_run_where_they_can() -> None:
    block, params, inputs = _block(kernels=TRITON, precision=Precision("bfloat16", "bfloat16"))
    found = _kernel_names(block, params, *inputs)
    assert all(f"name={name}" in found for name in (*NORMS, "swiglu"))
    watched = _kernel_names(block, params, *inputs, mutable=["intermediates"])
    assert not any(name in watched for name in NORMS) and "name=swiglu" in watched
    dropout = make_dropout(jax.random.split(jax.random.key(0), B), middle_half(4, 0.5))
    first = jax.tree.map(lambda x: x[0], dropout)
    assert "pallas_call" not in _kernel_names(block, params, *inputs, first)
    per_token = inputs[0], jnp.broadcast_to(inputs[1][:, None], (B, L, D)), None
    found = _kernel_names(block, params, *per_token)
    assert not any(name in found for name in NORMS) and "name=swiglu" in found
    assert "pallas_call" not in _kernel_names(block.clone(kernels="xla"), params, *inputs)


def test_kernels_need_whole_samples() -> None:
    mesh = make_mesh(MeshShape(2, 2, 2))
    assert fits_kernels((B, 4, D), Constrain(make_rules("fsdp"), mesh))
    for axis in ("act_len", "act_embed"):
        rules = make_rules("fsdp", [(axis, ["tensor"])])
        assert not fits_kernels((B, 4, D), Constrain(rules, mesh))


def test_an_unknown_name_is_an_error() -> None:
    model = LightningDiT(
        input_size=4, in_channels=8, num_classes=3, depth=1, hidden_size=D, num_heads=2, kernels="x"
    )
    with pytest.raises(ConfigError, match=r"kernels='x' is unknown[\s\S]*xla, triton"):
        model.check_sizes()
