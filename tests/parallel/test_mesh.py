"""Meshes fill one free axis and refuse what does not fit."""

import pytest

from dsr_jax.core.errors import MeshError
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
    check_batch(8, mesh, accumulate=2)
    with pytest.raises(MeshError, match="global batch 10 .*\n.*multiple of 4.*global_batch=8"):
        check_batch(10, mesh)
    with pytest.raises(MeshError, match="2 accumulation"):
        check_batch(12, mesh, accumulate=2)
