"""A step of stage 1 on toys: balanced gradients, starts, noise, and what it reports."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.trees import flatten_names
from dsr_jax.models.decoder import DecoderConfig, ViTDecoder
from dsr_jax.training.adversarial import generator_loss, to_signed
from dsr_jax.training.decoder_state import DecoderState, create_decoder_state
from dsr_jax.training.decoder_step import (
    LossSettings,
    Networks,
    generator_terms_and_grads,
    make_decoder_step,
    update_discriminator,
)
from dsr_jax.training.diffaug import NUM_UNIFORMS, augment
from dsr_jax.training.optimizers import LearningRate, Optimizer, ParamGroup
from tests.training.toy_training import FAST_COMPILE

SIDE, ROWS, PIXELS = 8, 4, 8 * 8 * 3
SETTINGS = LossSettings(discriminator_start=1, generator_start=2, gan_weight=0.5)
OPTIMIZER = Optimizer(LearningRate(1e-2, "linear", 1e-3, 0, 10))


def encode(variables: Any, images: Any, keys: Any) -> Any:
    """Pixels; noise where there are keys."""
    flat = images.reshape(len(images), -1)
    if keys is None:
        return flat
    return flat + jax.vmap(lambda key: jax.random.normal(key, (PIXELS,)))(keys)


def decode(variables: Any, params: Any, latents: Any) -> Any:
    hidden = jnp.tanh(latents @ params["first"])
    return (hidden @ params["pred"]["kernel"]).reshape(-1, SIDE, SIDE, 3) + 0.5


def perceptual(variables: Any, a: Any, b: Any) -> Any:
    return variables["scale"] * jnp.mean(jnp.square(a - b), axis=(1, 2, 3))


def discriminate(variables: Any, heads: Any, spectral: Any, images: Any, *, train: bool) -> Any:
    """Counts its passes in training."""
    logits = jnp.tanh(images.reshape(len(images), -1) @ heads)
    return logits, spectral + 1 if train else spectral


NETWORKS = Networks(encode, decode, perceptual, discriminate)
VARIABLES = {"scale": jnp.float32(0.7)}


def state(with_discriminator: bool = True, optimizer: Optimizer = OPTIMIZER) -> DecoderState:
    keys = jax.random.split(jax.random.key(0), 3)
    kernel = 0.1 * jax.random.normal(keys[1], (6, PIXELS))
    params = {"first": 0.1 * jax.random.normal(keys[0], (PIXELS, 6)), "pred": {"kernel": kernel}}
    heads = (0.1 * jax.random.normal(keys[2], (PIXELS, 5)), jnp.zeros(()))
    return create_decoder_state(params, heads if with_discriminator else None, optimizer, (0.5,))


def batch() -> dict[str, Any]:
    images = np.random.default_rng(0).integers(0, 256, (ROWS, SIDE, SIDE, 3), np.uint8)
    return {"image": jnp.asarray(images), "index": jnp.arange(ROWS, dtype=jnp.uint32)}


@functools.cache
def compiled(networks: Networks = NETWORKS) -> Any:
    """The toys' step; compiled once for all tests."""
    step = make_decoder_step(networks, SETTINGS, OPTIMIZER, seed=0)
    return jax.jit(step, compiler_options=FAST_COMPILE)


def run(steps: int) -> list[tuple[DecoderState, dict[str, Any]]]:
    """States and metrics after each of some steps."""
    found, current = [], state()
    for _ in range(steps):
        current, metrics = compiled()(current, batch(), VARIABLES)
        found.append((current, metrics))
    return found


