"""One step of stage 1: the decoder of an autoencoder against a frozen encoder and a discriminator.

Source: RAE and DSR train_stage1.py; spec encoder 8.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from dsr_jax.core.rng import sample_keys, stream_key, uniform_per_sample
from dsr_jax.core.typing import Array, Batch, Metrics, Params, PyTree
from dsr_jax.training.adversarial import (
    accuracy,
    adaptive_weight,
    check_loss,
    discriminator_loss,
    generator_loss,
    quantise,
    to_signed,
)
from dsr_jax.training.decoder_state import Critic, DecoderState
from dsr_jax.training.diffaug import NUM_DRAWS, augment
from dsr_jax.training.optimizers import Optimizer
from dsr_jax.training.state import Reshard
from dsr_jax.training.step import apply_gradients, to_unit_range


class Encode(Protocol):
    """Images to latents."""

    def __call__(self, variables: PyTree, images: Array, keys: Array | None, /) -> Array:
        """Maps images [B, H, W, 3] in [0, 1] to latents; noise is added where there are keys."""
        ...


class Judge(Protocol):
    """Images to logits."""

    def __call__(
        self, variables: PyTree, heads: Params, spectral: PyTree, images: Array, /, *, train: bool
    ) -> tuple[Array, PyTree]:
        """Judges images [B, H, W, 3] in [-1, 1]; in training, `spectral` changes."""
        ...


@dataclass(frozen=True)
class Networks:
    """The functions of a step; frozen arrays reach them as `variables`.

    Attributes:
      encode: Images to latents, never differentiated.
      decode: `(variables, params, latents) -> images` [B, H, W, 3], about [0, 1], not clipped.
      perceptual: `(variables, real, fake) -> distances` [B] of images in [-1, 1]; None for none.
      judge: The discriminator; None for none.
      last_layer: Path of the decoder's last kernel, where gradients are balanced.
    """

    encode: Encode
    decode: Callable[[PyTree, Params, Array], Array]
    perceptual: Callable[[PyTree, Array, Array], Array] | None = None
    judge: Judge | None = None
    last_layer: tuple[str, ...] = ("pred", "kernel")


@dataclass(frozen=True)
class LossSettings:
    """Weights, and when the adversarial part begins.

    Attributes:
      perceptual_weight: Of LPIPS; the weight of L1 is 1.
      gan_weight: Of the generator's loss, besides the adaptive weight.
      max_adaptive_weight: Limit of the latter.
      gan_loss: The discriminator's, "hinge" or "vanilla".
      discriminator_start: First step that trains the discriminator.
      generator_start: First step whose decoder is trained against it.
      cutout: Side of the hole in what the discriminator sees, as a share of the image's.
    """

    perceptual_weight: float = 1.0
    gan_weight: float = 0.75
    max_adaptive_weight: float = 1e4
    gan_loss: str = "hinge"
    discriminator_start: int = 0
    generator_start: int = 0
    cutout: float = 0.0

    def __post_init__(self) -> None:
        check_loss(self.gan_loss)


class GeneratorTerms(NamedTuple):
    """Losses of the decoder on one batch, scalars but for the images.

    Attributes:
      images: Reconstructions [B, H, W, 3].
      l1: Mean absolute error.
      perceptual: Mean LPIPS.
      gan: Minus the mean logit; 0 where the GAN is off.
      weight: Adaptive weight of `gan`; 0 where the GAN is off.
      total: What is minimised.
    """

    images: Array
    l1: Array
    perceptual: Array
    gan: Array
    weight: Array
    total: Array


class CriticTerms(NamedTuple):
    """Outcome of the discriminator's passes over one batch.

    Attributes:
      loss: What it minimises.
      accuracy: Share of places where it prefers the real image.
      spectral: Singular vectors after both passes, the reconstructions' first.
    """

    loss: Array
    accuracy: Array
    spectral: PyTree


def generator_terms_and_grads(
    networks: Networks,
    settings: LossSettings,
    variables: PyTree,
    state: DecoderState,
    images: Array,
    latents: Array,
    draws: Array,
    gan_on: Array | bool,
) -> tuple[GeneratorTerms, PyTree]:
    """Computes the decoder's losses and the gradient of their total; draws nothing.

    The gradient at the last kernel follows from that at the images by one product. So the decoder
    is passed backwards once, with the balanced sum; the two gradients at its last kernel cost a
    product each, since the compiler drops what nothing reads.

    The weight balances gradients of the whole batch. The original takes each process's own, before
    averaging, so its weight depends on the number of processes.

    Args:
      networks: The functions.
      settings: Weights.
      variables: Frozen arrays.
      state: Where to differentiate, and the discriminator.
      images: Targets [B, H, W, 3] in [0, 1].
      latents: The encoder's output for them.
      draws: Of the augmentation [B, NUM_DRAWS].
      gan_on: Whether the discriminator counts.

    Returns:
      Losses and gradients like `state.params`.
    """
    decoded, pull_back = jax.vjp(lambda p: networks.decode(variables, p, latents), state.params)

    def reconstruction(x: Array) -> tuple[Array, tuple[Array, Array]]:
        l1 = jnp.mean(jnp.abs(x - images))
        if networks.perceptual is None:
            return l1, (l1, jnp.zeros(()))
        distance = jnp.mean(networks.perceptual(variables, to_signed(images), to_signed(x)))
        return l1 + settings.perceptual_weight * distance, (l1, distance)

    (loss, (l1, distance)), upstream = jax.value_and_grad(reconstruction, has_aux=True)(decoded)
    gan = weight = jnp.zeros(())
    if networks.judge is not None and state.critic is not None:

        def at_last_layer(gradient: Array) -> Array:
            return functools.reduce(operator.getitem, networks.last_layer, pull_back(gradient)[0])

        adversarial = _adversarial(networks.judge, settings, variables, state.critic, draws)
        gan, towards_real = jax.lax.cond(gan_on, adversarial, _nothing, decoded)
        weight = adaptive_weight(
            at_last_layer(upstream), at_last_layer(towards_real), settings.max_adaptive_weight
        )
        weight = jnp.where(gan_on, weight, 0.0)
        upstream = upstream + settings.gan_weight * weight * towards_real
    total = loss + settings.gan_weight * weight * gan
    (grads,) = pull_back(upstream)
    return GeneratorTerms(decoded, l1, distance, gan, weight, total), grads


def _adversarial(
    judge: Judge, settings: LossSettings, variables: PyTree, critic: Critic, draws: Array
) -> Callable[[Array], tuple[Array, Array]]:
    """The generator's loss and its gradient as a function of reconstructions."""

    def loss(x: Array) -> Array:
        seen = augment(to_signed(x), draws, settings.cutout)
        logits, _ = judge(variables, critic.params, critic.spectral, seen, train=False)
        return generator_loss(logits)

    return jax.value_and_grad(loss)


