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
    quantize,
    to_signed,
)
from dsr_jax.training.decoder_state import (
    DecoderState,
    DiscriminatorState,
    discriminator_optimizer,
)
from dsr_jax.training.diffaug import NUM_UNIFORMS, augment
from dsr_jax.training.optimizers import Optimizer
from dsr_jax.training.skipping import array_norms
from dsr_jax.training.state import Reshard
from dsr_jax.training.step import apply_gradients, to_unit_range

DecoderStep = Callable[[DecoderState, Batch, PyTree], tuple[DecoderState, Metrics]]
"""`(state, batch, frozen arrays) -> (state, metrics)`."""


class Encode(Protocol):
    """Function from images to latents."""

    def __call__(self, variables: PyTree, images: Array, keys: Array | None, /) -> Array:
        """Maps images [B, H, W, 3] in [0, 1] to latents; noise is added where there are keys."""
        ...


class Discriminate(Protocol):
    """Function from images to logits."""

    def __call__(
        self, variables: PyTree, heads: Params, spectral: PyTree, images: Array, /, *, train: bool
    ) -> tuple[Array, PyTree]:
        """Returns logits of images [B, H, W, 3] in [-1, 1]; in training, `spectral` changes."""
        ...


@dataclass(frozen=True)
class Networks:
    """The functions of a step; frozen arrays reach them as `variables`.

    Attributes:
      encode: Images to latents, never differentiated.
      decode: `(variables, params, latents) -> images` [B, H, W, 3], about [0, 1], not clipped.
      perceptual: `(variables, real, fake) -> distances` [B] of images in [-1, 1]; None for none.
      discriminate: The discriminator; None for none.
      last_layer: Path of the decoder's last kernel, where gradients are balanced.
    """

    encode: Encode
    decode: Callable[[PyTree, Params, Array], Array]
    perceptual: Callable[[PyTree, Array, Array], Array] | None = None
    discriminate: Discriminate | None = None
    last_layer: tuple[str, ...] = ("pred", "kernel")


@dataclass(frozen=True)
class LossSettings:
    """Weights of the losses, and first steps of the adversarial losses.

    Attributes:
      perceptual_weight: Weight of LPIPS; the weight of L1 is 1.
      gan_weight: Weight of the generator's loss, besides the adaptive weight.
      max_adaptive_weight: Limit of the latter.
      gan_loss: The discriminator's, "hinge" or "vanilla".
      discriminator_start: First step that trains the discriminator.
      generator_start: First step whose decoder is trained against it.
      cutout: Side of the hole in the discriminator's inputs, as a fraction of the image's.
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
      total: Loss to minimize.
    """

    images: Array
    l1: Array
    perceptual: Array
    gan: Array
    weight: Array
    total: Array


class DiscriminatorTerms(NamedTuple):
    """Outcome of the discriminator's passes over one batch.

    Attributes:
      loss: Loss to minimize.
      accuracy: Fraction of positions where it prefers the real image.
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
    uniforms: Array,
    gan_on: Array | bool,
) -> tuple[GeneratorTerms, PyTree]:
    """Computes the decoder's losses and the gradient of their total on given random inputs.

    The gradient at the last kernel follows from that at the images by one matmul. So the decoder
    is passed backwards once, with the balanced sum; the two gradients at its last kernel cost a
    matmul each, since the compiler drops what nothing reads.

    The weight balances gradients of the whole batch. The original takes each process's own, before
    averaging, so its weight depends on the number of processes.

    Args:
      networks: The functions.
      settings: Weights.
      variables: Frozen arrays.
      state: Parameters at which to differentiate, and the discriminator.
      images: Targets [B, H, W, 3] in [0, 1].
      latents: The encoder's output for them.
      uniforms: [B, NUM_UNIFORMS] in [0, 1), for the augmentation.
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
    if networks.discriminate is not None and state.discriminator is not None:

        def at_last_layer(gradient: Array) -> Array:
            return functools.reduce(operator.getitem, networks.last_layer, pull_back(gradient)[0])

        adversarial = _adversarial(
            networks.discriminate, settings, variables, state.discriminator, uniforms
        )
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
    discriminate: Discriminate,
    settings: LossSettings,
    variables: PyTree,
    discriminator: DiscriminatorState,
    uniforms: Array,
) -> Callable[[Array], tuple[Array, Array]]:
    """Returns the generator's loss and its gradient with respect to reconstructions."""

    def loss(x: Array) -> Array:
        seen = augment(to_signed(x), uniforms, settings.cutout)
        logits, _ = discriminate(
            variables, discriminator.params, discriminator.spectral, seen, train=False
        )
        return generator_loss(logits)

    return jax.value_and_grad(loss)


def _nothing(x: Array) -> tuple[Array, Array]:
    """Returns the values of `_adversarial` if the GAN is off."""
    return jnp.zeros(()), jnp.zeros_like(x)


def discriminator_loss_and_grads(
    discriminate: Discriminate,
    settings: LossSettings,
    variables: PyTree,
    discriminator: DiscriminatorState,
    real: Array,
    fake: Array,
) -> tuple[DiscriminatorTerms, PyTree]:
    """Computes the discriminator's loss and gradients on given inputs.

    Args:
      discriminate: The discriminator.
      settings: Kinds and weights of the losses.
      variables: Frozen arrays.
      discriminator: State of the discriminator.
      real: Augmented images [B, H, W, 3] in [-1, 1].
      fake: Augmented reconstructions.

    Returns:
      Its terms, and gradients like `discriminator.params`.
    """

    def loss(params: Params) -> tuple[Array, DiscriminatorTerms]:
        on_fake, spectral = discriminate(
            variables, params, discriminator.spectral, fake, train=True
        )
        on_real, spectral = discriminate(variables, params, spectral, real, train=True)
        value = discriminator_loss(settings.gan_loss, on_real, on_fake)
        return value, DiscriminatorTerms(value, accuracy(on_real, on_fake), spectral)

    grads, terms = jax.grad(loss, has_aux=True)(discriminator.params)
    return terms, grads


