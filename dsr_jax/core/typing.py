"""Names of types that several packages use."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

Array = jax.Array
PyTree = Any
Params = Mapping[str, Any]
Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
Denoiser = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""`(x [B, h, w, C], t [B], labels [B]) -> [B, h, w, C]`."""
