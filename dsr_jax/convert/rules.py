"""The rule engine: one declarative table per model serves both directions.

A rule names a PyTorch tensor, the Flax parameter it becomes, and the change of layout between
them. Layers that Flax keeps stacked along a scan are one rule with `{i}` in the source's name, for
however many stacks the depth is cut into. Nothing is guessed: every source key is used by a rule
or named as dropped, every parameter of the model is set, every shape is checked.
"""

import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from dsr_jax.convert.names import drop_flags
from dsr_jax.convert.tensors import LazyArray
from dsr_jax.core.errors import ConversionError
from dsr_jax.core.trees import flatten_names, unflatten_names
from dsr_jax.models.depth import Stack as Stack

_SHOWN = 10
_OTHER_MODEL = (
    "check that the file is of the model you named, and its sizes (heads, register start, "
    "registers), and that you chose the right entry of the file"
)


@dataclass(frozen=True)
class Layout:
    """An invertible change of layout: permute the axes, then split some of them.

    Attributes:
      permute: Source axes in the target's order; () leaves them as they are.
      split: For each permuted axis the target axes it becomes, () for one axis unchanged.
    """

    permute: tuple[int, ...] = ()
    split: tuple[tuple[int, ...], ...] = ()

    def to_flax(self, x: np.ndarray) -> np.ndarray:
        """Converts PyTorch's layout to Flax's.

        Raises:
          ValueError: If an axis does not split as asked.
        """
        x = x.transpose(self.permute) if self.permute else x
        shape: list[int] = []
        for axis, size in enumerate(x.shape):
            parts = self._parts(axis)
            if parts and math.prod(parts) != size:
                raise ValueError(f"axis of {size} does not split into {parts}")
            shape += parts or (size,)
        return x.reshape(shape)

    def to_torch(self, x: np.ndarray) -> np.ndarray:
        """Converts Flax's layout to PyTorch's."""
        shape: list[int] = []
        rest = list(x.shape)
        axis = 0
        while rest:
            count = len(self._parts(axis)) or 1
            shape.append(math.prod(rest[:count]))
            rest, axis = rest[count:], axis + 1
        x = x.reshape(shape)
        return x.transpose(np.argsort(self.permute)) if self.permute else x

    def _parts(self, axis: int) -> tuple[int, ...]:
        return self.split[axis] if axis < len(self.split) else ()


SAME = Layout()
LINEAR = Layout((1, 0))
"""[out, in] -> [in, out]."""
CONV = Layout((2, 3, 1, 0))
"""[out, in, h, w] -> [h, w, in, out]."""


def linear(inputs: Sequence[int] = (), outputs: Sequence[int] = ()) -> Layout:
    """Returns the layout [out, in] -> [*inputs, *outputs]; () keeps that side as one axis."""
    return Layout((1, 0), (tuple(inputs), tuple(outputs)))


def vector(*parts: int) -> Layout:
    """Returns the layout [n] -> [*parts]."""
    return Layout((), (parts,))


@dataclass(frozen=True)
class Rule:
    """One tensor, or one of every layer.

    Attributes:
      source: PyTorch name, with `{i}` for the layer's number in rules of a stack.
      target: Flax path; below the stack's in rules of a stack.
      layout: Change of layout of one layer.
      stacks: Stacks of the layers; () for a tensor outside any stack.
    """

    source: str
    target: str
    layout: Layout = SAME
    stacks: tuple[Stack, ...] = ()

    def in_stacks(self, stacks: tuple[Stack, ...]) -> "Rule":
        """Returns a rule for all layers of stacks, from a rule for names below a layer's name."""
        return Rule("blocks.{i}." + self.source, self.target, self.layout, stacks)

    def pieces(self) -> Iterator[tuple[str, list[str]]]:
        """Yields (Flax path, PyTorch names), one name per layer of a stack."""
        if not self.stacks:
            yield self.target, [self.source]
        for stack in self.stacks:
            names = [self.source.replace("{i}", str(i)) for i in range(stack.first, stack.end)]
            yield f"{stack.name}/{self.target}", names

    def source_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of one source tensor of a parameter (all layers of a stack)."""
        layer = shape[1:] if self.stacks else shape
        return self.layout.to_torch(np.empty(layer, np.bool_)).shape


@dataclass(frozen=True)
class RuleSet:
    """All rules of a model.

    Attributes:
      rules: One per tensor, or per layer's tensor.
      shapes: Shape of every parameter of the model, by Flax path.
      dropped: Patterns of source keys that are not parameters of ours: constants, or unused.
    """

    rules: tuple[Rule, ...]
    shapes: Mapping[str, tuple[int, ...]]
    dropped: tuple[str, ...] = field(default=())

    def is_dropped(self, key: str) -> bool:
        """Whether a source key is named as dropped."""
        return any(fnmatch.fnmatchcase(key, pattern) for pattern in self.dropped)


def shapes_of(abstract: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by Flax path of a tree of arrays or `ShapeDtypeStruct`s."""
    return {name: tuple(leaf.shape) for name, leaf in flatten_names(abstract).items()}


