"""Inception-v3 as Google exported it in December 2015: the network of FID, sFID and IS.

It differs from torchvision's: 1008 classes, no auxiliary head, average pools that exclude padding
from the mean, a max pool in the last block, and other weights. The graph is a table, which the
converter uses as well. Source: ADM evaluator, torch-fidelity
feature_extractor_inceptionv3.py; spec evaluation 4.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.core.typing import Array
from dsr_jax.models.layers import add_param, ones, zeros
from dsr_jax.models.tuning import tuning

SPATIAL_CHANNELS = 7
"""Channels of the 17 x 17 map that sFID takes."""

_BATCH_NORM_EPS = 1e-3
_HIGHEST = jax.lax.Precision.HIGHEST


@dataclass(frozen=True)
class Conv:
    """Convolution without bias, batch norm, ReLU.

    Attributes:
      name: Name in the PyTorch ports.
      features: Output channels of the full network.
      kernel: Height and width.
      stride: Stride in both directions.
      padding: "SAME" or "VALID".
    """

    name: str
    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"


@dataclass(frozen=True)
class Pool:
    """3 x 3 pooling: "avg" or "max" of stride 1 with padding, or "max" of stride 2 without."""

    kind: str
    stride: int = 1


Step = Conv | Pool | tuple[Conv, ...]
"""One step of a branch; a tuple holds parallel convolutions, whose outputs are concatenated."""
Branches = tuple[tuple[Step, ...], ...]


def block_a(pool_features: int) -> Branches:
    """Returns the branches of a block on 35 x 35 maps."""
    return (
        (Conv("branch1x1", 64),),
        (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5))),
        (
            Conv("branch3x3dbl_1", 64),
            Conv("branch3x3dbl_2", 96, (3, 3)),
            Conv("branch3x3dbl_3", 96, (3, 3)),
        ),
        (Pool("avg"), Conv("branch_pool", pool_features)),
    )


def block_b() -> Branches:
    """Returns the branches of a block from 35 x 35 to 17 x 17 maps."""
    return (
        (Conv("branch3x3", 384, (3, 3), 2, "VALID"),),
        (
            Conv("branch3x3dbl_1", 64),
            Conv("branch3x3dbl_2", 96, (3, 3)),
            Conv("branch3x3dbl_3", 96, (3, 3), 2, "VALID"),
        ),
        (Pool("max", 2),),
    )


def block_c(width: int) -> Branches:
    """Returns the branches of a block on 17 x 17 maps, with 7 x 7 kernels as pairs of 1-d ones."""
    return (
        (Conv("branch1x1", 192),),
        (
            Conv("branch7x7_1", width),
            Conv("branch7x7_2", width, (1, 7)),
            Conv("branch7x7_3", 192, (7, 1)),
        ),
        (
            Conv("branch7x7dbl_1", width),
            Conv("branch7x7dbl_2", width, (7, 1)),
            Conv("branch7x7dbl_3", width, (1, 7)),
            Conv("branch7x7dbl_4", width, (7, 1)),
            Conv("branch7x7dbl_5", 192, (1, 7)),
        ),
        (Pool("avg"), Conv("branch_pool", 192)),
    )


def block_d() -> Branches:
    """Returns the branches of a block from 17 x 17 to 8 x 8 maps."""
    return (
        (Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, (3, 3), 2, "VALID")),
        (
            Conv("branch7x7x3_1", 192),
            Conv("branch7x7x3_2", 192, (1, 7)),
            Conv("branch7x7x3_3", 192, (7, 1)),
            Conv("branch7x7x3_4", 192, (3, 3), 2, "VALID"),
        ),
        (Pool("max", 2),),
    )


def block_e(pool: str) -> Branches:
    """Returns the branches of a block on 8 x 8 maps; the first has mean, the second max pooling."""

    def pair(first: str, second: str) -> tuple[Conv, ...]:
        return Conv(first, 384, (1, 3)), Conv(second, 384, (3, 1))

    return (
        (Conv("branch1x1", 320),),
        (Conv("branch3x3_1", 384), pair("branch3x3_2a", "branch3x3_2b")),
        (
            Conv("branch3x3dbl_1", 448),
            Conv("branch3x3dbl_2", 384, (3, 3)),
            pair("branch3x3dbl_3a", "branch3x3dbl_3b"),
        ),
        (Pool(pool), Conv("branch_pool", 192)),
    )


STEM: tuple[Step, ...] = (
    Conv("Conv2d_1a_3x3", 32, (3, 3), 2, "VALID"),
    Conv("Conv2d_2a_3x3", 32, (3, 3), 1, "VALID"),
    Conv("Conv2d_2b_3x3", 64, (3, 3)),
    Pool("max", 2),
    Conv("Conv2d_3b_1x1", 80, (1, 1), 1, "VALID"),
    Conv("Conv2d_4a_3x3", 192, (3, 3), 1, "VALID"),
    Pool("max", 2),
)

BLOCKS: dict[str, Branches] = {
    "Mixed_5b": block_a(32),
    "Mixed_5c": block_a(64),
    "Mixed_5d": block_a(64),
    "Mixed_6a": block_b(),
    "Mixed_6b": block_c(128),
    "Mixed_6c": block_c(160),
    "Mixed_6d": block_c(160),
    "Mixed_6e": block_c(192),
    "Mixed_7a": block_d(),
    "Mixed_7b": block_e("avg"),
    "Mixed_7c": block_e("max"),
}

_SPATIAL_BLOCK = "Mixed_6d"
"""Its first branch is `mixed_6/conv` of the TensorFlow graph."""


def convolutions(branch: tuple[Step, ...]) -> Iterator[Conv]:
    """Yields the convolutions of a branch in order."""
    for step in branch:
        if isinstance(step, Conv):
            yield step
        elif isinstance(step, tuple):
            yield from step


def convolve(x: Array, kernel: Array, stride: int = 1, padding: str = "SAME") -> Array:
    """Convolves [B, H, W, C] with a kernel [h, w, C, D], in true float32.

    Args:
      x: Images or maps.
      kernel: The kernel.
      stride: Stride in both directions.
      padding: "SAME" or "VALID".
    """
    if kernel.shape[:2] == (1, 1):
        return jnp.matmul(x, kernel[0, 0], precision=_HIGHEST)
    width = x.shape[2]
    wanted = (width - kernel.shape[1]) // stride + 1 if padding == "VALID" else width
    padded = padding == "VALID" and tuning().pad_convolutions
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((0, 0), (0, 1)) if padded else padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=_HIGHEST,
    )[:, :, :wanted]


class ConvBN(nn.Module):
    """Convolution, batch norm with the training statistics, ReLU.

    Attributes:
      conv: Kernel, stride and padding.
      features: Output channels.
    """

    conv: Conv
    features: int

    @nn.compact
    def arrays(self, inputs: int) -> tuple[Array, Array, Array]:
        """Returns the kernel [h, w, inputs, D], and factor and offset [D] of the norm."""
        shape = (*self.conv.kernel, inputs, self.features)
        kernel = add_param(self, "kernel", nn.initializers.he_normal(), (None,) * 4, shape)
        scale, bias, mean, var = (
            add_param(self, name, init, (None,), (self.features,))
            for name, init in (("scale", ones), ("bias", zeros), ("mean", zeros), ("var", ones))
        )
        factor = scale * jax.lax.rsqrt(var + _BATCH_NORM_EPS)
        return kernel, factor, bias - mean * factor

    def __call__(self, x: Array) -> Array:
        """Maps [B, H, W, C] to [B, H', W', features]."""
        kernel, factor, offset = self.arrays(x.shape[-1])
        return nn.relu(convolve(x, kernel, self.conv.stride, self.conv.padding) * factor + offset)


def _pool(x: Array, pool: Pool) -> Array:
    window, strides = (3, 3), (pool.stride, pool.stride)
    if pool.kind == "avg":
        return nn.avg_pool(x, window, strides, "SAME", count_include_pad=False)
    return nn.max_pool(x, window, strides, "SAME" if pool.stride == 1 else "VALID")


class Block(nn.Module):
    """Parallel branches, concatenated along the channels.

    All 1 x 1 convolutions of the block's input are one matmul. A 1 x 1 convolution after an average
    pool is computed before it, which is the same but for rounding, and pools fewer channels.

    Attributes:
      branches: The block's table.
      width_div: Divides every number of channels.
    """

    branches: Branches
    width_div: int = 1

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """Maps [B, H, W, C]; returns all branches [B, H', W', C'], and the first one alone."""
        outputs, entries = [], self._entry_convolutions(x)
        for branch in self.branches:
            entry, y = _entry(branch), x
            if entry is not None:
                y, factor, offset = entries[entry.name]
                index = branch.index(entry)
                y = nn.relu(self._run(branch[:index], y) * factor + offset)
                branch = branch[index + 1 :]
            outputs.append(self._run(branch, y))
        return jnp.concatenate(outputs, axis=-1), outputs[0]

    def _entry_convolutions(self, x: Array) -> dict[str, tuple[Array, Array, Array]]:
        """Returns the output, and factor and offset of the norm, of each entry convolution."""
        convs = list(filter(None, map(_entry, self.branches)))
        kernels, factors, offsets = zip(
            *(self._module(conv).arrays(x.shape[-1]) for conv in convs), strict=True
        )
        outputs = convolve(x, jnp.concatenate(kernels, axis=-1))
        parts = jnp.split(outputs, np.cumsum([len(x) for x in offsets])[:-1], axis=-1)
        names = [conv.name for conv in convs]
        return dict(zip(names, zip(parts, factors, offsets, strict=True), strict=True))

    def _run(self, branch: tuple[Step, ...], x: Array) -> Array:
        for step in branch:
            if isinstance(step, Pool):
                x = _pool(x, step)
            elif isinstance(step, Conv):
                x = self._module(step)(x)
            else:
                x = jnp.concatenate([self._module(conv)(x) for conv in step], axis=-1)
        return x

    def _module(self, conv: Conv) -> ConvBN:
        return ConvBN(conv, conv.features // self.width_div, name=conv.name)


def _entry(branch: tuple[Step, ...]) -> Conv | None:
    """Returns the 1 x 1 convolution that a branch applies to the block's input, or None."""
    step = branch[1] if branch[0] == Pool("avg") else branch[0]
    return step if isinstance(step, Conv) and step.kernel == (1, 1) else None


class Features(NamedTuple):
    """The features that metrics are computed from, float32.

    Attributes:
      pool: Mean of the last map [B, 2048]: FID, KID, precision and recall.
      spatial: Seven channels of a 17 x 17 map [B, 2023], rows first, channels last: sFID.
      logits: Class scores [B, 1008] without the bias, as ADM's Inception Score uses them.
    """

    pool: Array
    spatial: Array
    logits: Array


class InceptionV3(nn.Module):
    """The network, with all matmuls in true float32, regardless of the default precision.

    Attributes:
      width_div: Divides every number of channels: 1, or 2, 4, 8, 16 in tests.
      num_classes: Outputs of the classifier.
    """

    width_div: int = 1
    num_classes: int = 1008

    @nn.compact
    def __call__(self, x: Array) -> Features:
        """Maps prepared images [B, 299, 299, 3], see `inception_input`; sows the max pools."""
        pools = 0
        for step in STEM:
            if isinstance(step, Conv):
                x = ConvBN(step, step.features // self.width_div, name=step.name)(x)
            elif isinstance(step, Pool):
                x, pools = _pool(x, step), pools + 1
                self.sow("intermediates", f"MaxPool_{pools}", x)
        spatial = x
        for name, branches in BLOCKS.items():
            x, first = Block(branches, self.width_div, name=name)(x)
            if name == _SPATIAL_BLOCK:
                spatial = first[..., :SPATIAL_CHANNELS].reshape(len(first), -1)
        pool = jnp.mean(x, axis=(1, 2))
        return Features(pool, spatial, Classifier(self.num_classes, name="fc")(pool))


class Classifier(nn.Module):
    """Linear layer with a bias that is a parameter but is not added.

    Attributes:
      features: Number of classes.
    """

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [B, D] to [B, features]."""
        shape = (x.shape[-1], self.features)
        kernel = add_param(self, "kernel", nn.initializers.lecun_normal(), (None, None), shape)
        add_param(self, "bias", zeros, (None,), (self.features,))
        return jnp.matmul(x, kernel, precision=_HIGHEST)
