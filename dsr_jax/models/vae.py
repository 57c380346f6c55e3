"""AutoencoderKL: images to a Gaussian over latents an eighth or a sixteenth as wide, and back.

The network of Stable Diffusion's VAE, of Flux's and, with attention on a level, of MAR's KL-16 and
VA-VAE. Source: diffusers autoencoder_kl.py and vae.py, latent-diffusion model.py; spec denoiser
10.4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.typing import Array
from dsr_jax.models.kernels import attend
from dsr_jax.models.layers import TORCH_DEFAULT, Dense, add_param, flattened, ones, zeros
from dsr_jax.models.precision import Precision

LOG_VARIANCES = (-30.0, 20.0)
"""Bounds of the logarithm of a latent's variance."""

_SAME = ((1, 1), (1, 1))
_AFTER = ((0, 1), (0, 1))
"""Halving pads below and on the right only."""


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the autoencoder; the defaults are those of stabilityai's sd-vae-ft-ema and -mse.

    Attributes:
      image_channels: Channels of images.
      latent_channels: Channels C of latents.
      widths: Channels of each level; between two levels the side is halved.
      layers_per_block: Residual blocks of a level of the encoder; the decoder's have one more.
      num_groups: Groups of every norm.
      encoder_attention: Levels of the encoder, by number, with attention behind every residual
        block.
      decoder_attention: The same of the decoder, whose level 0 is the one next to the latents.
      middle_attention: The middle has attention.
      quant_conv: A 1x1 convolution follows the encoder.
      post_quant_conv: A 1x1 convolution comes before the decoder.
    """

    image_channels: int = 3
    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    num_groups: int = 32
    encoder_attention: tuple[int, ...] = ()
    decoder_attention: tuple[int, ...] = ()
    middle_attention: bool = True
    quant_conv: bool = True
    post_quant_conv: bool = True

    def __post_init__(self) -> None:
        odd = [width for width in self.widths if width % self.num_groups]
        if odd or not self.widths:
            raise ConfigError(
                f"levels of {self.widths} channels do not divide into {self.num_groups} groups",
                "take both from the config.json next to the original's weights",
            )

    @property
    def factor(self) -> int:
        """Pixels of an image per pixel of a latent, along a side."""
        return 2 ** (len(self.widths) - 1)


class Posterior(NamedTuple):
    """A Gaussian over latents, independent in each number.

    Attributes:
      mean: [B, h, w, C].
      log_variance: [B, h, w, C], within LOG_VARIANCES.
    """

    mean: Array
    log_variance: Array

    @property
    def std(self) -> Array:
        """Standard deviation [B, h, w, C]."""
        return jnp.exp(0.5 * self.log_variance)

    def sample(self, normal: Array) -> Array:
        """Returns latents [B, h, w, C] for standard normals of that shape."""
        return self.mean + self.std * normal


class Conv(nn.Module):
    """A convolution [B, h, w, Cin] -> [B, h', w', features]; its kernel is [k, k, Cin, features].

    Attributes:
      features: Channels of the output.
      size: Side k of the kernel.
      stride: Step between outputs.
      padding: Rows before and after, columns before and after.
      precision: Dtype policy.
    """

    features: int
    size: int = 3
    stride: int = 1
    padding: tuple[tuple[int, int], tuple[int, int]] = _SAME
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies the convolution, in the compute dtype."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        fan_in = self.size**2 * x.shape[-1]
        init, axes = flattened(TORCH_DEFAULT.kernel(fan_in), 3), (None, None, "channels", None)
        kernel = add_param(self, "kernel", init, axes, shape)
        bias = add_param(self, "bias", TORCH_DEFAULT.bias(fan_in), (None,), (self.features,))
        y = jax.lax.conv_general_dilated(
            self.precision.to_compute(x),
            self.precision.to_compute(kernel),
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + self.precision.to_compute(bias)


class GroupNorm(nn.Module):
    """Normalizes groups of channels over the whole image, in float32; learned scale and bias.

    Attributes:
      num_groups: Groups of neighboring channels.
      epsilon: Added to the variance.
      precision: Dtype policy.
    """

    num_groups: int
    epsilon: float = 1e-6
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [B, h, w, C] to the same, float32."""
        batch, *_, channels = x.shape
        grouped = self.precision.to_float32("norm", x).reshape(
            batch, -1, self.num_groups, channels // self.num_groups
        )
        centered = grouped - jnp.mean(grouped, axis=(1, 3), keepdims=True)
        variance = jnp.mean(jnp.square(centered), axis=(1, 3), keepdims=True)
        y = (centered * jax.lax.rsqrt(variance + self.epsilon)).reshape(x.shape)
        scale = add_param(self, "scale", ones, ("channels",), (channels,))
        return y * scale + add_param(self, "bias", zeros, ("channels",), (channels,))


