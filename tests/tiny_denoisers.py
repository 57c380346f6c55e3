"""Denoisers with random weights, also where training starts from zero, for other tests."""

from typing import Any

import numpy as np

from dsr_jax.convert.denoiser import shapes_of_model
from dsr_jax.core.trees import unflatten_names
from dsr_jax.models.transformer import DiffusionTransformer


def random_params(model: DiffusionTransformer, seed: int = 0) -> dict[str, Any]:
    """Parameters of numbers that make a mistake in any of them show."""
    random = np.random.default_rng(seed)
    return unflatten_names(
        {
            name: (0.3 * random.standard_normal(shape)).astype(np.float32)
            for name, shape in shapes_of_model(model).items()
        }
    )
