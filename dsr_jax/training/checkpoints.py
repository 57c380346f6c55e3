"""Checkpoints: asynchronous saves, restores onto any mesh, and errors with remedies.

A step is the folder `<directory>/<step>/` with two items: `state`, the arrays, and `meta`, a JSON
record that is read first: name, shape, dtype and checksum of every array, the architecture, the
package versions. So a checkpoint of another model is told from a damaged one before any array is
read. Orbax writes a step under a temporary name and renames it, hence a folder that bears a number
is complete; a killed save leaves only a temporary folder behind.

The storage format checks its indices but not the numbers themselves: a flipped bit inside an array
restores without complaint. The checksums are there for that.
"""

import dataclasses
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from dsr_jax.core.errors import (
    CheckpointError,
    DamagedCheckpointError,
    ProcessError,
    StuckSaveError,
)
from dsr_jax.core.provenance import package_versions
from dsr_jax.core.trees import flatten_names
from dsr_jax.parallel.processes import is_process_zero, log, wait_for_all
from dsr_jax.training.checkpoint_reading import (
    FORMAT,
    describe_arrays,
    first_line,
    read_arrays,
    read_meta,
)
from dsr_jax.training.checkpoint_reading import restore_params as restore_params
from dsr_jax.training.checksums import checksums, record_checksum
from dsr_jax.training.matching import match_state
from dsr_jax.training.quiet import DuplicateFilter
from dsr_jax.training.save_record import SaveRecord
from dsr_jax.training.state import TrainState
from dsr_jax.training.step_folders import (
    TEMPORARY,
    check_folder,
    choose_step,
    mark_damaged,
    move_aside,
    move_damaged_aside,
)
from dsr_jax.training.step_folders import list_steps as list_steps

SAVE_SECONDS = 1200.0
"""How long a save may take; Orbax's own limit for the agreement of all processes."""


class _Manager(ocp.CheckpointManager):
    """Orbax's manager without its own check of the preemption service.

    It asks for the step of a finished save from a background thread, which sets back the step
    counter by which JAX's service makes all hosts stop at the same step. The loop asks instead.
    """

    def reached_preemption(self, step: int) -> bool:
        del step
        return False


