"""GPU nodes by name, with the cards' limits, and their devices for compiling ahead of time.

Source: NVIDIA's data sheets of the SXM cards (A100 80GB, H100, H200) and of the nodes that hold
eight of them (DGX A100: one 200 Gb/s adapter per card; DGX H100 and H200: 400 Gb/s). NVLink speeds
there count both directions, half of which can be sent. What a data sheet lacks (shared memory, L2,
clock, memory as the driver reports it) is from XLA's descriptions of the same cards,
xla/backends/gpu/target_config/specs.
"""

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import jax

from dsr_jax.core.errors import MeshError

MEMORY_FRACTIONS = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")
"""Environment variables with the fraction of a GPU's memory that JAX takes, which refuses both at
once. Source: jaxlib/xla_client.py."""

_DEFAULT_FRACTION = 0.75

MAX_FRACTION = 0.95
"""Fraction of a GPU's memory that JAX can take; CUDA and its libraries need the rest."""


def memory_fraction() -> tuple[str, str]:
    """Returns the name of the variable that is set, or the first one's, and its value or ""."""
    found = {name: os.environ[name] for name in MEMORY_FRACTIONS if os.environ.get(name)}
    return next(iter(found.items()), (MEMORY_FRACTIONS[0], ""))


@dataclass(frozen=True)
class Card:
    """Limits of a GPU.

    Attributes:
      name: Its name in topologies, as in "h100:8".
      device_kind: Name that JAX gives it.
      memory_bytes: All of its memory.
      peak_flops: Dense bfloat16 FLOP/s.
      hbm_bandwidth: Bytes/s.
      ici_bandwidth: Bytes/s that it can send over NVLink to the other GPUs of its node.
      dcn_bandwidth: Bytes/s that it can send to other nodes.
      capability: Major number of its compute capability.
      cores: Streaming multiprocessors.
      fpus: Float32 units of a multiprocessor.
      shared_bytes: Shared memory of a multiprocessor.
      l2_bytes: L2 cache.
      clock_ghz: Highest clock.
    """

    name: str
    device_kind: str
    memory_bytes: int
    peak_flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float
    capability: int
    cores: int
    fpus: int
    shared_bytes: int
    l2_bytes: int
    clock_ghz: float

    @property
    def hbm_bytes(self) -> int:
        """Memory that JAX takes: a variable of MEMORY_FRACTIONS, three quarters by default.

        Raises:
          MeshError: If the variable is not a fraction.
        """
        name, text = memory_fraction()
        try:
            fraction = float(text or _DEFAULT_FRACTION)
        except ValueError:
            fraction = 0.0
        if not 0 < fraction <= 1:
            raise MeshError(
                f"{name}={text!r} is not a fraction of a GPU's memory",
                f"set it above 0 and at most 1, as in {name}=0.92, or unset it",
            )
        return int(self.memory_bytes * fraction)

    @property
    def target_config(self) -> str:
        """XLA's GpuTargetConfigProto in text form, from which it compiles without the card."""
        numbers = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "shared_memory_per_block": 48 * 1024,
            "shared_memory_per_core": self.shared_bytes,
            "threads_per_core_limit": 2048,
            "core_count": self.cores,
            "fpus_per_core": self.fpus,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 2**16 - 1,
            "block_dim_limit_z": 2**16 - 1,
            "memory_bandwidth": int(self.hbm_bandwidth),
            "l2_cache_size": self.l2_bytes,
            "clock_rate_ghz": self.clock_ghz,
            "device_memory_size": self.memory_bytes,
            # A block can use all but 1 KiB of its multiprocessor's.
            "shared_memory_per_block_optin": self.shared_bytes - 1024,
            "registers_per_core_limit": 2**16,
            "registers_per_block_limit": 2**16,
        }
        return (
            f"gpu_device_info {{ {' '.join(f'{name}: {value}' for name, value in numbers.items())} "
            f"cuda_compute_capability {{ major: {self.capability} }} }} "
            'platform_name: "CUDA" dnn_version_info { major: 9 minor: 15 patch: 0 } '
            f'device_description_str: "{self.device_kind}"'
        )


CARDS: Mapping[str, Card] = MappingProxyType(
    {
        card.name: card
        for card in (
            Card(
                "a100",
                "NVIDIA A100-SXM4-80GB",
                memory_bytes=85_100_068_864,
                peak_flops=312e12,
                hbm_bandwidth=2.039e12,
                ici_bandwidth=3e11,
                dcn_bandwidth=2.5e10,
                capability=8,
                cores=108,
                fpus=64,
                shared_bytes=167_936,
                l2_bytes=41_943_040,
                clock_ghz=1.41,
            ),
            Card(
                "h100",
                "NVIDIA H100 80GB HBM3",
                memory_bytes=84_978_434_048,
                peak_flops=989e12,
                hbm_bandwidth=3.35e12,
                ici_bandwidth=4.5e11,
                dcn_bandwidth=5e10,
                capability=9,
                cores=132,
                fpus=128,
                shared_bytes=233_472,
                l2_bytes=52_428_800,
                clock_ghz=1.98,
            ),
            Card(
                "h200",
                "NVIDIA H200",
                memory_bytes=150_754_820_096,
                peak_flops=989e12,
                hbm_bandwidth=4.8e12,
                ici_bandwidth=4.5e11,
                dcn_bandwidth=5e10,
                capability=9,
                cores=132,
                fpus=128,
                shared_bytes=233_472,
                l2_bytes=62_914_560,
                clock_ghz=1.98,
            ),
        )
    }
)

