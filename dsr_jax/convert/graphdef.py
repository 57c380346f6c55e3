"""Constants of a frozen TensorFlow graph, read without TensorFlow.

A `.pb` file is a GraphDef in protobuf's wire format. Only the few fields that a constant needs are
looked at (graph.proto, node_def.proto, attr_value.proto, tensor.proto); what does not fit raises.
Source: spec evaluation 5.2.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dsr_jax.core.errors import ConversionError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_SIZES = {_FIXED64: 8, _FIXED32: 4}
_FLOAT = 1
"""DT_FLOAT; constants of other types (sizes, axes) are no weights."""

Value = int | memoryview


class _Malformed(Exception):
    """The bytes do not follow the format."""


def read_constants(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads every float32 constant of a GraphDef by its node's name.

    Raises:
      ConversionError: If the file is damaged, or no graph with constants.
    """
    path = Path(path)
    try:
        constants = dict(_constants(memoryview(path.read_bytes())))
    except _Malformed as error:
        raise ConversionError(
            f"{path} cannot be read as a TensorFlow graph: {error}",
            "it is incomplete or of another format; copy it again",
        ) from error
    if not constants:
        raise ConversionError(f"{path} holds no constants", "give a frozen graph")
    return constants


def _constants(graph: memoryview) -> Iterator[tuple[str, np.ndarray]]:
    for field, node in _fields(graph):
        if field != 1:
            continue
        name = operation = ""
        tensor = None
        for part, value in _fields(_message(node)):
            if part == 1:
                name = _text(value)
            elif part == 2:
                operation = _text(value)
            elif part == 5:
                tensor = _tensor_of(_message(value)) or tensor
        if operation == "Const":
            array = _array(name, tensor)
            if array is not None:
                yield name, array


def _tensor_of(entry: memoryview) -> memoryview | None:
    """Returns the tensor of an attribute called "value"; None for other attributes."""
    fields = dict(_fields(entry))
    if _text(fields.get(1, memoryview(b""))) != "value" or 2 not in fields:
        return None
    tensor = dict(_fields(_message(fields[2]))).get(8)
    return None if tensor is None else _message(tensor)


def _array(name: str, tensor: memoryview | None) -> np.ndarray | None:
    """Returns the values of a TensorProto; None if they are not float32."""
    if tensor is None:
        raise _Malformed(f"constant {name!r} has no value")
    kind, content, single = 0, memoryview(b""), []
    shape: tuple[int, ...] = ()
    for field, value in _fields(tensor):
        if field == 1 and isinstance(value, int):
            kind = value
        elif field == 2:
            shape = tuple(_sizes(_message(value)))
        elif field == 4:
            content = _message(value)
        elif field == 5:
            single.append(bytes(_message(value)))
    if kind != _FLOAT:
        return None
    raw = bytes(content) or b"".join(single)
    count = math.prod(shape)
    # A single number fills the whole tensor.
    if len(raw) not in (4 * count, 4) or not raw:
        raise _Malformed(f"constant {name!r} of shape {list(shape)} has {len(raw)} bytes")
    values = np.frombuffer(raw, "<f4").astype(np.float32)
    return np.broadcast_to(values if len(values) == count else values[0], (count,)).reshape(shape)


def _sizes(shape: memoryview) -> Iterator[int]:
    for field, dimension in _fields(shape):
        if field == 2:
            size = dict(_fields(_message(dimension))).get(1, 0)
            if not isinstance(size, int) or size >= 2**31:
                raise _Malformed("a dimension of unknown size")
            yield size


def _fields(message: memoryview) -> Iterator[tuple[int, Value]]:
    """Yields (field number, value) of a message; fixed-size values as their bytes."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        field, wire = tag >> 3, tag & 7
        if field == 0:
            raise _Malformed(f"field 0 at byte {position}")
        if wire == _VARINT:
            value, position = _varint(message, position)
            yield field, value
            continue
        if wire == _BYTES:
            size, position = _varint(message, position)
        elif wire in _FIXED_SIZES:
            size = _FIXED_SIZES[wire]
        else:
            raise _Malformed(f"wire type {wire} at byte {position}")
        if position + size > len(message):
            raise _Malformed(f"{size} bytes announced, {len(message) - position} left")
        yield field, message[position : position + size]
        position += size


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """Returns a varint (seven bits per byte) and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise _Malformed("it ends within a number")
        byte = message[position]
        value, position = value | (byte & 127) << shift, position + 1
        if byte < 128:
            return value, position
    raise _Malformed("a number of more than ten bytes")


def _message(value: Value) -> memoryview:
    if isinstance(value, int):
        raise _Malformed("a number where a message must be")
    return value


def _text(value: Value) -> str:
    try:
        return bytes(_message(value)).decode()
    except UnicodeDecodeError as error:
        raise _Malformed("a name that is not text") from error
