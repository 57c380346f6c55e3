"""Random state dicts as the original writes them, for tests."""

import numpy as np

from dsr_jax.convert.converter import require_converter
from dsr_jax.models.transformer import DiffusionTransformer


def make_state(model: DiffusionTransformer, seed: int = 0) -> dict[str, np.ndarray]:
    """Random parameters under the original's names, and its constants."""
    family, random = require_converter(type(model)), np.random.RandomState(seed)
    rules = family.rules(model)
    state = {}
    for rule in rules.rules:
        for target, names in rule.pieces():
            shape = rule.source_shape(rules.shapes[target])
            for name in names:
                state[name] = (0.2 * random.standard_normal(shape)).astype(np.float32)
    return state | family.constants(model)
