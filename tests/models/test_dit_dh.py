"""DiTDH: sizes, start, both register sets, conditions token by token, remat and errors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.trees import count_params, flatten_names
from dsr_jax.models.dit import REGISTER_START
from dsr_jax.models.dit_dh import DIT_DH, DiTDH
from dsr_jax.models.precision import Precision

TINY = dict(
    input_size=4,
    in_channels=3,
    hidden_size=16,
    depth=3,
    num_heads=2,
    num_classes=5,
    decoder_hidden_size=24,
    decoder_depth=2,
    decoder_num_heads=3,
)
REGISTERS = dict(num_registers=4, register_start=1)


def inputs(batch: int = 2) -> tuple[jax.Array, ...]:
    x = jax.random.normal(jax.random.key(1), (batch, 4, 4, 3))
    return x, jnp.linspace(0.1, 0.9, batch), jnp.arange(batch) % 5


def shapes_of(model: DiTDH) -> dict:
    return jax.eval_shape(lambda: nn.unbox(model.init(jax.random.key(0), *inputs())["params"]))


def random_params(model: DiTDH, seed: int = 0) -> dict:
    """Parameters without the zeros of the official start, at which every output is zero."""
    leaves, tree = jax.tree.flatten(shapes_of(model))
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(
        tree, [jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32) for leaf in leaves]
    )


def layers(model: DiTDH, params: dict) -> dict[str, np.ndarray]:
    """Every block's output by stack, the head's conditions, and the final tokens."""
    _, kept = jax.jit(lambda p: model.apply({"params": p}, *inputs(), mutable=["intermediates"]))(
        params
    )
    kept = kept["intermediates"]
    found = {name: stack["block_out"][0] for name, stack in kept.items() if "blocks" in name}
    return found | {name: kept[name][0] for name in ("s_projected", "final_tokens")}


# Parameter counts of the official code, spec denoiser 2.4.
COUNTS = {
    ("S", 768): (196_455_764, 196_630_868),
    ("S", 1152): (198_176_468, 198_351_572),
    ("B", 768): (294_295_892, 294_498_644),
    ("B", 1152): (296_164_052, 296_366_804),
    ("L", 768): (621_744_436, 621_965_620),
    ("L", 1152): (623_710_900, 623_932_084),
    ("XL", 768): (838_675_796, 838_906_196),
    ("XL", 1152): (840_691_412, 840_921_812),
}


@pytest.mark.parametrize(("variant", "channels"), COUNTS)
def test_parameter_counts_are_the_official_ones(variant: str, channels: int) -> None:
    for registers, count in zip((0, 36), COUNTS[variant, channels], strict=True):
        model = DiTDH(
            input_size=16,
            in_channels=channels,
            num_classes=1000,
            num_registers=registers,
            register_start=REGISTER_START[variant],
            **DIT_DH[variant],
        )
        args = jnp.zeros((1, 16, 16, channels)), jnp.zeros(1), jnp.zeros(1, int)
        shapes = jax.eval_shape(lambda m=model, a=args: m.init(jax.random.key(0), *a))
        assert count_params(nn.unbox(shapes)["params"]) == count


def test_output_is_zero_at_the_official_start_but_biases_are_not() -> None:
    model = DiTDH(**TINY, **REGISTERS)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), *inputs()))["params"]
    np.testing.assert_array_equal(jax.jit(model.apply)({"params": params}, *inputs()), 0.0)
    biases = {name: x for name, x in flatten_names(params).items() if name.endswith("bias")}
    zero = {name for name, x in biases.items() if not x.any()}
    assert {name.rsplit("/", 2)[-2] for name in zero} == {"adaLN", "linear", "proj"}
    assert {name for name in zero if name.endswith("/proj/bias")} == {
        "s_embedder/proj/bias",
        "x_embedder/proj/bias",
    }
    for name, fan_in in {
        "dec_blocks/mlp/w3": 64,
        "dec_blocks/attn/proj": 24,
        "s_projector": 16,
        "enc_blocks_reg/mlp/w12": 16,
    }.items():
        kernel = flatten_names(params)[f"{name}/kernel"]
        bound = fan_in**-0.5
        assert 0.9 * bound < np.abs(kernel).max() <= bound
        assert 0.7 * bound < np.abs(biases[f"{name}/bias"]).max() <= bound


def test_encoder_registers_change_the_function_from_their_block_on() -> None:
    model = DiTDH(**TINY, **REGISTERS)
    params = random_params(model)
    moved = params | {"enc_register_tokens": params["enc_register_tokens"] + 1.0}
    one, two = layers(model, params), layers(model, moved)
    assert one["enc_blocks_pre"].shape == (1, 2, 16, 16)
    assert one["enc_blocks_reg"].shape == (2, 2, 4 + 16, 16)
    assert one["s_projected"].shape == (2, 4 + 16, 24)
    assert one["dec_blocks"].shape == (2, 2, 4 + 16, 24)
    assert one["final_tokens"].shape == (2, 16, 3)
    np.testing.assert_array_equal(one["enc_blocks_pre"], two["enc_blocks_pre"])
    for name in ("enc_blocks_reg", "dec_blocks"):
        assert np.abs(one[name][:, :, 4:] - two[name][:, :, 4:]).max() > 1e-3
    assert np.abs(one["final_tokens"] - two["final_tokens"]).max() > 1e-3


def test_head_has_registers_of_its_own_from_its_first_block_on() -> None:
    model = DiTDH(**TINY, num_registers=4, register_start=2)
    params = random_params(model)
    moved = params | {"dec_register_tokens": params["dec_register_tokens"] + 1.0}
    one, two = layers(model, params), layers(model, moved)
    for name in ("enc_blocks_pre", "enc_blocks_reg", "s_projected"):
        np.testing.assert_array_equal(one[name], two[name])
    assert np.abs(one["dec_blocks"][0, :, 4:] - two["dec_blocks"][0, :, 4:]).max() > 1e-3


def test_head_without_attention_sees_each_position_alone() -> None:
    """Conditions are of each token: only attention can carry them to another place."""
    model = DiTDH(**TINY, **REGISTERS)
    params = random_params(model)
    attention = params["dec_blocks"]["attn"]
    silent = jax.tree.map(jnp.zeros_like, attention["proj"])
    head = params["dec_blocks"] | {"attn": attention | {"proj": silent}}
    encoder = {name: params[name] for name in params if name.startswith("enc_blocks")}
    closed = {
        name: stack | {"attn": stack["attn"] | {"proj": jax.tree.map(jnp.zeros_like, p)}}
        for name, stack in encoder.items()
        for p in [stack["attn"]["proj"]]
    }
    params = params | {"dec_blocks": head} | closed
    x, t, y = inputs()

    @jax.jit
    def apply(x: jax.Array) -> jax.Array:
        return model.apply({"params": params}, x, t, y)

    moved = np.abs(apply(x.at[:, 1, 2].add(1.0)) - apply(x)).max(axis=-1)
    assert moved[:, 1, 2].min() > 1e-4
    moved[:, 1, 2] = 0
    assert moved.max() == 0


@pytest.mark.parametrize("start", [0, 2])
def test_stacks_are_cut_at_the_start_block(start: int) -> None:
    params = shapes_of(DiTDH(**TINY, num_registers=9, register_start=start))
    depths = {k: v["norm1"]["scale"].shape[0] for k, v in params.items() if "blocks" in k}
    before = {"enc_blocks_pre": start} if start else {}
    assert depths == before | {"enc_blocks_reg": 3 - start, "dec_blocks": 2}


def test_optional_parts_leave_no_parameters() -> None:
    names = set(shapes_of(DiTDH(**TINY)))
    assert {"pos_embed", "s_projector", "enc_blocks", "dec_blocks"} <= names
    same_width = TINY | {"decoder_hidden_size": 16, "decoder_num_heads": 2, "use_pos_embed": False}
    assert names - set(shapes_of(DiTDH(**same_width))) == {"pos_embed", "s_projector"}


@pytest.mark.slow
def test_remat_changes_no_gradient() -> None:
    def gradients(policy: str) -> dict:
        model = DiTDH(**TINY, **REGISTERS, remat=policy)
        return jax.jit(
            jax.grad(lambda p: jnp.sum(jnp.square(model.apply({"params": p}, *inputs()))))
        )(random_params(model))

    kept, recomputed = flatten_names(gradients("none")), flatten_names(gradients("full"))
    for name, value in kept.items():
        scale = np.abs(value).max() + 1e-6
        np.testing.assert_allclose(recomputed[name] / scale, value / scale, atol=2e-5)


def test_bfloat16_stays_near_float32() -> None:
    model = DiTDH(**TINY, **REGISTERS)
    params = {"params": random_params(model)}
    wide = model.apply(params, *inputs())
    narrow = model.clone(precision=Precision("bfloat16"))
    out, kept = narrow.apply(params, *inputs(), mutable=["intermediates"])
    assert out.dtype == jnp.float32
    assert kept["intermediates"]["dec_blocks"]["block_out"][0].dtype == jnp.float32
    assert kept["intermediates"]["dec_blocks"]["attn_out"][0].dtype == jnp.bfloat16
    error = np.abs(out - wide).max() / np.abs(wide).max()
    assert 1e-6 < error < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_registers": 5}, "registers.num=5.*\n.*use 4 or 9"),
        ({"num_registers": 4, "register_start": 3}, "registers.start=3 is not one of blocks 0..2"),
        ({"num_heads": 3}, r"model\.hidden_size=16.* num_heads=3.*\n.*multiple of 12"),
        (
            {"decoder_num_heads": 5},
            r"model\.decoder_hidden_size=24.*decoder_num_heads=5.*\n.*multiple of 20",
        ),
        ({"patch_size": 3}, "input_size=4 is not a multiple of patch_size=3"),
    ],
)
def test_impossible_sizes_name_the_key(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shapes_of(DiTDH(**(TINY | change)))
