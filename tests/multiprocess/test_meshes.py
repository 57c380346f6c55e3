"""Every mesh over 2 and 4 processes trains as one process does, its rows being loaded where needed.

An axis that does not split the batch, such as `tensor`, may reach over processes: then several of
them load the same rows.
"""

from pathlib import Path

import numpy as np
import pytest

from tests.processes import finish, start

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

MODULE = "tests.multiprocess.mesh_worker"
TOLERANCE = 2e-5
"""Of an array's largest magnitude: sums over devices are rounded in another order."""
TWO = ("2,1,1", "1,2,1", "1,1,2")
FOUR = ("4,1,1", "1,4,1", "1,1,4", "2,2,1", "2,1,2", "1,2,2")


def run(out: Path, count: int, rules: str, *meshes: str) -> dict[str, dict[str, np.ndarray]]:
    """Trains on each mesh; returns losses and states by mesh."""
    out.mkdir()
    devices = int(np.prod([int(size) for size in meshes[0].split(",")]))
    finish(start(MODULE, (str(out), rules, *meshes), count, devices), timeout=900)
    found = {}
    for mesh in meshes:
        with np.load(out / f"{mesh}.npz") as arrays:
            found[mesh] = dict(arrays)
    return found


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What one process on one device computes."""
    return run(tmp_path_factory.mktemp("one") / "out", 1, "fsdp", "1,1,1")["1,1,1"]


def agree(found: dict[str, dict[str, np.ndarray]], wanted: dict[str, np.ndarray]) -> None:
    """Compares losses and all arrays of the state."""
    for mesh, arrays in found.items():
        assert arrays.keys() == wanted.keys()
        for name, value in wanted.items():
            scale = np.abs(value).max() + 1e-12
            np.testing.assert_allclose(
                arrays[name] / scale,
                value / scale,
                rtol=0,
                atol=TOLERANCE,
                err_msg=f"{mesh} {name}",
            )


def test_two_processes(wanted: dict[str, np.ndarray], tmp_path: Path) -> None:
    agree(run(tmp_path / "out", 2, "fsdp", *TWO), wanted)


def test_four_processes(wanted: dict[str, np.ndarray], tmp_path: Path) -> None:
    agree(run(tmp_path / "out", 4, "fsdp", *FOUR), wanted)


def test_two_processes_of_two_devices(wanted: dict[str, np.ndarray], tmp_path: Path) -> None:
    """The tensor axis within and across processes."""
    agree(run(tmp_path / "out", 2, "fsdp", "1,1,4", "2,1,2", "1,2,2"), wanted)


@pytest.mark.parametrize("rules", ["replicated", "zero1"])
def test_other_rules_with_tensor(rules: str, wanted: dict[str, np.ndarray], tmp_path: Path) -> None:
    agree(run(tmp_path / "out", 2, rules, "1,1,2", "2,1,1"), wanted)