_NODE = (1, 2, 4, 8)
"""GPUs that a program can use of a node."""

_MAX_NODES = 64
"""Largest number of nodes that advice names."""


@dataclass(frozen=True)
class GpuTopology:
    """GPUs of one node, or of several equal nodes.

    Attributes:
      name: Name such as "h100:8" or "2xh100:8".
      chip: Its GPUs.
      gpus: GPUs of a node, connected by NVLink.
      slices: Number of nodes, connected by a network.
    """

    name: str
    chip: Card
    gpus: int
    slices: int = 1

    platform = "gpu"

    @property
    def num_chips(self) -> int:
        """GPUs of all nodes."""
        return self.gpus * self.slices

    @property
    def larger(self) -> tuple[str, ...]:
        """Names of larger topologies of the same GPUs."""
        full = self.chip.name, _NODE[-1]
        own = [f"{full[0]}:{n}" for n in _NODE if n > self.gpus and self.slices == 1]
        nodes, more = 2 * self.slices, []
        while nodes <= _MAX_NODES:
            more.append(f"{nodes}x{full[0]}:{full[1]}")
            nodes *= 2
        return (*own, *more)

    @property
    def accelerator_type(self) -> str:
        """What a node holds, such as "8 x NVIDIA H200"."""
        return f"{self.gpus} x {self.chip.device_kind}"


def find_gpus(name: str) -> GpuTopology | None:
    """Returns the GPUs called `name`, as in "h100:8" or "2xh100:8"; None if it names no card.

    Raises:
      MeshError: If it names a card, but no number of GPUs or nodes that there is.
    """
    card, _, gpus = name.partition(":")
    many, times, rest = card.partition("x")
    nodes, card = (many, rest) if times and many.isdigit() else ("1", card)
    if card not in CARDS:
        return None
    if gpus not in map(str, _NODE) or int(nodes) < 1:
        raise MeshError(
            f"topology {name!r} is not a number of nodes and of GPUs in each",
            f"name {', '.join(map(str, _NODE))} GPUs of a node, as in {card}:8, or several nodes, "
            f"as in 2x{card}:8",
        )
    return GpuTopology(name, CARDS[card], int(gpus), int(nodes))


CUDA_VERSIONS = (13, 12)
"""Versions of CUDA that JAX has plugins for."""

_ENVIRONMENT = MappingProxyType({"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"})
"""Without it the plugin does not register itself where there is no GPU."""

_FLAGS = MappingProxyType({"xla_gpu_autotune_level": "0", "xla_gpu_enable_triton_gemm": "false"})
"""XLA's flags without a GPU: autotuning measures on one, and without it some of Triton's matmuls
have no configuration and end the compilation."""


def compile_only_gpus(topology: GpuTopology) -> list[jax.Device]:
    """Returns the devices as a compiler needs them; no GPU needs to be present.

    Sets the environment variables that JAX's CUDA plugin and XLA read, where they are not set. They
    are read once, so it has to come before the process's first computation.

    Raises:
      MeshError: If the CUDA plugin is not installed, or does not compile for these GPUs.
    """
    if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in CUDA_VERSIONS):
        raise MeshError(
            "compiling for a GPU needs JAX's CUDA plugin, which is not installed",
            "pip install 'dsr_jax[cuda]' (in a checkout: pip install -e '.[cuda]' "
            "-c constraints.txt), 4 GB",
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    flags = os.environ.get("XLA_FLAGS", "")
    missing = [f"--{name}={value}" for name, value in _FLAGS.items() if f"--{name}=" not in flags]
    os.environ["XLA_FLAGS"] = " ".join([*flags.split(), *missing])
    from jax.experimental.topologies import get_topology_desc

    try:
        found = get_topology_desc(
            topology_name=topology.chip.device_kind,
            platform="cuda",
            target_config=topology.chip.target_config,
            topology=f"1x{topology.slices}x{topology.gpus}",
        ).devices
    except Exception as error:  # The plugin's errors have no class of their own.
        raise MeshError(
            f"JAX's CUDA plugin does not compile for {topology.name}: {error}",
            "use the versions of constraints.txt, in a process that has not computed anything yet",
        ) from error
    return list(found)
