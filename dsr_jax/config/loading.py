"""Loads config files, applies overrides, and reads the config of a run.

A config file holds `get_config(arg)`, which starts from `base_config()` and returns it. Keys are
locked and typed, so that a typo or a wrong type is an error that names the key.
"""

import ast
import difflib
import importlib.util
import os
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ml_collections import ConfigDict

from dsr_jax.config.checks import check
from dsr_jax.config.denoisers import use_denoiser
from dsr_jax.config.schema import base_config, leaves
from dsr_jax.core import files
from dsr_jax.core.errors import ConfigError, DamagedFileError

RENAMED: Mapping[str, str] = MappingProxyType({"eval.judge": "eval.classifier"})
"""Today's name of every key that had another: old command lines and config.json files have it."""


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
    """Reads the part behind the colon of `configs/x.py:variant=XL,runlocal`.

    Args:
      arg: Comma-separated `key=value`, or a bare `key` for a boolean; None or "" for defaults.
      **defaults: The keys there are, with values whose types are enforced.

    Raises:
      ConfigError: For an unknown key or a value of another type.
    """
    values = ConfigDict(defaults)
    for item in filter(None, (arg or "").split(",")):
        key, equals, text = item.partition("=")
        if key not in values:
            raise ConfigError(
                f"config argument {item!r}: no such key", f"keys are {', '.join(defaults)}"
            )
        values[key] = _parse_value(key, text if equals else "True", values[key])
    return values


def choose(table: Mapping[str, Any], key: str, value: str) -> Any:
    """Returns `table[value]`, where the user has chosen the value of the config argument `key`.

    Raises:
      ConfigError: With the choices, if there is no such entry.
    """
    if value not in table:
        raise ConfigError(
            f"config argument {key}={value}: no such {key}", f"choose from {', '.join(table)}"
        )
    return table[value]


def _parse_value(key: str, text: str, default: Any) -> Any:
    """Reads `text` as a value of the default's type."""
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, tuple) and isinstance(value, (list, int, float)):
        value = tuple(value) if isinstance(value, list) else (value,)
    if type(value) is not type(default):
        raise ConfigError(
            f"{key}={text} is a {type(value).__name__}, but {key} is a {type(default).__name__}",
            f"write for example {key}={default!r}",
        )
    return value


def load_file(path_and_arg: str) -> ConfigDict:
    """Runs `get_config(arg)` of "configs/x.py:arg", or reads the config.json of a run.

    Raises:
      ConfigError: If the file is missing, has no get_config, or sets a key that there is not.
    """
    path, _, arg = path_and_arg.partition(":")
    if not Path(path).is_file():
        others = ", ".join(sorted(str(p) for p in Path("configs").glob("*.py")))
        raise ConfigError(
            f"config file {path!r} not found",
            f"choose from {others}" if others else "check the path, or run from the repository",
        )
    if Path(path).suffix == ".json":
        return from_json(files.read_json(path), path)
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"config file {path!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"config file {path!r} defines no get_config(arg)")
    try:
        config = module.get_config(arg or None)
    except (AttributeError, KeyError, TypeError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f.lineno for f in reversed(frames) if f.filename == spec.origin), "?")
        problem = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{path}, line {line}: {problem}",
            "keys and their types are those of dsr_jax/config/schema.py; a denoiser's own keys are "
            "added by use_denoiser",
        ) from error
    use_denoiser(config, config.model.name)
    return config


def apply_overrides(config: ConfigDict, overrides: Sequence[str]) -> None:
    """Sets dotted keys in place from "--config.optim.lr=1e-3".

    A denoiser that an override names brings its own keys, wherever they stand among the overrides.

    Raises:
      ConfigError: For an unknown key (with the nearest known one) or a wrong type.
    """
    for override in overrides:
        name, _, text = override.removeprefix("--").partition("=")
        if name == "config.model.name":
            use_denoiser(config, text)
    known = dict(leaves(config))
    for override in overrides:
        name, equals, text = override.removeprefix("--").partition("=")
        key = name.removeprefix("config.")
        key = RENAMED.get(key, key)
        if not name.startswith("config.") or not equals:
            raise ConfigError(f"argument {override!r} is not understood", "see --help")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            section = ", ".join(k for k in known if k.split(".")[0] == key.split(".")[0])
            hint = f"did you mean config.{near[0]}?" if near else f"keys: {section or list(config)}"
            raise ConfigError(f"unknown config key {name!r}", hint)
        config.update_from_flattened_dict({key: _parse_value(name, text, known[key])})


def load(path_and_arg: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Loads a config file, applies overrides and checks the result."""
    config = load_file(path_and_arg)
    apply_overrides(config, overrides)
    check(config)
    return config


def from_json(values: Mapping[str, Any], origin: str) -> ConfigDict:
    """Rebuilds a config from `to_json`, against today's base config.

    Raises:
      ConfigError: If it holds a key that this version does not know.
      DamagedFileError: If a value has another form than its key's.
    """
    with files.name_damage(origin, "restore the file from a copy, or use another --workdir"):
        return _from_json(values, origin)


def _from_json(values: Mapping[str, Any], origin: str) -> ConfigDict:
    config = base_config()
    use_denoiser(config, values.get("model", {}).get("name", config.model.name))
    known = dict(leaves(config))
    for key, value in leaves(values):
        key = RENAMED.get(key, key)
        if key not in known:
            raise ConfigError(
                f"{origin} holds the unknown key {key!r}",
                "it was written by another version of dsr_jax; use that version to read it",
            )
        config.update_from_flattened_dict({key: _tuples(value)})
    return config


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def load_run(workdir: str | os.PathLike[str]) -> ConfigDict:
    """Reads the config of an existing run.

    Raises:
      ConfigError: If the folder holds no run.
    """
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"{str(workdir)!r} holds no run: {path} is missing",
            "give the --workdir that python -m dsr_jax.train was started with",
        )
    return from_json(read_values(path), str(path))


def read_values(path: Path) -> dict[str, Any]:
    """Reads the plain values of a run's config.json.

    Raises:
      DamagedFileError: If that is what the file does not hold.
    """
    remedy = "restore the file from a copy, or start again in another --workdir"
    values = files.read_json(path, remedy)
    if not isinstance(values, dict):
        raise DamagedFileError(f"{path} is damaged: it holds no config", remedy)
    return values
