"""Record of a run's saves, stored outside of its checkpoints.

The file `<checkpoints>.json` beside their folder tells a run that has not saved yet from one whose
checkpoints are gone, a request to go back that was served from a new one, and hooks that were
called after a step from those that a stop prevented.
"""

import json
from pathlib import Path
from typing import Any

from dsr_jax.core import files
from dsr_jax.core.errors import CheckpointError
from dsr_jax.parallel.processes import is_process_zero
from dsr_jax.telemetry.writers import METRICS_FILE
from dsr_jax.training.step_folders import list_steps, set_aside_folder


class SaveRecord:
    """The record of one checkpoint folder; read by every process, written by process 0.

    Args:
      directory: The folder of the checkpoints.

    Attributes:
      found: Whether there was a record: the run has begun under this program.
      newest: The newest step that was saved completely; None before the first.
      went_back_to: The value of config.checkpoint.restore_step that was served last; -1 for none.

    Raises:
      CheckpointError: If the file is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.path = directory.with_name(f"{directory.name}.json")
        self.found = self.path.exists()
        values = self._read() if self.found else {}
        self.newest: int | None = values.get("newest")
        self.went_back_to: int = values.get("went_back_to", -1)
        # Step of the last call, and the number of hooks called there. A record without it is of a
        # program that did not note them.
        self._hooks: list[int] | None = values.get("hooks", None if self.found else [0, 0])

    def check_never_saved(self) -> None:
        """Checks that a run whose folder holds no checkpoint is one that has not saved yet.

        Raises:
          CheckpointError: If it has.
        """
        if self.newest is None or list_steps(self._directory):
            return
        aside = set_aside_folder(self._directory)
        also = f", or bring steps back from {aside}" if aside.is_dir() else ""
        raise CheckpointError(
            f"the run saved step {self.newest}, but {self._directory} holds no checkpoint",
            f"put that folder back{also}; to start again from step 0, use a new --workdir, or "
            f"remove {self.path} and {METRICS_FILE} beside it first",
        )

    def note_begun(self) -> None:
        """Notes that a run begins, without a checkpoint yet."""
        if not self.found:
            self._write()

    def note_saved(self, step: int) -> None:
        """Notes that a step is on disk."""
        self.newest = step
        self._write()

    def note_went_back(self, step: int) -> None:
        """Notes that the run went back to a step because the config asked for it."""
        self.newest = self.went_back_to = step
        self._write()

    def forget_went_back(self) -> None:
        """Notes a start that does not ask to go back: the next one that does is served again."""
        if self.went_back_to >= 0:
            self.went_back_to = -1
            self._write()

    def hooks_called(self, step: int, count: int) -> int:
        """Returns how many of `count` hooks were called after a step, in order."""
        if self._hooks is None or self._hooks[0] > step:
            return count
        return self._hooks[1] if self._hooks[0] == step else 0

    def note_hooks(self, step: int, called: int) -> None:
        """Notes that the first `called` hooks were called after a step, or were not due."""
        self._hooks = [step, called]
        self._write()

    def _read(self) -> dict[str, Any]:
        try:
            values = files.read_json(self.path)
            hooks = values.get("hooks", [0, 0])
            if not isinstance(hooks, list) or len(hooks) != 2:
                raise ValueError("hooks is not a list of step and number")
            integers = [values.get("newest") or 0, values.get("went_back_to", -1), *hooks]
            if not all(isinstance(value, int) for value in integers):
                raise ValueError("a step is not an integer")
        except (AttributeError, OSError, ValueError, json.JSONDecodeError) as error:
            raise CheckpointError(
                f"{self.path} is damaged: {error}",
                "remove it; the run continues from its newest checkpoint",
            ) from error
        return values

    def _write(self) -> None:
        if is_process_zero():
            hooks = {} if self._hooks is None else {"hooks": self._hooks}
            values = {"newest": self.newest, "went_back_to": self.went_back_to, **hooks}
            files.write_json(self.path, values)
