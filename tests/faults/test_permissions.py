"""Folders that cannot be written to, also by root."""

from pathlib import Path

import pytest

from tools.faults.permissions import allow_writing, deny_writing, why_not_deniable


def test_read_only_folders_take_nothing_until_they_are_writable_again(tmp_path: Path) -> None:
    if problem := why_not_deniable(tmp_path):
        pytest.skip(f"folders cannot be made read-only here: {problem}")
    inner = tmp_path / "run" / "checkpoints"
    inner.mkdir(parents=True)
    (inner / "old").write_text("old")
    deny_writing(tmp_path / "run")
    try:
        for act in (
            lambda: (tmp_path / "run" / "new").touch(),
            lambda: (inner / "new").touch(),
            lambda: (inner / "old").unlink(),
            lambda: (inner / "old").rename(tmp_path / "old"),
        ):
            with pytest.raises(PermissionError):
                act()
        assert (inner / "old").read_text() == "old"
    finally:
        allow_writing(tmp_path / "run")
    (inner / "old").rename(inner / "new")
    assert not why_not_deniable(inner)
    allow_writing(tmp_path / "none")
