"""JiT: sizes, start, class tokens and registers, dropout, remat and errors."""

from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.trees import count_params, flatten_names
from dsr_jax.models.jit import JIT, JiT
from dsr_jax.models.precision import Precision
from tests.programs import quick_programs

TINY = dict(
    input_size=8,
    in_channels=3,
    patch_size=2,
    hidden_size=16,
    depth=4,
    num_heads=2,
    num_classes=5,
    bottleneck_dim=6,
    num_class_tokens=3,
    class_token_start=1,
)
REGISTERS = dict(num_registers=4, register_start=2)
ALONE = dict(num_class_tokens=0, num_registers=4, register_start=1)


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with quick_programs(tmp_path_factory.mktemp("programs")):
        yield


def inputs(batch: int = 2) -> tuple[jax.Array, ...]:
    x = jax.random.normal(jax.random.key(1), (batch, 8, 8, 3))
    return x, jnp.linspace(0.1, 0.9, batch), jnp.arange(batch) % 5


def keys(seed: int, batch: int = 2) -> jax.Array:
    return jax.random.split(jax.random.key(seed), batch)


def shapes_of(model: JiT) -> dict:
    return jax.eval_shape(lambda: nn.unbox(model.init(jax.random.key(0), *inputs())["params"]))


def random_params(model: JiT, seed: int = 0) -> dict:
    """Parameters without the zeros of the official start, at which every output is zero."""
    leaves, tree = jax.tree.flatten(shapes_of(model))
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(
        tree, [jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32) for leaf in leaves]
    )


def layers(model: JiT, params: dict, *more: jax.Array) -> dict[str, np.ndarray]:
    """Every block's output by stack, and the final tokens."""
    _, kept = jax.jit(
        lambda p: model.apply({"params": p}, *inputs(), *more, mutable=["intermediates"])
    )(params)
    kept = kept["intermediates"]
    found = {name: stack["block_out"][0] for name, stack in kept.items() if "blocks" in name}
    return found | {"final_tokens": kept["final_tokens"][0]}


# Parameter counts of the official code, spec denoiser 11; of patch 32 to a tenth of a million.
COUNTS = {"B-16": 131_320_320, "L-16": 459_139_808, "H-16": 952_842_048}
ROUNDED = {"B-32": 133.4, "L-32": 461.8, "H-32": 956.4}


def count(variant: str, **changes: int) -> int:
    sizes = JIT[variant]
    side = 16 * sizes["patch_size"]
    model = JiT(input_size=side, in_channels=3, num_classes=1000, **{**sizes, **changes})
    args = jnp.zeros((1, side, side, 3)), jnp.zeros(1), jnp.zeros(1, int)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *args))
    return count_params(nn.unbox(shapes)["params"])


@pytest.mark.parametrize("variant", COUNTS)
def test_parameter_counts_are_the_official_ones(variant: str) -> None:
    assert count(variant) == COUNTS[variant]


@pytest.mark.parametrize("variant", ROUNDED)
def test_parameter_counts_with_large_patches(variant: str) -> None:
    assert round(count(variant) / 1e6, 1) == ROUNDED[variant]


def test_registers_and_class_tokens_cost_their_tables() -> None:
    width = JIT["B-16"]["hidden_size"]
    assert count("B-16", num_registers=36, register_start=4) == COUNTS["B-16"] + 2 * 36 * width
    assert count("B-16", num_class_tokens=0) == COUNTS["B-16"] - 32 * width


def test_output_is_zero_at_the_official_start() -> None:
    model = JiT(**TINY, **REGISTERS)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), *inputs()))["params"]
    np.testing.assert_array_equal(jax.jit(model.apply)({"params": params}, *inputs()), 0.0)
    flat = flatten_names(params)
    assert flat["x_embedder/proj1/kernel"].shape == (2, 2, 3, 6)
    assert "x_embedder/proj1/bias" not in flat
    # Xavier on the flattened views: 12 inputs to 6, and 6 to 16.
    for name, fans in {"proj1": 12 + 6, "proj2": 6 + 16}.items():
        kernel, bound = flat[f"x_embedder/{name}/kernel"], (6 / fans) ** 0.5
        assert 0.8 * bound < np.abs(kernel).max() <= bound
    assert 0.01 < flat["in_context_posemb"].std() < 0.03


def test_class_tokens_depend_on_the_label_and_change_the_function() -> None:
    model = JiT(**TINY)
    params = random_params(model)
    moved = params | {"in_context_posemb": params["in_context_posemb"] + 1.0}
    one, two = layers(model, params), layers(model, moved)
    assert one["blocks_pre"].shape == (1, 2, 16, 16)
    assert one["blocks_ctx"].shape == (3, 2, 3 + 16, 16)
    np.testing.assert_array_equal(one["blocks_pre"], two["blocks_pre"])
    assert np.abs(one["final_tokens"] - two["final_tokens"]).max() > 1e-3
    assert one["final_tokens"].shape == (2, 16, 12)


