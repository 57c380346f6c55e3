"""Meshes fill one free axis, keep slices apart, and refuse what does not fit."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from dsr_jax.core.errors import MeshError
from dsr_jax.parallel.axes import make_rules
from dsr_jax.parallel.mesh import MeshShape, check_batch, make_mesh


def test_one_axis_takes_what_is_left() -> None:
    assert MeshShape(-1, 2, 2).resolve(8) == (2, 2, 2)
    assert MeshShape(2, -1, 1).resolve(8) == (2, 4, 1)
    assert dict(make_mesh(MeshShape()).shape) == {"data": 8, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize("sizes", [(-1, -1, 1), (0, 1, 1), (3, 1, 1), (-1, 3, 1), (2, 2, 1)])
def test_sizes_that_do_not_fit_raise(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(MeshError, match="mesh sizes"):
        MeshShape(*sizes).resolve(8)


def test_batch_must_divide() -> None:
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    rules = make_rules("fsdp")
    check_batch(8, mesh, rules, accumulate=2)
    with pytest.raises(MeshError, match="global batch 10 .*\n.*multiple of 4.*global_batch=8"):
        check_batch(10, mesh, rules)
    with pytest.raises(MeshError, match="2 accumulation"):
        check_batch(12, mesh, rules, accumulate=2)


def test_replicated_rules_split_the_batch_over_tensor_too() -> None:
    mesh, rules = make_mesh(MeshShape(data=2, fsdp=2, tensor=2)), make_rules("replicated")
    check_batch(8, mesh, rules)
    with pytest.raises(MeshError, match="batch 4 .* data x fsdp x tensor = 2 x 2 x 2.*\n.*of 8"):
        check_batch(4, mesh, rules)


@dataclass(frozen=True)
class Chip:
    """What JAX says of a TPU chip that is not there."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    process_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0


def chips(slices: int) -> list[Any]:
    """Slices of 2 x 4 chips."""
    return [
        Chip(100 * number + 2 * y + x, number, (x, y, 0), 2 * number + y // 2)
        for number in range(slices)
        for y in range(4)
        for x in range(2)
    ]


@pytest.mark.parametrize(
    ("shape", "sizes", "crossed"),
    [
        (MeshShape(), (16, 1, 1), {"data"}),
        (MeshShape(fsdp=8), (2, 8, 1), {"data"}),
        (MeshShape(fsdp=4, tensor=2, dcn_data=2), (2, 4, 2), {"data"}),
        (MeshShape(data=1, fsdp=16, dcn_data=1, dcn_fsdp=2), (1, 16, 1), {"fsdp"}),
        (MeshShape(data=4, fsdp=4, dcn_data=1, dcn_fsdp=-1), (4, 4, 1), {"fsdp"}),
    ],
)
def test_only_the_axes_that_are_named_cross_slices(
    shape: MeshShape, sizes: tuple[int, ...], crossed: set[str]
) -> None:
    mesh = make_mesh(shape, chips(2))
    assert mesh.devices.shape == sizes and mesh.axis_names == ("data", "fsdp", "tensor")
    index = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    for axis, name in enumerate(mesh.axis_names):
        assert (name in crossed) == bool((np.diff(index, axis=axis) != 0).any()), name
    # Slices lie one after the other: an axis crosses from one to the next once.
    assert all((np.diff(index, axis=axis) >= 0).all() for axis in range(3))
    assert len({chip.id for chip in mesh.devices.flat}) == 16


def test_four_slices_can_cut_both_axes() -> None:
    mesh = make_mesh(MeshShape(data=4, fsdp=8, dcn_data=2, dcn_fsdp=2), chips(4))
    index = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)[..., 0]
    blocks = [block for half in np.split(index, 2) for block in np.split(half, 2, axis=1)]
    assert [set(block.flat) for block in blocks] == [{0}, {1}, {2}, {3}]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            MeshShape(data=1, fsdp=16),
            "'data': 1, 'fsdp': 16, 'tensor': 1. of 16 devices .* 2 slices with dcn_data 2 and "
            "dcn_fsdp 1\n.*config.mesh.data to a multiple of 2",
        ),
        (MeshShape(dcn_data=3), "'dcn_data': 3, 'dcn_fsdp': 1. .* the 2 slices at hand"),
        (MeshShape(dcn_fsdp=-1), "not valid"),
        (MeshShape(fsdp=8, dcn_data=1, dcn_fsdp=4), "'dcn_fsdp': 4.*2 slices"),
    ],
)
def test_what_does_not_divide_over_slices_raises_with_the_sizes(
    shape: MeshShape, message: str
) -> None:
    with pytest.raises(MeshError, match=message):
        make_mesh(shape, chips(2))


def test_other_devices_have_no_slices() -> None:
    assert make_mesh(MeshShape(fsdp=8)).devices.shape == (1, 8, 1)
    with pytest.raises(MeshError, match="'dcn_data': 2.* the 1 slices at hand"):
        make_mesh(MeshShape(dcn_data=2))
