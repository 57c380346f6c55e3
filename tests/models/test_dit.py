"""LightningDiT: sizes, registers, errors, precision and equality across meshes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.trees import count_params, flatten_names
from dsr_jax.models.dit import DIT, REGISTER_START, LightningDiT
from dsr_jax.models.precision import Precision

TINY = dict(input_size=4, in_channels=3, hidden_size=32, depth=3, num_heads=2, num_classes=5)


def inputs(batch: int = 2, size: int = 4, channels: int = 3) -> tuple[jax.Array, ...]:
    x = jax.random.normal(jax.random.key(1), (batch, size, size, channels))
    return x, jnp.linspace(0.1, 0.9, batch), jnp.arange(batch) % 5


def random_params(model: LightningDiT, seed: int = 0) -> dict:
    """Parameters without the zeros of the official start, at which every output is zero."""
    shapes = jax.eval_shape(lambda: nn.unbox(model.init(jax.random.key(0), *inputs())["params"]))
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(
        tree, [jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32) for leaf in leaves]
    )


# Parameter counts of the official code, spec denoiser 1.13.
COUNTS = {
    ("S", 768): (33_649_792, 33_677_440),
    ("S", 1152): (33_945_088, 33_972_736),
    ("B", 768): (131_884_288, 131_939_584),
    ("B", 1152): (132_474_496, 132_529_792),
    ("L", 768): (459_923_424, 459_997_152),
    ("L", 1152): (460_710_240, 460_783_968),
    ("XL", 768): (677_248_384, 677_331_328),
    ("XL", 1152): (678_133_504, 678_216_448),
}


@pytest.mark.parametrize(("variant", "channels"), COUNTS)
def test_parameter_counts_are_the_official_ones(variant: str, channels: int) -> None:
    for registers, count in zip((0, 36), COUNTS[variant, channels], strict=True):
        model = LightningDiT(
            input_size=16,
            in_channels=channels,
            num_classes=1000,
            num_registers=registers,
            register_start=REGISTER_START[variant],
            **DIT[variant],
        )
        args = jnp.zeros((1, 16, 16, channels)), jnp.zeros(1), jnp.zeros(1, int)
        shapes = jax.eval_shape(lambda m=model, a=args: m.init(jax.random.key(0), *a))
        assert count_params(nn.unbox(shapes)["params"]) == count


def test_output_is_zero_at_the_official_start() -> None:
    model = LightningDiT(**TINY, num_registers=4, register_start=1)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), *inputs()))
    np.testing.assert_array_equal(jax.jit(model.apply)(params, *inputs()), 0.0)


def test_registers_change_the_function_from_their_block_on() -> None:
    model = LightningDiT(**TINY, num_registers=4, register_start=1)
    params = random_params(model)
    moved = params | {"register_tokens": params["register_tokens"] + 1.0}

    def layers(p: dict) -> dict[str, jax.Array]:
        _, kept = model.apply({"params": p}, *inputs(), mutable=["intermediates"])
        return kept["intermediates"]

    one, two = layers(params), layers(moved)
    np.testing.assert_array_equal(
        one["blocks_pre"]["block_out"][0], two["blocks_pre"]["block_out"][0]
    )
    assert one["blocks_pre"]["block_out"][0].shape == (1, 2, 16, 32)
    assert one["blocks_reg"]["block_out"][0].shape == (2, 2, 4 + 16, 32)
    patches = [kept["blocks_reg"]["block_out"][0][:, :, 4:] for kept in (one, two)]
    assert np.abs(patches[0] - patches[1]).max() > 1e-3


def test_registers_have_no_order() -> None:
    """Registers are not rotated by rope, so permuting them must not change the output."""
    model = LightningDiT(**TINY, num_registers=4, register_start=0)
    params = random_params(model)
    shuffled = params | {
        name: params[name][:, ::-1] for name in ("register_tokens", "register_pos_embed")
    }
    outputs = [model.apply({"params": p}, *inputs()) for p in (params, shuffled)]
    np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", [0, 1, 2])
def test_stacks_are_cut_at_the_start_block(start: int) -> None:
    model = LightningDiT(**TINY, num_registers=9, register_start=start)
    shapes = jax.eval_shape(lambda: nn.unbox(model.init(jax.random.key(0), *inputs())["params"]))
    depths = {k: v["norm1"]["scale"].shape[0] for k, v in shapes.items() if "blocks" in k}
    assert depths == ({"blocks_pre": start} if start else {}) | {"blocks_reg": 3 - start}


@pytest.mark.parametrize("remat", ["full", pytest.param("dots", marks=pytest.mark.slow)])
def test_remat_changes_no_gradient(remat: str) -> None:
    def gradients(policy: str) -> dict:
        model = LightningDiT(**TINY, num_registers=4, register_start=1, remat=policy)
        params = random_params(model)
        return jax.jit(
            jax.grad(lambda p: jnp.sum(jnp.square(model.apply({"params": p}, *inputs()))))
        )(params)

    kept, recomputed = flatten_names(gradients("none")), flatten_names(gradients(remat))
    for name, value in kept.items():
        scale = np.abs(value).max() + 1e-6
        np.testing.assert_allclose(recomputed[name] / scale, value / scale, atol=2e-5)


def test_bfloat16_stays_near_float32_and_float32_ops_stay_wide() -> None:
    model = LightningDiT(**TINY, num_registers=4, register_start=1)
    narrow = model.clone(precision=Precision("bfloat16"))
    params = random_params(model)
    wide = model.apply({"params": params}, *inputs())
    out, kept = narrow.apply({"params": params}, *inputs(), mutable=["intermediates"])
    assert out.dtype == jnp.float32
    assert kept["intermediates"]["blocks_reg"]["block_out"][0].dtype == jnp.float32
    assert kept["intermediates"]["blocks_reg"]["attn_out"][0].dtype == jnp.bfloat16
    error = np.abs(out - wide).max() / np.abs(wide).max()
    assert 1e-6 < error < 0.1


@pytest.mark.parametrize("kernel", ["einsum", "xla"])
def test_attention_kernels_agree(kernel: str) -> None:
    model = LightningDiT(**TINY, attn_kv_bias=True, attention=kernel)
    params = random_params(model)
    reference = model.clone(attention="auto").apply({"params": params}, *inputs())
    np.testing.assert_allclose(
        model.apply({"params": params}, *inputs()), reference, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_registers": 5}, "registers.num=5.*\n.*use 4 or 9"),
        ({"num_registers": 4, "register_start": 3}, "registers.start=3 is not one of blocks 0..2"),
        ({"num_heads": 3}, "hidden_size=32.*num_heads=3.*\n.*multiple of 12"),
        ({"patch_size": 3}, "input_size=4 is not a multiple of patch_size=3"),
        ({"remat": "some"}, "remat='some'.*\n.*none, dots, full"),
        ({"attention": "flash"}, "attention='flash'"),
    ],
)
def test_impossible_sizes_name_the_key(change: dict, message: str) -> None:
    model = LightningDiT(**(TINY | change))
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs()))


def test_unknown_labels_make_the_output_nan() -> None:
    model = LightningDiT(**TINY)
    x, t, _ = inputs()
    out = model.apply({"params": random_params(model)}, x, t, jnp.array([5, 6]))
    assert np.isfinite(out[0]).all() and np.isnan(out[1]).all()


def test_numpy_parameters_are_not_changed_in_place() -> None:
    model = LightningDiT(**TINY, num_registers=4, register_start=1)
    params = jax.tree.map(lambda leaf: np.array(leaf), random_params(model))
    before = jax.tree.map(np.copy, params)
    model.apply({"params": params}, *inputs())
    jax.tree.map(np.testing.assert_array_equal, params, before)
