"""Names in state dicts: removes additions of training wrappers, and tensors that the user drops."""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from dsr_jax.core.errors import ConversionError

_WRAPPERS = frozenset(
    {
        "module",  # DDP, DeepSpeed, AveragedModel
        "_orig_mod",  # torch.compile
        "_orig_module",  # torch_xla
        "_checkpoint_wrapped_module",  # activation checkpointing
        "_fsdp_wrapped_module",
        "_fpw_module",  # FSDP before PyTorch 1.13
        "_forward_module",  # Lightning Fabric
    }
)
"""Parts of names that wrappers add wherever a module is wrapped; no network here has them."""

_NETWORKS = ("ema_model", "model_ema", "ema", "online_model", "model")
"""Attributes under which Lightning modules and ema_pytorch keep networks; EMA weights first."""

_COUNTERS = frozenset({"step", "initted", "n_averaged", "num_updates", "decay"})
"""Single numbers that EMA wrappers store beside the weights."""

_FLATTENED = frozenset({"_flat_param", "flat_param"})


def unwrap(path: str, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the state under the names that it has without wrappers, and without their counters.

    Args:
      path: The file, for errors.
      state: Arrays by name.

    Raises:
      ConversionError: If two names become one, or FSDP has flattened the parameters.
    """
    unwrapped: dict[str, np.ndarray] = {}
    for full_name, value in state.items():
        if full_name in _COUNTERS and value.size == 1:
            continue
        parts = full_name.split(".")
        if not _FLATTENED.isdisjoint(parts):
            raise ConversionError(
                f"{path} holds {full_name}: parameters that FSDP has flattened, without their "
                "names and shapes",
                "save it inside FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT)",
            )
        name = ".".join(part for part in parts if part not in _WRAPPERS)
        if name in unwrapped:
            raise ConversionError(
                f"{path} holds {name} twice: with and without the names that wrappers add "
                f"({', '.join(sorted(_WRAPPERS))})",
                "save the weights of one model only",
            )
        unwrapped[name] = value
    return unwrapped


def split_networks(state: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Returns the networks of a state that keeps each below an attribute of its own.

    Args:
      state: Arrays by name, without wrappers' names.

    Returns:
      States without the attribute's name, by attribute, EMA weights first; {} unless every name
      begins with an attribute that Lightning modules or ema_pytorch have.
    """
    networks: dict[str, dict[str, np.ndarray]] = {name: {} for name in _NETWORKS}
    for full_name, value in state.items():
        attribute, _, name = full_name.partition(".")
        if attribute not in networks or not name:
            return {}
        networks[attribute][name] = value
    return {name: network for name, network in networks.items() if network}


def drop(
    state: Mapping[str, np.ndarray], patterns: Sequence[str], source: str
) -> dict[str, np.ndarray]:
    """Returns the state without the tensors that patterns such as `projectors.*` name.

    Raises:
      ConversionError: If a pattern names none.
    """
    for pattern in patterns:
        if not fnmatch.filter(state, pattern):
            raise ConversionError(
                f"--drop {pattern!r} names no tensor of {source}",
                f"its names begin with {', '.join(first_parts(state)[:8])}",
            )
    return {
        name: value
        for name, value in state.items()
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }


def drop_flags(unknown: Iterable[str], known: Iterable[str]) -> str:
    """Returns the --drop flags that leave unknown tensors out.

    Args:
      unknown: Names that a model lacks.
      known: Names that it has.

    Returns:
      Such as "--drop 'projectors.*'"; "" where they are below names of the model itself, which
      then is of other sizes.
    """
    ours, patterns = set(first_parts(known)), []
    for name in unknown:
        first, dot, _ = name.partition(".")
        if first in ours:
            return ""
        pattern = f"--drop '{first}{'.*' if dot else ''}'"
        if pattern not in patterns:
            patterns.append(pattern)
    return " ".join(patterns)


def first_parts(names: Iterable[str]) -> list[str]:
    """Returns the parts before the first dot, each once, in order."""
    return list(dict.fromkeys(name.partition(".")[0] for name in names))