def _nothing(x: Array) -> tuple[Array, Array]:
    """What `_adversarial` gives where the GAN is off."""
    return jnp.zeros(()), jnp.zeros_like(x)


def critic_loss_and_grads(
    judge: Judge,
    settings: LossSettings,
    variables: PyTree,
    critic: Critic,
    real: Array,
    fake: Array,
) -> tuple[CriticTerms, PyTree]:
    """Computes the discriminator's loss and gradients; draws nothing.

    Args:
      judge: The discriminator.
      settings: Which loss.
      variables: Frozen arrays.
      critic: Its state.
      real: Augmented images [B, H, W, 3] in [-1, 1].
      fake: Augmented reconstructions.

    Returns:
      Its terms, and gradients like `critic.params`.
    """

    def loss(params: Params) -> tuple[Array, CriticTerms]:
        on_fake, spectral = judge(variables, params, critic.spectral, fake, train=True)
        on_real, spectral = judge(variables, params, spectral, real, train=True)
        value = discriminator_loss(settings.gan_loss, on_real, on_fake)
        return value, CriticTerms(value, accuracy(on_real, on_fake), spectral)

    grads, terms = jax.grad(loss, has_aux=True)(critic.params)
    return terms, grads


def update_critic(
    networks: Networks,
    settings: LossSettings,
    optimizer: Optimizer,
    variables: PyTree,
    critic: Critic,
    params: Params,
    images: Array,
    draws: tuple[Array, Array],
) -> tuple[Critic, Array, Array]:
    """Trains the discriminator on images and what a decoder makes of them without noise.

    Args:
      networks: The functions.
      settings: Weights.
      optimizer: Its update; the discriminator counts its own steps.
      variables: Frozen arrays.
      critic: Its state.
      params: The decoder's parameters.
      images: The batch [B, H, W, 3] in [0, 1].
      draws: Of the augmentation of images and of reconstructions, each [B, NUM_DRAWS].

    Returns:
      Its new state, loss and accuracy.
    """
    assert networks.judge is not None
    decoded = networks.decode(variables, params, networks.encode(variables, images, None))
    seen = [
        augment(x, u, settings.cutout)
        for x, u in zip((to_signed(images), quantise(to_signed(decoded))), draws, strict=True)
    ]
    terms, grads = critic_loss_and_grads(networks.judge, settings, variables, critic, *seen)
    moved, opt_state = optimizer.apply(grads, critic.opt_state, critic.params, critic.step)
    new = Critic(step=critic.step + 1, params=moved, spectral=terms.spectral, opt_state=opt_state)
    return new, terms.loss, terms.accuracy


