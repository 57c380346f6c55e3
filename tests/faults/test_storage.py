"""Pages, scores and images of prompts on a full disk, or where nothing can be written."""

import contextlib
import json
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dsr_jax import evaluate_prompts, report
from dsr_jax.core.errors import StorageError
from dsr_jax.core.files import name_storage_errors
from tests.faults import outputs
from tools.faults.permissions import allow_writing, deny_writing, why_not_deniable


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """A limit on file sizes, which stands for the full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder in which nothing can be made."""
    if problem := why_not_deniable(folder):
        pytest.skip(f"folders cannot be made read-only here: {problem}")
    deny_writing(folder)
    try:
        yield
    finally:
        allow_writing(folder)


def show(inputs: Path, out: Path) -> None:
    report.main([f"--workdir={inputs / 'run'}", f"--out={out / 'page.html'}"])


def write_images(inputs: Path, out: Path) -> None:
    evaluate_prompts.main(
        ["write", "shapes", f"--out={out / 'images'}", "--split=train", "--per-task=1"]
        + ["--images=1", "--batch=2", "--generator=tests.shapes_generator:gray"]
    )


def score(inputs: Path, out: Path) -> None:
    evaluate_prompts.main(
        ["score", "geneval", str(inputs / "r.jsonl"), f"--out={out / 'scores.json'}"]
    )


def content(folder: Path) -> dict[str, object]:
    """The files of a folder, without the times in their provenance."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".json":
            record = json.loads(path.read_bytes())
            record.pop("provenance")
            found[path.name] = record
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


@pytest.mark.parametrize("fault", [full_disk, read_only])
@pytest.mark.parametrize("command", [show, write_images, score])
def test_the_same_command_finishes_once_there_is_room(
    command: Callable[[Path, Path], None],
    fault: Callable[[Path], contextlib.AbstractContextManager[None]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "run").mkdir()
    outputs.write_shown_run(tmp_path / "run", outliers=False)
    line = {"metadata": {"tag": "colors", "prompt": "a"}, "tag": "colors", "correct": True}
    (tmp_path / "r.jsonl").write_text(json.dumps({**line, "metadata": json.dumps(line)}))
    whole, out = tmp_path / "whole", tmp_path / "out"
    whole.mkdir()
    out.mkdir()
    command(tmp_path, whole)
    with fault(out), pytest.raises(StorageError, match=f"{out}/.* cannot be written") as caught:
        with name_storage_errors(None):
            command(tmp_path, out)
    assert "then run the same command again" in caught.value.remedy
    assert [path for path in out.rglob("*") if path.is_file()] == []
    command(tmp_path, out)
    assert content(out) == content(whole)
