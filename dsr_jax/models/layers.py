"""Projections, norms and feed-forward blocks shared by all networks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.core.typing import Array
from dsr_jax.models.elementwise import scaled_norm, silu_product
from dsr_jax.models.gathering import gather_once
from dsr_jax.models.precision import Precision
from dsr_jax.models.tuning import tuning
from dsr_jax.parallel.axes import Constrain

Initializer = Callable[..., Array]

xavier_uniform: Initializer = nn.initializers.xavier_uniform()
zeros: Initializer = nn.initializers.zeros_init()
ones: Initializer = nn.initializers.ones_init()


def fan_in_uniform(fan_in: int) -> Initializer:
    """Returns the initializer of torch's linear layers: uniform within 1/sqrt(fan_in)."""
    bound = fan_in**-0.5

    def initialize(key: Array, shape: Sequence[int], dtype: jnp.dtype = jnp.float32) -> Array:
        return jax.random.uniform(key, tuple(shape), dtype, -bound, bound)

    return initialize


@dataclass(frozen=True)
class LinearInit:
    """Initialization of the linear layers of a block.

    Attributes:
      kernel: Returns the initializer of a kernel of some fan-in.
      bias: Returns the initializer of a bias of the same fan-in.
    """

    kernel: Callable[[int], Initializer]
    bias: Callable[[int], Initializer]


XAVIER = LinearInit(lambda _: xavier_uniform, lambda _: zeros)
"""Xavier-uniform kernels, zero biases: LightningDiT."""
TORCH_DEFAULT = LinearInit(fan_in_uniform, fan_in_uniform)
"""The default of torch's linear layers, which DiTDH has (spec denoiser 2.3)."""


