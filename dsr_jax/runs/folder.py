"""Folder of a run: checks whether a start may use it, and writes the files of each start."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsr_jax.config import ConfigDict, to_json
from dsr_jax.config.loading import read_values
from dsr_jax.config.resume import CLASSES, check_allowed, compare_configs, is_allowed
from dsr_jax.config.schema import leaves
from dsr_jax.core import files
from dsr_jax.core.errors import CheckpointError, ConfigError, DamagedFileError, DataError
from dsr_jax.core.lock import is_lock
from dsr_jax.core.provenance import provenance
from dsr_jax.data.classes import DataDescription, compare, read_class_names
from dsr_jax.parallel.processes import is_process_zero
from dsr_jax.parallel.watch import FOLDER as FAILURES
from dsr_jax.telemetry.writers import METRICS_FILE, read_metrics
from dsr_jax.training.save_record import SaveRecord
from dsr_jax.training.step_folders import list_steps

MAX_LINES = 8


def check_workdir(
    config: ConfigDict, workdir: str | os.PathLike[str], allowed: Sequence[str] = ()
) -> list[str]:
    """Checks that a run may start or continue in `workdir`; writes nothing.

    Args:
      config: The config of this start.
      workdir: The run's folder.
      allowed: Arguments of --allow-change: keys or sections that may change what is learned.

    Returns:
      "config.KEY: old -> new" for every key that differs from the run's last start.

    Raises:
      ConfigError: If the folder holds something else, or a run that cannot take the changes.
    """
    check_allowed(allowed)
    folder = Path(workdir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"workdir {str(folder)!r} is a file", "name a new or empty folder")
    if not folder.exists():
        return []
    if not (folder / "config.json").is_file():
        foreign = _foreign_names(folder)
        if not foreign:
            return []
        content = ", ".join(foreign[:5])
        raise ConfigError(
            f"workdir {str(folder)!r} is not empty and holds no run of dsr_jax ({content}, ...)",
            "name a new or empty folder; nothing was written",
        )
    saved = read_values(folder / "config.json")
    changes = compare_configs(saved, config)
    if not _has_saved(folder, saved):
        # Nothing rests on the old settings yet: this start begins at step 0 anyway.
        return sorted(line for part in changes for line in part.values())
    if changes.never:
        raise ConfigError(
            f"workdir {str(folder)!r} holds a run of another architecture:\n    "
            + "\n    ".join(list(changes.never.values())[:MAX_LINES]),
            "use another --workdir, or the config that the run was started with",
        )
    refused = {key: line for key, line in changes.ask.items() if not is_allowed(key, allowed)}
    if refused:
        flags = " ".join(f"--allow-change {key}" for key in refused)
        raise ConfigError(
            f"workdir {str(folder)!r} holds a run with other settings, which decide what is "
            "learned:\n    " + "\n    ".join(list(refused.values())[:MAX_LINES]),
            f"use another --workdir or the run's own settings; to continue all the same: {flags}",
        )
    return sorted([*changes.free.values(), *changes.ask.values()])


def _foreign_names(folder: Path) -> list[str]:
    """Lists what is in a folder besides what a start leaves that was killed before config.json."""
    ours = {path.name for path in files.leftovers(folder)} | {FAILURES}
    names = sorted(path.name for path in folder.iterdir() if path.name not in ours)
    return [name for name in names if not is_lock(name)]


def _has_saved(folder: Path, saved: Mapping[str, Any]) -> bool:
    """Whether a run has a checkpoint.

    Raises:
      CheckpointError: If it had one, by its record or by its metrics, which is gone.
    """
    steps = folder / "checkpoints"
    if list_steps(steps):
        return True
    record = SaveRecord(steps)
    record.check_never_saved()
    if record.found:
        return False
    # The metrics of a run that a program without this record began.
    last = max((entry["step"] for entry in read_metrics(folder)), default=0)
    if last >= dict(leaves(saved)).get("checkpoint.every_steps", math.inf):
        raise CheckpointError(
            f"{folder / METRICS_FILE} is at step {last}, but {steps} holds no checkpoint",
            "put that folder back; to start again from step 0, use a new --workdir, or remove "
            f"{folder / METRICS_FILE} first",
        )
    return False


def check_data(
    workdir: str | os.PathLike[str], data: DataDescription, allowed: Sequence[str] = ()
) -> list[str]:
    """Checks that the data set is the one that the run in `workdir` was started with.

    Args:
      workdir: The run's folder; without class_names.json or a checkpoint it accepts any data.
      data: Result of `data.classes.describe`.
      allowed: Arguments of --allow-change: with "classes" or "data" the data set may differ.

    Returns:
      How it differs, where that is allowed: one line per class or count.

    Raises:
      DataError: Naming the classes that appeared, vanished or changed their label or count.
    """
    old = read_class_names(workdir)
    lines = compare(old, data) if old else []
    # Without a checkpoint, this start begins at step 0 anyway.
    resumes = bool(list_steps(Path(workdir) / "checkpoints"))
    if lines and resumes and not is_allowed(CLASSES, allowed) and not is_allowed("data", allowed):
        raise DataError(
            f"{data['source']} is not what the run in {str(workdir)!r} was trained on:\n    "
            + "\n    ".join([*lines[:8], *(["..."] if len(lines) > 8 else [])]),
            "restore the data set, start a new --workdir, or continue with it all the same: "
            f"--allow-change {CLASSES}",
        )
    return lines


def write_run_files(config: ConfigDict, workdir: str | os.PathLike[str]) -> None:
    """Writes config.json, appends this start to provenance.json, removes killed writes' leftovers.

    The caller holds the folder's lock.
    """
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    files.remove_leftovers(folder)
    path = folder / "provenance.json"
    starts = files.read_json(path, f"remove {path}") if path.is_file() else []
    if not isinstance(starts, list):
        raise DamagedFileError(f"{path} is damaged: it holds no list of starts", f"remove {path}")
    # First, since a folder without it is taken for somebody else's.
    files.write_json(folder / "config.json", to_json(config))
    files.write_json(path, [*starts, provenance()])


def add_to_provenance(workdir: str | os.PathLike[str], facts: Mapping[str, Any]) -> None:
    """Adds what a start decides after `write_run_files`, if that was called, to its entry.

    Process 0 writes; the caller holds the folder's lock.
    """
    path = Path(workdir) / "provenance.json"
    if not is_process_zero() or not path.is_file():
        return
    *before, last = files.read_json(path, f"remove {path}")
    files.write_json(path, [*before, {**last, **facts}])