def test_class_tokens_are_the_labels_embedding_plus_a_position() -> None:
    """With zero modulation every block is the identity, and shows the inserted tokens."""
    model = JiT(**TINY)
    params = random_params(model)
    for name in ("blocks_pre", "blocks_ctx"):
        zeros = jax.tree.map(jnp.zeros_like, params[name]["adaLN"])
        params = params | {name: params[name] | {"adaLN": zeros}}
    inserted = layers(model, params)["blocks_ctx"][0, :, :3]
    table = params["y_embedder"]["embedding_table"]["embedding"]
    want = table[inputs()[2]][:, None] + params["in_context_posemb"]
    np.testing.assert_allclose(inserted, want, rtol=1e-6)


def test_registers_are_inserted_next_to_the_class_tokens_at_their_own_block() -> None:
    model = JiT(**TINY, **REGISTERS)
    params = random_params(model)
    one = layers(model, params)
    assert {name: x.shape[0] for name, x in one.items() if "blocks" in name} == {
        "blocks_pre": 1,
        "blocks_ctx": 1,
        "blocks_reg": 2,
    }
    assert one["blocks_reg"].shape == (2, 2, 4 + 3 + 16, 16)
    moved = params | {"register_tokens": params["register_tokens"] + 1.0}
    two = layers(model, moved)
    np.testing.assert_array_equal(one["blocks_ctx"], two["blocks_ctx"])
    assert np.abs(one["final_tokens"] - two["final_tokens"]).max() > 1e-3


def test_registers_alone_leave_no_class_tokens() -> None:
    model = JiT(**(TINY | ALONE))
    assert "in_context_posemb" not in shapes_of(model)
    assert layers(model, random_params(model))["blocks_reg"].shape == (3, 2, 4 + 16, 16)
    names = set(shapes_of(JiT(**(TINY | {"num_class_tokens": 0}))))
    assert "blocks" in names and not any("register" in name for name in names)


def test_dropout_acts_in_training_and_in_the_middle_half_only() -> None:
    model = JiT(**TINY, dropout=0.5)
    params = random_params(model)
    plain = layers(model.clone(dropout=0.0), params)
    for name, value in layers(model, params).items():
        np.testing.assert_array_equal(value, plain[name])
    dropped = layers(model, params, keys(1))
    # Blocks 1 and 2 of 4 drop: the first is alone in its stack.
    np.testing.assert_array_equal(dropped["blocks_pre"], plain["blocks_pre"])
    moved = np.abs(dropped["blocks_ctx"] - plain["blocks_ctx"]).max(axis=(1, 2, 3))
    assert (moved > 1e-2).all()
    silent = layers(model.clone(dropout=0.0), params, keys(1))
    np.testing.assert_array_equal(silent["final_tokens"], plain["final_tokens"])


def test_dropout_belongs_to_samples() -> None:
    model = JiT(**TINY, dropout=0.5)
    params = {"params": random_params(model)}
    apply = jax.jit(lambda *given: model.apply(params, *given))
    x, t, y = inputs(4)
    whole = apply(x, t, y, keys(1, 4))
    np.testing.assert_allclose(apply(x[2:], t[2:], y[2:], keys(1, 4)[2:]), whole[2:], atol=1e-5)
    assert np.abs(whole - apply(x, t, y, keys(2, 4))).max() > 1e-2


@pytest.mark.slow
def test_remat_changes_neither_gradient_nor_dropout() -> None:
    def gradients(policy: str) -> dict:
        model = JiT(**TINY, dropout=0.5, remat=policy)
        return jax.jit(
            jax.grad(lambda p: jnp.sum(jnp.square(model.apply({"params": p}, *inputs(), keys(1)))))
        )(random_params(model))

    kept, recomputed = flatten_names(gradients("none")), flatten_names(gradients("full"))
    for name, value in kept.items():
        scale = np.abs(value).max() + 1e-6
        np.testing.assert_allclose(recomputed[name] / scale, value / scale, atol=2e-5)


def test_bfloat16_stays_near_float32() -> None:
    model = JiT(**TINY, **REGISTERS)
    params = {"params": random_params(model)}
    narrow = model.clone(precision=Precision("bfloat16"))
    wide, out = (jax.jit(network.apply)(params, *inputs()) for network in (model, narrow))
    assert out.dtype == jnp.float32
    error = np.abs(out - wide).max() / np.abs(wide).max()
    assert 1e-6 < error < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_token_start": 4}, "class_token_start=4 is not one of blocks 0..3"),
        ({"num_registers": 4, "register_start": 4}, "registers.start=4 is not one of blocks 0..3"),
        ({"bottleneck_dim": 0}, "bottleneck_dim=0"),
        ({"num_class_tokens": -1}, "num_class_tokens=-1"),
        ({"dropout": 1.0}, "dropout=1.0.*\n.*less than 1"),
        ({"patch_size": 3}, "input_size=8 is not a multiple of patch_size=3"),
    ],
)
def test_impossible_sizes_name_the_key(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shapes_of(JiT(**(TINY | change)))
