"""Matches a checkpoint's arrays with those of the state at hand, and names what does not fit."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dsr_jax.core.errors import CheckpointError

MAX_LINES = 8

Arrays = Mapping[str, Mapping[str, Any]]
"""Shape and dtype of every array, by name."""

_MOMENTS = re.compile(r"(.*opt_state)/\d+/(.+)")
"""Names of the optimizer's arrays: their index depended on clipping in older checkpoints."""

_MOMENT = re.compile(r"opt_state/(?:mu|nu)/(.+)")
"""Current names of a parameter's moments."""

_DISCRIMINATOR = re.compile(r"critic/(.+)")
"""Names of the discriminator's arrays in older checkpoints."""


class Match(NamedTuple):
    """Sources of a state's arrays.

    Attributes:
      sources: Name in the checkpoint by name in the state.
      new_ema: Decays of EMA weights that the checkpoint lacks: their sources are the parameters.
      dropped_ema: Decays of EMA weights that only the checkpoint has.
      new_moments: Names in the state of moments that the checkpoint lacks, where their parameters
        were frozen; they have no source.
    """

    sources: dict[str, str]
    new_ema: list[str]
    dropped_ema: list[str]
    new_moments: list[str]


def match_state(
    path: Path, meta: Mapping[str, Any], wanted: Arrays, architecture: Mapping[str, Any]
) -> Match:
    """Finds every array of a training state in a checkpoint.

    Args:
      path: The checkpoint's folder, for messages.
      meta: Record of the checkpoint.
      wanted: The arrays of the state at hand.
      architecture: Config values of the model at hand, by dotted key.

    Raises:
      CheckpointError: With the first differing arrays and the config keys behind them.
    """
    saved = meta["arrays"]
    new_ema = sorted(_ema_decays(wanted) - _ema_decays(saved))
    dropped_ema = sorted(_ema_decays(saved) - _ema_decays(wanted))
    names = {_current_name(name): name for name in saved}
    sources = {}
    for name in wanted:
        source = names.get(_current_name(name), name)
        if name.split("/")[0] == "ema" and name.split("/")[1] in new_ema:
            source = "/".join(["params", *name.split("/")[2:]])
        sources[name] = source
    kept = {_current_name(name) for name in wanted}
    frozen = {n for n in saved if _is_moment(n, wanted) and _current_name(n) not in kept}
    frozen = frozen if "opt_state/count" in kept else set()
    new_moments = [n for n in wanted if sources[n] not in saved and _is_moment(n, saved)]
    sources = {name: source for name, source in sources.items() if name not in new_moments}
    used = {*sources.values(), *frozen, *(n for n in saved if _is_ema(n, dropped_ema))}
    found = {name: saved[source] for name, source in sources.items() if source in saved}
    found |= {name: wanted[name] for name in new_moments}
    found |= {name: array for name, array in saved.items() if name not in used}
    _require_equal(path, meta, found, wanted, architecture, state=True)
    return Match(sources, new_ema, dropped_ema, new_moments)


def check_arrays(path: Path, meta: Mapping[str, Any], wanted: Arrays, prefix: str) -> None:
    """Checks that a checkpoint holds the wanted arrays under exactly their names.

    Args:
      path: The checkpoint's folder, for messages.
      meta: Record of the checkpoint.
      wanted: The arrays of the model at hand.
      prefix: The part of the state that is wanted, such as "params/".

    Raises:
      CheckpointError: With the first differing arrays.
    """
    saved = {name: a for name, a in meta["arrays"].items() if name.startswith(prefix)}
    _require_equal(path, meta, saved, wanted, {}, state=False)


def check_ema(path: Path, meta: Mapping[str, Any], decay: str) -> None:
    """Checks that a checkpoint holds the EMA weights of a decay.

    Raises:
      CheckpointError: With the decays that it holds.
    """
    decays = sorted(_ema_decays(meta["arrays"]))
    if decay not in decays:
        raise CheckpointError(
            f"checkpoint {path} holds no EMA weights of decay {decay}",
            f"decays there: {', '.join(decays) or 'none; use the parameters themselves'}",
        )


def _require_equal(
    path: Path,
    meta: Mapping[str, Any],
    saved: Arrays,
    wanted: Arrays,
    architecture: Mapping[str, Any],
    *,
    state: bool,
) -> None:
    names = [name for name in {**wanted, **saved} if _show(saved, name) != _show(wanted, name)]
    if not names:
        return
    lines = _config_lines(meta["architecture"], architecture)[:MAX_LINES]
    names.sort(key=lambda name: not name.startswith("params/"))
    lines += [
        f"{name}: {_show(saved, name)} -> {_show(wanted, name)}" for name in names[:MAX_LINES]
    ]
    if len(names) > MAX_LINES:
        lines.append(f"... and {len(names) - MAX_LINES} arrays more")
    if not state or names[0].startswith("params/"):
        what = "is of another architecture"
        remedy = "use the config that it was written with: config.json in its run's folder"
    else:
        what = "fits the model, but not the training state"
        remedy = (
            "the discriminator cannot change within a run: set config.gan back as in config.json "
            "of the run's folder, or start another --workdir"
        )
    differences = "\n    ".join(lines)
    raise CheckpointError(
        f"checkpoint {path} {what} (checkpoint -> config):\n    {differences}", remedy
    )


def _ema_decays(arrays: Arrays) -> set[str]:
    return {name.split("/")[1] for name in arrays if name.startswith("ema/")}


def _is_ema(name: str, decays: list[str]) -> bool:
    return name.startswith("ema/") and name.split("/")[1] in decays


def _is_moment(name: str, arrays: Arrays) -> bool:
    """Returns whether an array is a moment of one of the parameters in `arrays`."""
    found = _MOMENT.fullmatch(_current_name(name))
    return found is not None and f"params/{found[1]}" in arrays


def _current_name(name: str) -> str:
    """Names an array as today, and one of the optimizer without its index in the chain."""
    if found := _DISCRIMINATOR.fullmatch(name):
        name = f"discriminator/{found[1]}"
    found = _MOMENTS.fullmatch(name)
    return "/".join(found.groups()) if found else name


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