def test_gradients_are_those_of_the_balanced_sum() -> None:
    before, images = state(), batch()["image"] / 255
    uniforms = jax.random.uniform(jax.random.key(3), (ROWS, NUM_UNIFORMS))
    latents = encode(VARIABLES, images, None)
    settings = dataclasses.replace(SETTINGS, perceptual_weight=2.0)

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def compute(before: DecoderState) -> Any:
        return generator_terms_and_grads(
            NETWORKS, settings, VARIABLES, before, images, latents, uniforms, True
        )

    terms, grads = compute(before)

    def reconstruction(params: Any) -> Any:
        x = decode(VARIABLES, params, latents)
        distance = perceptual(VARIABLES, to_signed(images), to_signed(x))
        return jnp.mean(jnp.abs(x - images)) + 2.0 * jnp.mean(distance)

    def adversarial(params: Any) -> Any:
        seen = augment(to_signed(decode(VARIABLES, params, latents)), uniforms)
        return generator_loss(jnp.tanh(seen.reshape(ROWS, -1) @ before.discriminator.params))

    first, second = (
        jax.jit(jax.value_and_grad(f), compiler_options=FAST_COMPILE)(before.params)
        for f in (reconstruction, adversarial)
    )
    norms = [jnp.linalg.norm(g["pred"]["kernel"]) for _, g in (first, second)]
    weight = norms[0] / (norms[1] + 1e-6)
    np.testing.assert_allclose(terms.weight, weight, rtol=1e-4)
    np.testing.assert_allclose(terms.total, first[0] + 0.5 * weight * second[0], rtol=1e-4)
    want = jax.tree.map(lambda a, b: a + 0.5 * weight * b, first[1], second[1])
    for name, value in flatten_names(want).items():
        np.testing.assert_allclose(flatten_names(grads)[name], value, rtol=1e-3, atol=1e-7)


def test_each_part_begins_at_its_step() -> None:
    steps = run(3)
    counts = [int(after.discriminator.step) for after, _ in steps]
    assert counts == [0, 1, 2]
    # One pass over reconstructions and one over images per update.
    assert [float(after.discriminator.spectral) for after, _ in steps] == [0, 2, 4]
    on = [float(metrics["adaptive_weight"]) > 0 for _, metrics in steps]
    assert on == [False, False, True]
    assert [float(m["gan"]) != 0 for _, m in steps] == on
    assert [float(m["discriminator_loss"]) > 0 for _, m in steps] == [False, True, True]
    np.testing.assert_array_equal(steps[0][0].discriminator.params, state().discriminator.params)
    # The discriminator's schedule begins with its own first update.
    rates = [float(metrics["discriminator_learning_rate"]) for _, metrics in steps]
    assert rates[0] == rates[1] == pytest.approx(1e-2) and rates[2] < rates[1]
    assert [int(after.step) for after, _ in steps] == [1, 2, 3]
    assert all(bool(metrics["finite"]) for _, metrics in steps)


def test_without_discriminator_the_first_steps_are_the_same() -> None:
    with_gan, _ = run(1)[0]
    networks = dataclasses.replace(NETWORKS, discriminate=None)
    without, metrics = compiled(networks)(state(with_discriminator=False), batch(), VARIABLES)
    assert without.discriminator is None and "discriminator_loss" not in metrics
    for name, value in flatten_names(with_gan.params).items():
        np.testing.assert_allclose(flatten_names(without.params)[name], value, rtol=1e-6)


def test_without_lpips_the_loss_is_l1() -> None:
    networks = dataclasses.replace(NETWORKS, discriminate=None, perceptual=None)
    _, metrics = compiled(networks)(state(with_discriminator=False), batch(), {})
    assert metrics["loss"] == metrics["l1"] > 0 and metrics["lpips"] == 0


def test_the_decoder_sees_noise_and_the_discriminator_none() -> None:
    """It sees what the decoder, already updated, makes of clean latents."""
    (before, _), (after, metrics) = run(2)
    images = batch()["image"] / 255
    noiseless = dataclasses.replace(NETWORKS, encode=lambda v, x, keys: encode(v, x, None))
    expected = []
    for networks in (NETWORKS, noiseless):
        expected.append(float(compiled(networks)(before, batch(), VARIABLES)[1]["l1"]))
    assert expected[0] == pytest.approx(float(metrics["l1"])) and expected[0] != expected[1]

    middle = jnp.full((ROWS, NUM_UNIFORMS), 0.5)

    def loss(networks: Networks) -> float:
        given = (VARIABLES, before.discriminator, after.params, images, (middle, middle))
        update = functools.partial(update_discriminator, networks, SETTINGS, OPTIMIZER)
        return float(jax.jit(update, compiler_options=FAST_COMPILE)(*given)[1])

    assert loss(NETWORKS) == loss(noiseless)


