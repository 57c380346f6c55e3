"""Logical axes, and the rules that map them to mesh axes.

A parameter or activation names the meaning of each of its dimensions ("embed", "act_batch", ...).
A rule set says which mesh axes a meaning is split over. Flax treats a name without a rule as
replicated, silently; here an unknown, colliding or missing name raises.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsr_jax.core.errors import MeshError
from dsr_jax.core.typing import Array, PyTree

MESH_AXES = ("data", "fsdp", "tensor")

LOGICAL_AXES: Mapping[str, str] = {
    # Parameters.
    "embed": "model width, the dimension that FSDP splits",
    "mlp": "hidden units of a feed-forward block",
    "heads": "attention heads",
    "kv_heads": "heads of keys and values, where fewer than those of queries",
    "head_dim": "channels of one head",
    "modulation": "outputs of an adaLN projection",
    "layers": "depth of a scanned stack",
    "patch": "rows or columns inside a patch",
    "channels": "channels of the input or output",
    "classes": "rows of the label table",
    "vocabulary": "rows of the language model's token table",
    "frequencies": "Fourier features of the time embedding",
    "tokens": "positions or registers of a learned table",
    # Activations.
    "act_batch": "samples",
    "act_len": "tokens",
    "act_embed": "model width",
    "act_heads": "attention heads",
    "act_head_dim": "channels of one head",
    "act_mlp": "hidden units of a feed-forward block",
    "act_modulation": "outputs of an adaLN projection",
}

Rules = tuple[tuple[str, tuple[str, ...]], ...]

_REPLICATED: dict[str, tuple[str, ...]] = dict.fromkeys(LOGICAL_AXES, ())

_TENSOR: Mapping[str, tuple[str, ...]] = {
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "modulation": ("tensor",),
    "act_batch": ("data", "fsdp"),
    "act_heads": ("tensor",),
    "act_mlp": ("tensor",),
}

_PRESETS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    # Parameters split over `fsdp` along the width and over `tensor` along heads and hidden units.
    "fsdp": {"embed": ("fsdp",), **_TENSOR},
    # As "fsdp", but parameters are whole along the width: what splits is in _UPDATE_PRESETS.
    "zero1": _TENSOR,
    # Every device holds all parameters; only the batch is split.
    "replicated": {"act_batch": ("data", "fsdp", "tensor")},
}

_UPDATE_PRESETS: Mapping[str, str] = {"zero1": "fsdp"}
"""Presets whose moments and EMA weights are sharded as the parameters of another preset."""


def check_rules(rules: Rules) -> None:
    """Checks that every logical axis has exactly one rule and every mesh axis exists.

    Raises:
      MeshError: For an unknown, repeated or missing logical axis, or an unknown mesh axis.
    """
    names = [name for name, _ in rules]
    known = f"known logical axes: {', '.join(LOGICAL_AXES)}"
    for name, mesh_axes in rules:
        if name not in LOGICAL_AXES:
            raise MeshError(f"sharding rule for unknown logical axis {name!r}", known)
        if names.count(name) > 1:
            raise MeshError(f"logical axis {name!r} has more than one sharding rule")
        for axis in mesh_axes:
            if axis not in MESH_AXES:
                raise MeshError(
                    f"sharding rule {name!r} -> {mesh_axes} uses unknown mesh axis {axis!r}",
                    f"mesh axes are {', '.join(MESH_AXES)}",
                )
    if missing := [name for name in LOGICAL_AXES if name not in names]:
        raise MeshError(f"no sharding rule for logical axes {missing}", "map them to () or to axes")


def make_rules(name: str, overrides: Sequence[tuple[str, Sequence[str]]] = ()) -> Rules:
    """Returns a checked rule set.

    Args:
      name: Preset, "fsdp", "zero1" or "replicated".
      overrides: `(logical axis, mesh axes)` pairs that replace the preset's.

    Raises:
      MeshError: If the preset or an axis is unknown.
    """
    if name not in _PRESETS:
        raise MeshError(f"unknown sharding rules {name!r}", f"choose from {', '.join(_PRESETS)}")
    for axis, _ in overrides:
        if axis not in LOGICAL_AXES:
            raise MeshError(
                f"sharding override for unknown logical axis {axis!r}",
                f"known logical axes: {', '.join(LOGICAL_AXES)}",
            )
    replaced = {axis: tuple(mesh_axes) for axis, mesh_axes in overrides}
    rules = tuple({**_REPLICATED, **_PRESETS[name], **replaced}.items())
    check_rules(rules)
    return rules


def make_update_rules(name: str, overrides: Sequence[tuple[str, Sequence[str]]] = ()) -> Rules:
    """Returns the rules of what only the update reads, moments and EMA; see `make_rules`.

    They are the parameters' own, except under "zero1" (Rajbhandari et al. 2020, stage 1), where
    every device of `fsdp` holds the whole parameters and the rest of the state is split over it.
    """
    make_rules(name)
    return make_rules(_UPDATE_PRESETS.get(name, name), overrides)


def partition_spec(names: Sequence[str | None], rules: Rules) -> PartitionSpec:
    """Places an array's logical axes on mesh axes.

    Args:
      names: One logical axis (or None for a dimension that is never split) per dimension.
      rules: A checked rule set.

    Raises:
      MeshError: For an unknown name, or two dimensions that would share one mesh axis.
    """
    table = dict(rules)
    entries: list[tuple[str, ...] | str | None] = []
    taken: dict[str, str] = {}
    for name in names:
        if name is not None and name not in table:
            raise MeshError(
                f"unknown logical axis {name!r} in {tuple(names)}",
                f"known logical axes: {', '.join(LOGICAL_AXES)}",
            )
        axes = table[name] if name is not None else ()
        for axis in axes:
            if axis in taken:
                raise MeshError(
                    f"logical axes {taken[axis]!r} and {name!r} of one array {tuple(names)} both "
                    f"land on mesh axis {axis!r}",
                    "give one of them another mesh axis in config.sharding.overrides",
                )
            taken[axis] = str(name)
        entries.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*entries)


def fit_spec(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Drops the mesh axes that do not divide their dimension: XLA shards evenly or not at all."""
    entries: list[tuple[str, ...] | str | None] = []
    for size, entry in zip(shape, tuple(spec) + (None,) * (len(shape) - len(spec)), strict=True):
        axes = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        shards = math.prod(mesh.shape[axis] for axis in axes)
        entries.append(entry if axes and size % shards == 0 else None)
    return PartitionSpec(*entries)