def torch_to_flax(state: Mapping[str, np.ndarray], rules: RuleSet) -> dict[str, Any]:
    """Converts a state dict; arguments and errors are those of `lazy_params`.

    Returns:
      The parameter tree, of new arrays.
    """
    flat = flatten_names(lazy_params(state, rules))
    return unflatten_names({name: leaf.read() for name, leaf in flat.items()})


def lazy_params(state: Mapping[str, np.ndarray], rules: RuleSet) -> dict[str, Any]:
    """Checks a state dict against a model; what `files.save_converted` writes tensor by tensor.

    Half-precision floats become float32, which holds them exactly.

    Args:
      state: Arrays by PyTorch name.
      rules: The model's table.

    Returns:
      The parameter tree, of `LazyArray`s.

    Raises:
      ConversionError: Listing all keys that are missing, left over or of another shape; or all
        tensors that are not floats, or hold numbers that are not finite.
    """
    flat: dict[str, LazyArray] = {}
    used: set[str] = set()
    missing: list[str] = []
    misshaped: list[str] = []
    pieces = [(rule, *piece) for rule in rules.rules for piece in rule.pieces()]
    for rule, target, names in pieces:
        used.update(names)
        absent = [name for name in names if name not in state]
        missing += absent
        if absent or target not in rules.shapes:
            continue
        wanted = rule.source_shape(rules.shapes[target])
        wrong = [
            f"{name} is {list(state[name].shape)}, the model's {target} needs {list(wanted)}"
            for name in names
            if state[name].shape != wanted
        ]
        misshaped += wrong
        if not wrong:
            flat[target] = _lazy(rule, rules.shapes[target], [state[name] for name in names])
    targets = {target for _, target, _ in pieces}
    unknown = [key for key in state if key not in used and not rules.is_dropped(key)]
    flags = drop_flags(unknown, used)
    _raise_unless_empty(
        "the state dict does not fit the model",
        {
            "missing from the state dict": missing,
            "not known to the model": unknown,
            "of another shape": misshaped,
            "parameters that no rule sets": [name for name in rules.shapes if name not in targets],
            "rules for parameters that the model lacks": sorted(targets - set(rules.shapes)),
        },
        f"leave out what only training needed: {flags}; or {_OTHER_MODEL}" if flags else "",
    )
    check_values({name: state[name] for name in state if name in used})
    return unflatten_names(flat)


def _lazy(rule: Rule, shape: tuple[int, ...], layers: Sequence[np.ndarray]) -> LazyArray:
    def pieces() -> Iterator[np.ndarray]:
        for layer in layers:
            yield rule.layout.to_flax(layer.astype(dtype, copy=False))

    dtype = np.result_type(*(_stored_dtype(layer) for layer in layers))
    return LazyArray(shape, dtype, pieces)


