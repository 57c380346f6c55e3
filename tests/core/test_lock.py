"""Locks on folders: one owner at a time, across processes and machines."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dsr_jax.core import lock as locks
from dsr_jax.core.errors import LockError, StorageError
from dsr_jax.core.lock import FILE, FolderLock, release_all, this_process

HOLD = """
import sys, time
from dsr_jax.core.lock import FolderLock
with FolderLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    """Starts a process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def write_lock(folder: Path, **changes: Any) -> Path:
    """Writes a lock as another process would have."""
    folder.mkdir(exist_ok=True)
    path = folder / FILE
    path.write_text(json.dumps({**this_process(), "host": "elsewhere", **changes}))
    return path


def test_a_living_owner_is_named(tmp_path: Path) -> None:
    process = hold(tmp_path)
    try:
        with pytest.raises(LockError) as caught, FolderLock(tmp_path):
            pass
        host = this_process()["host"]
        assert f"in use by process {process.pid} on {host}" in caught.value.problem
    finally:
        process.kill()
        process.wait()
    # Its lock is still there, but it is dead.
    assert (tmp_path / FILE).exists()
    with FolderLock(tmp_path):
        assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_copy_of_a_locked_folder_is_not_in_use(tmp_path: Path) -> None:
    """The owner is alive, but elsewhere: the copy's lock is never touched again."""
    with FolderLock(tmp_path / "run"):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        copied = FolderLock(
            tmp_path / "copy", log=lambda text: None, touch_seconds=0.2, stale_seconds=0.5
        )
        with copied:
            assert json.loads((tmp_path / "copy" / FILE).read_text())["pid"] == os.getpid()
        with pytest.raises(LockError, match="in use"):
            FolderLock(tmp_path / "run").acquire()


def test_a_reused_process_id_is_not_the_owner(tmp_path: Path) -> None:
    write_lock(tmp_path, pid=os.getpid(), started="1")
    with FolderLock(tmp_path):
        pass


def test_a_lock_without_the_start_of_its_owner_becomes_stale(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    write_lock(tmp_path, pid=ended.pid, started=None)
    with FolderLock(tmp_path, log=lambda text: None, touch_seconds=0.2, stale_seconds=0.5):
        assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()


def test_an_owner_that_is_still_writing_its_lock_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).touch()
    timer = threading.Timer(0.3, lambda: write_lock(tmp_path))
    timer.start()
    try:
        with pytest.raises(LockError, match=rf"in use by process {os.getpid()} on elsewhere"):
            FolderLock(tmp_path, log=lambda text: None, touch_seconds=0.2).acquire()
    finally:
        timer.join()


def test_an_owner_on_another_machine_is_alive_while_it_touches_its_lock(tmp_path: Path) -> None:
    path = write_lock(tmp_path, machine="another", pid=7)
    said: list[str] = []

    def touch() -> None:
        time.sleep(0.5)
        os.utime(path)

    threading.Thread(target=touch).start()
    with pytest.raises(LockError, match="in use by process 7 on elsewhere"):
        FolderLock(tmp_path, log=said.append, touch_seconds=0.2, stale_seconds=30.0).acquire()
    assert len(said) == 1 and "process 7 on elsewhere" in said[0] and "waiting up to" in said[0]


def test_an_owner_on_another_machine_without_heartbeat_is_dead(tmp_path: Path) -> None:
    path = write_lock(tmp_path, machine="another", pid=7)
    os.utime(path, (time.time() - 100, time.time() - 100))
    with FolderLock(tmp_path, stale_seconds=30.0):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_an_owner_that_ends_while_another_waits_leaves_the_lock_to_it(tmp_path: Path) -> None:
    path = write_lock(tmp_path, machine="another", pid=7)

    def end() -> None:
        time.sleep(0.5)
        path.unlink()

    threading.Thread(target=end).start()
    with FolderLock(tmp_path, log=lambda text: None, touch_seconds=0.2):
        assert json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00\xff", '{"pid": "x"}'])