@dataclass(frozen=True)
class Constrain:
    """Pins an activation's layout: `constrain(x, "act_batch", "act_len", "act_embed")`.

    Rules and mesh are explicit fields because JAX's trace cache does not key on an ambient rule
    context: a function once traced without it would stay unconstrained. Without a mesh the names
    are still checked and `x` is returned as it is.

    Attributes:
      rules: A checked rule set.
      mesh: The mesh, or None where there is one device or the caller shards by other means.
    """

    rules: Rules = field(default_factory=lambda: make_rules("fsdp"))
    mesh: Mesh | None = None

    def __call__(self, x: Array, *names: str | None) -> Array:
        """Returns `x` with the layout that the rules give to `names`, one per dimension."""
        if len(names) != x.ndim:
            raise MeshError(f"{len(names)} logical axes {names} for an array of shape {x.shape}")
        spec = partition_spec(names, self.rules)
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def fitted_spec(self, shape: tuple[int, ...], names: Sequence[str | None]) -> PartitionSpec:
        """Returns how an array of this shape is split: where names say and shards are even.

        Without a mesh it is whole.
        """
        spec = partition_spec(names, self.rules)
        if self.mesh is None:
            return PartitionSpec(*(None for _ in shape))
        return fit_spec(spec, shape, self.mesh)

    def on_each_device(
        self, function: Callable[..., Any], in_specs: PyTree, out_specs: PyTree
    ) -> Callable[..., Any]:
        """Runs a function on each device's part, where the compiler could not partition it.

        Args:
          function: Takes and returns arrays, or trees of them.
          in_specs: How each argument is split; a spec may stand for a tree.
          out_specs: The same of what it returns.
        """
        if self.mesh is None or self.mesh.size == 1:
            return function
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
