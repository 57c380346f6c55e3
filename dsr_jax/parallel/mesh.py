"""Device meshes with the axes data, fsdp and tensor."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.sharding import AxisType, Mesh

from dsr_jax.core.errors import MeshError
from dsr_jax.parallel.axes import MESH_AXES


@dataclass(frozen=True)
class MeshShape:
    """Devices along each mesh axis; at most one may be -1, which takes what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def resolve(self, num_devices: int) -> tuple[int, int, int]:
        """Returns the sizes of (data, fsdp, tensor) for `num_devices`.

        Raises:
          MeshError: If the sizes are not positive or do not multiply to the device count.
        """
        sizes = dict(zip(MESH_AXES, (self.data, self.fsdp, self.tensor), strict=True))
        free = [axis for axis, size in sizes.items() if size == -1]
        if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
            raise MeshError(
                f"mesh sizes {sizes} are not valid", "use positive sizes and at most one -1"
            )
        fixed = math.prod(size for size in sizes.values() if size != -1)
        if free and num_devices % fixed == 0:
            sizes[free[0]] = num_devices // fixed
        if math.prod(sizes.values()) != num_devices:
            raise MeshError(
                f"mesh sizes {sizes} do not multiply to the {num_devices} devices at hand",
                "set config.mesh.data, .fsdp and .tensor so that their product is the device "
                "count, or one of them to -1",
            )
        return sizes["data"], sizes["fsdp"], sizes["tensor"]


def make_mesh(shape: MeshShape, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the mesh over `devices` (default: all devices of all processes).

    Axis types are Auto: Linen layers leave the layout of products to the compiler, which an
    Explicit mesh forbids.

    Raises:
      MeshError: If the sizes do not fit the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = shape.resolve(len(devices))
    types = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(sizes, MESH_AXES, axis_types=types, devices=devices)


def check_batch(batch: int, mesh: Mesh, *, accumulate: int = 1) -> None:
    """Checks that a global batch divides over the mesh, also per accumulated micro-batch.

    Raises:
      MeshError: If it does not, with the nearest batch that does.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"] * accumulate
    if batch % shards:
        nearest = max(1, round(batch / shards)) * shards
        raise MeshError(
            f"global batch {batch} does not divide over data x fsdp = {mesh.shape['data']} x "
            f"{mesh.shape['fsdp']} devices with {accumulate} accumulation steps",
            f"use a multiple of {shards}, for example config.data.global_batch={nearest}",
        )
