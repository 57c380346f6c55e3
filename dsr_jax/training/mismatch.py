"""Tells a user how a checkpoint's arrays differ from those of the model at hand."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsr_jax.core.errors import CheckpointError

MAX_LINES = 8

Arrays = Mapping[str, Mapping[str, Any]]
"""Shape and dtype of every array, by name."""


def check_arrays(
    path: Path,
    meta: Mapping[str, Any],
    wanted: Arrays,
    prefix: str = "",
    architecture: Mapping[str, Any] | None = None,
) -> None:
    """Checks that a checkpoint holds the wanted arrays.

    Args:
      path: The checkpoint's folder, for messages.
      meta: Its record.
      wanted: The arrays of the model at hand.
      prefix: The part of the state that is wanted, such as "params/"; "" for all of it.
      architecture: Config values of the model at hand, by dotted key.

    Raises:
      CheckpointError: With the first differing arrays and the config keys behind them.
    """
    saved = {name: a for name, a in meta["arrays"].items() if name.startswith(prefix)}
    names = [name for name in {**wanted, **saved} if _show(saved, name) != _show(wanted, name)]
    if not names:
        return
    lines = _config_lines(meta["architecture"], architecture or {})[:MAX_LINES]
    names.sort(key=lambda name: not name.startswith("params/"))
    lines += [
        f"{name}: {_show(saved, name)} -> {_show(wanted, name)}" for name in names[:MAX_LINES]
    ]
    if len(names) > MAX_LINES:
        lines.append(f"... and {len(names) - MAX_LINES} arrays more")
    if prefix or names[0].startswith("params/"):
        what = "is of another architecture"
        remedy = "use the config that it was written with: config.json in its run's folder"
    else:
        what = "fits the model, but not the training state"
        remedy = "config.ema.decays, optimizer and discriminator cannot change within a run"
    differences = "\n    ".join(lines)
    raise CheckpointError(
        f"checkpoint {path} {what} (checkpoint -> config):\n    {differences}", remedy
    )


def _show(arrays: Arrays, name: str) -> str:
    if name not in arrays:
        return "absent"
    return f"{arrays[name]['dtype']}{tuple(arrays[name]['shape'])}"


def _config_lines(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    if not saved or not wanted:
        return []
    return [
        f"config.{key}: {saved.get(key, 'absent')} -> {wanted.get(key, 'absent')}"
        for key in {**saved, **wanted}
        if saved.get(key) != wanted.get(key)
    ]