def test_a_damaged_lock_counts_by_its_age(tmp_path: Path, text: str) -> None:
    """A kill between creating and writing it, or a full disk."""
    path = tmp_path / FILE
    path.write_text(text, encoding="latin-1")
    os.utime(path, (time.time() - 100, time.time() - 100))
    with FolderLock(tmp_path, stale_seconds=30.0):
        pass
    assert list(tmp_path.iterdir()) == []


def test_many_at_once_have_one_owner_at_a_time(tmp_path: Path) -> None:
    """All find a dead owner's lock first."""
    write_lock(tmp_path, pid=os.getpid(), started="1")
    inside, most, failed = [0], [0], [0]
    guard = threading.Lock()

    def compete() -> None:
        for _ in range(5):
            try:
                with FolderLock(tmp_path, lost=lambda error: None):
                    with guard:
                        inside[0] += 1
                        most[0] = max(most[0], inside[0])
                    time.sleep(0.01)
                    with guard:
                        inside[0] -= 1
            except LockError:
                failed[0] += 1
                time.sleep(0.01)

    threads = [threading.Thread(target=compete) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1 and failed[0] > 0
    assert list(tmp_path.iterdir()) == []


def test_an_owner_whose_lock_was_taken_is_notified_and_keeps_the_new_lock(tmp_path: Path) -> None:
    lost: list[LockError] = []
    lock = FolderLock(tmp_path, lost=lost.append, touch_seconds=0.05)
    lock.acquire()
    path = write_lock(tmp_path, pid=7)
    deadline = time.monotonic() + 20
    while not lost and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "was lost to process 7 on elsewhere" in str(lost[0])
    lock.release()
    assert path.exists()


def test_a_deleted_lock_is_created_again(tmp_path: Path) -> None:
    """By somebody who tidies up; or for a moment, while another command looks at it."""
    lost: list[LockError] = []
    with FolderLock(tmp_path, lost=lost.append, touch_seconds=0.05):
        path = tmp_path / FILE
        path.unlink()
        deadline = time.monotonic() + 20
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not lost and list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_empty_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next command would wait for its owner."""

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(locks.os, "fsync", full)
    with pytest.raises(StorageError, match="cannot be written: .*No space left"):
        FolderLock(tmp_path).acquire()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_another_host_wrote_first_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mounted bucket takes both hosts' new files, and refuses the one that is written later."""

    def clobbered(handle: int) -> None:
        write_lock(tmp_path, machine="another", pid=7)
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(locks.os, "fsync", clobbered)
    with pytest.raises(LockError, match="Stale"):
        FolderLock(tmp_path).acquire()
    assert json.loads((tmp_path / FILE).read_text())["pid"] == 7


def test_the_owner_touches_its_lock(tmp_path: Path) -> None:
    with FolderLock(tmp_path, touch_seconds=0.05):
        path = tmp_path / FILE
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 20
        while path.stat().st_mtime < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert path.stat().st_mtime > 1


def test_a_folder_that_was_made_for_the_lock_alone_goes_with_it(tmp_path: Path) -> None:
    with FolderLock(tmp_path / "a"):
        assert (tmp_path / "a" / FILE).exists()
    assert not (tmp_path / "a").exists()
    with FolderLock(tmp_path / "b"):
        (tmp_path / "b" / "result").touch()
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["result"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LockError, match="file/run cannot be written: .*Not a directory"):
        FolderLock(tmp_path / "file" / "run").acquire()


def test_a_process_that_ends_at_once_can_release_all(tmp_path: Path) -> None:
    FolderLock(tmp_path / "a").acquire()
    FolderLock(tmp_path / "b").acquire()
    release_all()
    assert list(tmp_path.iterdir()) == [] and not locks._held


def test_names_in_a_folder_have_locks_of_their_own(tmp_path: Path) -> None:
    with FolderLock(tmp_path, "a"), FolderLock(tmp_path, "b"):
        assert all(locks.is_lock(path.name) for path in tmp_path.iterdir())
        with (
            pytest.raises(LockError, match=f"{tmp_path / 'a'} is in use"),
            FolderLock(tmp_path, "a"),
        ):
            pass
    assert list(tmp_path.iterdir()) == []


def test_an_owner_of_another_form_is_described() -> None:
    assert "unknown command" in locks.describe({**this_process(), "command": 7})