def test_random_inputs_belong_to_samples_and_the_step() -> None:
    _, want = run(1)[0]
    _, later = compiled()(dataclasses.replace(state(), step=jnp.ones((), int)), batch(), VARIABLES)
    assert float(want["l1"]) != float(later["l1"])
    shuffled = {name: x[::-1] for name, x in batch().items()}
    _, got = compiled()(state(), shuffled, VARIABLES)
    assert float(got["loss"]) == pytest.approx(float(want["loss"]), rel=1e-5)


def test_ema_weights_follow_the_decoder() -> None:
    (after, _), start = run(1)[0], state()
    for name, value in flatten_names(after.ema["0.5"]).items():
        old, new = flatten_names(start.params)[name], flatten_names(after.params)[name]
        np.testing.assert_allclose(value, 0.5 * (old + new), rtol=1e-5, atol=1e-7)


def test_a_non_finite_discriminator_is_reported() -> None:
    before = state()
    broken = dataclasses.replace(
        before,
        step=before.step + 1,
        discriminator=dataclasses.replace(
            before.discriminator, params=before.discriminator.params * jnp.nan
        ),
    )
    assert not compiled()(broken, batch(), VARIABLES)[1]["finite"]


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(ConfigError, match="'softplus'"):
        LossSettings(gan_loss="softplus")


@pytest.mark.slow
def test_balancing_costs_no_second_pass_through_the_decoder() -> None:
    """The compiler drops all of the two passes but their gradient at the last kernel."""
    network = ViTDecoder(DecoderConfig(12, 2, 4, 64, 4, 2, 128))
    tokens = jnp.zeros((ROWS, 4, 12))
    params = jax.eval_shape(lambda key: network.init(key, tokens), jax.random.key(0))["params"]

    def decoded(variables: Any, p: Any, z: Any) -> Any:
        return network.apply({"params": p}, z).image

    def flops(networks: Networks, given: DecoderState) -> float:
        def grads(given: Any, images: Any, latents: Any, uniforms: Any) -> Any:
            return generator_terms_and_grads(
                networks, SETTINGS, {}, given, images, latents, uniforms, True
            )[1]

        images, uniforms = jnp.zeros((ROWS, SIDE, SIDE, 3)), jnp.zeros((ROWS, NUM_UNIFORMS))
        return (
            jax.jit(grads).lower(given, images, tokens, uniforms).compile().cost_analysis()["flops"]
        )

    alone = dataclasses.replace(state(with_discriminator=False), params=nn.unbox(params))
    balanced = dataclasses.replace(state(), params=nn.unbox(params))
    plain = Networks(encode, decoded)
    cost = flops(plain, alone)
    assert (
        cost < flops(dataclasses.replace(plain, discriminate=discriminate), balanced) < 1.2 * cost
    )


def test_settings_of_the_decoders_parameters_do_not_concern_the_discriminator() -> None:
    group = ParamGroup(("pred",), 1.0, OPTIMIZER.b1, OPTIMIZER.b2)
    optimizer = dataclasses.replace(OPTIMIZER, freeze=("first",), groups=(group,), weight_decay=0.1)
    settings = dataclasses.replace(SETTINGS, discriminator_start=0, generator_start=0)
    step = make_decoder_step(NETWORKS, settings, optimizer, seed=0)
    before = state(optimizer=optimizer)
    after, metrics = jax.jit(step, compiler_options=FAST_COMPILE)(before, batch(), VARIABLES)
    np.testing.assert_array_equal(after.params["first"], before.params["first"])
    assert (after.params["pred"]["kernel"] != before.params["pred"]["kernel"]).any()
    assert before.discriminator is not None and after.discriminator is not None
    assert (after.discriminator.params != before.discriminator.params).any()
    kernel = optax.tree.get(after.opt_state, "mu")["pred"]["kernel"] / (1 - OPTIMIZER.b1)
    np.testing.assert_allclose(metrics["grad_norm"], jnp.linalg.norm(kernel), rtol=1e-5)
