"""The representation autoencoder: latents are the patch tokens of a frozen encoder.

Source: RAE and DSR stage1/rae.py; spec encoder 3.
"""

import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.rng import normal_per_sample, uniform_per_sample
from dsr_jax.core.typing import Array, Params, PyTree
from dsr_jax.models.decoder import ViTDecoder
from dsr_jax.models.encoder import Encoder, neurons_shape, trained_registers
from dsr_jax.models.intervention import Intervention
from dsr_jax.models.resample import resample

MEDIAN_EPS = 1e-6
SCALE_RANGE = (0.2, 5.0)
"""Bounds of the factor that norm-scaled noise has on a token."""


class Noise(NamedTuple):
    """Random numbers of the noise that augments latents.

    Attributes:
      level: Uniform in [0, 1), one per sample [B].
      normal: Standard normals [B, h, w, C].
    """

    level: Array
    normal: Array


def sample_noise(keys: Array, shape: tuple[int, ...]) -> Noise:
    """Samples noise for latents [B, *shape], row b from `keys[b]` alone."""
    level, normal = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    return Noise(uniform_per_sample(level), normal_per_sample(normal, shape))


def add_noise(latents: Array, norms: Array, noise: Noise, tau: float, norm_scaled: bool) -> Array:
    """Adds `tau * level * normal` to latents.

    Args:
      latents: [B, h, w, C].
      norms: Norms of the tokens [B, h, w].
      noise: Random numbers from `sample_noise`.
      tau: Maximum standard deviation; a sample's is uniform in [0, tau).
      norm_scaled: Multiplies a token's noise by its norm divided by the lower median of the image's
        norms, clipped to SCALE_RANGE.

    Source: spec encoder 3, "Noise".
    """
    scale = tau * noise.level[:, None, None, None]
    if norm_scaled:
        rows = norms.reshape(len(norms), -1)
        median = jnp.sort(rows, axis=1)[:, (rows.shape[1] - 1) // 2, None, None]
        scale = scale * jnp.clip(norms / (median + MEDIAN_EPS), *SCALE_RANGE)[..., None]
    return latents + scale * noise.normal


@dataclass(frozen=True)
class RAE:
    """An `InputSpace` of a frozen encoder's patch tokens, decoded by a trained ViT.

    The defaults are the published ones for training a decoder. Denoisers are trained on latents
    without noise: `noise_tau=0`.

    Attributes:
      encoder: The frozen encoder.
      decoder: The decoder; None if nothing is decoded.
      image_size: Side of the encoder's input; other images are resized to it.
      noise_tau: Maximum standard deviation of the noise that `encode` adds if it has keys.
      norm_scaled_noise: Noise is proportional to a token's norm; see `add_noise`.
      post_stat_norm: Noise is added and norms are computed after normalization by statistics.
      preln: Latents are the tokens before the encoder's final norm.
      eps: Added to the variance of latents.
      cached: `encode` takes cached tokens [B, h, w, C] of this encoder instead of images.
    """

    encoder: Encoder
    decoder: ViTDecoder | None = None
    image_size: int = 224
    noise_tau: float = 0.8
    norm_scaled_noise: bool = False
    post_stat_norm: bool = False
    preln: bool = False
    eps: float = 1e-5
    cached: bool = False

    def __post_init__(self) -> None:
        patch, width = self.encoder.patch_size, self.encoder.hidden_size
        if self.image_size <= 0 or self.image_size % patch:
            raise ConfigError(
                f"config.space.image_size={self.image_size} is not a multiple of the encoder's "
                f"patches of {patch} pixels",
                f"use for example {16 * patch}",
            )
        if self.noise_tau < 0:
            raise ConfigError(
                f"noise_tau={self.noise_tau} is negative", "use 0 for no noise, or more"
            )
        channels = self.decoder.config.latent_channels if self.decoder else width
        if channels != width:
            raise ConfigError(
                f"the decoder takes latents of {channels} channels, but the encoder's have {width}",
                "use the decoder that was trained for this encoder",
            )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of one latent."""
        side = self.image_size // self.encoder.patch_size
        return (side, side, self.encoder.hidden_size)

    def make_variables(
        self,
        encoder: Params | None,
        decoder: Params | None = None,
        statistics: dict[str, np.ndarray] | None = None,
        registers: Intervention | None = None,
    ) -> dict[str, Any]:
        """Returns the variables of `encode` and `decode` after checking that they fit.

        Warns if test-time registers are used with an encoder that was trained with registers.

        Args:
          encoder: The encoder's parameters; None if latents are cached.
          decoder: The decoder's.
          statistics: "mean" and "var" of the latents, each [h, w, C]; None for no normalization.
          registers: Test-time registers, with their mask.

        Raises:
          ConfigError: If statistics or neurons belong to another encoder.
        """
        variables: dict[str, Any] = {} if encoder is None else {"encoder": encoder}
        if decoder is not None:
            variables["decoder"] = decoder
        if statistics is not None:
            for name in ("mean", "var"):
                if statistics[name].shape != self.latent_shape:
                    raise ConfigError(
                        f"config.space.statistics: {name} has shape {statistics[name].shape}, but "
                        f"the encoder's latents have {self.latent_shape}",
                        "use statistics that were computed with this encoder and image size",
                    )
            variables["statistics"] = {name: statistics[name] for name in ("mean", "var")}
        if registers is not None:
            shape = neurons_shape(self.encoder)
            if registers.mask.shape != shape:
                raise ConfigError(
                    f"register neurons for {registers.mask.shape} blocks and units, but the "
                    f"encoder has {shape}",
                    "use the neurons that were found for this very encoder",
                )
            if count := trained_registers(self.encoder):
                warnings.warn(
                    f"the encoder was trained with {count} registers, which absorb its outliers; "
                    "test-time registers are for encoders without",
                    stacklevel=2,
                )
            variables["registers"] = registers
        return variables

    def encode(self, variables: PyTree, images: Array, keys: Array | None = None) -> Array:
        """Maps images [B, H, W, 3], float in [0, 1], to latents [B, h, w, C], float32.

        Args:
          variables: Result of `make_variables`.
          images: Images of any size, or cached latents [B, h, w, C].
          keys: One random key per sample [B]: adds noise if `noise_tau` is not 0. None adds none.
        """
        return self.encode_with_norms(variables, images, keys)[0]

    def encode_with_norms(
        self, variables: PyTree, images: Array, keys: Array | None = None
    ) -> tuple[Array, Array]:
        """Returns the latents of `encode`, and the norms [B, h, w] of the tokens without noise."""
        noise = None
        if keys is not None and self.noise_tau:
            noise = sample_noise(keys, self.latent_shape)
        return self.encode_noised(variables, images, noise)

    def encode_noised(
        self, variables: PyTree, images: Array, noise: Noise | None
    ) -> tuple[Array, Array]:
        """Returns latents [B, h, w, C] with given noise, and norms [B, h, w] without.

        Without `preln` and `post_stat_norm` the final norm of a ViT makes all norms sqrt(C).
        """
        latents = self._tokens(variables, images)
        norms = jnp.linalg.norm(latents, axis=-1)
        if noise is not None and not self.post_stat_norm:
            latents = add_noise(latents, norms, noise, self.noise_tau, self.norm_scaled_noise)
        if "statistics" in variables:
            mean, std = self._statistics(variables)
            latents = (latents - mean) / std
        if self.post_stat_norm:
            norms = jnp.linalg.norm(latents, axis=-1)
            if noise is not None:
                latents = add_noise(latents, norms, noise, self.noise_tau, self.norm_scaled_noise)
        return latents, norms

    def normalize_images(self, images: Array) -> Array:
        """Resizes images [B, H, W, 3] in [0, 1] and normalizes them as the encoder expects."""
        size = self.image_size
        mean, std = self._pixels()
        return (jnp.asarray(resample(images, size, size, "bicubic")) - mean) / std

    def decode(self, variables: PyTree, latents: Array) -> Array:
        """Maps latents [B, h, w, C] to images [B, H, W, 3], not clipped to [0, 1].

        Raises:
          ConfigError: If the space has no decoder.
        """
        if self.decoder is None:
            raise ConfigError(
                "this input space has no decoder, so it cannot make images",
                "set config.space.decoder to a folder that python -m dsr_jax.convert decoder wrote",
            )
        if "statistics" in variables:
            mean, std = self._statistics(variables)
            latents = latents * std + mean
        tokens = latents.reshape(len(latents), -1, latents.shape[-1])
        out: Any = self.decoder.apply({"params": variables["decoder"]}, tokens)
        pixel_mean, pixel_std = self._pixels()
        return out.image * pixel_std + pixel_mean

    def _tokens(self, variables: PyTree, images: Array) -> Array:
        if self.cached:
            return images.astype(jnp.float32)
        out: Any = self.encoder.apply(
            {"params": variables["encoder"]},
            self.normalize_images(images),
            variables.get("registers"),
        )
        tokens = out.pre_norm if self.preln else out.tokens
        return jax.lax.stop_gradient(tokens.reshape(len(tokens), *self.latent_shape))

    def _statistics(self, variables: PyTree) -> tuple[Array, Array]:
        """Returns mean and standard deviation of the latents [h, w, C]."""
        statistics = variables["statistics"]
        return statistics["mean"], jnp.sqrt(statistics["var"] + self.eps)

    def _pixels(self) -> tuple[np.ndarray, np.ndarray]:
        mean, std = self.encoder.pixel_mean, self.encoder.pixel_std
        return np.array(mean, np.float32), np.array(std, np.float32)
