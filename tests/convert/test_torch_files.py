"""Torch files: what passes, what is refused by the name of its class, what is no weights at all."""

import argparse
import collections
import pathlib
import pickle
import types
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from dsr_jax.convert.readers import read_state
from dsr_jax.convert.torch_files import to_numpy
from dsr_jax.core.errors import ConversionError
from tests.requirements import require

torch = require("torch", "torch")
WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3)}


def saved(path: Path, beside: Any, zipped: bool = True) -> Path:
    """Writes weights and an object beside them."""
    torch.save({"ema": WEIGHTS, "x": beside}, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "harmless",
    [
        np.float64(2.3),
        np.int64(3),
        np.bool_(True),
        np.random.RandomState(0).get_state(),
        np.array(["name"]),
        argparse.Namespace(model="SiT-XL/2"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_numpys_values_and_command_lines_pass(harmless: Any, zipped: bool, tmp_path: Path) -> None:
    state = read_state(saved(tmp_path / "x.pt", harmless, zipped))
    np.testing.assert_array_equal(state["a.weight"], WEIGHTS["a.weight"].numpy())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("beside", "name"),
    [
        (pathlib.PurePosixPath("/x"), "pathlib.PurePosixPath"),
        (collections.defaultdict(list), "collections.defaultdict"),
        (types.SimpleNamespace(lr=1), "types.SimpleNamespace"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_refusal_names_the_class(beside: Any, name: str, zipped: bool, tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt", beside, zipped)
    with pytest.raises(ConversionError, match=rf"x\.pt is refused: .*{name}") as caught:
        read_state(path)
    message = str(caught.value)
    assert "\x1b" not in message and "weights_only" not in message
    assert "state_dict()" in caught.value.remedy


def test_another_pickle_protocol_is_a_refusal_with_a_reason(tmp_path: Path) -> None:
    torch.save({"ema": WEIGHTS}, tmp_path / "x.pt", pickle_protocol=4)
    with (
        pytest.warns(UserWarning, match="pickle protocol"),
        pytest.raises(ConversionError, match=r"x\.pt is refused: \S+.*\n.*default protocol"),
    ):
        read_state(tmp_path / "x.pt")
    (tmp_path / "y.pt").write_bytes(pickle.dumps({"x": types.SimpleNamespace()}, protocol=2))
    with pytest.raises(ConversionError, match=r"types\.SimpleNamespace"):
        read_state(tmp_path / "y.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin"])
@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("<html>quota exceeded</html>", "a web page"),
        ("\n<!DOCTYPE html>\n<title>Sign in</title>", "a web page"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 123\n", "git-lfs"),
        ("", "an empty file"),
    ],
)
def test_failed_downloads_are_reported_as_such(
    text: str, name: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_text(text)
    with pytest.raises(ConversionError, match=rf"weights\{suffix} is .*{name}.*\n.*download"):
        read_state(path)


def test_tensors_are_views_in_their_own_types(tmp_path: Path) -> None:
    whole = torch.tensor([1.5, -2.0])
    for kind in ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64"):
        tensor = whole.to(getattr(torch, kind))
        array = to_numpy("x", tensor)
        assert array.dtype == np.dtype(getattr(ml_dtypes, kind, kind)), kind
        assert array.ctypes.data == tensor.data_ptr()
        np.testing.assert_array_equal(array.astype(np.float32), tensor.float().numpy())
    with pytest.raises(ConversionError, match="x is a sparse tensor"):
        to_numpy("x", whole.to_sparse())
    with pytest.raises(ConversionError, match="x is on PyTorch's meta device"):
        to_numpy("x", whole.to("meta"))


def test_files_are_mapped(tmp_path: Path) -> None:
    """Values that change on disk change in the array, which therefore was not read."""
    torch.save({"x": torch.full((4096,), 3.0)}, tmp_path / "x.pt")
    state = read_state(tmp_path / "x.pt")
    content = (tmp_path / "x.pt").read_bytes()
    number = np.float32(3).tobytes()
    place = content.index(number * 4096)
    with open(tmp_path / "x.pt", "r+b") as file:
        file.seek(place)
        file.write(np.float32(5).tobytes() * 4096)
    assert (state["x"] == 5).all()
