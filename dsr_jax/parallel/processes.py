"""Start-up of JAX's multi-controller runtime."""

import ctypes
import os
import signal
import socket
import sys
from typing import Any

import jax
from jax._src import distributed
from jax.experimental import multihost_utils

from dsr_jax.core.errors import MeshError
from dsr_jax.core.memory import keep_freed_memory

HEARTBEAT_SECONDS = 100
"""Silence after which JAX itself ends all processes; its own default."""


def start_processes(heartbeat_seconds: int = HEARTBEAT_SECONDS) -> None:
    """Joins the other processes of the run, if there are any. Call it before any JAX computation.

    Where computation is on the CPU, it also sets the allocator for it.

    A launcher that JAX cannot detect sets `DSR_COORDINATOR` (host:port), `DSR_NUM_PROCESSES` and
    `DSR_PROCESS_ID`; on Cloud TPU pods and under SLURM JAX finds them itself.

    Args:
      heartbeat_seconds: Silence of one process after which JAX's runtime aborts all of them.

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
        jax.distributed.initialize(
            given[names[0]],
            num_processes=count,
            process_id=rank,
            heartbeat_timeout_seconds=heartbeat_seconds,
        )
    elif _in_cluster():
        jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat_seconds)
    if jax.distributed.is_initialized():
        _delay_aborts()
    if jax.default_backend() == "cpu":
        keep_freed_memory()


def _in_cluster() -> bool:
    """True where the environment says that several processes belong together."""
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    tasks = os.environ.get("SLURM_NTASKS", "1")
    return len(hosts) > 1 or tasks not in ("", "1") or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ


def coordination_client() -> Any:
    """JAX's client of the run's coordination service; None in a run of one process.

    JAX has no public name for it; Orbax takes it from the same place.
    """
    return distributed.global_state.client


def coordinator_refuses() -> bool:
    """Whether the machine of process 0 answers, but nobody listens there any more."""
    host, _, port = (distributed.global_state.coordinator_address or ":0").rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=1):
            return False
    except ConnectionRefusedError:
        return True
    except OSError:
        return False


def _delay_aborts() -> None:
    """Lets an aborting thread sleep for some seconds, while the others go on.

    When process 0 dies, JAX's client aborts this process within a millisecond, and nobody could say
    why. Nothing but a C function may handle that signal, of no matter which thread: `sleep`, which
    takes the signal's number, 6, for its seconds, is one. Then the abort takes its course.
    """
    try:
        c = ctypes.CDLL(None)
        handler = ctypes.cast(c.sleep, ctypes.c_void_p)
    except (AttributeError, OSError, TypeError):
        return
    c.signal.argtypes, c.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    c.signal(signal.SIGABRT, handler)


def wait_for_all(name: str) -> None:
    """Returns when every process has called it with the same `name`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def is_process_zero() -> bool:
    """Whether this is process 0, which writes shared files and logs."""
    return jax.process_index() == 0


def log(text: str) -> None:
    """Prints a line to stderr, on process 0 alone."""
    if is_process_zero():
        print(text, file=sys.stderr, flush=True)
