"""Files are whole or absent."""

import hashlib
from pathlib import Path

import pytest

from dsr_jax.core import files


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a" / "x.json"
    files.write_json(path, {"old": 1})

    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        files.write_json(path, {"new": 2})
    assert files.read_json(path) == {"old": 1}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_digest(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert files.file_digest(tmp_path / "f") == "sha256:" + hashlib.sha256(b"abc").hexdigest()
