"""Reads checkpoints: their record, requested arrays, and diagnosis of damage."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from dsr_jax.core.errors import CheckpointError, DamagedCheckpointError
from dsr_jax.core.trees import flatten_names
from dsr_jax.core.typing import Params, PyTree
from dsr_jax.training.checksums import checksums, record_checksum
from dsr_jax.training.matching import check_arrays, check_ema
from dsr_jax.training.quiet import without_duplicates
from dsr_jax.training.step_folders import choose_step, list_steps

FORMAT = 2


def read_meta(directory: str | Path, step: int | None = None) -> dict[str, Any]:
    """Reads a checkpoint's record.

    Args:
      directory: Folder of the steps.
      step: Step of the checkpoint; None for the newest.

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
        if meta.pop("checksum") != record_checksum(meta):
            raise ValueError("the checksum of its record does not agree")
        if not meta["arrays"]:
            raise ValueError("its record lists no arrays")
        return meta

    meta = _read(directory, step, read)
    if meta["format"] != FORMAT:
        raise CheckpointError(
            f"checkpoint {directory / str(step)} has format {meta['format']}, but this version of "
            f"dsr_jax reads {FORMAT}",
            "use the version that wrote it: provenance.json of the run's folder names the revision",
        )
    return meta


def restore_params(
    directory: str | Path, abstract: Params, step: int | None = None, ema: str | None = None
) -> tuple[Params, dict[str, Any]]:
    """Restores the parameters alone, or their EMA weights of one decay.

    Args:
      directory: Folder of the steps.
      abstract: Parameters as `ShapeDtypeStruct`s with shardings.
      step: Step of the checkpoint; None for the newest.
      ema: Decay of the EMA weights, as in `str(0.9999)`; None for the parameters themselves.

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
        check_ema(directory / str(step), meta, ema)
    prefix = "params/" if ema is None else f"ema/{ema}/"
    check_arrays(directory / str(step), meta, describe_arrays(item), prefix)

    leaves = flatten_names(item)
    restored = read_arrays(directory, step, meta, leaves)
    values = [restored[name] for name in leaves]
    return jax.tree.unflatten(jax.tree.structure(abstract), values), meta


_READING = ocp.CheckpointManagerOptions(create=False, save_interval_steps=0)


def describe_arrays(tree: PyTree, sums: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Returns the record of a tree's arrays: shape, dtype and, if given, checksum by name."""
    return {
        name: {
            "shape": list(leaf.shape),
            "dtype": str(leaf.dtype),
            **({} if sums is None else {"checksum": sums[name]}),
        }
        for name, leaf in flatten_names(tree).items()
    }


def read_arrays(
    directory: Path, step: int, meta: Mapping[str, Any], leaves: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """Reads arrays of one step and compares their checksums.

    Args:
      directory: Folder of the steps.
      step: Step of the checkpoint.
      meta: Record of the checkpoint.
      leaves: `ShapeDtypeStruct`s with shardings, by the arrays' names in the checkpoint.

    Returns:
      The arrays by the same names.

    Raises:
      DamagedCheckpointError: If they cannot be read, or are not those that were saved.
    """
    arrays = _read(directory, step, lambda: _restore(directory, step, leaves))
    wrong = [
        name
        for name, value in checksums(arrays).items()
        if value != meta["arrays"][name]["checksum"]
    ]
    if wrong:
        problem = f"the checksum of {wrong[0]} does not agree ({len(wrong)} arrays in all)"
        raise _damaged(directory, step, problem)
    return arrays


def _restore(directory: Path, step: int, leaves: Mapping[str, Any]) -> dict[str, jax.Array]:
    stored = ocp.PyTreeCheckpointHandler().metadata(directory / str(step) / "state")
    item = _select(stored.tree, leaves)
    args = ocp.args.PyTreeRestore(
        item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=True,
    )
    with ocp.CheckpointManager(directory, options=_READING) as manager:
        return flatten_names(manager.restore(step, args=ocp.args.Composite(state=args)).state)


def _select(stored: Any, leaves: Mapping[str, Any], prefix: str = "") -> Any:
    """Returns the part of a stored tree that holds the leaves, which it puts in; {} for nothing.

    Lists keep their length, as Orbax needs them.
    """
    if isinstance(stored, Mapping):
        parts = {k: _select(v, leaves, f"{prefix}{k}/") for k, v in stored.items()}
        return {key: part for key, part in parts.items() if not _is_empty(part)}
    if isinstance(stored, (list, tuple)):
        parts = {k: _select(v, leaves, f"{prefix}{k}/") for k, v in enumerate(stored)}
        if all(map(_is_empty, parts.values())):
            return {}
        return [None if _is_empty(part) else part for part in parts.values()]
    return leaves.get(prefix.removesuffix("/"))


def _is_empty(part: Any) -> bool:
    return part is None or (isinstance(part, dict) and not part)


def _read(directory: Path, step: int, read: Callable[[], Any]) -> Any:
    """Runs `read`; what goes wrong in it, except on the device, is a damaged checkpoint."""
    try:
        with without_duplicates():
            return read()
    except jax.errors.JaxRuntimeError:
        raise
    except Exception as error:
        raise _damaged(directory, step, first_line(error)) from error


def _damaged(directory: Path, step: int, problem: str) -> DamagedCheckpointError:
    others = [other for other in list_steps(directory) if other != step]
    earlier = [other for other in others if other < step]
    remedy = "there is no other step in that folder"
    if earlier:
        remedy = (
            f"other steps there: {', '.join(map(str, others))}; the run's own command sets this "
            f"one aside and continues from step {earlier[-1]}"
        )
    elif others:
        remedy = (
            f"other steps there: {', '.join(map(str, others))}; the run continues from one with "
            f"--config.checkpoint.restore_step={others[-1]}"
        )
    return DamagedCheckpointError(
        step, f"checkpoint {directory / str(step)} is damaged: {problem}", remedy
    )


def first_line(error: BaseException) -> str:
    """Returns the kind of an error and the first line of its message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else 'no message'}"
