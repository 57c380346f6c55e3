"""Patches, positions, time and labels as vectors of the model's width."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.core.typing import Array
from dsr_jax.models.layers import XAVIER, Dense, Initializer, LinearInit, add_param
from dsr_jax.models.precision import Precision


def sincos_1d(dim: int, positions: np.ndarray) -> np.ndarray:
    """Returns sines then cosines [N, dim] of N positions over 10000^(2k/dim), in float64."""
    frequencies = 10000.0 ** -(np.arange(dim // 2, dtype=np.float64) / (dim / 2))
    angles = positions.reshape(-1)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def sincos_2d(dim: int, grid: int) -> np.ndarray:
    """Returns a table [grid**2, dim] for a row-major grid: half the channels encode the column.

    Source: MAE's get_2d_sincos_pos_embed; spec denoiser 1.7.
    """
    rows, columns = np.mgrid[:grid, :grid]
    halves = [sincos_1d(dim // 2, columns), sincos_1d(dim // 2, rows)]
    return np.concatenate(halves, axis=1).astype(np.float32)


def sincos_init(grid: int) -> Initializer:
    """Returns an initializer of a learned table [1, grid**2, D] by the sine-cosine table."""

    def initialize(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
        del key
        return jnp.asarray(sincos_2d(shape[-1], grid), dtype).reshape(shape)

    return initialize


def patchify(x: Array, patch: int) -> Array:
    """Cuts [B, h, w, C] into row-major patches [B, N, p, p, C]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, -1, patch, patch, c)


def unpatchify(tokens: Array, patch: int, channels: int) -> Array:
    """Puts [B, N, p*p*C] (row in patch, column in patch, channel) back to [B, h, w, C]."""
    b, n, _ = tokens.shape
    side = int(np.sqrt(n))
    x = tokens.reshape(b, side, side, patch, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, side * patch, side * patch, channels)


class PatchEmbed(nn.Module):
    """Strided convolution as one matmul per patch.

    Attributes:
      width: Model width D.
      patch_size: Side p of a patch.
      precision: Dtype policy.
    """

    width: int
    patch_size: int
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [B, h, w, C] to tokens [B, N, D], row-major."""
        return Dense(
            (self.width,),
            ("patch", "patch", "channels", "embed"),
            num_inputs=3,
            precision=self.precision,
            name="proj",
        )(patchify(x, self.patch_size))


class BottleneckPatchEmbed(nn.Module):
    """A strided convolution to a few channels and a 1x1 convolution to the width.

    Source: JiT model_jit.py (BottleneckPatchEmbed); spec denoiser 11.

    Attributes:
      bottleneck: Channels in between.
      width: Model width D.
      patch_size: Side p of a patch.
      precision: Dtype policy.
    """

    bottleneck: int
    width: int
    patch_size: int
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [B, h, w, C] to tokens [B, N, D], row-major."""
        shared: Any = {"num_inputs": 3, "precision": self.precision}
        axes = ("patch", "patch", "channels")
        narrow = Dense((self.bottleneck,), (*axes, None), use_bias=False, **shared, name="proj1")(
            patchify(x, self.patch_size)
        )
        return Dense((self.width,), (*axes, "embed"), **shared, name="proj2")(
            narrow[:, :, None, None]
        )


def torch_normal(seed: int, count: int) -> np.ndarray:
    """Returns the float32 numbers of `torch.randn(count)` from a CPU generator with this seed.

    Box-Muller on groups of 16 words of a Mersenne twister, as PyTorch does for 16 numbers or more.

    Args:
      seed: Seed of the generator.
      count: Numbers, a multiple of 16.

    Raises:
      ValueError: If the count is no multiple of 16.
    """
    if count % 16:
        raise ValueError(f"{count} is no multiple of 16")
    words = np.random.RandomState(seed).randint(0, 2**32, count, dtype=np.uint32)
    uniform = ((words & 0xFFFFFF) / np.float32(2**24)).astype(np.float32).reshape(-1, 2, 8)
    radius = np.sqrt(-2 * np.log(1 - uniform[:, 0]))
    angle = np.float32(2 * np.pi) * uniform[:, 1]
    pairs = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return pairs.reshape(count).astype(np.float32)


