"""The recorded revision is that of this project's code, or none."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRINT = "from dsr_jax.core import provenance as p; print(p.git_revision(), p.__file__)"


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.com")
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def commit(folder: Path) -> str:
    git(folder, "init", "-q")
    git(folder, "add", "--all")
    git(folder, "commit", "-q", "--message=first")
    return git(folder, "rev-parse", "HEAD")


def revision(folder: Path, **variables: str) -> str:
    """What the copy of the package in a folder takes for its revision."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu", **variables}
    command = [sys.executable, "-c", PRINT]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, file = done.stdout.split()
    assert Path(file).is_relative_to(folder.resolve())
    return found


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository of this project with its own first commit."""
    folder = tmp_path / "checkout"
    (folder / "dsr_jax").mkdir(parents=True)
    for name in ("setup.cfg", "pyproject.toml", ".gitattributes", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copy(ROOT / "dsr_jax" / "__init__.py", folder / "dsr_jax")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "dsr_jax" / "core", folder / "dsr_jax" / "core", ignore=ignore)
    (folder / ".gitignore").write_text("__pycache__/\n")
    commit(folder)
    return folder


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another project's repository."""
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "paper.txt").write_text("x\n")
    commit(folder)
    return folder


@pytest.mark.slow
def test_a_checkout_has_its_commit_and_is_dirty_after_changes(checkout: Path, other: Path) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    git(checkout, "tag", "--annotate", "v1", "--message=v1")
    assert revision(checkout) == head
    assert revision(checkout, GIT_DIR=str(other / ".git")) == head
    (checkout / "setup.cfg").write_text((checkout / "setup.cfg").read_text() + "# changed\n")
    assert revision(checkout) == f"{head}-dirty"
    git(checkout, "worktree", "add", "-q", str(checkout.parent / "second"), "HEAD")
    assert revision(checkout.parent / "second") == head


def test_an_archive_has_the_commit_it_was_made_of(checkout: Path, other: Path) -> None:
    """Also where it is unpacked inside of another repository, as the home of a TPU's worker."""
    archive = checkout.parent / "dsr_jax.tar.gz"
    git(checkout, "archive", "--format=tar.gz", f"--output={archive}", "HEAD")
    with tarfile.open(archive) as tar:
        tar.extractall(other / "dsr_jax_copy", filter="data")
    assert revision(other / "dsr_jax_copy") == git(checkout, "rev-parse", "HEAD")


def test_a_copy_inside_of_another_repository_has_no_revision(checkout: Path, other: Path) -> None:
    packages = other / ".venv" / "site-packages"
    shutil.copytree(checkout / "dsr_jax", packages / "dsr_jax")
    assert revision(packages) == "None"
    # Not even at its top.
    shutil.copytree(checkout / "dsr_jax", other / "dsr_jax")
    (other / "setup.cfg").write_text("[metadata]\nname = other\n")
    assert revision(other) == "None"


@pytest.mark.slow
def test_a_wheel_made_of_an_archive_has_the_commit(checkout: Path, tmp_path: Path) -> None:
    archive = checkout.parent / "dsr_jax.tar"
    git(checkout, "archive", f"--output={archive}", "HEAD")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "source", filter="data")
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=tmp_path / "source", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "source").glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(tmp_path / "site")
    assert revision(tmp_path / "site") == git(checkout, "rev-parse", "HEAD")
