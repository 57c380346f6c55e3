"""Lists of register neurons: files, the published sets, and masks.

Source: DSR ttreg configs; spec encoder 5.
"""

import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from dsr_jax.core.errors import ConfigError, DataError
from dsr_jax.core.files import read_json, write_atomic

Neurons = dict[int, list[int]]
"""Hidden MLP units by block, best first."""

PUBLISHED: Mapping[str, str] = MappingProxyType(
    {
        "siglip2-base-patch16-256": "siglip2_base.json",
        "siglip2-so400m-patch14-224": "siglip2_so400m_recursive.json",
    }
)
"""The published set of an encoder, by the encoder's name in `models.variants.ENCODERS`."""


def published_neurons(encoder: str) -> Neurons:
    """Returns the published register neurons of an encoder.

    Raises:
      ConfigError: If none were published.
    """
    name = encoder.rsplit("/", 1)[-1]
    if name not in PUBLISHED:
        raise ConfigError(
            f"no register neurons were published for {encoder}",
            f"published ones exist for {', '.join(PUBLISHED)}; find an encoder's own with "
            "tools/find_registers.py",
        )
    data = resources.files("dsr_jax.registers").joinpath("data", PUBLISHED[name])
    return parse_neurons(data.read_text(), PUBLISHED[name])


def load_neurons(source: str | os.PathLike[str]) -> Neurons:
    """Reads a file of the official form, or a published set by the encoder's name.

    Raises:
      DataError: If the file is missing or does not have that form.
    """
    path = Path(source)
    if not path.exists() and path.name in PUBLISHED:
        return published_neurons(path.name)
    if not path.is_file():
        raise DataError(f"{path} does not exist", f"give a file, or one of {', '.join(PUBLISHED)}")
    return _check_neurons(read_json(path, _FORM), str(path))


def parse_neurons(text: str, name: str) -> Neurons:
    """Reads the official JSON: an object of block numbers with lists of units.

    Order and duplicates are kept; neither changes the intervention.

    Raises:
      DataError: If `text` does not have that form; `name` is the file, for the message.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} is not JSON: {error}", _FORM) from error
    return _check_neurons(content, name)


_FORM = 'the form is {"2": [33, 9], "3": [11]}: units by block'


def _check_neurons(content: Any, name: str) -> Neurons:
    if not isinstance(content, dict):
        raise DataError(f"{name} holds a {type(content).__name__}", _FORM)
    neurons: Neurons = {}
    for block, units in content.items():
        listed = isinstance(units, list) and all(type(unit) is int for unit in units)
        if not (block.isdecimal() and listed):
            raise DataError(f"{name}: {block!r}: {str(units)[:80]} is not a list of units", _FORM)
        neurons[int(block)] = units
    return neurons


def save_neurons(path: str | os.PathLike[str], neurons: Mapping[int, Sequence[int]]) -> None:
    """Writes the official JSON, one block per line."""
    lines = [f"  {json.dumps(str(block))}: {list(units)}" for block, units in neurons.items()]
    write_atomic(path, "{\n" + ",\n".join(lines) + "\n}\n")


def neurons_to_mask(neurons: Mapping[int, Sequence[int]], depth: int, mlp_dim: int) -> np.ndarray:
    """Marks the units of each block [L, M], bool.

    Raises:
      ConfigError: If the encoder has no such block or unit.
    """
    mask = np.zeros((depth, mlp_dim), bool)
    for block, units in neurons.items():
        if not 0 <= block < depth:
            raise ConfigError(
                f"register neurons in block {block}, but the encoder has blocks 0 to {depth - 1}",
                "use the neurons that were found for this very encoder",
            )
        wrong = [unit for unit in units if not 0 <= unit < mlp_dim]
        if wrong:
            raise ConfigError(
                f"register neuron {wrong[0]} in block {block}, but the encoder's MLPs have units "
                f"0 to {mlp_dim - 1}",
                "use the neurons that were found for this very encoder",
            )
        mask[block, list(units)] = True
    return mask
