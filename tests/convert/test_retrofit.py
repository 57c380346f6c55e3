"""Registers inserted into a trained network: same function, moved layers, and the way back."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.convert.families import export_denoiser
from dsr_jax.convert.retrofit import add_registers, remove_registers
from dsr_jax.core.errors import ConfigError, ConversionError
from dsr_jax.core.trees import flatten_names
from dsr_jax.models.dit import LightningDiT
from dsr_jax.models.dit_dh import DiTDH
from dsr_jax.models.embeddings import sincos_2d
from dsr_jax.models.jit import JiT
from dsr_jax.models.registry import model_sizes
from dsr_jax.models.sit import SiT
from dsr_jax.models.transformer import DiffusionTransformer
from tests.programs import quick_programs
from tests.tiny_denoisers import random_params

SIZES: dict[str, Any] = {
    "input_size": 4,
    "in_channels": 3,
    "hidden_size": 16,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 5,
}
HEAD = {"decoder_hidden_size": 24, "decoder_depth": 1, "decoder_num_heads": 2}
CLASSES = {"bottleneck_dim": 4, "num_class_tokens": 2}
MODELS = {
    "lightningdit": LightningDiT(**SIZES, attn_kv_bias=True, use_qknorm=True),
    "ditdh": DiTDH(**SIZES, **HEAD),
    "sit": SiT(**SIZES),
    "jit-classes-first": JiT(**SIZES, **CLASSES, class_token_start=0),
    "jit-classes-later": JiT(**SIZES, **CLASSES, class_token_start=2),
}


@pytest.fixture(scope="module", autouse=True)
def quickly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The networks are tiny and run a few times: compiling them is what takes time."""
    with quick_programs(tmp_path_factory.mktemp("programs")):
        yield


@functools.cache
def compiled(model: DiffusionTransformer) -> Any:
    """The network as a program."""
    return jax.jit(model.apply)


def run(model: DiffusionTransformer, params: Any) -> np.ndarray:
    """What a network makes of some noise."""
    x = jax.random.normal(jax.random.key(3), (2, 4, 4, 3))
    return np.asarray(
        compiled(model)({"params": params}, x, jnp.array([0.3, 0.8]), jnp.array([1, 5]))
    )


@pytest.mark.parametrize("name", MODELS)
def test_registers_with_a_closed_gate_change_nothing(name: str) -> None:
    model = MODELS[name]
    params = random_params(model)
    before = run(model, params)
    least = 1e-3 * np.abs(before).max()

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return np.abs(a - b).max()

    gated, more = add_registers(model, params, 4, 1, gate=True)
    assert distance(run(gated, more), before) < 2e-3 * least

    # And only the gate does it: open, it is the published network; ajar, neither.
    plain, official = add_registers(model, params, 4, 1)
    published = run(plain, official)
    assert distance(published, before) > least
    opened = jax.tree.map_with_path(lambda path, x: x + 1 if is_gate(path) else x, more)
    assert distance(run(gated, opened), published) < 2e-3 * least
    ajar = jax.tree.map_with_path(lambda path, x: x + 0.5 if is_gate(path) else x, more)
    assert all(distance(run(gated, ajar), other) > least / 10 for other in (before, published))


def is_gate(path: tuple[Any, ...]) -> bool:
    """Whether a parameter is a gate."""
    return path[-1].key == "register_gate"


@pytest.mark.parametrize("name", ["lightningdit", "ditdh", "jit-classes-later"])
@pytest.mark.parametrize("gate", [False, True])
def test_removing_registers_restores_the_first_network(name: str, gate: bool) -> None:
    model = MODELS[name]
    params = random_params(model)
    changed, more = add_registers(model, params, 4, 2, gate=gate)
    again, back = remove_registers(changed, more)
    assert again == model.clone(register_start=0)
    want, got = flatten_names(params), flatten_names(back)
    assert set(want) == set(got)
    assert all(np.array_equal(want[key], got[key]) for key in want)