class Checkpoints:
    """The checkpoints of one run, for its training; a context manager.

    Every process of a run makes one and calls the same methods at the same steps.

    Args:
      directory: Folder of the steps, on storage that all processes see.
      every_steps: Interval at which `due` returns True.
      keep_latest: That many newest steps stay.
      keep_every: Steps that are multiples of this stay as well; 0 for none.
      architecture: Config values that decide the parameters, by dotted key; compared by name when
        arrays do not fit.
      save_seconds: Time that a save may take, also in the background.

    Raises:
      CheckpointError: If the folder holds something else.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        every_steps: int,
        keep_latest: int = 2,
        keep_every: int = 0,
        architecture: Mapping[str, Any] | None = None,
        save_seconds: float = SAVE_SECONDS,
    ) -> None:
        self.directory = Path(directory).absolute()
        self._every_steps = every_steps
        self._architecture = dict(architecture or {})
        check_folder(self.directory)
        if is_process_zero() and self.directory.is_dir():
            for leftover in self.directory.glob(f"*{TEMPORARY}*"):
                shutil.rmtree(leftover)
            for moved in move_damaged_aside(self.directory):
                log(f"a damaged checkpoint was set aside: {moved}")
        wait_for_all("checkpoints opened")
        self.record = SaveRecord(self.directory)
        keep: list[Any] = [policies.LatestN(keep_latest)]
        if keep_every:
            keep.append(policies.EveryNSteps(keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep),
            async_options=ocp.options.AsyncOptions(timeout_secs=max(1, round(save_seconds))),
        )
        self._open: Callable[[], _Manager] = lambda: _Manager(self.directory, options=options)
        self._manager = self._open()
        self._save_seconds = save_seconds
        self._saving: tuple[int, float] | None = None
        self._failed = self._stuck = False
        self._duplicates = DuplicateFilter()
        self._duplicates.install()

    def steps(self) -> list[int]:
        """Steps that can be restored, in order."""
        return list_steps(self.directory)

    def latest_step(self) -> int | None:
        """Returns the newest step; None without checkpoints."""
        return max(self.steps(), default=None)

    def due(self, step: int) -> bool:
        """Whether the cadence asks for a save after this step."""
        return step % self._every_steps == 0

    def save(self, step: int, state: TrainState, extra: Mapping[str, Any] | None = None) -> None:
        """Starts to save; returns once the arrays are copied, so that they may be donated.

        A step that is there already is left as it is.

        Args:
          step: Steps done.
          state: Arrays; only ever those of finite steps.
          extra: JSON values that `restore` gives back.

        Raises:
          CheckpointError: If this save, or the one before, failed.
        """
        if step in self.steps():
            return
        meta = {
            "format": FORMAT,
            "step": step,
            "architecture": self._architecture,
            "packages": package_versions(),
            "arrays": describe_arrays(state, checksums(state)),
            "extra": dict(extra or {}),
        }
        meta["checksum"] = record_checksum(meta)
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        self.wait()
        self._saving = step, time.monotonic()
        self._run(lambda: self._manager.save(step, args=args, force=True))

    def raise_errors(self) -> None:
        """Raises the error of a save that failed in the background; does not wait for one.

        Raises:
          CheckpointError: If there is one.
          StuckSaveError: If a save is under way for too long.
        """
        self._run(self._manager.check_for_errors)
        if self._saving is None:
            return
        step, since = self._saving
        if not self._manager.is_saving_in_progress():
            self._saving = None
            # Its last thread is at its end; errors of that one come out here only.
            self._run(self._manager.wait_until_finished)
            self._run(lambda: self.record.note_saved(step))
        elif time.monotonic() - since > self._save_seconds:
            self._stuck = True
            raise StuckSaveError(
                f"saving step {step} to {self.directory} has not ended after "
                f"{self._save_seconds:.0f} s",
                f"whole checkpoints there: {self.steps() or 'none'}; look at the storage, or set "
                "config.checkpoint.save_seconds higher; the same command continues",
            )

    def wait(self) -> None:
        """Waits until all saves are on disk.

        Raises:
          CheckpointError: If one failed.
          StuckSaveError: If one does not end.
        """
        self.raise_errors()
        while self._saving is not None:
            time.sleep(0.01)
            self.raise_errors()

    def restore(
        self, abstract: TrainState, step: int | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """Restores a whole state, on the mesh of `abstract`, whichever it was saved on.

        EMA weights that the checkpoint lacks start from its parameters; those that the state at
        hand lacks are dropped. The log says so. Moments of parameters that were frozen start at 0;
        those of parameters that are frozen now are dropped.

        Args:
          abstract: `ShapeDtypeStruct`s with shardings.
          step: Step of the checkpoint; None for the newest.

        Returns:
          The state, and what was given to `save` as `extra`.

        Raises:
          DamagedCheckpointError: If it cannot be read.
          CheckpointError: If it is missing or does not fit.
        """
        step = choose_step(self.directory, step)
        meta = read_meta(self.directory, step)
        path = self.directory / str(step)
        match = match_state(path, meta, describe_arrays(abstract), self._architecture)
        wanted = flatten_names(abstract)
        # Parameters come first, so that they keep their own layout where EMA weights share them.
        leaves = {source: wanted[name] for name, source in reversed(match.sources.items())}
        read = read_arrays(self.directory, step, meta, leaves)
        for decay in match.new_ema:
            log(f"EMA weights of decay {decay} are new: they start from the weights of step {step}")
        for decay in match.dropped_ema:
            log(f"EMA weights of decay {decay} are dropped")
        if match.new_moments:
            log(f"{len(match.new_moments)} moments of parameters frozen until step {step} are 0")
        new = {name: _zeros(wanted[name]) for name in match.new_moments}
        found = {n: new[n] if n in new else read[match.sources[n]] for n in wanted}
        return _assemble(abstract, found, match.new_ema), meta["extra"]

    def set_aside_after(self, step: int) -> list[int]:
        """Moves the steps behind `step` to the folder `<directory>_set_aside`.

        A run that goes back to an earlier step will come to those numbers again, and nothing is
        ever overwritten.

        Returns:
          The steps moved.
        """
        later = [other for other in self.steps() if other > step]
        if later:
            self._manager.close()
            if is_process_zero():
                for other in later:
                    move_aside(self.directory, other)
            wait_for_all("checkpoints set aside")
            self._manager = self._open()
        return later

    def leave_to_next_start(self, error: DamagedCheckpointError) -> None:
        """Leaves a damaged step to the next start, in a run of several processes.

        Perhaps one of them alone cannot read it; the next start sets it aside.

        Raises:
          DamagedCheckpointError: In such a run; its exit status asks launchers for another start
            if there is an earlier step.
        """
        if jax.process_count() == 1:
            return
        if min(self.steps()) < error.step:
            mark_damaged(self.directory, error.step)
            error.exit_status = ProcessError.exit_status
        raise error

    def set_aside_damaged(self, errors: Sequence[DamagedCheckpointError], used: int) -> None:
        """Moves damaged steps aside, once the run continues from an earlier one.

        Args:
          errors: Errors of the damaged steps.
          used: Step from which the run continues.
        """
        if not errors:
            return
        self._manager.close()
        for error in errors:
            moved = move_aside(self.directory, error.step)
            log(f"{error.problem}; it was set aside: {moved}; step {used} is used")
        self._manager = self._open()

    def close(self) -> None:
        """Waits for saves and ends the threads; not for those of a save that does not end."""
        if self._stuck:
            return
        self.wait()
        self._run(self._manager.close)
        if not self._failed:
            self._duplicates.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, Exception):
            self.close()

    def _run(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except (OSError, ValueError, RuntimeError) as error:
            if isinstance(error, jax.errors.JaxRuntimeError):
                raise
            self._failed, self._saving = True, None
            raise CheckpointError(
                f"saving to {self.directory} failed: {first_line(error)}",
                f"whole checkpoints there: {self.steps() or 'none'}; free space or repair the "
                "storage, then start again to continue from the newest",
            ) from error


def _zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(like.shape, like.dtype), out_shardings=like.sharding)()


def _assemble(abstract: TrainState, found: Mapping[str, Any], new_ema: Sequence[str]) -> TrainState:
    """Builds the state from its arrays by name; EMA weights that share the parameters get copies.

    The step donates its state, and no buffer may be donated twice.
    """
    state = jax.tree.unflatten(jax.tree.structure(abstract), [*found.values()])
    for decay in new_ema:
        layout = jax.tree.map(lambda leaf: leaf.sharding, abstract.ema[decay])
        copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=layout)
        state = dataclasses.replace(state, ema=state.ema | {decay: copy(state.params)})
    return state
