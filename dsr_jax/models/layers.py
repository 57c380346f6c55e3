"""Projections, norms and feed-forward blocks shared by all networks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.core.typing import Array
from dsr_jax.models.precision import Precision

Initializer = Callable[..., Array]

xavier_uniform: Initializer = nn.initializers.xavier_uniform()
zeros: Initializer = nn.initializers.zeros_init()
ones: Initializer = nn.initializers.ones_init()


def fan_in_uniform(fan_in: int) -> Initializer:
    """Uniform within 1/sqrt(fan_in): what torch gives a linear layer's kernel and bias."""
    bound = fan_in**-0.5

    def initialise(key: Array, shape: Sequence[int], dtype: jnp.dtype = jnp.float32) -> Array:
        return jax.random.uniform(key, tuple(shape), dtype, -bound, bound)

    return initialise


@dataclass(frozen=True)
class LinearInit:
    """How the linear layers of a block start.

    Attributes:
      kernel: Initialiser of a kernel by its fan-in.
      bias: Initialiser of a bias by the same fan-in.
    """

    kernel: Callable[[int], Initializer]
    bias: Callable[[int], Initializer]


XAVIER = LinearInit(lambda _: xavier_uniform, lambda _: zeros)
"""Xavier-uniform kernels, zero biases: LightningDiT."""
TORCH_DEFAULT = LinearInit(fan_in_uniform, fan_in_uniform)
"""What torch's linear layers have unless told otherwise: the head model (spec denoiser 2.3)."""