def test_layers_move_with_their_block() -> None:
    model = MODELS["ditdh"]
    params = random_params(model)
    changed, more = add_registers(model, params, 4, 2)
    name = "attn/qkv/kernel"
    whole = flatten_names(params)[f"enc_blocks/{name}"]
    flat = flatten_names(more)
    assert np.array_equal(flat[f"enc_blocks_pre/{name}"], whole[:2])
    assert np.array_equal(flat[f"enc_blocks_reg/{name}"], whole[2:])
    assert np.array_equal(flat[f"dec_blocks/{name}"], flatten_names(params)[f"dec_blocks/{name}"])
    assert flat["enc_register_tokens"].shape == (1, 4, 16)
    assert flat["dec_register_tokens"].shape == (1, 4, 24)
    assert changed.register_start == 2


def test_tokens_are_initialized_like_the_originals_or_smaller() -> None:
    """Source: spec denoiser 1.10: N(0, 1), and the sine-cosine table of their grid."""
    model = LightningDiT(**{**SIZES, "hidden_size": 512})
    params = random_params(model)
    _, more = add_registers(model, params, 36, 1)
    tokens = more["register_tokens"]
    assert abs(tokens.mean()) < 0.03 and abs(tokens.std() - 1) < 0.03
    corner = sincos_2d(512, 16).reshape(16, 16, 512)[:6, :6].reshape(1, 36, 512)
    assert np.array_equal(more["register_pos_embed"], corner)
    _, small = add_registers(model, params, 36, 1, scale=0.02)
    assert np.allclose(small["register_tokens"], 0.02 * tokens)
    _, other = add_registers(model, params, 36, 1, seed=1)
    assert not np.allclose(other["register_tokens"], tokens)


def test_a_closed_gate_learns_and_then_the_registers() -> None:
    model = MODELS["lightningdit"]
    gated, params = add_registers(model, random_params(model), 4, 1, gate=True)
    x = jax.random.normal(jax.random.key(3), (2, 4, 4, 3))

    @jax.jit
    def grads(params: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            out = gated.apply({"params": params}, x, jnp.array([0.3, 0.8]), jnp.array([1, 5]))
            return jnp.mean((out - x) ** 2)

        return jax.grad(loss)(params)

    first = grads(params)
    assert np.abs(first["blocks_reg"]["attn"]["register_gate"]).max() > 1e-5
    assert not np.any(first["register_tokens"])
    second = grads(jax.tree.map(lambda p, g: p - 0.1 * g, params, first))
    assert np.abs(second["register_tokens"]).max() > 1e-7


def test_impossible_changes_are_rejected() -> None:
    model = MODELS["lightningdit"]
    params = random_params(model)
    with pytest.raises(ConversionError, match="no registers"):
        remove_registers(model, params)
    with pytest.raises(ConfigError, match="not a square"):
        add_registers(model, params, 5, 1)
    with pytest.raises(ConfigError, match=r"start=3 is not one of blocks"):
        add_registers(model, params, 4, 3)
    changed, more = add_registers(model, params, 4, 1)
    with pytest.raises(ConversionError, match="4 registers already"):
        add_registers(changed, more, 4, 1)
    with pytest.raises(ConversionError, match="not of the model: .*x_embedder"):
        add_registers(dataclasses.replace(model, in_channels=4), params, 4, 1)
    with pytest.raises(ConversionError, match="lack blocks"):
        add_registers(model, more, 4, 1)
    with pytest.raises(ConfigError, match="gate=True"):
        model.clone(register_gate=True).check_sizes()


def test_the_originals_form_has_no_gate() -> None:
    model = MODELS["lightningdit"]
    for gate in (False, True):
        changed, params = add_registers(model, random_params(model), 4, 1, gate=gate)
        record = {"family": "lightningdit", "model": model_sizes(changed)}
        if gate:
            with pytest.raises(ConversionError, match="registers.* gate"):
                export_denoiser(params, record)
        else:
            assert export_denoiser(params, record)["register_tokens"].shape == (1, 4, 16)
