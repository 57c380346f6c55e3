"""Processes that a launcher started find each other by the launcher's own variables."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import REPOSITORY

pytestmark = pytest.mark.multiprocess

SCRIPT = """
import jax
from dsr_jax.parallel.processes import start_processes, wait_for_all
start_processes()
wait_for_all("all there")
print(jax.process_count(), jax.process_index())
"""
FAKE_MPI = '''
"""What JAX uses of mpi4py, over a file that both ranks see."""
import os, pathlib, time, types

class Comm:
    def Get_rank(self): return int(os.environ["PMI_RANK"])
    def Get_size(self): return int(os.environ["PMI_SIZE"])
    def Split_type(self, kind): return self
    def bcast(self, value, root):
        path = pathlib.Path(os.environ["FAKE_MPI_FILE"])
        if self.Get_rank() == root:
            path.with_suffix(".new").write_text(value)
            path.with_suffix(".new").rename(path)
        while not path.exists():
            time.sleep(0.01)
        return path.read_text()

MPI = types.SimpleNamespace(COMM_WORLD=Comm(), COMM_TYPE_SHARED=0)
'''


def environments(kind: str, folder: Path, rank: int) -> dict[str, str]:
    """What a launcher sets for one of two processes on this machine."""
    if kind == "Open MPI":
        return {
            "OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp://127.0.0.1:54321",
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_RANK": str(rank),
            "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
        }
    if kind == "SLURM":
        return {
            "SLURM_JOB_ID": "77",
            "SLURM_NTASKS": "2",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
        }
    if kind == "GKE":
        return {
            "JAX_FORCE_TPU_INIT": "1",
            "TPU_PROCESS_ADDRESSES": "localhost:8471,localhost:8472",
            "TPU_WORKER_ID": str(rank),
            "MEGASCALE_NUM_SLICES": "1",
            "MEGASCALE_SLICE_ID": "0",
            "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
        }
    assert kind == "PMI"
    (folder / "mpi4py").mkdir(exist_ok=True)
    (folder / "mpi4py" / "__init__.py").write_text(FAKE_MPI)
    return {
        "PMI_SIZE": "2",
        "PMI_RANK": str(rank),
        "FAKE_MPI_FILE": str(folder / "address"),
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{folder}",
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Open MPI", "SLURM", "GKE", "PMI"])
def test_two_processes_become_one_job(kind: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}
    # Beside the launcher's variables, so that tests can run at the same time.
    shared["JAX_COORDINATOR_PORT"] = port
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env=shared | environments(kind, tmp_path, rank),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    # Gloo writes there, too.
    assert [out.splitlines()[-1:] for out, _ in outputs] == [["2 0"], ["2 1"]], outputs