def check_values(state: Mapping[str, np.ndarray]) -> None:
    """Checks that all tensors are floats of at least 16 bits and finite.

    Raises:
      ConversionError: Naming those that are not.
    """
    types = {name: x.dtype for name, x in state.items() if not _is_float(x.dtype)}
    _raise_unless_empty(
        "weights of types that are not converted, since they hold quantized values",
        {"tensors": [f"{name} is {dtype}" for name, dtype in types.items()]},
        "use the file in float32, bfloat16 or float16",
    )
    wrong = {
        name: x.size - finite
        for name, x in state.items()
        if (finite := int(np.count_nonzero(np.isfinite(x)))) < x.size
    }
    overflow = any(state[name].dtype == np.float16 for name in wrong)
    _raise_unless_empty(
        "weights that are NaN or infinite",
        {
            "tensors": [
                f"{name}: {count} of {state[name].size} numbers ({state[name].dtype})"
                for name, count in wrong.items()
            ]
        },
        "float16 ends at 65504, above which numbers became infinite: use the file in float32 or "
        "bfloat16"
        if overflow
        else "the training had diverged, or the file is damaged: use an earlier checkpoint",
    )


def _is_float(dtype: np.dtype) -> bool:
    return dtype in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)


def _stored_dtype(x: np.ndarray) -> np.dtype:
    """Returns float32 for half-precision dtypes, and other dtypes unchanged."""
    return np.dtype(np.float32) if x.dtype.itemsize == 2 else x.dtype


def flax_to_torch(params: Any, rules: RuleSet) -> dict[str, np.ndarray]:
    """Converts a parameter tree back; the exact inverse of `torch_to_flax`.

    Args:
      params: The tree, of arrays.
      rules: The model's table.

    Returns:
      Arrays by PyTorch name, without the dropped ones.

    Raises:
      ConversionError: Listing all parameters that are missing, left over or of another shape.
    """
    flat = {name: np.asarray(leaf) for name, leaf in flatten_names(params).items()}
    state: dict[str, np.ndarray] = {}
    missing: list[str] = []
    targets: set[str] = set()
    misshaped = [
        f"{name} is {list(flat[name].shape)}, the model has {list(shape)}"
        for name, shape in rules.shapes.items()
        if name in flat and flat[name].shape != shape
    ]
    for rule in rules.rules:
        for target, names in rule.pieces():
            targets.add(target)
            if target not in flat:
                missing.append(target)
            elif flat[target].shape == rules.shapes.get(target):
                layers = flat[target] if rule.stacks else [flat[target]]
                for name, layer in zip(names, layers, strict=True):
                    state[name] = np.ascontiguousarray(rule.layout.to_torch(layer))
    _raise_unless_empty(
        "the parameters do not fit the table",
        {
            "missing parameters": missing,
            "parameters that the model or its table lacks": [
                name for name in flat if name not in targets or name not in rules.shapes
            ],
            "of another shape": misshaped,
        },
    )
    return state


def _raise_unless_empty(problem: str, lists: Mapping[str, Sequence[str]], remedy: str = "") -> None:
    lines = []
    for title, names in lists.items():
        if names:
            lines.append(f"  {title} ({len(names)}):")
            lines += [f"    {name}" for name in list(names)[:_SHOWN]]
            if len(names) > _SHOWN:
                lines.append(f"    ... and {len(names) - _SHOWN} more")
    if lines:
        raise ConversionError("\n".join([problem, *lines]), remedy or _OTHER_MODEL)


def unstack_layers(tree: Mapping[str, Any], stacks: Sequence[Stack]) -> list[dict[str, Any]]:
    """Returns the per-layer trees of scanned stacks, in the source's order of layers."""
    layers: list[dict[str, Any]] = []
    for stack in stacks:
        flat = flatten_names(tree[stack.name])
        for i in range(stack.end - stack.first):
            layers.append(unflatten_names({name: leaf[i] for name, leaf in flat.items()}))
    return layers


def stack_layers(layers: Sequence[Any], stacks: Sequence[Stack]) -> dict[str, Any]:
    """Stacks per-layer trees; the inverse of `unstack_layers`, for any split into stacks.

    Raises:
      ConversionError: If the stacks do not cover the layers.
    """
    if sum(stack.end - stack.first for stack in stacks) != len(layers):
        raise ConversionError(f"{len(layers)} layers do not fill the stacks {list(stacks)}")
    flat = [flatten_names(layer) for layer in layers]
    return {
        stack.name: unflatten_names(
            {
                name: np.stack([np.asarray(layer[name]) for layer in flat[stack.first : stack.end]])
                for name in flat[0]
            }
        )
        for stack in stacks
    }
