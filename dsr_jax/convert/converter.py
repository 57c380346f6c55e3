"""Interface of the conversion of one kind of denoiser from and to PyTorch.

A denoiser names its converter in the class attribute `converter`, as "package.module:NAME".
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsr_jax.convert.rules import RuleSet
from dsr_jax.core.errors import ConversionError
from dsr_jax.core.plugins import load_object
from dsr_jax.models.denoiser import Denoiser
from dsr_jax.models.registry import denoiser_name


@dataclass(frozen=True)
class DenoiserConverter:
    """Conversion of one kind of denoiser.

    Attributes:
      rules: Returns the table of rules of a network.
      constants: Returns what a network's state dict holds besides parameters.
      infer: Reads a network's sizes from a state dict.
      options: Sizes that `infer` takes, for what a file may not hold.
      help: The kind of denoiser in a few words.
      prefix: Prefix of every name in checkpoints.
      entries: State dicts of the original's checkpoints.
      obstacle: Returns what of a network the original's class cannot hold; "" for nothing.
      has_registers: The released class has registers; an export with some is pointed out if not.
    """

    rules: Callable[[Any], RuleSet]
    constants: Callable[[Any], dict[str, np.ndarray]]
    infer: Callable[..., Denoiser]
    options: tuple[str, ...]
    help: str
    prefix: str = ""
    entries: tuple[str, ...] = ("ema",)
    obstacle: Callable[[Any], str] = lambda model: ""
    has_registers: bool = True

    def strip_prefix(self, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns a state dict without `prefix`, if all of its names begin with it."""
        if not all(name.startswith(self.prefix) for name in state):
            return dict(state)
        return {name.removeprefix(self.prefix): value for name, value in state.items()}


def find_converter(kind: type[Denoiser]) -> DenoiserConverter | None:
    """Returns the converter of a denoiser's class, or None if it has none."""
    if not kind.converter:
        return None
    return load_object(f"{kind.__name__}.converter", kind.converter)


def require_converter(kind: type[Denoiser]) -> DenoiserConverter:
    """Returns the converter of a denoiser's class.

    Raises:
      ConversionError: If it has none.
    """
    found = find_converter(kind)
    if found is None:
        raise ConversionError(
            f"{denoiser_name(kind)} has no converter, so there is no PyTorch checkpoint of it",
            "export to a folder (--out without .pt or .safetensors), which sample and train read, "
            f"or name a DenoiserConverter in {kind.__name__}.converter",
        )
    return found
