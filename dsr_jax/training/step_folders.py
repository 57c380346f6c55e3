"""The folder that a run's checkpoints lie in: which steps are there, and whether all is ours."""

import re
from pathlib import Path

from dsr_jax.core.errors import CheckpointError

TEMPORARY = ".orbax-checkpoint-tmp"
"""Part of the names that Orbax gives to steps which are not whole yet."""


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


def move_aside(directory: Path, step: int) -> None:
    """Moves a step to the folder `<directory>_set_aside`, under a name that is free there."""
    folder = directory.with_name(f"{directory.name}_set_aside")
    folder.mkdir(exist_ok=True)
    names = (f"{step}", *(f"{step}.{count}" for count in range(1, 1000)))
    free = next(name for name in names if not (folder / name).exists())
    (directory / str(step)).rename(folder / free)