class Resnet(nn.Module):
    """Two convolutions after norm and SiLU, and a shortcut (1x1 if the width changes).

    Attributes:
      features: Channels of the output.
      num_groups: Groups of the norms.
      precision: Dtype policy.
    """

    features: int
    num_groups: int
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [B, h, w, C] to [B, h, w, features], float32."""
        y = x
        for i in (1, 2):
            norm = GroupNorm(self.num_groups, precision=self.precision, name=f"norm{i}")
            y = Conv(self.features, precision=self.precision, name=f"conv{i}")(nn.silu(norm(y)))
        if x.shape[-1] != self.features:
            x = _pointwise(self.features, self.precision, "shortcut")(x)
        return self.precision.to_float32("residual", x) + y


def _pointwise(features: int, precision: Precision, name: str | None = None) -> Conv:
    return Conv(features, 1, padding=((0, 0), (0, 0)), precision=precision, name=name)


class SpatialAttention(nn.Module):
    """Attention with one head over all positions, after a norm, added to its input.

    Attributes:
      num_groups: Groups of the norm.
      attention: Attention kernel.
      precision: Dtype policy.
    """

    num_groups: int
    attention: str = "auto"
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [B, h, w, C] to the same."""
        batch, *_, channels = x.shape

        def dense(name: str) -> Dense:
            return Dense(
                (channels,),
                ("channels", None),
                linear_init=TORCH_DEFAULT,
                precision=self.precision,
                name=name,
            )

        normed = GroupNorm(self.num_groups, precision=self.precision, name="norm")(x)
        q, k, v = (dense(name)(normed).reshape(batch, -1, 1, channels) for name in "qkv")
        mixed = attend(q, k, v, self.attention).reshape(x.shape)
        return x + self.precision.to_float32("residual", dense("out")(mixed))


class Middle(nn.Module):
    """Two residual blocks with attention between them.

    Attributes:
      config: Sizes.
      attention: Attention kernel.
      precision: Dtype policy.
    """

    config: VAEConfig
    attention: str = "auto"
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [B, h, w, C] to the same."""
        groups, width = self.config.num_groups, x.shape[-1]
        x = Resnet(width, groups, self.precision, name="resnet_0")(x)
        if self.config.middle_attention:
            x = SpatialAttention(groups, self.attention, self.precision, name="attn")(x)
        return Resnet(width, groups, self.precision, name="resnet_1")(x)


class Level(nn.Module):
    """Residual blocks of one width, then a change of the side, unless it is the last level.

    Attributes:
      features: Width.
      num_layers: Residual blocks.
      num_groups: Groups of the norms.
      resize: "downsample" to half the side, "upsample" to twice, or "" for neither.
      attend: Attention follows every residual block.
      attention: Attention kernel.
      precision: Dtype policy.
    """

    features: int
    num_layers: int
    num_groups: int
    resize: str
    attend: bool = False
    attention: str = "auto"
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [B, h, w, C] to [B, h', w', features]."""
        for i in range(self.num_layers):
            x = Resnet(self.features, self.num_groups, self.precision, name=f"resnet_{i}")(x)
            if self.attend:
                x = SpatialAttention(
                    self.num_groups, self.attention, self.precision, name=f"attn_{i}"
                )(x)
        if not self.resize:
            return x
        stride, padding = 1, _SAME
        if self.resize == "downsample":
            stride, padding = 2, _AFTER
        else:
            x = x.repeat(2, axis=1).repeat(2, axis=2)
        resized = Conv(self.features, 3, stride, padding, self.precision, name=self.resize)(x)
        return self.precision.to_float32("residual", resized)


