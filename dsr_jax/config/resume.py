"""The resume contract: which changes of a config an existing run takes, by the schema's table."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dsr_jax.config.checks import unused_keys
from dsr_jax.config.loading import RENAMED
from dsr_jax.config.schema import SCHEMA, Change, leaves, to_json
from dsr_jax.core.errors import ConfigError

CLASSES = "classes"
"""What `--allow-change` takes besides keys of the config: the class list of the data."""


class Changes(NamedTuple):
    """Differences between a run's last start and this one, as "config.KEY: old -> new" by key.

    Attributes:
      free: Changes that need no permission.
      ask: Changes of what is learned.
      never: Changes that no run survives.
    """

    free: dict[str, str]
    ask: dict[str, str]
    never: dict[str, str]


def compare_configs(saved: Mapping[str, Any], config: ConfigDict) -> Changes:
    """Sorts the differences between a run's config and the one at hand.

    Keys without effect, such as those of another kind of input space, may always change.

    Args:
      saved: A run's config as nested plain values. Keys that are younger than the run had their
        default's effect then.
      config: The config at hand.
    """
    old = {name: key.default for name, key in SCHEMA.items()}
    # As JSON holds them: lists for tuples.
    old = dict(leaves(_plain(old))) | {RENAMED.get(k, k): v for k, v in leaves(saved)}
    new = dict(leaves(to_json(config)))
    unused = unused_keys(config)
    changes = Changes({}, {}, {})
    for name in sorted({**old, **new}):
        if old.get(name) == new.get(name):
            continue
        kind = Change.FREE if name in unused else _change_of(name, old)
        line = f"config.{name}: {old.get(name)} -> {new.get(name)}"
        getattr(changes, kind.value)[name] = line
    return changes


def check_allowed(names: Sequence[str]) -> None:
    """Checks the arguments of --allow-change: keys of the config, sections, or "classes".

    Raises:
      ConfigError: For an unknown name, with the nearest known one, or for a key that no run can
        change.
    """
    for name in names:
        known = [key for key in (*SCHEMA, CLASSES) if _covers(name, key)]
        if not known:
            near = difflib.get_close_matches(_bare(name), [*SCHEMA, CLASSES], n=1)
            raise ConfigError(
                f"--allow-change {name}: no such key",
                f"did you mean {near[0]}?" if near else "python -m dsr_jax.config lists all keys",
            )
        fixed = [key for key in known if key in SCHEMA and SCHEMA[key].change is Change.NEVER]
        if fixed == known:
            raise ConfigError(
                f"--allow-change {name}: this decides the parameters, which no run can change",
                "start a new run in another --workdir",
            )


def is_allowed(key: str, names: Iterable[str]) -> bool:
    """Returns whether --allow-change names this key or its section."""
    return any(_covers(name, key) for name in names)


def _covers(name: str, key: str) -> bool:
    bare = _bare(name)
    return key == bare or key.startswith(f"{bare}.")


def _bare(name: str) -> str:
    return name.removeprefix("config.")


def _change_of(name: str, old: Mapping[str, Any]) -> Change:
    """Returns whether a key may change, also one that the schema does not list."""
    if name in SCHEMA:
        return SCHEMA[name].change
    # A denoiser's own keys are fields of its class; those younger than the run changed nothing.
    is_field = name.startswith("model.") and name in old
    return Change.NEVER if is_field else Change.FREE


def _plain(flat: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(v) if isinstance(v, tuple) else v for name, v in flat.items()}
