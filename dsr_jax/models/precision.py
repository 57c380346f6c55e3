"""Mixed precision: which operations run in the compute dtype and which in float32."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.typing import Array
from dsr_jax.parallel.axes import Constrain

FLOAT32_OPS: Mapping[str, str] = {
    "norm": "mean squares in bfloat16 lose small channels next to an outlier's large one",
    "rope": "angles grow with the position; the rotated q and k are cast back for the matmul",
    "softmax": "sums over hundreds of tokens",
    "time_embedding": "sines of t * W * 2 pi, and the two layers that read them",
    "conditioning": "time + label, whose scale and shift reach every layer",
    "residual": "frozen networks: the sum that every block adds to; trained ones choose its dtype",
    "output": "prediction, loss and the sampler's state",
}


@dataclass(frozen=True)
class Precision:
    """Mixed precision: float32 parameters, matmuls in `compute`, FLOAT32_OPS in float32.

    This is what the official sampling scripts do under bfloat16 autocast (spec denoiser 1.12),
    where the residual stream is float32.

    Attributes:
      compute: Dtype of matmuls and of what only they read: "float32" or "bfloat16".
      residual: Dtype of the residual stream, the sum that every block adds to, and of norms of it.
      gather: Layout by which kernels are gathered once for both passes (`models.gathering`); None
        leaves it to the compiler where they are gathered.
    """

    compute: str = "float32"
    residual: str = "float32"
    gather: Constrain | None = None

    def __post_init__(self) -> None:
        for name, dtype in (("compute", self.compute), ("residual", self.residual)):
            if dtype not in ("float32", "bfloat16"):
                raise ConfigError(
                    f"config.precision.{name}={dtype!r} is not supported",
                    "use 'float32' or 'bfloat16'",
                )

    def to_compute(self, x: Array) -> Array:
        """Casts an operand of a matmul to the compute dtype."""
        return x.astype(self.compute)

    def to_residual(self, x: Array) -> Array:
        """Casts what enters the residual stream to its dtype."""
        return x.astype(self.residual)

    def to_float32(self, name: str, x: Array) -> Array:
        """Casts to float32 for the named op of FLOAT32_OPS."""
        if name not in FLOAT32_OPS:
            raise KeyError(f"{name!r} is not in FLOAT32_OPS")
        return x.astype(jnp.float32)
