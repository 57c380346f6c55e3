"""Safetensors files mapped and streamed: the library's own bytes, and one piece in memory."""

import io
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load, save, save_file

from dsr_jax.convert.tensors import LazyArray, map_safetensors, write_safetensors
from dsr_jax.core.errors import ConversionError

TYPES = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int64, np.uint8, np.bool_)
ARRAYS = {
    f'x{number}."é"': np.arange(6).reshape(2, 3).astype(dtype) for number, dtype in enumerate(TYPES)
} | {"empty": np.zeros((0, 3), np.float32), "scalar": np.array(3, np.float32)}


def written(tensors: dict[str, np.ndarray | LazyArray]) -> bytes:
    file = io.BytesIO()
    write_safetensors(file, tensors)
    return file.getvalue()


def test_bytes_are_those_of_the_library() -> None:
    assert written(dict(ARRAYS)) == save(ARRAYS)
    transposed = ARRAYS["empty"].T, np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert (load(written({"x": transposed[1]}))["x"] == transposed[1]).all()
    assert written({}) == save({})


def test_a_lazy_array_is_written_piece_by_piece() -> None:
    alive = []

    def pieces():
        for number in range(3):
            alive.append(number)
            yield np.full((2, 4), number, np.float32).T

    lazy = LazyArray((3, 4, 2), np.dtype(np.float32), pieces)
    assert not alive
    np.testing.assert_array_equal(load(written({"x": lazy}))["x"], lazy.read())
    assert lazy.read()[:, 0, 0].tolist() == [0, 1, 2]


def test_mapped_arrays_are_the_librarys(tmp_path: Path) -> None:
    save_file(ARRAYS, tmp_path / "x.safetensors", metadata={"format": "np"})
    mapped = map_safetensors(tmp_path / "x.safetensors")
    assert set(mapped) == set(ARRAYS)
    for name, value in ARRAYS.items():
        assert mapped[name].dtype == value.dtype and not mapped[name].flags.writeable
        np.testing.assert_array_equal(mapped[name], value)
    save_file({}, tmp_path / "none.safetensors")
    assert map_safetensors(tmp_path / "none.safetensors") == {}


def test_types_that_numpy_lacks_are_named(tmp_path: Path) -> None:
    content = save({"x": np.zeros((2, 2), np.uint8)})
    path = tmp_path / "x.safetensors"
    path.write_bytes(content.replace(b'"U8","shape":[2,2]', b'"F4","shape":[4,2]'))
    with pytest.raises(ConversionError, match=r"x\.safetensors holds tensors of type F4"):
        map_safetensors(path)
