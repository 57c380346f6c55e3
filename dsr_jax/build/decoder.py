"""Builds the training of a decoder: networks, losses, state, reconstructions."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dsr_jax.build.frozen import open_lpips, open_vit
from dsr_jax.build.rae import make_rae
from dsr_jax.build.remat import first_policy, with_remat
from dsr_jax.build.state import shard_state
from dsr_jax.config import ConfigDict, trains_decoder
from dsr_jax.convert.discriminator import load_backbone
from dsr_jax.core.errors import ConfigError
from dsr_jax.core.rng import stream_key
from dsr_jax.core.typing import Array, Params, PyTree
from dsr_jax.models.decoder import DecoderConfig, ViTDecoder
from dsr_jax.models.discriminator import Discriminator, Heads
from dsr_jax.models.lpips import LPIPS
from dsr_jax.models.precision import Precision
from dsr_jax.models.variants import RANDOM_BACKBONES
from dsr_jax.models.vit import ViT
from dsr_jax.parallel.axes import Constrain, Rules
from dsr_jax.parallel.shardings import replicated
from dsr_jax.sampling.images import to_uint8
from dsr_jax.spaces import RAE
from dsr_jax.training.decoder_state import DecoderState, create_decoder_state
from dsr_jax.training.decoder_step import LossSettings, Networks
from dsr_jax.training.optimizers import Optimizer
from dsr_jax.training.step import to_unit_range


@dataclass(frozen=True)
class DecoderParts:
    """Networks of a decoder's training.

    Attributes:
      space: The autoencoder, whose decoder is trained.
      lpips: Perceptual distance; None if its weight is 0.
      discriminator: None if its weight is 0.
      variables: Frozen arrays: "space", and "lpips" and "backbone" if these losses are on.
    """

    space: RAE
    lpips: LPIPS | None
    discriminator: Discriminator | None
    variables: dict[str, PyTree]

    @property
    def decoder(self) -> ViTDecoder:
        """The trained network."""
        assert self.space.decoder is not None
        return self.space.decoder

    @property
    def networks(self) -> Networks:
        """The functions that a step calls."""
        return Networks(
            encode=lambda variables, images, keys: self.space.encode(
                variables["space"], images, keys
            ),
            decode=self.decode,
            perceptual=None if self.lpips is None else self._perceptual,
            discriminate=None if self.discriminator is None else self._discriminate,
        )

    def with_remat(self, config: ConfigDict, policy: str) -> "DecoderParts":
        """Returns the same networks, with another policy of the trained one if that is "auto"."""
        decoder = with_remat(config, self.decoder, policy)
        return dataclasses.replace(self, space=dataclasses.replace(self.space, decoder=decoder))

    def decode(self, variables: PyTree, params: Params, latents: Array) -> Array:
        """Maps latents [B, h, w, C] to images, not clipped."""
        return self.space.decode({**variables["space"], "decoder": params}, latents)

    def _perceptual(self, variables: PyTree, a: Array, b: Array) -> Array:
        assert self.lpips is not None
        distances: Any = self.lpips.apply({"params": variables["lpips"]}, a, b)
        return distances

    def _discriminate(
        self, variables: PyTree, heads: Params, spectral: PyTree, images: Array, *, train: bool
    ) -> tuple[Array, PyTree]:
        assert self.discriminator is not None
        return self.discriminator(variables["backbone"], heads, spectral, images, train=train)


def make_decoder_parts(config: ConfigDict, mesh: Mesh | None, rules: Rules) -> DecoderParts:
    """Reads the frozen networks and defines the trained ones.

    Args:
      config: The whole config.
      mesh: Mesh over which the frozen arrays are replicated; None leaves them in place.
      rules: Layout of the trained networks' activations.

    Raises:
      ConversionError: If a folder is missing, damaged or of the wrong kind.
      ConfigError: If settings do not fit each other, or the network of a loss is not named.
    """
    _check(config)
    precision, constrain = Precision(config.precision.compute), Constrain(rules, mesh)
    space, frozen = make_rae(config, mesh)
    sizes = _decoder_sizes(config, space)
    trained = dataclasses.replace(precision, residual=config.precision.residual)
    decoder = ViTDecoder(
        sizes,
        precision=trained,
        constrain=constrain,
        remat=first_policy("decoder.remat", config.decoder.remat),
        unroll=config.decoder.unroll,
    )
    space = dataclasses.replace(space, decoder=decoder)
    others: dict[str, PyTree] = {}
    lpips = discriminator = None
    if config.lpips.weight:
        lpips, others["lpips"] = open_lpips("config.lpips.folder", config.lpips.folder, config.seed)
    if config.gan.weight:
        vit, others["backbone"] = open_vit(
            "config.gan.backbone",
            config.gan.backbone,
            RANDOM_BACKBONES,
            load_backbone,
            config.seed,
        )
        backbone = ViT(vit, precision=precision, constrain=constrain, unroll=config.decoder.unroll)
        heads = Heads(config.gan.kernel_size)
        discriminator = Discriminator(backbone, config.gan.key_depths, heads)
    if mesh is not None:
        others = jax.device_put(others, replicated(mesh))
    return DecoderParts(space, lpips, discriminator, {"space": frozen, **others})


def _check(config: ConfigDict) -> None:
    lpips, gan = config.lpips, config.gan
    for wrong, problem, remedy in (
        (
            not trains_decoder(config),
            "config.decoder.hidden_size=0 defines no decoder",
            "use python -m dsr_jax.train for a denoiser, or set the sizes of a decoder",
        ),
        (
            config.space.name != "rae",
            f"config.space.name={config.space.name!r} has no decoder to train",
            "set config.space.name=rae",
        ),
        (
            config.space.decoder,
            f"config.space.decoder={config.space.decoder!r}, but the decoder is trained",
            "leave it empty",
        ),
        (
            lpips.weight and not lpips.folder,
            f"config.lpips.weight={lpips.weight}, but config.lpips.folder is not set",
            "name a folder that python -m dsr_jax.convert lpips wrote, or switch LPIPS off with "
            "config.lpips.weight=0.0",
        ),
        (
            gan.weight and not gan.backbone,
            f"config.gan.weight={gan.weight}, but config.gan.backbone is not set",
            "name a folder that python -m dsr_jax.convert dino_discriminator wrote, or switch the "
            "discriminator off with config.gan.weight=0.0",
        ),
        (
            gan.kernel_size % 2 == 0,
            f"config.gan.kernel_size={gan.kernel_size}",
            "use an odd number of tokens",
        ),
        (
            gan.weight and gan.generator_start < gan.discriminator_start,
            f"config.gan.generator_start={gan.generator_start} is before "
            f"config.gan.discriminator_start={gan.discriminator_start}",
            "start the discriminator first",
        ),
        (
            config.optim.accumulate != 1,
            f"config.optim.accumulate={config.optim.accumulate}",
            "the adaptive weight needs the whole batch at once: use 1, and "
            "config.decoder.remat=full to save memory",
        ),
    ):
        if wrong:
            raise ConfigError(problem, remedy)


def _decoder_sizes(config: ConfigDict, space: RAE) -> DecoderConfig:
    section, (grid, _, channels) = config.decoder, space.latent_shape
    side = grid * section.patch_size
    if side != config.data.image_size:
        raise ConfigError(
            f"{grid} patches of config.decoder.patch_size={section.patch_size} make images of "
            f"{side} pixels, config.data.image_size is {config.data.image_size}",
            "change either: reconstructions are compared with their images",
        )
    return DecoderConfig(
        latent_channels=channels,
        grid=grid,
        **{key: section[key] for key in section if key not in ("remat", "unroll")},
    )


def make_loss_settings(config: ConfigDict) -> LossSettings:
    """Returns weights and first steps of the losses."""
    gan = config.gan
    return LossSettings(
        perceptual_weight=config.lpips.weight,
        gan_weight=gan.weight,
        max_adaptive_weight=gan.max_adaptive_weight,
        gan_loss=gan.loss,
        discriminator_start=gan.discriminator_start,
        generator_start=gan.generator_start,
        cutout=gan.cutout,
    )


def make_decoder_state(
    config: ConfigDict, parts: DecoderParts, optimizer: Optimizer, mesh: Mesh, rules: Rules
) -> tuple[DecoderState, Callable[[], DecoderState]]:
    """Returns the state's shapes and shardings, and a function that makes the first one."""

    def init() -> DecoderState:
        sizes = parts.decoder.config
        tokens = jnp.zeros((1, sizes.grid**2, sizes.latent_channels))
        params: Any = parts.decoder.init(stream_key(config.seed, "params"), tokens)["params"]
        heads = None
        if parts.discriminator is not None:
            heads = parts.discriminator.init(stream_key(config.seed, "heads"))
        return create_decoder_state(params, heads, optimizer, config.ema.decays)

    return shard_state(config, init, mesh, rules)


def make_reconstruct(
    config: ConfigDict, parts: DecoderParts
) -> Callable[[Params, PyTree, Array], Array]:
    """Returns a compiled `(params, variables, images) -> images`, uint8, without noise."""

    @jax.jit
    def reconstruct(params: Params, variables: PyTree, images: Array) -> Array:
        latents = parts.space.encode(variables["space"], to_unit_range(images))
        return to_uint8(parts.decode(variables, params, latents), config.sample.uint8)

    return reconstruct
