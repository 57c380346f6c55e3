"""Start-up of JAX's multi-controller runtime."""

import os
import sys

import jax
from jax.experimental import multihost_utils

from dsr_jax.core.errors import MeshError
from dsr_jax.core.memory import keep_freed_memory


def start_processes() -> None:
    """Joins the other processes of the run, if there are any. Call it before any JAX computation.

    Where computation is on the CPU, it also sets the allocator for it.

    A launcher that JAX cannot detect sets `DSR_COORDINATOR` (host:port), `DSR_NUM_PROCESSES` and
    `DSR_PROCESS_ID`; on Cloud TPU pods and under SLURM JAX finds them itself.

    Raises:
      MeshError: If only some of the three variables are set, or one is not a number.
    """
    if jax.distributed.is_initialized():
        return
    names = ("DSR_COORDINATOR", "DSR_NUM_PROCESSES", "DSR_PROCESS_ID")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if given:
        if len(given) < len(names):
            raise MeshError(
                f"{sorted(given)} set but not {sorted(set(names) - set(given))}",
                "set all three of DSR_COORDINATOR, DSR_NUM_PROCESSES, DSR_PROCESS_ID, or none",
            )
        try:
            count, rank = int(given[names[1]]), int(given[names[2]])
        except ValueError as error:
            raise MeshError(f"process variables are not numbers: {given}") from error
        jax.distributed.initialize(given[names[0]], num_processes=count, process_id=rank)
    elif _in_cluster():
        jax.distributed.initialize()
    if jax.default_backend() == "cpu":
        keep_freed_memory()


def _in_cluster() -> bool:
    """True where the environment says that several processes belong together."""
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    tasks = os.environ.get("SLURM_NTASKS", "1")
    return len(hosts) > 1 or tasks not in ("", "1") or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ


def wait_for_all(name: str) -> None:
    """Returns when every process has called it with the same `name`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def is_primary() -> bool:
    """True in the process that writes shared files and talks to the user."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Shows a line to the user, on the primary process."""
    if is_primary():
        print(text, file=sys.stderr, flush=True)
