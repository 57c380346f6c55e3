"""Random state dicts as the original writes them, for tests."""

import numpy as np

from dsr_jax.convert.lightningdit import lightningdit_rules, rope_buffers
from dsr_jax.models.dit import LightningDiT


def make_state(model: LightningDiT, seed: int = 0) -> dict[str, np.ndarray]:
    """Random parameters under the original's names, and its constants."""
    rules, random = lightningdit_rules(model), np.random.RandomState(seed)
    state = {}
    for rule in rules.rules:
        for target, names in rule.pieces():
            shape = rule.source_shape(rules.shapes[target])
            for name in names:
                state[name] = (0.2 * random.standard_normal(shape)).astype(np.float32)
    return state | rope_buffers(model)
