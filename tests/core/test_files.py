"""Files are whole or absent."""

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsr_jax.core import files
from dsr_jax.core.errors import DamagedFileError, StorageError


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
    assert files.leftovers(tmp_path, "x.json") == [leftover]
    assert files.leftovers(tmp_path, "x") == []


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


def test_content_is_on_disk_before_a_name_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def sync(handle: int) -> None:
        calls.append(f"sync {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        fsync(handle)

    def rename(source: Path, target: Path) -> None:
        calls.append(f"rename {Path(source).name}")
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", sync)
    monkeypatch.setattr(files.os, "replace", rename)
    (tmp_path / "new" / "part").mkdir(parents=True)
    (tmp_path / "new" / "part" / "a").write_text("a")
    files.rename_synced(tmp_path / "new", tmp_path / "done")
    assert sorted(calls[:3]) == ["sync a", "sync new", "sync part"]
    assert calls[3:] == ["rename new", f"sync {tmp_path.name}"]
    calls.clear()
    files.write_atomic(tmp_path / "b", "b")
    assert [call.split()[0] for call in calls] == ["sync", "rename", "sync"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_storage_that_takes_no_more_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number), "temporary")

    path = tmp_path / "x.json"
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        with pytest.raises(StorageError, match=f"{path} cannot be written: {os.strerror(number)}"):
            files.write_json(path, {})
    assert list(tmp_path.iterdir()) == []
    files.write_json(path, {})
