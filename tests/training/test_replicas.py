"""Copies that differ are found, and the device that is alone is named."""

from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsr_jax.core.errors import ProcessError
from dsr_jax.parallel.mesh import MeshShape, make_mesh
from dsr_jax.training.replicas import ReplicaCheck

MESH = MeshShape(4, 2, 1)
BATCH = 16


def place(value: np.ndarray, *spec: Any, wrong: dict[int, float] | None = None) -> jax.Array:
    """Lays an array out; adds to the first number of some devices' pieces."""
    sharding = NamedSharding(make_mesh(MESH, jax.devices()), PartitionSpec(*spec))
    pieces = []
    for device, index in sharding.addressable_devices_indices_map(value.shape).items():
        piece = np.array(value[index])
        piece.flat[0] += (wrong or {}).get(device.id, 0)
        pieces.append(jax.device_put(piece, device))
    return jax.make_array_from_single_device_arrays(value.shape, sharding, pieces)


def state(**wrong: dict[int, float]) -> dict[str, jax.Array]:
    """One array whole everywhere, one in two halves, one in eight parts, and a counter."""
    numbers = np.arange(64, dtype=np.float32).reshape(8, 8) / 7
    return {
        "whole": place(numbers, wrong=wrong.get("whole")),
        "halves": place(numbers.astype(np.float16), "fsdp", wrong=wrong.get("halves")),
        "parts": place(numbers, ("data", "fsdp"), wrong=wrong.get("parts")),
        "step": place(np.asarray(3, np.int32)),
    }


def batch(step: int, shift: int = 0) -> dict[str, jax.Array]:
    index = step * BATCH + np.arange(BATCH)
    index[:2] += shift
    return {"index": place(index.astype(np.uint32), ("data", "fsdp"))}


def verify(step: int, tree: Any, samples: Any) -> None:
    check = ReplicaCheck(tree, samples, "process {} (host)".format)
    check.verify(step, np.asarray(check.start(step, tree, samples)))


def test_equal_replicas_pass() -> None:
    verify(4, state(), batch(3))
    verify(4, state(), {})


@pytest.mark.parametrize("name", ["whole", "halves"])
@pytest.mark.parametrize("device", [0, 5])
def test_the_odd_device_is_named(name: str, device: int) -> None:
    with pytest.raises(ProcessError) as caught:
        verify(4, state(**{name: {device: 0.1}}), batch(3))
    problem = caught.value.problem
    assert f"step 4: process 0 (host), devices [{device}] differs from the others" in problem
    assert f"in {name};" in problem


def test_an_equal_split_names_both_sides() -> None:
    with pytest.raises(ProcessError, match=r"devices \[0, 2, 4, 6\] differ from each other"):
        verify(4, state(halves={4: 1.0, 6: 1.0}), batch(3))


def test_parts_that_one_device_holds_cannot_differ() -> None:
    verify(4, state(parts={3: 1.0}), batch(3))


@pytest.mark.parametrize("shift", [BATCH, -BATCH])
def test_samples_of_another_step_are_noticed(shift: int) -> None:
    with pytest.raises(ProcessError, match=r"devices \[0\] trained on samples of another step"):
        verify(4, state(), batch(3, shift))
    with pytest.raises(ProcessError, match="trained on samples of another step"):
        verify(5, state(), batch(3))


def test_positions_wrap_around_with_their_32_bits() -> None:
    verify(2**28 + 1, state(), batch(2**28))
