"""Experiment configs: the base every config file fills in, its command line, and its run folder.

A config file holds `get_config(arg)`, which starts from `base_config()` and returns it. Keys are
locked and typed, so that a typo or a wrong type is an error that names the key.
"""

import ast
import difflib
import importlib.util
import json
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dsr_jax.base_config import base_config as base_config
from dsr_jax.core import files
from dsr_jax.core.errors import ConfigError
from dsr_jax.core.provenance import provenance

# A change of these makes the parameters of an existing run meaningless.
ARCHITECTURE_SECTIONS = ("model", "registers", "space", "decoder")
_SPACE_KEYS = {"pixels": {"name"}, "vae": {"name", "vae", "scale"}}


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
        others = sorted(str(p) for p in Path("configs").glob("*.py"))
        raise ConfigError(f"config file {path!r} not found", f"here are {', '.join(others)}")
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
        return module.get_config(arg or None)
    except (AttributeError, KeyError, TypeError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f.lineno for f in reversed(frames) if f.filename == spec.origin), "?")
        problem = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{path}, line {line}: {problem}",
            "keys and their types are those of dsr_jax/base_config.py",
        ) from error


def apply_overrides(config: ConfigDict, overrides: Sequence[str]) -> None:
    """Sets dotted keys in place from "--config.optim.lr=1e-3".

    Raises:
      ConfigError: For an unknown key (with the nearest known one) or a wrong type.
    """
    known = dict(_leaves(config))
    for override in overrides:
        name, equals, text = override.removeprefix("--").partition("=")
        key = name.removeprefix("config.")
        if not name.startswith("config.") or not equals:
            raise ConfigError(f"argument {override!r} is not understood", "see --help")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            section = ", ".join(k for k in known if k.split(".")[0] == key.split(".")[0])
            hint = f"did you mean config.{near[0]}?" if near else f"keys: {section or list(config)}"
            raise ConfigError(f"unknown config key {name!r}", hint)
        config.update_from_flattened_dict({key: _parse_value(name, text, known[key])})