def make_decoder_step(
    networks: Networks,
    settings: LossSettings,
    optimizer: Optimizer,
    *,
    seed: int,
    reshard: Reshard | None = None,
) -> Callable[[DecoderState, Batch, PyTree], tuple[DecoderState, Metrics]]:
    """Builds the step that the caller compiles, with shardings and donation of the state.

    First the decoder is updated, from latents with noise; then, from `discriminator_start` on, the
    discriminator. Whatever is random is a function of (seed, step, the sample's index in the run).

    Args:
      networks: The functions.
      settings: Weights and starts.
      optimizer: Of both networks.
      seed: The run's seed.
      reshard: From `make_reshard`.

    Returns:
      `step(state, batch, variables) -> (state, metrics)`. Metrics: "loss" (the total), "l1",
      "lpips", "gan" and "adaptive_weight" (0 where off), "grad_norm", "param_norm",
      "learning_rate", "finite"; with a discriminator also "discriminator_loss" and
      "discriminator_accuracy", 0 before its start, and "discriminator_learning_rate".
    """

    divide = reshard or (lambda tree: tree)

    def step(state: DecoderState, batch: Batch, variables: PyTree) -> tuple[DecoderState, Metrics]:
        def keys(stream: str) -> Array:
            return sample_keys(stream_key(seed, stream, state.step), batch["index"])

        def draws(stream: str) -> Array:
            return uniform_per_sample(keys(stream), (NUM_DRAWS,))

        images = to_unit_range(batch["image"])
        latents = jax.lax.stop_gradient(networks.encode(variables, images, keys("encode")))
        gan_on = state.step >= settings.generator_start
        terms, grads = generator_terms_and_grads(
            networks, settings, variables, state, images, latents, draws("augment"), gan_on
        )
        grads = divide(grads)
        new = apply_gradients(state, grads, optimizer, divide)
        metrics = _generator_metrics(new, terms, grads, optimizer.learning_rate(state.step))
        finite = [metrics[name] for name in ("loss", "grad_norm", "param_norm")]
        if state.critic is not None:
            uniforms = draws("augment_real"), draws("augment_fake")
            critic, loss, share = jax.lax.cond(
                state.step >= settings.discriminator_start,
                lambda critic, params: update_critic(
                    networks, settings, optimizer, variables, critic, params, images, uniforms
                ),
                lambda critic, params: (critic, jnp.zeros(()), jnp.zeros(())),
                state.critic,
                new.params,
            )
            new = dataclasses.replace(new, critic=critic)
            metrics |= {
                "discriminator_loss": loss,
                "discriminator_accuracy": share,
                "discriminator_learning_rate": optimizer.learning_rate(state.critic.step),
            }
            finite += [loss, optax.tree.norm(critic.params)]
        return new, {**metrics, "finite": jnp.all(jnp.isfinite(jnp.stack(finite)))}

    return step


def _generator_metrics(
    new: DecoderState, terms: GeneratorTerms, grads: PyTree, learning_rate: Array
) -> Metrics:
    return {
        "loss": terms.total,
        "l1": terms.l1,
        "lpips": terms.perceptual,
        "gan": terms.gan,
        "adaptive_weight": terms.weight,
        "grad_norm": optax.tree.norm(grads),
        "param_norm": optax.tree.norm(new.params),
        "learning_rate": learning_rate,
    }