def flattened(init: Initializer, num_inputs: int) -> Initializer:
    """Makes a matrix initialiser serve an N-D kernel, as if it were [prod(in), prod(out)].

    Fan-in and fan-out then count what they count in the original's flat weight: the fused qkv
    has fan-out 3 D, whatever axes our kernel splits it into.
    """

    def initialise(key: Array, shape: Sequence[int], dtype: jnp.dtype = jnp.float32) -> Array:
        rows = int(np.prod(shape[:num_inputs]))
        return init(key, (rows, int(np.prod(shape)) // rows), dtype).reshape(shape)

    return initialise


def add_param(
    module: nn.Module,
    name: str,
    init: Initializer,
    axes: Sequence[str | None],
    shape: Sequence[int],
) -> Array:
    """Adds a parameter whose dimensions are named to the module whose compact method calls it."""
    boxed: Any = nn.with_logical_partitioning(init, tuple(axes))
    return module.param(name, boxed, tuple(shape))


def linear(
    x: Array, kernel: Array, bias: Array | None, num_inputs: int, policy: Precision
) -> Array:
    """Contracts the last `num_inputs` dimensions of x with the first of kernel, in compute dtype.

    The product is of two matrices, and reshaped afterwards: the transposes that the backward pass
    of an N-D product needs are then free.
    """
    inputs, outputs = kernel.shape[:num_inputs], kernel.shape[num_inputs:]
    leading = x.shape[: x.ndim - num_inputs]
    rows = int(np.prod(inputs))
    y = policy.to_compute(x).reshape(-1, rows) @ policy.to_compute(kernel).reshape(rows, -1)
    y = y.reshape(*leading, *outputs)
    return y if bias is None else y + policy.to_compute(bias)


class Dense(nn.Module):
    """Linear layer over the trailing dimensions, with an N-D kernel whose axes are named.

    Attributes:
      features: Output dimensions, e.g. `(3, heads, head_dim)`.
      axes: Logical axes of the kernel, input dimensions first.
      num_inputs: How many trailing dimensions of the input are contracted.
      use_bias: Adds a bias of shape `features`.
      linear_init: Start of kernel and bias.
      kernel_init: Initialiser of the flattened [in, out] matrix; replaces that of `linear_init`.
      precision: Dtype policy.
    """

    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    num_inputs: int = 1
    use_bias: bool = True
    linear_init: LinearInit = XAVIER
    kernel_init: Initializer | None = None
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [..., *in] to [..., *features] in the compute dtype."""
        n = self.num_inputs
        shape = (*x.shape[x.ndim - n :], *self.features)
        fan_in = int(np.prod(shape[:n]))
        init = flattened(self.kernel_init or self.linear_init.kernel(fan_in), n)
        kernel = add_param(self, "kernel", init, self.axes, shape)
        bias = None
        if self.use_bias:
            init = self.linear_init.bias(fan_in)
            bias = add_param(self, "bias", init, self.axes[n:], self.features)
        return linear(x, kernel, bias, n, self.precision)


class SplitDense(nn.Module):
    """Several linear layers of one input that share a fused kernel, as q, k and v do.

    Each output has a product of its own. One product followed by slices would be the same
    numbers, but its backward pass must first join the outputs' gradients into one array, which
    costs a quarter of the feed-forward's time on XLA's CPU backend.

    Attributes:
      count: Number of outputs.
      features: Dimensions of each output.
      axes: Logical axes of one output's kernel, input dimension first.
      use_bias: Adds a bias of shape `features` to each.
      linear_init: Start of the fused kernel and bias.
      precision: Dtype policy.
    """

    count: int
    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    use_bias: bool = True
    linear_init: LinearInit = XAVIER
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, ...]:
        """Maps [..., D] to `count` arrays [..., *features] in the compute dtype."""
        shape = (self.count, *self.features)
        axes = (self.axes[0], None, *self.axes[1:])
        fan_in = x.shape[-1]
        init = flattened(self.linear_init.kernel(fan_in), 1)
        kernel = add_param(self, "kernel", init, axes, (fan_in, *shape))
        bias = None
        if self.use_bias:
            bias = add_param(self, "bias", self.linear_init.bias(fan_in), axes[1:], shape)
        return tuple(
            linear(x, kernel[:, i], None if bias is None else bias[i], 1, self.precision)
            for i in range(self.count)
        )


class RMSNorm(nn.Module):
    """`x / rms(x)` in float32, cast back, then times a learned float32 scale.

    Attributes:
      epsilon: Added to the mean square.
      axis: Logical axis of the normalised dimension.
      precision: Dtype policy.
    """

    epsilon: float = 1e-6
    axis: str | None = "embed"
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalises the last dimension of [..., D]."""
        scale = add_param(self, "scale", ones, (self.axis,), x.shape[-1:])
        wide = self.precision.to_float32("norm", x)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return (wide * inverse).astype(x.dtype) * scale


class LayerNorm(nn.Module):
    """Layer normalisation in float32, with or without learned scale and bias.

    Attributes:
      epsilon: Added to the variance.
      affine: Learns a scale and a bias.
      axis: Logical axis of the normalised dimension.
      precision: Dtype policy.
    """

    epsilon: float = 1e-6
    affine: bool = False
    axis: str | None = "embed"
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalises the last dimension of [..., D]."""
        wide = self.precision.to_float32("norm", x)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        y = (centred * jax.lax.rsqrt(variance + self.epsilon)).astype(x.dtype)
        if self.affine:
            y = y * add_param(self, "scale", ones, (self.axis,), x.shape[-1:])
            y = y + add_param(self, "bias", zeros, (self.axis,), x.shape[-1:])
        return y


def _identity(x: Array) -> Array:
    return x


class SwiGLU(nn.Module):
    """`w3(silu(a) * b)` with `a, b = w12(x)`.

    Attributes:
      hidden: Width M of each half.
      linear_init: Start of the layers.
      precision: Dtype policy.
    """

    hidden: int
    linear_init: LinearInit = XAVIER
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: Array, drop: Callable[[Array], Array] = _identity) -> Array:
        """Maps [..., D] to [..., D]; `drop` acts on the hidden units [..., M]."""
        shared: Any = {"linear_init": self.linear_init, "precision": self.precision}
        gate, value = SplitDense(2, (self.hidden,), ("embed", "mlp"), **shared, name="w12")(x)
        hidden = drop(jax.nn.silu(gate) * value)
        return Dense(x.shape[-1:], ("mlp", "embed"), **shared, name="w3")(hidden)


class Mlp(nn.Module):
    """`fc2(gelu(fc1(x)))`.

    Attributes:
      hidden: Width M between the two layers.
      approximate: Tanh approximation of GELU (timm's DiT) instead of the exact one.
      linear_init: Start of the layers.
      precision: Dtype policy.
    """

    hidden: int
    approximate: bool = True
    linear_init: LinearInit = XAVIER
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: Array, drop: Callable[[Array], Array] = _identity) -> Array:
        """Maps [..., D] to [..., D]; `drop` acts on the hidden units [..., M]."""
        shared: Any = {"linear_init": self.linear_init, "precision": self.precision}
        y = Dense((self.hidden,), ("embed", "mlp"), **shared, name="fc1")(x)
        y = drop(jax.nn.gelu(y, approximate=self.approximate))
        return Dense(x.shape[-1:], ("mlp", "embed"), **shared, name="fc2")(y)