def update_discriminator(
    networks: Networks,
    settings: LossSettings,
    optimizer: Optimizer,
    variables: PyTree,
    discriminator: DiscriminatorState,
    params: Params,
    images: Array,
    uniforms: tuple[Array, Array],
) -> tuple[DiscriminatorState, Array, Array]:
    """Trains the discriminator on images and what a decoder makes of them without noise.

    Args:
      networks: The functions.
      settings: Weights.
      optimizer: Optimizer; the discriminator counts its own steps.
      variables: Frozen arrays.
      discriminator: State of the discriminator.
      params: The decoder's parameters.
      images: The batch [B, H, W, 3] in [0, 1].
      uniforms: For the augmentation of images and of reconstructions, each [B, NUM_UNIFORMS].

    Returns:
      Its new state, loss and accuracy.
    """
    assert networks.discriminate is not None
    decoded = networks.decode(variables, params, networks.encode(variables, images, None))
    seen = [
        augment(x, u, settings.cutout)
        for x, u in zip((to_signed(images), quantize(to_signed(decoded))), uniforms, strict=True)
    ]
    terms, grads = discriminator_loss_and_grads(
        networks.discriminate, settings, variables, discriminator, *seen
    )
    moved, opt_state = discriminator_optimizer(optimizer).apply(
        grads, discriminator.opt_state, discriminator.params, discriminator.step
    )
    new = DiscriminatorState(
        step=discriminator.step + 1, params=moved, spectral=terms.spectral, opt_state=opt_state
    )
    return new, terms.loss, terms.accuracy


def make_decoder_step(
    networks: Networks,
    settings: LossSettings,
    optimizer: Optimizer,
    *,
    seed: int,
    reshard: Reshard | None = None,
) -> DecoderStep:
    """Builds the step that the caller compiles, with shardings and donation of the state.

    First the decoder is updated, from latents with noise; then, from `discriminator_start` on, the
    discriminator. Whatever is random is a function of (seed, step, the sample's index in the run).

    Args:
      networks: The functions.
      settings: Weights and starts.
      optimizer: Optimizer of both networks.
      seed: The run's seed.
      reshard: Result of `make_reshard`.

    Returns:
      `step(state, batch, variables) -> (state, metrics)`. Metrics: "loss" (the total), "l1",
      "lpips", "gan" and "adaptive_weight" (0 where off), "grad_norm", "array_norms"
      by name, "param_norm", "learning_rate", "finite"; with a discriminator also
      "discriminator_loss" and "discriminator_accuracy", 0 before its start, and
      "discriminator_learning_rate".
    """

    divide = reshard or (lambda tree: tree)

    def step(state: DecoderState, batch: Batch, variables: PyTree) -> tuple[DecoderState, Metrics]:
        def keys(stream: str) -> Array:
            return sample_keys(stream_key(seed, stream, state.step), batch["index"])

        def uniforms(stream: str) -> Array:
            return uniform_per_sample(keys(stream), (NUM_UNIFORMS,))

        images = to_unit_range(batch["image"])
        latents = jax.lax.stop_gradient(networks.encode(variables, images, keys("encode")))
        gan_on = state.step >= settings.generator_start
        terms, grads = generator_terms_and_grads(
            networks, settings, variables, state, images, latents, uniforms("augment"), gan_on
        )
        grads = divide(optimizer.zero_frozen(grads))
        new = apply_gradients(state, grads, optimizer, divide)
        metrics = _generator_metrics(new, terms, grads, optimizer.learning_rate(state.step))
        finite = [metrics[name] for name in ("loss", "grad_norm", "param_norm")]
        if state.discriminator is not None:
            pair = uniforms("augment_real"), uniforms("augment_fake")
            discriminator, loss, share = jax.lax.cond(
                state.step >= settings.discriminator_start,
                lambda discriminator, params: update_discriminator(
                    networks, settings, optimizer, variables, discriminator, params, images, pair
                ),
                lambda discriminator, params: (discriminator, jnp.zeros(()), jnp.zeros(())),
                state.discriminator,
                new.params,
            )
            new = dataclasses.replace(new, discriminator=discriminator)
            metrics |= {
                "discriminator_loss": loss,
                "discriminator_accuracy": share,
                "discriminator_learning_rate": optimizer.learning_rate(state.discriminator.step),
            }
            finite += [loss, optax.tree.norm(discriminator.params)]
        return new, {**metrics, "finite": jnp.all(jnp.isfinite(jnp.stack(finite)))}

    return step


def _generator_metrics(
    new: DecoderState, terms: GeneratorTerms, grads: PyTree, learning_rate: Array
) -> Metrics:
    of_arrays = array_norms(grads)
    return {
        "loss": terms.total,
        "l1": terms.l1,
        "lpips": terms.perceptual,
        "gan": terms.gan,
        "adaptive_weight": terms.weight,
        "grad_norm": optax.tree.norm(of_arrays),
        "array_norms": of_arrays,
        "param_norm": optax.tree.norm(new.params),
        "learning_rate": learning_rate,
    }
