"""Cluster detection in simulated environments; a process of a job never runs alone."""

import http.server
import sys
import threading
from collections.abc import Iterator, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from jax._src import clusters as jax_clusters
from jax._src.clusters import cloud_tpu_cluster, k8s_cluster

from dsr_jax.core.errors import ClusterError
from dsr_jax.parallel import clusters, processes

OMPI = {
    "OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp://127.0.0.1:54321",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
}
GKE = {"TPU_WORKER_HOSTNAMES": "localhost,127.0.0.1", "TPU_WORKER_ID": "1"}
ADDRESSES = {"TPU_PROCESS_ADDRESSES": "localhost:8471,127.0.0.1:8471", "TPU_WORKER_ID": "0"}
MULTISLICE = {
    **GKE,
    "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}
PREFIXES = ("OMPI_", "PMI_", "MV2_", "SLURM_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_", "DSR_")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher's variables, and nobody to join."""
    import os

    for name in list(os.environ):
        if name.startswith((*PREFIXES, "JAX_COORDINATOR")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(processes.jax.distributed, "initialize", unwanted)


def unwanted(*args: object, **kwargs: object) -> None:
    raise AssertionError("nothing is to be joined")


def pretend(monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str], tpu: bool) -> None:
    """Sets the variables and, with `tpu`, makes JAX see chips on this machine."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", tpu)
    if not tpu:
        monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")


def what_jax_joins() -> tuple[Any, ...]:
    """Number of processes and this one's index, as `jax.distributed.initialize` finds them."""
    found = jax_clusters.ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, [0], None, 10
    )
    return found[1:3]


@pytest.fixture
def metadata() -> Iterator[dict[str, str]]:
    """What a metadata server on loopback answers; its address is under the key ""."""
    values: dict[str, str] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = values.get(self.path.rpartition("/")[2])
            assert self.headers["Metadata-Flavor"] == "Google"
            self.send_response(404 if text is None else 200)
            self.end_headers()
            self.wfile.write((text or "").encode())

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        values[""] = f"127.0.0.1:{server.server_port}"
        yield values
        server.shutdown()


@pytest.mark.parametrize(
    ("name", "variables", "count", "index"),
    [
        ("OmpiCluster", OMPI, 2, 1),
        ("SlurmCluster", SLURM, 4, 3),
        ("GkeTpuCluster", GKE, 2, 1),
        ("GkeTpuCluster", ADDRESSES, 2, 0),
        ("GkeTpuCluster", MULTISLICE, 4, 3),
    ],
)
def test_environment_variables_agree_with_jaxs_detection(
    monkeypatch: pytest.MonkeyPatch,
    metadata: dict[str, str],
    name: str,
    variables: dict[str, str],
    count: int,
    index: int,
) -> None:
    metadata["tpu-env"] = ""
    monkeypatch.setenv("GCE_METADATA_IP", metadata[""])
    pretend(monkeypatch, variables, tpu=name.startswith("Gke"))
    assert clusters.detect_cluster() == clusters.Cluster(name, count)
    assert what_jax_joins() == (count, index)
    joined: list[dict[str, Any]] = []
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda **how: joined.append(how))
    processes.start_processes(60)
    assert joined == [{"cluster_detection_method": None, "heartbeat_timeout_seconds": 60}]


def test_tpu_machines_find_each_other_through_the_metadata_server(
    monkeypatch: pytest.MonkeyPatch, metadata: dict[str, str]
) -> None:
    pytest.importorskip("requests")
    pretend(monkeypatch, {"GCE_METADATA_IP": metadata[""]}, tpu=True)
    metadata.update({"agent-worker-number": "2", "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-16'"})
    metadata["worker-network-endpoints"] = ",".join(f"a:{i}:127.0.0.1" for i in range(4))
    assert clusters.detect_cluster() == clusters.Cluster("GceTpuCluster", 4)
    assert what_jax_joins() == (4, 2)
    metadata["tpu-env"] += "\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'"
    assert clusters.detect_cluster() == clusters.Cluster("GceTpuCluster", 8)
    assert what_jax_joins() == (8, 6)


def test_a_single_tpu_machine_runs_alone(
    monkeypatch: pytest.MonkeyPatch, metadata: dict[str, str]
) -> None:
    """Else two commands on it would ask for the same port."""
    pytest.importorskip("requests")
    pretend(monkeypatch, {"GCE_METADATA_IP": metadata[""]}, tpu=True)
    metadata.update({"agent-worker-number": "0", "tpu-env": "", "worker-network-endpoints": "a"})
    assert clusters.detect_cluster() == clusters.Cluster("GceTpuCluster", 1)
    processes.start_processes()


def test_a_metadata_server_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("requests")
    pretend(monkeypatch, {"GCE_METADATA_IP": "127.0.0.1:1"}, tpu=True)
    with pytest.raises(
        ClusterError, match=r"(?s)server 127\.0\.0\.1:1 does not list.*PROCESSES=1 runs"
    ):
        processes.start_processes()
    monkeypatch.setenv("DSR_NUM_PROCESSES", "1")
    processes.start_processes()


