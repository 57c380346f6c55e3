"""Objects outside the package that a config names as "package.module:name"."""

import importlib
import sys
from pathlib import Path
from typing import Any

from dsr_jax.core.errors import ConfigError


def is_reference(name: str) -> bool:
    """Whether a config's value has the form "package.module:name"."""
    module, colon, attribute = name.partition(":")
    parts = [*module.split("."), attribute]
    return bool(colon) and all(part.isidentifier() for part in parts)


def load_object(key: str, reference: str) -> Any:
    """Imports the object that "package.module:name" refers to.

    Modules are searched on Python's path and in the working directory.

    Args:
      key: Config key, for messages.
      reference: Value of the key.

    Raises:
      ConfigError: If the module cannot be imported or has no such name.
    """
    module_name, _, attribute = reference.partition(":")
    # `python -m` does this, but console scripts and notebooks do not.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"{key}={reference!r}: the module {module_name!r} cannot be imported: {error}",
            "run from the folder that holds it, or put that folder on PYTHONPATH",
        ) from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        names = ", ".join(name for name in vars(module) if not name.startswith("_"))
        raise ConfigError(
            f"{key}={reference!r}: the module {module.__name__!r} has no {attribute!r}",
            f"choose from {names}",
        ) from error