def _leaves(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Lists (dotted key, value) of all leaves."""
    found: list[tuple[str, Any]] = []
    for key, value in config.items():
        if isinstance(value, (ConfigDict, dict)):
            found += _leaves(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def architecture(config: ConfigDict) -> dict[str, Any]:
    """The values that decide the parameters' names and shapes, by dotted key."""
    values = to_json(config)
    space = values["space"]
    # The other keys of the section have no effect.
    effective = _SPACE_KEYS.get(space["name"], set(space) - _SPACE_KEYS["vae"] | {"name"})
    values["space"] = {key: space[key] for key in space if key in effective}
    sections = ("space", "decoder") if trains_decoder(config) else ("model", "registers", "space")
    return {
        f"config.{key}": value for key, value in _leaves(values) if key.split(".")[0] in sections
    }


def trains_decoder(config: ConfigDict) -> bool:
    """Whether this is a config of python -m dsr_jax.train_decoder."""
    return config.decoder.hidden_size > 0


def check(config: ConfigDict) -> None:
    """Checks what can be checked without building anything.

    Raises:
      ConfigError: Naming the key and a value that would do.
    """

    def require(condition: bool, problem: str, remedy: str) -> None:
        if not condition:
            raise ConfigError(problem, remedy)

    positive = (
        "data.global_batch data.image_size data.channels data.num_classes train.steps optim.lr "
        "optim.accumulate model.depth model.hidden_size model.num_heads model.patch_size "
        "model.decoder_depth model.decoder_hidden_size model.decoder_num_heads "
        "decoder.depth decoder.num_heads decoder.mlp_dim decoder.patch_size gan.kernel_size "
        "objective.time_bins eval.batch log.every_steps checkpoint.every_steps "
        "checkpoint.keep_latest checkpoint.save_seconds failures.lost_seconds"
    )
    leaves = dict(_leaves(config))
    for key in positive.split():
        require(leaves[key] > 0, f"config.{key}={leaves[key]}", "it must be positive")
    for decay in config.ema.decays:
        require(0 <= decay < 1, f"config.ema.decays holds {decay}", "decays lie in [0, 1)")
    ema = config.sample.ema
    known = [str(decay) for decay in config.ema.decays]
    require(
        ema in ("none", *known),
        f"config.sample.ema={ema!r} is not among config.ema.decays={config.ema.decays}",
        f"choose from none, {', '.join(known)}",
    )
    none = "decoder.hidden_size lpips.weight gan.weight data.crop_from eval.every_steps "
    for key in (none + "failures.step_seconds failures.pause_seconds").split():
        require(leaves[key] >= 0, f"config.{key}={leaves[key]}", "use 0 for none")
    dropout = config.objective.label_dropout
    require(0 <= dropout <= 1, f"config.objective.label_dropout={dropout}", "use 0 to 1")
    require(
        config.precision.matmul in ("default", "tensorfloat32", "highest", "high", "bfloat16"),
        f"config.precision.matmul={config.precision.matmul!r}",
        "choose from default, bfloat16, tensorfloat32, high, highest",
    )
    require(
        not config.data.latents or (config.space.name == "rae" and not trains_decoder(config)),
        f"config.data.latents={config.data.latents!r}, but images are needed",
        "latents are for training a denoiser with config.space.name=rae",
    )
    require(
        not config.train.init_from or not trains_decoder(config),
        f"config.train.init_from={config.train.init_from!r}, but a decoder is trained",
        "leave it empty: only denoisers start from a converted folder",
    )
    require(
        config.eval.judge in ("", "digits"),
        f"config.eval.judge={config.eval.judge!r}",
        "choose from digits, or leave it empty for no judge",
    )
    _check_scores(config, require)


def _check_scores(config: ConfigDict, require: Callable[[bool, str, str], None]) -> None:
    """Checks that what config.eval asks for can be scored."""
    section = config.eval
    networks = section.inception or section.dinov2
    require(
        bool(section.reference) == bool(networks),
        f"config.eval.reference={section.reference!r} with inception={section.inception!r} and "
        f"dinov2={section.dinov2!r}",
        "name both the reference and the folder of a feature network, or none of them",
    )
    require(
        not section.reference or section.num_samples > 0,
        f"config.eval.reference={section.reference!r} with num_samples={section.num_samples}",
        "set config.eval.num_samples, for example to 10000",
    )
    require(
        not section.every_steps or (section.num_samples > 0 and bool(section.judge or networks)),
        f"config.eval.every_steps={section.every_steps}, but there is nothing to score",
        "set config.eval.num_samples, and reference and inception, or judge",
    )
    require(
        not section.reference or not trains_decoder(config),
        f"config.eval.reference={section.reference!r}, but a decoder is trained",
        "leave it empty: python -m dsr_jax.evaluate_reconstruction scores decoders",
    )


def load(path_and_arg: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Loads a config file, applies overrides and checks the result."""
    config = load_file(path_and_arg)
    apply_overrides(config, overrides)
    check(config)
    return config


def to_json(config: ConfigDict) -> dict[str, Any]:
    """Plain values; tuples become lists."""
    return json.loads(json.dumps(config.to_dict()))


def from_json(values: Mapping[str, Any], origin: str) -> ConfigDict:
    """Rebuilds a config from `to_json`, against today's base config.

    Raises:
      ConfigError: If it holds a key that this version does not know.
    """
    config = base_config()
    known = dict(_leaves(config))
    for key, value in _leaves(values):
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
    return from_json(files.read_json(path), str(path))


def check_workdir(config: ConfigDict, workdir: str | os.PathLike[str]) -> list[str]:
    """Checks that a run may start or continue in `workdir`; writes nothing.

    Returns:
      "key: old -> new" for every key that differs from the run's last start.

    Raises:
      ConfigError: If the folder holds something else, or a run of another architecture.
    """
    folder = Path(workdir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"workdir {str(folder)!r} is a file", "name a new or empty folder")
    if not folder.exists() or not any(folder.iterdir()):
        return []
    if not (folder / "config.json").is_file():
        content = ", ".join(sorted(p.name for p in folder.iterdir())[:5])
        raise ConfigError(
            f"workdir {str(folder)!r} is not empty and holds no run of dsr_jax ({content}, ...)",
            "name a new or empty folder; nothing was written",
        )
    # A key that is younger than the run had its default's effect then.
    defaults = dict(_leaves(to_json(base_config())))
    old = defaults | dict(_leaves(files.read_json(folder / "config.json")))
    new = dict(_leaves(to_json(config)))
    changed = {key for key in {**old, **new} if old.get(key) != new.get(key)}
    lines = [f"config.{key}: {old.get(key)} -> {new.get(key)}" for key in sorted(changed)]
    foreign = [line for line in lines if line.split(".")[1] in ARCHITECTURE_SECTIONS]
    if foreign:
        raise ConfigError(
            f"workdir {str(folder)!r} holds a run of another architecture:\n    "
            + "\n    ".join(foreign[:8]),
            "use another --workdir, or the config that the run was started with",
        )
    return lines


def write_run_files(config: ConfigDict, workdir: str | os.PathLike[str]) -> None:
    """Writes config.json and appends this start to provenance.json."""
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "provenance.json"
    starts = files.read_json(path) if path.is_file() else []
    # First, since a folder without it is taken for somebody else's.
    files.write_json(folder / "config.json", to_json(config))
    files.write_json(path, [*starts, provenance()])
