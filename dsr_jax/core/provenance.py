"""Provenance of results: code revision, package versions, command line, machine."""

import configparser
import datetime
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from dsr_jax.core.rng import generator
from dsr_jax.core.secrets import hide_secrets

_PACKAGES = (
    "dsr_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "scikit-learn",
)


_ROOT = Path(__file__).resolve().parents[2]
_REVISION = Path(__file__).with_name("REVISION")
_GIT_PLACES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")


def git_revision() -> str | None:
    """Returns the commit of this package's code, or None if it is unknown.

    In a git checkout of this project it is the checked-out commit, with "-dirty" appended if
    tracked files were changed. In an archive made by `git archive` (the launch scripts ship one) it
    is the commit that git wrote to the file REVISION. Elsewhere it is None: a repository that
    contains an installed or copied package belongs to another project.
    """
    if _is_checkout(_ROOT):
        command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
        # The commit instead of a tag's name, and of this repository instead of $GIT_DIR's.
        environment = {name: text for name, text in os.environ.items() if name not in _GIT_PLACES}
        try:
            done = subprocess.run(
                [*command, "--exclude=*"],
                env=environment,
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()
    try:
        revision = _REVISION.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return revision if re.fullmatch("[0-9a-f]{40}", revision) else None


def _is_checkout(folder: Path) -> bool:
    """Whether a folder is the top of a git checkout of this project."""
    setup = configparser.ConfigParser(interpolation=None)
    try:
        found = setup.read(folder / "setup.cfg")
    except (OSError, UnicodeDecodeError, configparser.Error):
        return False
    return (
        bool(found)
        and setup.get("metadata", "name", fallback="") == "dsr_jax"
        and (folder / ".git").exists()
    )


def package_versions() -> dict[str, str]:
    """Returns the installed versions of the packages that affect results."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def provenance() -> dict[str, Any]:
    """Returns the provenance that is written with runs, samples and scores."""
    device = jax.devices()[0]
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *map(hide_secrets, sys.argv[1:])],
        "git_revision": git_revision(),
        "python": sys.version.split()[0],
        "packages": package_versions(),
        "platform": device.platform,
        "device_kind": device.device_kind,
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
        "random_generator": generator(),
    }
