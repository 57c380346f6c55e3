"""Every reader takes any content: it reads it, or raises an error of ours that names the file.

    DSR_FUZZ_EXAMPLES=20000 python -m pytest -n0 tests/faults/test_fuzz.py -m slow

runs the long search; the smallest inputs that it finds become cases of `FOUND`.
"""

import io
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from dsr_jax.core.errors import DataError, DsrError
from dsr_jax.sampling.labels import load_labels
from tests.faults.readers import READERS, Reader

FEW, MANY = 4, int(os.environ.get("DSR_FUZZ_EXAMPLES", "60"))
MEMORY = 2**28
"""Bytes that a reader may allocate; the valid files are of a few KB."""

VALUES = st.one_of(
    st.sampled_from([None, True, -1, 0, 2**31, 2**63, 2**200, 1e400, float("nan"), 0.5, ""]),
    st.sampled_from(["x", "../x", "\ud800", "9" * 5000, [], {}, [[]], {"x": {}}, [1, "x", None]]),
    st.text(max_size=4),
    st.integers(-(2**64), 2**64),
)


def replace_some(value: Any, draw: Any) -> Any:
    """Replaces, removes or adds a value somewhere in a JSON document."""
    if not isinstance(value, (dict, list)) or not value or draw(st.integers(0, 3)) == 0:
        return draw(VALUES)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = keys[draw(st.integers(0, len(keys) - 1))]
    changed = value.copy()
    action = draw(st.integers(0, 5))
    if action == 0:
        del changed[key]
    elif action == 1 and isinstance(value, dict):
        changed[draw(st.text(max_size=3))] = draw(VALUES)
    else:
        changed[key] = replace_some(value[key], draw)
    return changed


@st.composite
def damaged(draw: Any, content: bytes, kind: str) -> bytes:
    """Damages the content of a file."""
    if kind == "json" and draw(st.booleans()):
        return json.dumps(replace_some(json.loads(content), draw)).encode()
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        action, where = draw(st.integers(0, 4)), draw(st.integers(0, max(len(changed) - 1, 0)))
        if action == 0:
            del changed[where:]
        elif action == 1:
            del changed[where : where + draw(st.integers(1, 16))]
        elif action == 2:
            changed[where:where] = draw(st.binary(max_size=8))
        elif changed:
            changed[where] = draw(st.integers(0, 255))
    return bytes(changed)


def read_damaged(reader: Reader, folder: Path, content: bytes) -> None:
    """Reads a valid folder in which one file has other content.

    Raises:
      AssertionError: For another error than one of ours with the file's name, or much memory.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(folder.with_name("valid"), folder)
    (folder / reader.file).write_bytes(content)
    tracemalloc.start()
    try:
        reader.read(folder)
    except DsrError as error:
        # Some errors are about files together, such as weights and their digest.
        assert str(folder) in str(error) or Path(reader.file).name in str(error), error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MEMORY


def make_valid(reader: Reader, folder: Path) -> bytes:
    """Makes the reader's valid folder; returns the content of the file."""
    valid = folder / "valid"
    valid.mkdir()
    reader.make(valid)
    content = (valid / reader.file).read_bytes()
    read_damaged(reader, folder / "read", content)
    return content


def search(name: str, folder: Path, examples: int) -> None:
    """Reads many damaged files."""
    reader = READERS[name]
    content = make_valid(reader, folder)

    @seed(0)
    @settings(
        max_examples=examples,
        deadline=5000,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged(content, reader.kind))
    def check(changed: bytes) -> None:
        read_damaged(reader, folder / "read", changed)

    check()


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_named(name: str, tmp_path: Path) -> None:
    search(name, tmp_path, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_damaged_files_are_named(name: str, tmp_path: Path) -> None:
    search(name, tmp_path, MANY)


def npy(header: str) -> bytes:
    """Returns an .npy file without values."""
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def flip(where: int) -> Callable[[bytes], bytes]:
    """Returns a function that changes a bit of a file."""
    return lambda valid: valid[:where] + bytes([valid[where] ^ 1]) + valid[where + 1 :]


def bomb() -> bytes:
    """Returns an archive of 0.1 MB that takes 128 MB when it is unpacked."""
    file = io.BytesIO()
    np.savez_compressed(file, labels=np.zeros(2**27, np.uint8))
    return file.getvalue()


FOUND: list[tuple[str, bytes | Callable[[bytes], bytes]]] = [
    *(("metrics", text) for text in (b"\xff\n", b"{}\n", b'{"loss": 1}\n', b'{"step": "3"}\n')),
    *(
        (name, text)
        for name in ("provenance", "job", "job record")
        for text in (b"7", b"[]", b"{}")
    ),
    *(("config", text) for text in (b'{"model": 7}', b'{"checkpoint": {"every_steps": Infinity}}')),
    *(
        ("latents manifest", methodcaller("replace", *change))
        for change in (
            (b'"shards": 2', b'"shards": 9223372036854775808'),
            (b'"dtype": "float32"', b'"dtype": []'),
            (b"sha256:0", b"\\ud800"),
            (b'"data": {', b'"data": null, "other": {'),
        )
    ),
    ("latents shard", flip(64)),
    ("packed images", flip(64)),
    ("neurons", b"\x80{}"),
    ("snapshot index", b'{"weight_map": {"w": "%s"}}' % (b"9" * 5000)),
    ("snapshot index", b'{"weight_map": {"w": "../x"}}'),
    ("hub config", b'{"model_type": "vit_mae", "hidden_size": 8}'),
    ("conversion", b'{"params_digest": 7}'),
    ("conversion", b'{"family": "siglip"}'),
    *(
        (name, npy(header))
        for name in ("array", "labels .npy")
        for header in (
            "{'descr': '<f8', 'fortran_order': F2, 3), }",
            "{'descr': '<f8', 'fortran_order': False, 'shape': (1073741824,), }",
            "{'descr': '<f8', 'fortran_order': False, 'shape': (-1,), }",
            "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        )
    ),
    ("arrays", lambda valid: valid[2:]),
    ("lock", b'{"host": "x", "command": 7}'),
    ("page of metrics.jsonl", b'{"step": 4, "loss": 9223372036854775808}\n'),
    ("page of config.json", b'{"train": 7, "model": {"name": "\\ud800"}}'),
]


@pytest.mark.parametrize(("name", "content"), FOUND)
def test_inputs_that_failed(
    name: str, content: bytes | Callable[[bytes], bytes], tmp_path: Path
) -> None:
    valid = make_valid(READERS[name], tmp_path)
    changed = content if isinstance(content, bytes) else content(valid)
    assert changed != valid
    read_damaged(READERS[name], tmp_path / "read", changed)


def test_archives_are_measured_before_they_are_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "labels.npz"
    path.write_bytes(bomb())
    tracemalloc.start()
    with pytest.raises(DataError, match="unpacked, it would take 134,217"):
        load_labels(path, 3)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
