"""Denoisers by name, and the configuration of denoisers outside the package.

A denoiser is a subclass of `models.denoiser.Denoiser`. `config.model.name` is a name below, or
"package.module:Class" for a class of any importable module. The fields of the class are its config
keys: those that `config/schema.py` lists in its section `model` keep their place and default there;
any other field becomes a key `config.model.FIELD` with the field's default.

Modules are imported when their class is asked for, so that importing this module is cheap.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.plugins import is_reference, load_object

if TYPE_CHECKING:
    from dsr_jax.models.denoiser import Denoiser

DENOISERS: Mapping[str, str] = MappingProxyType(
    {
        "lightningdit": "dsr_jax.models.dit:LightningDiT",
        "ditdh": "dsr_jax.models.dit_dh:DiTDH",
        "sit": "dsr_jax.models.sit:SiT",
        "jit": "dsr_jax.models.jit:JiT",
    }
)
"""Denoisers of this package: "module:Class" by the name in configs and in converted folders."""

TEXT_TO_IMAGE = "scale_rae"
"""Name of models.text_to_image.TextToImage in the records of converted folders: it is no choice of
config.model.name, which names the denoiser in it."""

FROM_DATA = ("input_size", "in_channels", "num_classes")
"""Fields of a denoiser that follow from the input space and the data."""

REGISTERS = ("num_registers", "register_start", "register_gate", "register_condition")
"""Fields of a denoiser that the config's section `registers` sets."""

_RUNTIME = ("parent", "name", "precision", "constrain")
_NOT_SIZES = (*_RUNTIME, "remat", "attention", "kernels", "unroll", "dropout")


def denoiser_class(name: str) -> "type[Denoiser]":
    """Returns the class of a denoiser.

    Args:
      name: A key of DENOISERS, or "package.module:Class".

    Raises:
      ConfigError: If there is no such denoiser.
    """
    from dsr_jax.models.denoiser import Denoiser

    if not is_denoiser(name):
        raise ConfigError(
            f"config.model.name={name!r} is unknown",
            f"choose from {', '.join(DENOISERS)}, or name a class of your own as "
            "package.module:Class",
        )
    found = load_object("config.model.name", DENOISERS.get(name, name))
    if not (isinstance(found, type) and issubclass(found, Denoiser)):
        raise ConfigError(
            f"config.model.name={name!r} is not a denoiser",
            "name a subclass of dsr_jax.models.denoiser.Denoiser",
        )
    return found


def is_denoiser(name: str) -> bool:
    """Whether a name, such as the family in the record of a converted folder, is a denoiser's."""
    return name in DENOISERS or is_reference(name)


def denoiser_name(kind: "type[Denoiser]") -> str:
    """Returns the name of a denoiser's class: its key in DENOISERS, otherwise "module:Class"."""
    path = f"{kind.__module__}:{kind.__qualname__}"
    if path == "dsr_jax.models.text_to_image:TextToImage":
        return TEXT_TO_IMAGE
    return next((name for name, known in DENOISERS.items() if known == path), path)


def config_fields(kind: "type[Denoiser]") -> dict[str, Any]:
    """Returns the fields of a denoiser that a config sets in `model`, with their defaults.

    Fields without a default have `dataclasses.MISSING`.
    """
    excluded = {*_RUNTIME, *FROM_DATA, *REGISTERS}
    return {
        field.name: field.default
        for field in dataclasses.fields(kind)
        if field.name not in excluded
    }


def model_sizes(model: Any) -> dict[str, Any]:
    """Returns the constructor arguments that the weights fix, to rebuild the network from.

    Networks among them become their own sizes, with the name of the class.
    """
    names = [field.name for field in dataclasses.fields(model) if field.name not in _NOT_SIZES]
    values = {name: getattr(model, name) for name in names}
    return {
        name: {"name": denoiser_name(cast(Any, type(value))), **model_sizes(value)}
        if dataclasses.is_dataclass(value)
        else value
        for name, value in values.items()
    }