def flattened(init: Initializer, num_inputs: int) -> Initializer:
    """Returns an initializer of N-D kernels that treats them as matrices [prod(in), prod(out)].

    Fan-in and fan-out are then those of the original's flat weight: the fused qkv has fan-out 3 D,
    although the kernel here has more axes.
    """

    def initialize(key: Array, shape: Sequence[int], dtype: jnp.dtype = jnp.float32) -> Array:
        rows = int(np.prod(shape[:num_inputs]))
        return init(key, (rows, int(np.prod(shape)) // rows), dtype).reshape(shape)

    return initialize


def add_param(
    module: nn.Module,
    name: str,
    init: Initializer,
    axes: Sequence[str | None],
    shape: Sequence[int],
) -> Array:
    """Adds a parameter with named dimensions to the module whose compact method calls this."""
    boxed: Any = nn.with_logical_partitioning(init, tuple(axes))
    return module.param(name, boxed, tuple(shape))


def linear(
    x: Array,
    kernel: Array,
    bias: Array | None,
    num_inputs: int,
    policy: Precision,
    axes: Sequence[str | None] = (),
) -> Array:
    """Contracts the last `num_inputs` dimensions of x with the first of kernel, in compute dtype.

    This is a 2-D matmul between reshapes: the backward pass of an N-D one needs transposes, which
    are free for matrices. `axes` are the kernel's logical ones. The kernel of a matmul with one row
    per sample, such as a modulation, is not gathered by `policy`: moving rows is cheaper.
    """
    inputs, outputs = kernel.shape[:num_inputs], kernel.shape[num_inputs:]
    leading = x.shape[: x.ndim - num_inputs]
    rows = int(np.prod(inputs))
    matrix = policy.to_compute(kernel).reshape(rows, -1)
    if policy.gather is not None and axes and len(leading) > 1:
        matrix = gather_once(matrix, kernel.shape, axes, num_inputs, policy.gather)
    y = policy.to_compute(x).reshape(-1, rows) @ matrix
    if bias is not None and tuning().flat_bias:
        y, bias = add_bias(y, bias.reshape(-1)), None
    return add_bias(y.reshape(*leading, *outputs), bias)


def add_bias(product: Array, bias: Array | None) -> Array:
    """Returns the product plus the bias, if there is one, in the product's dtype."""
    return product if bias is None else product + bias.astype(product.dtype)


class Dense(nn.Module):
    """Linear layer over the trailing dimensions, with an N-D kernel whose axes are named.

    `nn.DenseGeneral` cannot have one: it applies the logical names of the N-D kernel to the 2-D one
    that it initializes (flax issue 3676).

    Attributes:
      features: Output dimensions, e.g. `(3, heads, head_dim)`.
      axes: Logical axes of the kernel, input dimensions first.
      num_inputs: Number of trailing dimensions of the input that are contracted.
      use_bias: Adds a bias of shape `features`.
      linear_init: Initialization of kernel and bias.
      kernel_init: Initializer of the flattened [in, out] matrix; replaces that of `linear_init`.
      precision: Dtype policy.
    """

    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    num_inputs: int = 1
    use_bias: bool = True
    linear_init: LinearInit = XAVIER
    kernel_init: Initializer | None = None
    precision: Precision = Precision()

    def __call__(self, x: Array) -> Array:
        """Maps [..., *in] to [..., *features] in the compute dtype."""
        n = self.num_inputs
        kernel, bias = self._parameters(x.shape[x.ndim - n :])
        return linear(x, kernel, bias, n, self.precision, self.axes)

    def apart(self, x: Array) -> tuple[Array, Array | None]:
        """Returns the product [..., *features] and the bias, for kernels that add it themselves."""
        n = self.num_inputs
        kernel, bias = self._parameters(x.shape[x.ndim - n :])
        return linear(x, kernel, None, n, self.precision, self.axes), bias

    @nn.compact
    def _parameters(self, inputs: tuple[int, ...]) -> tuple[Array, Array | None]:
        """Returns kernel and bias for inputs of these dimensions."""
        n = self.num_inputs
        shape = (*inputs, *self.features)
        fan_in = int(np.prod(shape[:n]))
        init = flattened(self.kernel_init or self.linear_init.kernel(fan_in), n)
        kernel = add_param(self, "kernel", init, self.axes, shape)
        bias = None
        if self.use_bias:
            init = self.linear_init.bias(fan_in)
            bias = add_param(self, "bias", init, self.axes[n:], self.features)
        return kernel, bias


class SplitDense(nn.Module):
    """Several linear layers of one input that share a fused kernel, as q, k and v do.

    One matmul or one for each output, as `models.tuning` chooses: the numbers are the same.

    Attributes:
      count: Number of outputs.
      features: Dimensions of each output.
      axes: Logical axes of one output's kernel, input dimension first.
      use_bias: Adds a bias of shape `features` to each.
      linear_init: Initialization of the fused kernel and bias.
      precision: Dtype policy.
    """

    count: int
    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    use_bias: bool = True
    linear_init: LinearInit = XAVIER
    precision: Precision = Precision()

    def __call__(self, x: Array) -> tuple[Array, ...]:
        """Maps [..., D] to `count` arrays [..., *features] in the compute dtype."""
        kernel, bias, axes = self._parameters(x.shape[-1])
        if not tuning().separate_outputs:
            fused = linear(x, kernel, bias, 1, self.precision, axes)
            parts = jnp.split(fused.reshape(*x.shape[:-1], -1), self.count, axis=-1)
            return tuple(part.reshape(*x.shape[:-1], *self.features) for part in parts)
        return tuple(
            linear(x, kernel[:, i], bias if bias is None else bias[i], 1, self.precision, self.axes)
            for i in range(self.count)
        )

    def apart(self, x: Array) -> tuple[Array, Array | None]:
        """Returns the product [..., count, *features] and the bias, as `Dense.apart` does."""
        kernel, bias, axes = self._parameters(x.shape[-1])
        return linear(x, kernel, None, 1, self.precision, axes), bias

    @nn.compact
    def _parameters(self, fan_in: int) -> tuple[Array, Array | None, tuple[str | None, ...]]:
        """Returns the fused kernel and bias, and the kernel's logical axes."""
        shape = (self.count, *self.features)
        axes = (self.axes[0], None, *self.axes[1:])
        init = flattened(self.linear_init.kernel(fan_in), 1)
        kernel = add_param(self, "kernel", init, axes, (fan_in, *shape))
        bias = None
        if self.use_bias:
            bias = add_param(self, "bias", self.linear_init.bias(fan_in), axes[1:], shape)
        return kernel, bias, axes


def _normalize(
    module: "RMSNorm | LayerNorm",
    x: Array,
    scale: Array | None,
    bias: Array | None,
    modulation: tuple[Array | None, Array | None],
    center: bool,
) -> Array:
    """Normalizes x [..., D], with statistics, scale and modulation in float32."""
    policy = module.precision
    shift, factor = modulation
    if shift is None or factor is None:
        return scaled_norm(x, scale, None, bias, module.epsilon, center, policy.residual)
    if bias is not None:
        shift = shift + bias * (1 + factor.astype(jnp.float32))
    return scaled_norm(x, scale, factor, shift, module.epsilon, center, policy.compute)


class RMSNorm(nn.Module):
    """`x / rms(x)` times a learned scale, in float32, with optional modulation.

    Attributes:
      epsilon: Added to the mean square.
      axis: Logical axis of the normalized dimension.
      precision: Dtype policy.
    """

    epsilon: float = 1e-6
    axis: str | None = "embed"
    precision: Precision = Precision()

    def __call__(self, x: Array, shift: Array | None = None, factor: Array | None = None) -> Array:
        """Normalizes the last dimension of [..., D].

        Args:
          x: [..., D].
          shift: Of the modulation; broadcasts to x. None for none.
          factor: Of the modulation, which multiplies by 1 + factor.

        Returns:
          [..., D] in the residual stream's dtype; modulated, in the compute dtype.
        """
        scale = self.scale(x.shape[-1])
        return _normalize(self, x, scale, None, (shift, factor), center=False)

    @nn.compact
    def scale(self, width: int) -> Array:
        """Returns the learned scale [D]."""
        return add_param(self, "scale", ones, (self.axis,), (width,))


class LayerNorm(nn.Module):
    """Layer normalization in float32, with optional scale and bias, and optional modulation.

    Attributes:
      epsilon: Added to the variance.
      affine: Learns a scale and a bias.
      axis: Logical axis of the normalized dimension.
      precision: Dtype policy.
    """

    epsilon: float = 1e-6
    affine: bool = False
    axis: str | None = "embed"
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: Array, shift: Array | None = None, factor: Array | None = None) -> Array:
        """Normalizes the last dimension of [..., D]; arguments and result as `RMSNorm`'s."""
        scale = bias = None
        if self.affine:
            scale = add_param(self, "scale", ones, (self.axis,), x.shape[-1:])
            bias = add_param(self, "bias", zeros, (self.axis,), x.shape[-1:])
        return _normalize(self, x, scale, bias, (shift, factor), center=True)


class SwiGLU(nn.Module):
    """`w3(silu(a) * b)` with `a, b = w12(x)`.

    Attributes:
      hidden: Width M of each half.
      linear_init: Initialization of the layers.
      precision: Dtype policy.
      kernels: "triton" computes the hidden units from the product of w12 by a kernel, for tokens
        [B, L, D] and without `drop`; "xla" leaves it to XLA.
      constrain: Layout of activations, by which that kernel runs on each device's part.
    """

    hidden: int
    linear_init: LinearInit = XAVIER
    precision: Precision = Precision()
    kernels: str = "xla"
    constrain: Constrain = Constrain()

    def __call__(self, x: Array, drop: Callable[[Array], Array] | None = None) -> Array:
        """Maps [..., D] to [..., D]; `drop` acts on the hidden units [..., M]."""
        return add_bias(*self.apart(x, drop))

    @nn.compact
    def apart(
        self, x: Array, drop: Callable[[Array], Array] | None = None
    ) -> tuple[Array, Array | None]:
        """Returns the result without the bias of w3, and the bias."""
        shared: Any = {"linear_init": self.linear_init, "precision": self.precision}
        fused = SplitDense(2, (self.hidden,), ("embed", "mlp"), **shared, name="w12")
        if self.kernels == "triton" and drop is None:
            from dsr_jax.models.triton_swiglu import swiglu  # Imports Pallas only if used.

            product, bias = fused.apart(x)
            assert bias is not None
            hidden = swiglu(product, bias, self.constrain)
        else:
            hidden = _dropped(silu_product(*fused(x)), drop)
        return Dense(x.shape[-1:], ("mlp", "embed"), **shared, name="w3").apart(hidden)


def _dropped(hidden: Array, drop: Callable[[Array], Array] | None) -> Array:
    return hidden if drop is None else drop(hidden)


class Mlp(nn.Module):
    """`fc2(gelu(fc1(x)))`.

    Attributes:
      hidden: Width M between the two layers.
      approximate: Tanh approximation of GELU (timm's DiT) instead of the exact one.
      linear_init: Initialization of the layers.
      precision: Dtype policy.
    """

    hidden: int
    approximate: bool = True
    linear_init: LinearInit = XAVIER
    precision: Precision = Precision()

    def __call__(self, x: Array, drop: Callable[[Array], Array] | None = None) -> Array:
        """Maps [..., D] to [..., D]; `drop` acts on the hidden units [..., M]."""
        return add_bias(*self.apart(x, drop))

    @nn.compact
    def apart(
        self, x: Array, drop: Callable[[Array], Array] | None = None
    ) -> tuple[Array, Array | None]:
        """Returns the result without the bias of fc2, and the bias."""
        shared: Any = {"linear_init": self.linear_init, "precision": self.precision}
        y = Dense((self.hidden,), ("embed", "mlp"), **shared, name="fc1")(x)
        y = _dropped(jax.nn.gelu(y, approximate=self.approximate), drop)
        return Dense(x.shape[-1:], ("mlp", "embed"), **shared, name="fc2").apart(y)
