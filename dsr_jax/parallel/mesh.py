"""Device meshes with the axes data, fsdp and tensor, over one TPU slice or several."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from dsr_jax.core.errors import MeshError
from dsr_jax.parallel.axes import MESH_AXES, Rules


@dataclass(frozen=True)
class MeshShape:
    """Number of devices along each mesh axis; at most one may be -1, for the remaining devices.

    Attributes:
      data: Replicas of the state, over all slices.
      fsdp: Devices that share a state, over all slices.
      tensor: Devices that share a head or a hidden unit, within a slice.
      dcn_data: Slices along `data`, which communicate over the data-center network; at most one of
        the two may be -1.
      dcn_fsdp: Slices along `fsdp`.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    dcn_data: int = -1
    dcn_fsdp: int = 1

    def resolve(self, num_devices: int) -> tuple[int, int, int]:
        """Returns the sizes of (data, fsdp, tensor) for `num_devices`.

        Raises:
          MeshError: If the sizes are not positive or do not multiply to the device count.
        """
        sizes = dict(zip(MESH_AXES, (self.data, self.fsdp, self.tensor), strict=True))
        data, fsdp, tensor = _fill(sizes, num_devices, "devices")
        return data, fsdp, tensor

    def resolve_slices(self, num_devices: int, num_slices: int) -> tuple[int, int, int]:
        """Returns how many slices each of (data, fsdp, tensor) extends over.

        Raises:
          MeshError: If they do not multiply to `num_slices`, or do not divide their axes.
        """
        sizes = self.resolve(num_devices)
        wanted = {"dcn_data": self.dcn_data, "dcn_fsdp": self.dcn_fsdp}
        data, fsdp = _fill(wanted, num_slices, "slices")
        slices = data, fsdp, 1
        if any(size % across for size, across in zip(sizes, slices, strict=True)):
            names = dict(zip(MESH_AXES, sizes, strict=True))
            raise MeshError(
                f"mesh sizes {names} of {num_devices} devices do not divide over {num_slices} "
                f"slices with dcn_data {slices[0]} and dcn_fsdp {slices[1]}",
                f"set config.mesh.data to a multiple of {slices[0]} (with fsdp x tensor at most "
                f"{num_devices // num_slices}, the devices of a slice), or set "
                "config.mesh.dcn_fsdp to the slices that share a state",
            )
        return slices


def _fill(sizes: dict[str, int], total: int, what: str) -> tuple[int, ...]:
    """Returns the sizes, with -1 replaced so that their product is `total`."""
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise MeshError(
            f"mesh sizes {sizes} are not valid", "use positive sizes and at most one -1"
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and total % fixed == 0:
        sizes = {**sizes, free[0]: total // fixed}
    if math.prod(sizes.values()) != total:
        raise MeshError(
            f"mesh sizes {sizes} do not multiply to the {total} {what} at hand",
            f"set {', '.join(f'config.mesh.{axis}' for axis in sizes)} so that their product is "
            f"the number of {what}, or one of them to -1",
        )
    return tuple(sizes.values())


def num_slices(devices: Sequence[jax.Device]) -> int:
    """Returns the number of TPU slices of the devices; 1 for devices of another kind."""
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def make_mesh(shape: MeshShape, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the mesh over `devices` (default: all devices of all processes).

    Neighbors along an axis are neighbors in the slice's torus. Several slices are cut along
    `data`, where devices exchange gradients once a step, unless the shape says otherwise.

    Axis types are Auto: Linen layers leave the layout of matmuls to the compiler, which an
    Explicit mesh forbids.

    Raises:
      MeshError: If the sizes do not fit the devices or their slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes, types = shape.resolve(len(devices)), (AxisType.Auto,) * len(MESH_AXES)
    across = shape.resolve_slices(len(devices), num_slices(devices))
    # Splitting comes last: 4 x 16 on a torus of 8 x 8 has no other way.
    if math.prod(across) == 1:
        array = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        within = [size // factor for size, factor in zip(sizes, across, strict=True)]
        array = mesh_utils.create_hybrid_device_mesh(
            within, across, devices, allow_split_physical_axes=True
        )
    return Mesh(array, MESH_AXES, axis_types=types)


def check_batch(batch: int, mesh: Mesh, rules: Rules, *, accumulate: int = 1) -> None:
    """Checks that a global batch divides over the mesh, also per accumulated micro-batch.

    Args:
      batch: Samples per step.
      mesh: Mesh of devices.
      rules: Rules that map samples to mesh axes.
      accumulate: Micro-batches per step.

    Raises:
      MeshError: If it does not, with the nearest batch that does.
    """
    axes = dict(rules)["act_batch"]
    shards = math.prod(mesh.shape[axis] for axis in axes) * accumulate
    if batch % shards:
        nearest = max(1, round(batch / shards)) * shards
        sizes = " x ".join(str(mesh.shape[axis]) for axis in axes)
        raise MeshError(
            f"global batch {batch} does not divide over {' x '.join(axes)} = {sizes} devices with "
            f"{accumulate} accumulation steps",
            f"use a multiple of {shards}, for example config.data.global_batch={nearest}",
        )