@pytest.fixture
def kubernetes(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A pod of an indexed job of three, as the Kubernetes client shows it."""
    labels = {"job-name": "train"}
    owner = SimpleNamespace(controller=True, kind="Job")
    pod = SimpleNamespace(
        metadata=SimpleNamespace(name="train-2", labels=labels, owner_references=[owner]),
        spec=SimpleNamespace(subdomain="jaxpods"),
    )
    job = SimpleNamespace(
        metadata=SimpleNamespace(name="train", labels={}), spec=SimpleNamespace(parallelism=3)
    )
    core = SimpleNamespace(list_namespaced_pod=lambda **_: SimpleNamespace(items=[pod]))
    batch = SimpleNamespace(read_namespaced_job=lambda **_: job)
    module: Any = ModuleType("kubernetes")
    module.config = SimpleNamespace(load_incluster_config=lambda: None)
    module.client = SimpleNamespace(
        CoreV1Api=lambda: core,
        BatchV1Api=lambda: batch,
        exceptions=SimpleNamespace(ApiException=ConnectionError),
    )
    monkeypatch.setitem(sys.modules, "kubernetes", module)
    monkeypatch.setattr(k8s_cluster.K8sCluster, "_namespace", classmethod(lambda cls: "default"))
    for name in ("_pod", "_job", "_controller"):
        monkeypatch.setattr(
            k8s_cluster.K8sCluster,
            name,
            classmethod(vars(k8s_cluster.K8sCluster)[name].__func__.__wrapped__),
        )
    pretend(
        monkeypatch, {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": "localhost"}, tpu=False
    )
    return SimpleNamespace(job=job, pod=pod)


def test_pods_of_a_kubernetes_job_are_found(
    monkeypatch: pytest.MonkeyPatch, kubernetes: SimpleNamespace
) -> None:
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "2")
    assert clusters.detect_cluster() == clusters.Cluster("K8sCluster", 3)
    monkeypatch.setattr(k8s_cluster.socket, "gethostbyname", lambda name: "127.0.0.1")
    assert what_jax_joins() == (3, 2)


def test_a_pod_of_no_job_runs_alone(
    monkeypatch: pytest.MonkeyPatch, kubernetes: SimpleNamespace
) -> None:
    kubernetes.pod.metadata.labels = {}
    processes.start_processes()
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    with pytest.raises(ClusterError, match=r"K8sCluster.*job-name.*\n.*JOB_COMPLETION_INDEX"):
        processes.start_processes()


def test_a_pod_without_the_client_runs_alone_if_it_is_of_no_job(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    pretend(monkeypatch, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, tpu=False)
    processes.start_processes()
    assert not [w for w in recwarn if "Kubernetes" in str(w.message)]
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    with pytest.raises(ClusterError, match=r"JOB_COMPLETION_INDEX=1 .*\n.*pip install kubernetes"):
        processes.start_processes()


@pytest.mark.parametrize(
    ("variables", "named", "remedy"),
    [
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "PMI_SIZE=2, PMI_RANK=0", "pip install mpi4py"),
        # Open MPI 5 has no orte_hnp_uri any more.
        (
            {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "3"},
            "OMPI_COMM_WORLD_SIZE=8, OMPI_COMM_WORLD_RANK=3",
            "pip install mpi4py",
        ),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, "SLURM_STEP_NODELIST", "start with srun, or"),
        (
            {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
            r"SLURM_NTASKS=4 .*no job step \(SLURM_STEP_NODELIST not set",
            "unset SLURM_NTASKS",
        ),
        (GKE, "TPU_WORKER_HOSTNAMES=localhost,127.0.0.1", r"dsr_jax\[tpu\]"),
        (ADDRESSES, "TPU_PROCESS_ADDRESSES=", r"dsr_jax\[tpu\]"),
        ({"MEGASCALE_NUM_SLICES": "2"}, "MEGASCALE_NUM_SLICES=2", r"dsr_jax\[tpu\]"),
        (
            {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"},
            "JAX_COORDINATOR_ADDRESS=10.0.0.1:1234",
            "DSR_COORDINATOR",
        ),
    ],
    ids=str,
)
def test_a_process_that_cannot_join_its_job_ends(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], named: str, remedy: str
) -> None:
    monkeypatch.setattr(clusters, "can_ask_mpi", lambda: False)
    pretend(monkeypatch, variables, tpu=False)
    with pytest.raises(ClusterError, match=f"{named}.*\n.*{remedy}"):
        processes.start_processes()
    if "unset" in remedy or "srun" in remedy:
        monkeypatch.delenv("SLURM_NTASKS")
    else:
        monkeypatch.setenv("DSR_NUM_PROCESSES", "1")
    processes.start_processes()


def test_mpi_is_asked_through_mpi4py_where_that_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    joined: list[Any] = []
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda **how: joined.append(how))
    monkeypatch.setattr(clusters, "can_ask_mpi", lambda: True)
    pretend(monkeypatch, {"PMI_SIZE": "2", "PMI_RANK": "1"}, tpu=False)
    processes.start_processes()
    assert [how["cluster_detection_method"] for how in joined] == ["mpi4py"]


def test_launchers_within_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intel's mpirun starts its own daemons as SLURM tasks: two ranks have one SLURM_PROCID."""
    pretend(monkeypatch, {**SLURM, "PMI_SIZE": "8", "PMI_RANK": "5"}, tpu=False)
    with pytest.raises(ClusterError, match="PMI_SIZE=8, PMI_RANK=5 .*SlurmCluster counts 4"):
        processes.start_processes()
    monkeypatch.setenv("PMI_SIZE", "4")
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda **how: None)
    processes.start_processes()


def test_a_job_that_jax_cannot_join_names_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**_: object) -> None:
        raise RuntimeError("DEADLINE_EXCEEDED: nobody there")

    monkeypatch.setattr(processes.jax.distributed, "initialize", fails)
    pretend(monkeypatch, SLURM, tpu=False)
    with pytest.raises(ClusterError, match=r"SlurmCluster.*nobody there\n.*SLURM_STEP_NODELIST"):
        processes.start_processes()
