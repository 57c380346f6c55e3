"""Files are whole or absent."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from dsr_jax.core import files
from dsr_jax.core.errors import DamagedFileError


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


def test_leftovers_of_killed_writes_are_found(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from dsr_jax.core import files\n"
        "with files.open_atomic(sys.argv[1]) as file:\n"
        "    file.write(b'half')\n"
        "    file.flush()\n"
        "    os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.json")], timeout=60)
    for name in ("x.json", ".bashrc", ".notes.tmp", "thesis.tmp"):
        (tmp_path / name).touch()
    (leftover,) = files.leftovers(tmp_path)
    assert leftover.read_bytes() == b"half"


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_damaged_json_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(DamagedFileError, match=f"{path} is damaged"):
        files.read_json(path)


def test_json_files_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with path.open("wb") as file:
        file.truncate(files.MAX_JSON_BYTES + 1)
    with pytest.raises(DamagedFileError, match="larger than 256 MiB"):
        files.read_json(path)