class FourierTimeEmbed(nn.Module):
    """Gaussian Fourier features of t in [0, 1], then a two-layer MLP, all in float32.

    Source: DSR lightningDiT.py (GaussianFourierEmbedding), where the frequencies are learned;
    Scale-RAE, where they are constants from a seed; spec denoiser 1.2, t2i 2.5.

    Attributes:
      width: Model width D.
      num_frequencies: Entries of the frequency vector W.
      seed: PyTorch's seed of constant frequencies; None for learned ones.
      linear_init: Initialization of the layers' biases; kernels are normal.
      precision: Dtype policy.
    """

    width: int
    num_frequencies: int = 256
    linear_init: LinearInit = XAVIER
    precision: Precision = Precision()
    seed: int | None = None

    @nn.compact
    def __call__(self, t: Array) -> Array:
        """Maps t [B] to [B, D]."""
        if self.seed is not None:
            frequencies: Array = jnp.asarray(torch_normal(self.seed, self.num_frequencies))
        else:
            frequencies = add_param(
                self, "W", nn.initializers.normal(1.0), ("frequencies",), (self.num_frequencies,)
            )
        t = self.precision.to_float32("time_embedding", t)
        angles = t[:, None] * frequencies * 2 * np.float32(np.pi)
        features = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        return time_mlp(features, self.width, self.linear_init)


class SinusoidalTimeEmbed(nn.Module):
    """Cosines and sines of t in [0, 1] at fixed frequencies, then the same MLP, all in float32.

    Source: SiT models.py (TimestepEmbedder, which is given t itself); spec denoiser 10.1.

    Attributes:
      width: Model width D.
      num_frequencies: Number of frequencies, from 1 down to almost 1/10000.
      precision: Dtype policy.
    """

    width: int
    num_frequencies: int = 128
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, t: Array) -> Array:
        """Maps t [B] to [B, D]."""
        steps = np.arange(self.num_frequencies) / self.num_frequencies
        angles = self.precision.to_float32("time_embedding", t)[:, None] * np.float32(
            10000.0**-steps
        )
        features = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        self.sow("intermediates", "features", features)
        return time_mlp(features, self.width)


def time_mlp(features: Array, width: int, linear_init: LinearInit = XAVIER) -> Array:
    """Maps features of the time [B, F] to [B, width] by two layers.

    Adds the layers `mlp_0` and `mlp_2` to the module whose compact method calls it.

    Args:
      features: Sines and cosines.
      width: Model width D.
      linear_init: Initialization of the layers' biases; kernels are normal.
    """
    shared: Any = {"kernel_init": nn.initializers.normal(0.02), "linear_init": linear_init}
    hidden = Dense((width,), ("frequencies", "embed"), **shared, name="mlp_0")(features)
    return Dense((width,), ("embed", None), **shared, name="mlp_2")(jax.nn.silu(hidden))


LABEL_STD = 0.02
"""Standard deviation of the label table's initialization."""


class LabelEmbed(nn.Module):
    """Table of class vectors; the row after the last class is the null label of guidance.

    Attributes:
      num_classes: Number K of real classes; the table has K + 1 rows.
      width: Model width D.
    """

    num_classes: int
    width: int

    @nn.compact
    def __call__(self, labels: Array) -> Array:
        """Maps labels [B] in 0..K to [B, D]; a label beyond K gives NaN, never another class."""
        return LabelTable(self.num_classes + 1, self.width, name="embedding_table")(labels)


class LabelTable(nn.Module):
    """The table, as a submodule so that parameter names follow the original's."""

    rows: int
    width: int

    @nn.compact
    def __call__(self, labels: Array) -> Array:
        """Looks up [B] -> [B, D]."""
        init, shape = nn.initializers.normal(LABEL_STD), (self.rows, self.width)
        table = add_param(self, "embedding", init, ("classes", "embed"), shape)
        return jnp.take(table, labels, axis=0, mode="fill", fill_value=jnp.nan)
