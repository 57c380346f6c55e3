"""Folder of a run's checkpoints: lists its steps, and checks for foreign files."""

import re
from pathlib import Path

from dsr_jax.core import files
from dsr_jax.core.errors import CheckpointError

TEMPORARY = ".orbax-checkpoint-tmp"
"""Part of the names that Orbax gives to steps which are not whole yet."""

_DAMAGED = ".damaged"


def list_steps(directory: str | Path) -> list[int]:
    """Returns the steps in a checkpoint folder, in order; [] if there is no such folder."""
    folder = Path(directory)
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal())


def choose_step(directory: Path, step: int | None) -> int:
    """Returns the step, or the newest for None.

    Raises:
      CheckpointError: If there is no such step.
    """
    steps = list_steps(directory)
    if not steps:
        raise CheckpointError(
            f"no checkpoint in {directory}",
            "check the folder; a run writes its first after config.checkpoint.every_steps steps",
        )
    if step is not None and step not in steps:
        raise CheckpointError(
            f"no checkpoint of step {step} in {directory}",
            f"steps there: {', '.join(map(str, steps))}",
        )
    return steps[-1] if step is None else step


def check_folder(directory: Path) -> None:
    """Checks that a folder is absent, empty or holds checkpoints only.

    Raises:
      CheckpointError: Naming what else is there.
    """
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is a file", "name a folder for checkpoints")
    if not directory.is_dir():
        return
    known = re.compile(rf"\d+({re.escape(TEMPORARY)}.*)?|\..*")
    foreign = sorted(p.name for p in directory.iterdir() if not known.fullmatch(p.name))
    if foreign:
        raise CheckpointError(
            f"{directory} holds files that are no checkpoints: {', '.join(foreign[:5])}",
            "use another --workdir; nothing was written",
        )


def move_aside(directory: Path, step: int) -> Path:
    """Moves a step to the folder `<directory>_set_aside`, under a name that is free there.

    Returns:
      Where it is now.
    """
    folder = set_aside_folder(directory)
    folder.mkdir(exist_ok=True)
    names = (f"{step}", *(f"{step}.{count}" for count in range(1, 1000)))
    free = next(folder / name for name in names if not (folder / name).exists())
    (directory / str(step)).rename(free)
    return free


def mark_damaged(directory: Path, step: int) -> None:
    """Asks the next start of a run of several processes to set a damaged step aside."""
    files.write_atomic(set_aside_folder(directory) / f"{step}{_DAMAGED}", "")


def move_damaged_aside(directory: Path) -> list[Path]:
    """Moves the steps aside that `mark_damaged` named; returns where they are now."""
    moved = []
    for mark in sorted(set_aside_folder(directory).glob(f"*{_DAMAGED}")):
        step = mark.name.removesuffix(_DAMAGED)
        # First, so that a start that is killed in between never moves a newer step of that number.
        mark.unlink()
        if step.isdecimal() and (directory / step).is_dir():
            moved.append(move_aside(directory, int(step)))
    return moved


def set_aside_folder(directory: Path) -> Path:
    """Returns the folder for steps that a run no longer continues from."""
    return directory.with_name(f"{directory.name}_set_aside")
