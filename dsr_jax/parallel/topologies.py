"""TPU slices by name, with the chips' limits, and devices for compiling ahead of time.

GPUs are in `parallel.gpus`; `find_topology` and `compile_only_devices` take both.

Source: Google Cloud's pages on TPU v4, v5e, v5p and v6e; link speeds from "How to scale your model"
(jax-ml.github.io/scaling-book), chapter TPUs; memory as libtpu's compiler reports it. The pages
give the data-center network's speed per chip (v5p) or per pod of 256 chips (v5e, v6e); they give
none for v4, for which v5p's stands.
"""

import importlib.util
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax

from dsr_jax.core.errors import MeshError
from dsr_jax.parallel.gpus import CARDS, GpuTopology, compile_only_gpus, find_gpus

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Limits of a chip.

    Attributes:
      generation: Google's name, as in "v5e:4x4".
      device_kind: Name that JAX gives its devices.
      accelerator: Beginning of the accelerator type, as in "v5litepod-16".
      types_count_cores: Whether the number after it counts cores, two per chip, instead of chips.
      hbm_bytes: Memory that a program can have; the rest is the runtime's.
      peak_flops: Dense bfloat16 FLOP/s.
      hbm_bandwidth: Bytes/s.
      ici_bandwidth: Bytes/s that it can send along one axis of the torus, in both directions.
      dcn_bandwidth: Bytes/s that it can send over the data-center network to other slices.
      chips_per_host: Chips along each axis that one host holds, in slices of several hosts.
      shapes: Slices that can be had.
    """

    generation: str
    device_kind: str
    accelerator: str
    types_count_cores: bool
    hbm_bytes: float
    peak_flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float
    chips_per_host: tuple[int, ...]
    shapes: tuple[str, ...]


_FLAT = tuple("1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16".split())
_CUBES = tuple("2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16".split())

CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        chip.generation: chip
        for chip in (
            Chip(
                *("v4", "TPU v4", "v4", True),
                *(30.75 * GIB, 275e12, 1.2e12, 9e10, 6.25e9),
                *((2, 2, 1), _CUBES),
            ),
            Chip(
                *("v5e", "TPU v5 lite", "v5litepod", False),
                *(15.75 * GIB, 197e12, 8.1e11, 9e10, 3.125e9),
                *((2, 2), _FLAT),
            ),
            Chip(
                *("v5p", "TPU v5", "v5p", True),
                *(95.74 * GIB, 459e12, 2.8e12, 1.8e11, 6.25e9),
                *((2, 2, 1), (*_CUBES, "16x16x16", "16x16x24")),
            ),
            Chip(
                *("v6e", "TPU v6 lite", "v6e", False),
                *(31.25 * GIB, 918e12, 1.6e12, 1.8e11, 1.25e10),
                *((2, 2), _FLAT),
            ),
        )
    }
)


@dataclass(frozen=True)
class Topology:
    """TPU slice, a grid of chips of one kind, or several equal slices.

    Attributes:
      name: Name such as "v5e:16x16" or "2xv5e:16x16".
      chip: Its chips.
      shape: Chips along each axis of a slice.
      slices: Number of slices, connected by the data-center network.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    platform = "tpu"

    @property
    def num_chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def slice_name(self) -> str:
        """The name of one slice."""
        return f"{self.chip.generation}:{'x'.join(map(str, self.shape))}"

    @property
    def larger(self) -> tuple[str, ...]:
        """Names of the same number of larger slices."""
        many, shapes = f"{self.slices}x" if self.slices > 1 else "", self.chip.shapes
        behind = shapes[shapes.index(self.slice_name.partition(":")[2]) + 1 :]
        return tuple(f"{many}{self.chip.generation}:{shape}" for shape in behind)

    @property
    def accelerator_type(self) -> str:
        """Accelerator type with which a slice is created, such as "v5litepod-256"."""
        cores = 2 if self.chip.types_count_cores else 1
        return f"{self.chip.accelerator}-{math.prod(self.shape) * cores}"


AnyTopology = Topology | GpuTopology

_ENVIRONMENT = MappingProxyType(
    {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
)
"""The last two only prevent warnings of libtpu."""


def find_topology(name: str) -> AnyTopology:
    """Returns the TPU slice or GPUs called `name`, or several slices or nodes.

    Args:
      name: As in "v5e:4x4", "v5p:2x2x4", "2xv5e:4x4", "h100:8", "2xh100:8".

    Raises:
      MeshError: If there is none, with those that there are.
    """
    if gpus := find_gpus(name):
        return gpus
    generation, _, shape = name.partition(":")
    many, times, rest = generation.partition("x")
    if times and many.isdigit() and int(many):
        generation = rest
    else:
        many = "1"
    if generation not in CHIPS:
        raise MeshError(
            f"unknown TPU or GPU {generation!r} in topology {name!r}",
            f"choose from {', '.join(f'{chip}:{CHIPS[chip].shapes[-1]}' for chip in CHIPS)}, "
            f"{', '.join(f'{card}:8' for card in CARDS)}",
        )
    chip = CHIPS[generation]
    if shape not in chip.shapes:
        raise MeshError(
            f"no {generation} slice of shape {shape!r}", f"there are {', '.join(chip.shapes)}"
        )
    return Topology(name, chip, tuple(int(side) for side in shape.split("x")), int(many))


def compile_only_devices(topology: AnyTopology) -> list[jax.Device]:
    """Returns the topology's devices as a compiler needs them; none of them needs to be present.

    For TPUs it sets the environment variables that libtpu reads, where they are not set: libtpu
    would otherwise ask the metadata server of a TPU virtual machine and lock a TPU of this machine.

    Raises:
      MeshError: If the compiler (libtpu, JAX's CUDA plugin) is not installed, or does not know the
        topology.
    """
    if isinstance(topology, GpuTopology):
        return compile_only_gpus(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise MeshError(
            "compiling for a TPU needs its compiler, libtpu, which is not installed",
            "pip install 'dsr_jax[tpu]' (in a checkout: pip install -e '.[tpu]')",
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Slices of one host need not fill it.
    host = [min(sides) for sides in zip(topology.shape, topology.chip.chips_per_host, strict=True)]
    options: dict[str, Any] = {"chips_per_host_bounds": (*host, 1)[:3]}
    if topology.chip.types_count_cores:
        options["chip_config_name"] = "megacore"  # JAX shows such a chip's two cores as one device.
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    from jax.experimental.topologies import get_topology_desc

    try:
        found = get_topology_desc(topology.slice_name, "tpu", **options).devices
    except Exception as error:  # libtpu's errors have no class of their own.
        raise MeshError(f"libtpu does not compile for {topology.name}: {error}") from error
    if len(found) != topology.num_chips:
        raise MeshError(f"{topology.name}: {len(found)} devices for {topology.num_chips} chips")
    return list(found)
