"""The folder of a run: whether a start may use it, and what each start writes into it."""

import os
from pathlib import Path

from dsr_jax.config import ConfigDict, base_config, to_json
from dsr_jax.config.schema import leaves
from dsr_jax.core import files
from dsr_jax.core.errors import ConfigError, DataError
from dsr_jax.core.provenance import provenance
from dsr_jax.data.classes import DataDescription, compare, read_class_names

# A change of these makes the parameters of an existing run meaningless.
ARCHITECTURE_SECTIONS = ("model", "registers", "space", "decoder")


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
    defaults = dict(leaves(to_json(base_config())))
    old = defaults | dict(leaves(files.read_json(folder / "config.json")))
    new = dict(leaves(to_json(config)))
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


def check_data(workdir: str | os.PathLike[str], data: DataDescription) -> None:
    """Checks that the data set is the one that the run in `workdir` was started with.

    Args:
      workdir: The run's folder; one without class_names.json accepts any data.
      data: From `data.classes.describe`.

    Raises:
      DataError: Naming the classes that appeared, vanished or changed their label or count.
    """
    old = read_class_names(workdir)
    lines = compare(old, data) if old else []
    if lines:
        raise DataError(
            f"{data['source']} is not what the run in {str(workdir)!r} was trained on:\n    "
            + "\n    ".join([*lines[:8], *(["..."] if len(lines) > 8 else [])]),
            "restore the data set, or start a new --workdir",
        )


def write_run_files(config: ConfigDict, workdir: str | os.PathLike[str]) -> None:
    """Writes config.json and appends this start to provenance.json."""
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "provenance.json"
    starts = files.read_json(path) if path.is_file() else []
    # First, since a folder without it is taken for somebody else's.
    files.write_json(folder / "config.json", to_json(config))
    files.write_json(path, [*starts, provenance()])