class Tower(nn.Module):
    """Encoder or decoder: a convolution, the levels with the middle at the narrow end, the output.

    Attributes:
      config: Sizes.
      features: Channels of the output.
      down: Encodes; else decodes.
      attention: Attention kernel.
      precision: Dtype policy.
    """

    config: VAEConfig
    features: int
    down: bool
    attention: str = "auto"
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [B, h, w, C] to [B, h', w', features]."""
        config, precision = self.config, self.precision
        widths = config.widths if self.down else config.widths[::-1]
        x = Conv(widths[0], precision=precision, name="conv_in")(x)
        x = precision.to_float32("residual", x)
        middle = Middle(config, self.attention, precision, name="mid")
        if not self.down:
            x = middle(x)
        for level in self._levels(widths):
            x = level(x)
        if self.down:
            x = middle(x)
        x = nn.silu(GroupNorm(config.num_groups, precision=precision, name="norm_out")(x))
        return Conv(self.features, precision=precision, name="conv_out")(x)

    def _levels(self, widths: Sequence[int]) -> list[Level]:
        name, resize = ("down", "downsample") if self.down else ("up", "upsample")
        config = self.config
        layers = config.layers_per_block + (0 if self.down else 1)
        attending = config.encoder_attention if self.down else config.decoder_attention
        return [
            Level(
                width,
                layers,
                config.num_groups,
                resize if i < len(widths) - 1 else "",
                i in attending,
                self.attention,
                self.precision,
                name=f"{name}_{i}",
            )
            for i, width in enumerate(widths)
        ]


class AutoencoderKL(nn.Module):
    """Encoder and decoder.

    Under `mutable=["intermediates"]`, `encode` keeps "encoder_out" and "moments" [B, h, w, 2 C].

    Attributes:
      config: Sizes.
      attention: Attention kernel, see `models.kernels.attend`.
      precision: Dtype policy.
    """

    config: VAEConfig = VAEConfig()
    attention: str = "auto"
    precision: Precision = Precision()

    def setup(self) -> None:
        """Names the parts."""
        config, shared = self.config, (self.attention, self.precision)
        self.encoder = Tower(config, 2 * config.latent_channels, True, *shared)
        self.decoder = Tower(config, config.image_channels, False, *shared)
        if config.quant_conv:
            self.quant_conv = _pointwise(2 * config.latent_channels, self.precision)
        if config.post_quant_conv:
            self.post_quant_conv = _pointwise(config.latent_channels, self.precision)

    def encode(self, images: Array) -> Posterior:
        """Maps images [B, H, W, 3] in [-1, 1] to a Gaussian over latents [B, h, w, C], float32.

        Raises:
          ConfigError: If the sides are no multiples of `config.factor`.
        """
        factor = self.config.factor
        if images.shape[1] % factor or images.shape[2] % factor:
            raise ConfigError(
                f"images of {images.shape[1]} x {images.shape[2]} pixels for an autoencoder that "
                f"divides sides by {factor}",
                f"use a multiple of {factor}",
            )
        out = self.encoder(images)
        self.sow("intermediates", "encoder_out", out)
        if self.config.quant_conv:
            out = self.quant_conv(out)
        moments = self.precision.to_float32("output", out)
        self.sow("intermediates", "moments", moments)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return Posterior(mean, jnp.clip(log_variance, *LOG_VARIANCES))

    def decode(self, latents: Array) -> Array:
        """Maps latents [B, h, w, C] to images [B, H, W, 3], about [-1, 1], float32."""
        if self.config.post_quant_conv:
            latents = self.post_quant_conv(latents)
        return self.precision.to_float32("output", self.decoder(latents))

    def __call__(self, images: Array) -> Array:
        """Reconstructs images [B, H, W, 3] from the means of their latents."""
        return self.decode(self.encode(images).mean)
