"""Checkpoints: asynchronous saves, restores onto any mesh, and errors that say what to do.

A step is the folder `<directory>/<step>/` with two items: `state`, the arrays, and `meta`, a JSON
record that is read first: name, shape, dtype and checksum of every array, the architecture, the
package versions. So a checkpoint of another model is told from a damaged one before any array is
read. Orbax writes a step under a temporary name and renames it, hence a folder that bears a number
is complete; a killed save leaves only a temporary folder behind.

The storage format checks its indices but not the numbers themselves: a flipped bit inside an array
restores without complaint. The checksums are there for that.
"""

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from dsr_jax.core.errors import CheckpointError, StuckSaveError
from dsr_jax.core.provenance import package_versions
from dsr_jax.core.trees import flatten_names
from dsr_jax.core.typing import Params, PyTree
from dsr_jax.parallel.processes import is_process_zero, wait_for_all
from dsr_jax.training.checksums import checksums, record_checksum
from dsr_jax.training.mismatch import check_arrays
from dsr_jax.training.quiet import EchoFilter, without_echoes
from dsr_jax.training.state import TrainState
from dsr_jax.training.step_folders import TEMPORARY, check_folder, choose_step, move_aside
from dsr_jax.training.step_folders import list_steps as list_steps

FORMAT = 2
SAVE_SECONDS = 1200.0
"""How long a save may take; Orbax's own limit for the agreement of all processes."""


class _Manager(ocp.CheckpointManager):
    """Orbax's manager without its own look at the preemption service.

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
      every_steps: How often `due` says so.
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
        wait_for_all("checkpoints opened")
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
        self._echoes = EchoFilter()
        self._echoes.install()

    def steps(self) -> list[int]:
        """Steps that can be restored, in order."""
        return list_steps(self.directory)

    def latest_step(self) -> int | None:
        """The newest of them, None if there are none."""
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
            "arrays": _describe(state, checksums(state)),
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

        Args:
          abstract: `ShapeDtypeStruct`s with shardings.
          step: Which one; None for the newest.

        Returns:
          The state, and what was given to `save` as `extra`.

        Raises:
          CheckpointError: If it is missing, damaged, or does not fit.
        """
        step = choose_step(self.directory, step)
        meta = read_meta(self.directory, step)
        path = self.directory / str(step)
        check_arrays(path, meta, _describe(abstract), architecture=self._architecture)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        state = _read(self.directory, step, lambda: self._manager.restore(step, args=args).state)
        _verify(self.directory, step, meta, state)
        return state, meta["extra"]

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

    def close(self) -> None:
        """Waits for saves and ends the threads; not for those of a save that does not end."""
        if self._stuck:
            return
        self.wait()
        self._run(self._manager.close)
        if not self._failed:
            self._echoes.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
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
                f"saving to {self.directory} failed: {_first_line(error)}",
                f"whole checkpoints there: {self.steps() or 'none'}; free space or mend the "
                "storage, then start again to continue from the newest",
            ) from error


def read_meta(directory: str | Path, step: int | None = None) -> dict[str, Any]:
    """Reads a checkpoint's record.

    Args:
      directory: Folder of the steps.
      step: Which one; None for the newest.

    Returns:
      "step", "architecture", "packages", "arrays" (by name: shape, dtype, checksum), "extra".

    Raises:
      CheckpointError: If it is missing, damaged or of another program.
    """
    directory = Path(directory).absolute()
    step = choose_step(directory, step)

    def read() -> dict[str, Any]:
        with ocp.CheckpointManager(directory, options=_READING) as manager:
            args = ocp.args.Composite(meta=ocp.args.JsonRestore())
            meta = manager.restore(step, args=args).meta
        if meta["format"] != FORMAT or not meta["arrays"]:
            raise ValueError(f"record of format {meta['format']}, this version reads {FORMAT}")
        if meta.pop("checksum") != record_checksum(meta):
            raise ValueError("the checksum of its record does not agree")
        return meta

    return _read(directory, step, read)


def restore_params(
    directory: str | Path, abstract: Params, step: int | None = None, ema: str | None = None
) -> tuple[Params, dict[str, Any]]:
    """Restores the parameters alone, or one of their averages.

    Args:
      directory: Folder of the steps.
      abstract: Parameters as `ShapeDtypeStruct`s with shardings.
      step: Which one; None for the newest.
      ema: Decay of the average, as in `str(0.9999)`; None for the parameters themselves.

    Returns:
      Parameters, and the checkpoint's record (see `read_meta`).

    Raises:
      CheckpointError: If it is missing, damaged, or does not fit.
    """
    directory = Path(directory).absolute()
    step = choose_step(directory, step)
    meta = read_meta(directory, step)
    item = {"params": abstract} if ema is None else {"ema": {ema: abstract}}
    if ema is not None:
        _check_average(directory / str(step), meta, ema)
    prefix = "params/" if ema is None else f"ema/{ema}/"
    check_arrays(directory / str(step), meta, _describe(item), prefix)

    def read() -> PyTree:
        args = ocp.args.PyTreeRestore(
            item,
            restore_args=ocp.checkpoint_utils.construct_restore_args(item),
            partial_restore=True,
        )
        with ocp.CheckpointManager(directory, options=_READING) as manager:
            return manager.restore(step, args=ocp.args.Composite(state=args)).state

    restored = _read(directory, step, read)
    _verify(directory, step, meta, restored)
    return (restored["params"] if ema is None else restored["ema"][ema]), meta


_READING = ocp.CheckpointManagerOptions(create=False, save_interval_steps=0)


def _describe(tree: PyTree, sums: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Returns shape, dtype and, if given, checksum by name."""
    return {
        name: {
            "shape": list(leaf.shape),
            "dtype": str(leaf.dtype),
            **({} if sums is None else {"checksum": sums[name]}),
        }
        for name, leaf in flatten_names(tree).items()
    }


def _verify(directory: Path, step: int, meta: Mapping[str, Any], tree: PyTree) -> None:
    wrong = [
        name for name, value in checksums(tree).items() if value != meta["arrays"][name]["checksum"]
    ]
    if wrong:
        problem = f"the checksum of {wrong[0]} does not agree ({len(wrong)} arrays in all)"
        raise _damaged(directory, step, problem)


def _read(directory: Path, step: int, read: Callable[[], Any]) -> Any:
    """Runs `read`; what goes wrong in it, except on the device, is a damaged checkpoint."""
    try:
        with without_echoes():
            return read()
    except jax.errors.JaxRuntimeError:
        raise
    except Exception as error:
        raise _damaged(directory, step, _first_line(error)) from error


def _damaged(directory: Path, step: int, problem: str) -> CheckpointError:
    others = [other for other in list_steps(directory) if other != step]
    remedy = "there is no other step in that folder"
    if others:
        remedy = (
            f"other steps there: {', '.join(map(str, others))}; training continues from one with "
            f"--config.checkpoint.restore_step={others[-1]}"
        )
    return CheckpointError(f"checkpoint {directory / str(step)} is damaged: {problem}", remedy)


def _check_average(path: Path, meta: Mapping[str, Any], ema: str) -> None:
    decays = sorted({name.split("/")[1] for name in meta["arrays"] if name.startswith("ema/")})
    if ema not in decays:
        raise CheckpointError(
            f"checkpoint {path} holds no average of decay {ema}",
            f"decays there: {', '.join(decays) or 'none; use the parameters themselves'}",
        )


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else 'no message'}"
