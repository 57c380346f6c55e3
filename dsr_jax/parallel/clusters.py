"""Detection of the processes that belong to one job.

JAX decides which cluster this is (`jax._src.clusters`): Open MPI, SLURM, Cloud TPU virtual machines
through the metadata server, GKE, Kubernetes jobs. This module adds the opposite check: a process
whose environment shows that it is one of several never runs alone silently.
"""

import dataclasses
import importlib.util
import os
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jax._src import clusters

from dsr_jax.core.errors import ClusterError

ALONE = "DSR_NUM_PROCESSES=1 runs this process alone"
_BY_HAND = "set DSR_COORDINATOR (host:port), DSR_NUM_PROCESSES and DSR_PROCESS_ID"


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Cluster that JAX has detected.

    Attributes:
      name: JAX's class, such as "SlurmCluster".
      num_processes: Processes of the job.
    """

    name: str
    num_processes: int


_MPI_SIZES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
        "MPICH or Intel MPI": ("PMI_SIZE", "PMI_RANK"),
        "MVAPICH": ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    }
)
_TPU_LISTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
_SLURM_STEP = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")


def detect_cluster() -> Cluster | None:
    """Returns the cluster that `jax.distributed.initialize()` would join; None if there is none.

    Raises:
      ClusterError: If JAX recognizes a cluster but cannot read its size.
    """
    for kind in clusters.ClusterEnv._cluster_types:
        if kind.opt_in_only_method:
            continue
        in_job = kind.__name__ != "K8sCluster" or "JOB_COMPLETION_INDEX" in os.environ
        try:
            with warnings.catch_warnings():
                # JAX warns in every pod; `check_alone` decides where it matters.
                warnings.filterwarnings("ignore", message="Kubernetes environment")
                if kind.is_env_present():
                    return Cluster(kind.__name__, kind.get_process_count())
        except Exception as error:  # Whatever an HTTP or Kubernetes client raises.
            if in_job:
                raise _unreadable(kind.__name__, error) from error
    return None


def mpi_library() -> str | None:
    """Returns the MPI library whose variables say that this is one of several processes."""
    return next((name for name, (size, _) in _MPI_SIZES.items() if _number(size) > 1), None)


def can_ask_mpi() -> bool:
    """Whether JAX can find the processes of an MPI job through mpi4py."""
    return importlib.util.find_spec("mpi4py") is not None


def check_size(cluster: Cluster) -> None:
    """Checks that MPI's variables, where there are any, agree with what JAX has detected.

    Raises:
      ClusterError: If they do not, as where mpirun starts several ranks per SLURM task.
    """
    for library, (size, rank) in _MPI_SIZES.items():
        if _number(size) > 1 and _number(size) != cluster.num_processes:
            raise ClusterError(
                f"{size}={os.environ[size]}, {rank}={os.environ.get(rank)} ({library}), but JAX's "
                f"{cluster.name} counts {cluster.num_processes} processes",
                f"start with srun or with mpirun, not with one inside the other; or {_BY_HAND}; "
                f"{ALONE}",
            )


def check_alone() -> None:
    """Checks that nothing in the environment says that this is one of several processes.

    Call it where no cluster was detected.

    Raises:
      ClusterError: Naming the variables, and what to do about them.
    """
    if library := mpi_library():
        size, rank = _MPI_SIZES[library]
        raise ClusterError(
            f"{_show(size, rank)} say that this is one of several processes of {library}, which "
            "JAX finds through mpi4py; it is not installed",
            f"pip install mpi4py, or {_BY_HAND}; {ALONE}",
        )
    if _number("SLURM_NTASKS") > 1:
        missing = [name for name in _SLURM_STEP if name not in os.environ]
        raise ClusterError(
            f"{_show('SLURM_NTASKS')} says that this is one of several tasks, but this is no job "
            f"step ({', '.join(missing)} not set): a shell or a batch script in an allocation",
            "start with srun, or unset SLURM_NTASKS to run as one process",
        )
    for name in _TPU_LISTS:
        if len(os.environ.get(name, "").split(",")) > 1:
            raise ClusterError(
                f"{_show(name)} names several TPU workers, but JAX finds no TPU on this machine",
                f"pip install 'dsr_jax[tpu]' and check that /dev has the chips; {ALONE}",
            )
    if _number("MEGASCALE_NUM_SLICES") > 1:
        raise ClusterError(
            f"{_show('MEGASCALE_NUM_SLICES', 'MEGASCALE_COORDINATOR_ADDRESS')} are those of a job "
            "on several TPU slices, but JAX finds no TPU on this machine",
            f"pip install 'dsr_jax[tpu]' and check that /dev has the chips; {ALONE}",
        )
    if "KUBERNETES_SERVICE_HOST" in os.environ and _number("JOB_COMPLETION_INDEX") > 0:
        raise ClusterError(
            f"{_show('JOB_COMPLETION_INDEX')} says that this is one of several pods of a "
            "Kubernetes job, which JAX finds through the package kubernetes; it is not installed",
            f"pip install kubernetes, or {_BY_HAND}; {ALONE}",
        )
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        raise ClusterError(
            f"{_show('JAX_COORDINATOR_ADDRESS')} names a coordinator, but no variable has the "
            "number of processes and the index of this one",
            f"{_BY_HAND}; or unset JAX_COORDINATOR_ADDRESS",
        )


def join_error(cluster: str, error: BaseException) -> ClusterError:
    """Returns the error of a process that could not join the cluster it belongs to."""
    names = ("OMPI_", "PMI_", "SLURM_", "TPU_", "MEGASCALE_", "JOB_COMPLETION_INDEX", "JAX_COORD")
    found = sorted(name for name in os.environ if name.startswith(names))
    return ClusterError(
        f"this is one of several processes ({cluster}), but it cannot join the others: {error}",
        f"look at {', '.join(found) or 'the metadata server'}; or {_BY_HAND}; {ALONE}",
    )


def _unreadable(cluster: str, error: Exception) -> ClusterError:
    text = f"{type(error).__name__}: {error}"
    if cluster == "GceTpuCluster":
        where = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
        return ClusterError(
            f"this is a TPU virtual machine, but its metadata server {where} does not list "
            f"the workers ({text})",
            f"restore the access to it, or {_BY_HAND}; {ALONE}",
        )
    return join_error(cluster, RuntimeError(text))


def _number(name: str) -> int:
    """Returns the number in a variable; 0 where it is not set or no number."""
    text: Any = os.environ.get(name, "")
    return int(text) if text.isdecimal() else 0


def _show(*names: str) -> str:
    return ", ".join(f"{name}={os.environ.get(name)}" for name in names)
