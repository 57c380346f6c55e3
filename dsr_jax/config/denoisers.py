"""Config keys of denoisers that `config.schema` does not list: the fields of their classes."""

import dataclasses

from ml_collections import ConfigDict

from dsr_jax.config.schema import base_config
from dsr_jax.core.errors import ConfigError
from dsr_jax.models.registry import config_fields, denoiser_class

_TYPES = (bool, int, float, str, tuple)


def use_denoiser(config: ConfigDict, name: str) -> None:
    """Sets `config.model.name`, and adds the denoiser's own keys with their defaults.

    Keys that another denoiser added are removed; keys that are there keep their values.

    Args:
      config: Changed in place.
      name: A key of `models.registry.DENOISERS`, or "package.module:Class".

    Raises:
      ConfigError: If there is no such denoiser, or one of its fields cannot be a config key.
    """
    section, listed = config.model, base_config().model
    own = {
        key: default
        for key, default in config_fields(denoiser_class(name)).items()
        if key not in listed
    }
    for key, default in own.items():
        if default is dataclasses.MISSING or not isinstance(default, _TYPES):
            kinds = ", ".join(kind.__name__ for kind in _TYPES)
            raise ConfigError(
                f"{name}: field {key!r} has no default of a type that a config can hold",
                f"give it a default: a {kinds}",
            )
    with section.unlocked():
        section.name = name
        for key in [key for key in section if key not in listed and key not in own]:
            del section[key]
        section.update({key: default for key, default in own.items() if key not in section})
