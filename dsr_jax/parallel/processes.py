"""Start-up of JAX's multi-controller runtime."""

import contextlib
import ctypes
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax._src import distributed
from jax.experimental import multihost_utils

from dsr_jax.core.cli import leave
from dsr_jax.core.errors import ClusterError
from dsr_jax.core.lock import FolderLock
from dsr_jax.core.memory import keep_freed_memory
from dsr_jax.core.rng import pin_generator
from dsr_jax.core.secrets import hide_secrets
from dsr_jax.parallel import clusters

HEARTBEAT_SECONDS = 100
"""Silence after which JAX itself ends all processes; its own default."""

_BY_HAND = ("DSR_COORDINATOR", "DSR_NUM_PROCESSES", "DSR_PROCESS_ID")


def start_processes(heartbeat_seconds: int = HEARTBEAT_SECONDS) -> None:
    """Joins the other processes of the job, if there are any. Call it before any JAX computation.

    JAX's own detection decides whether there are others (`parallel.clusters`). A launcher that it
    does not find sets `DSR_COORDINATOR` (host:port), `DSR_NUM_PROCESSES` and `DSR_PROCESS_ID`;
    `DSR_NUM_PROCESSES=1` alone runs this process on its own whatever else is set.

    It also pins the random generator and, where computation is on the CPU, sets the allocator.

    Args:
      heartbeat_seconds: Silence of one process after which JAX's runtime aborts all of them.

    Raises:
      ClusterError: If the environment says that this is one of several processes and it cannot
        join them, naming the variables.
    """
    pin_generator()
    if jax.distributed.is_initialized():
        return
    given = {name: os.environ[name] for name in _BY_HAND if name in os.environ}
    if given == {"DSR_NUM_PROCESSES": "1"}:
        pass
    elif given:
        _join_by_hand(given, heartbeat_seconds)
    else:
        _join_detected(heartbeat_seconds)
    if jax.distributed.is_initialized():
        _delay_aborts()
    if jax.default_backend() == "cpu":
        keep_freed_memory()


def _join_by_hand(given: Mapping[str, str], heartbeat_seconds: int) -> None:
    """Joins the processes that the three variables name."""
    if missing := [name for name in _BY_HAND if name not in given]:
        raise ClusterError(
            f"{sorted(given)} set but not {missing}",
            f"set all three of {', '.join(_BY_HAND)}, or none",
        )
    address, *numbers = (given[name] for name in _BY_HAND)
    if not all(text.isdecimal() for text in numbers):
        raise ClusterError(f"process variables are not numbers: {given}")
    count, rank = map(int, numbers)
    if rank >= count:
        raise ClusterError(
            f"DSR_PROCESS_ID={rank} with DSR_NUM_PROCESSES={count}", "number processes from 0"
        )
    jax.distributed.initialize(
        address,
        num_processes=count,
        process_id=rank,
        heartbeat_timeout_seconds=heartbeat_seconds,
    )


def _join_detected(heartbeat_seconds: int) -> None:
    """Joins the processes that JAX detects; MPI libraries that it does not, through mpi4py."""
    cluster = clusters.detect_cluster()
    method = None
    if cluster is not None:
        clusters.check_size(cluster)
        if cluster.num_processes == 1:
            return
        name = cluster.name
    elif (library := clusters.mpi_library()) and clusters.can_ask_mpi():
        name, method = library, "mpi4py"
    else:
        clusters.check_alone()
        return
    try:
        jax.distributed.initialize(
            cluster_detection_method=method, heartbeat_timeout_seconds=heartbeat_seconds
        )
    except Exception as error:  # Detection, name resolution and the connection raise all kinds.
        raise clusters.join_error(name, error) from error


def coordination_client() -> Any:
    """Returns JAX's client of the coordination service; None in a run of one process.

    JAX has no public name for it; Orbax reads the same attribute.
    """
    return distributed.global_state.client


def coordinator_refuses() -> bool:
    """Returns whether the machine of process 0 answers, but refuses the coordinator's port."""
    host, _, port = (distributed.global_state.coordinator_address or ":0").rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=1):
            return False
    except ConnectionRefusedError:
        return True
    except OSError:
        return False


def _delay_aborts() -> None:
    """Delays the abort of this process by some seconds.

    When process 0 dies, JAX's client aborts this process within a millisecond, before the
    monitoring thread can print the reason. Only a C function can handle the signal in any thread:
    `sleep` takes the signal's number, 6, as its seconds. Then the abort continues.
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


@contextlib.contextmanager
def lock_folder(folder: str | os.PathLike[str], name: str = "") -> Iterator[None]:
    """Holds the lock on a folder that all processes of a command write, within the block.

    Args:
      folder: The folder, which is created if it is missing.
      name: Locks only the files of this name in it; "" for the whole folder.

    Raises:
      LockError: On process 0, if another command writes there.
    """
    folder = Path(folder)
    lock = FolderLock(folder, name, lost=leave, log=log)
    # A name that is no folder is for the checks of the command to refuse.
    if is_process_zero() and (folder.is_dir() or not folder.exists()):
        lock.acquire()
    try:
        wait_for_all("folder locked")
        yield
    finally:
        lock.release()


def is_process_zero() -> bool:
    """Returns whether this is process 0, which writes shared files and logs."""
    return jax.process_index() == 0


def log(text: str) -> None:
    """Prints a line to stderr, on process 0 alone."""
    if is_process_zero():
        print(hide_secrets(text), file=sys.stderr, flush=True)
