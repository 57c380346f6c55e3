"""SiT: sizes, start, its time's direction and embedding, registers on and off."""

from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax import build
from dsr_jax.core.trees import count_params
from dsr_jax.models.dit import REGISTER_START
from dsr_jax.models.embeddings import SinusoidalTimeEmbed
from dsr_jax.models.sit import SIT, SiT
from tests.programs import quick_programs

TINY = dict(input_size=8, in_channels=4, hidden_size=16, depth=3, num_heads=2, num_classes=5)
REGISTERS = dict(num_registers=4, register_start=1)


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests share their programs."""
    with quick_programs(tmp_path_factory.mktemp("programs")):
        yield


def inputs(batch: int = 2) -> tuple[jax.Array, ...]:
    x = jax.random.normal(jax.random.key(1), (batch, 8, 8, 4))
    return x, jnp.linspace(0.1, 0.9, batch), jnp.arange(batch) % 5


def shapes_of(model: SiT, *given: jax.Array) -> dict:
    given = given or inputs()
    return nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *given))["params"]


def random_params(model: SiT, seed: int = 0) -> dict:
    """Parameters without the zeros of the official start, at which every output is zero."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: random.normal(0, 0.2, leaf.shape).astype(np.float32), shapes_of(model)
    )


# Parameter counts of the official code, spec denoiser 10.1; the second without learned sigma.
COUNTS = {
    "S": (32_963_360, 32_957_200),
    "B": (130_512_416, 130_500_112),
    "L": (458_102_816, 458_086_416),
    "XL": (675_129_632, 675_111_184),
}


@pytest.mark.parametrize("variant", COUNTS)
def test_parameter_counts_are_the_official_ones(variant: str) -> None:
    given = jnp.zeros((1, 32, 32, 4)), jnp.zeros(1), jnp.zeros(1, int)
    registers = {"num_registers": 36, "register_start": REGISTER_START[variant]}
    width = SIT[variant]["hidden_size"]
    for changes, want in (
        ({}, COUNTS[variant][0]),
        ({"learn_sigma": False}, COUNTS[variant][1]),
        (registers, COUNTS[variant][0] + 2 * 36 * width),
    ):
        settings = {**SIT[variant], **changes}
        model = SiT(input_size=32, in_channels=4, num_classes=1000, **settings)
        assert count_params(shapes_of(model, *given)) == want


def test_the_defaults_are_the_flags_of_the_paper() -> None:
    flags = {key: value for key, value in SIT["XL"].items() if key not in TINY}
    assert SiT(**TINY) == SiT(**TINY, **flags)
    names = set(shapes_of(SiT(**TINY)))
    assert names == {
        *("x_embedder", "t_embedder", "y_embedder", "pos_embed", "blocks", "final_layer")
    }
    assert set(shapes_of(SiT(**TINY))["blocks"]) == {"attn", "mlp", "adaLN"}


def test_output_is_zero_at_the_official_start() -> None:
    model = SiT(**TINY, **REGISTERS)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), *inputs()))["params"]
    out = jax.jit(model.apply)({"params": params}, *inputs())
    assert out.shape == (2, 8, 8, 4) and not out.any()
    assert 0.7 < np.std(params["register_tokens"]) < 1.3
    np.testing.assert_array_equal(params["register_pos_embed"][:, 0], params["pos_embed"][:, 0])


def test_sinusoids_are_of_time_itself_with_cosines_first() -> None:
    embed, t = SinusoidalTimeEmbed(16), jnp.linspace(0.1, 0.9, 2)
    _, kept = embed.init_with_output(jax.random.key(0), t, mutable=["params", "intermediates"])
    features = kept["intermediates"]["features"][0]
    assert features.shape == (2, 256)
    frequencies = np.exp(-np.log(10_000) * np.arange(128) / 128)
    angles = np.asarray(t)[:, None] * frequencies
    np.testing.assert_allclose(features, np.hstack([np.cos(angles), np.sin(angles)]), atol=1e-6)


def test_callers_of_the_network_use_time_from_data_to_noise() -> None:
    model = SiT(**TINY)
    params, (x, t, y) = random_params(model), inputs()
    own = jax.jit(model.apply)({"params": params}, x, 1 - t, y)
    for prediction, sign in (("velocity", -1), ("data", 1)):
        translated = jax.jit(build.make_denoise_fn(model, prediction))(params, x, t, y)
        np.testing.assert_allclose(translated, sign * own, atol=1e-5)


def test_registers_are_inserted_at_their_block_and_change_the_function() -> None:
    model = SiT(**TINY, **REGISTERS)
    params = random_params(model)
    assert params["blocks_pre"]["adaLN"]["kernel"].shape[0] == 1
    assert params["blocks_reg"]["adaLN"]["kernel"].shape[0] == 2

    @jax.jit
    def run(params: dict) -> tuple[jax.Array, dict]:
        out, kept = model.apply({"params": params}, *inputs(), mutable=["intermediates"])
        return out, kept["intermediates"]

    out, kept = run(params)
    # Not by a constant, which LayerNorm takes away.
    moved, _ = run(params | {"register_tokens": params["register_tokens"][..., ::-1]})
    assert kept["blocks_pre"]["block_out"][0].shape == (1, 2, 16, 16)
    assert kept["blocks_reg"]["block_out"][0].shape == (2, 2, 4 + 16, 16)
    assert kept["final_tokens"][0].shape == (2, 16, 2 * 2 * 2 * 4)
    assert np.abs(out - moved).max() > 1e-3

    without = SiT(**TINY)
    concatenate = lambda *parts: np.concatenate(parts)  # noqa: E731
    blocks = jax.tree.map(concatenate, params["blocks_pre"], params["blocks_reg"])
    rest = {key: value for key, value in params.items() if key in shapes_of(without)}
    plain = jax.jit(without.apply)({"params": {**rest, "blocks": blocks}}, *inputs())
    assert np.abs(out - plain).max() > 1e-3
