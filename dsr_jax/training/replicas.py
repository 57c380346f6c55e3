"""Checks that the replicas of an array agree: on all devices, in all processes.

Parameters that several devices hold are never compared by training itself: a device that computes
wrongly, or a process that started from another state, would go unnoticed. Here each device sums the
bits of its own shards, which costs about one read of the state, and the sums of replicas of a shard
must agree.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsr_jax.core.errors import ProcessError
from dsr_jax.core.trees import flatten_names
from dsr_jax.core.typing import Array, Batch, PyTree
from dsr_jax.training.checksums import sum_bits


class ReplicaCheck:
    """Compares the replicas of a state's arrays, and the batches that they were trained on.

    Args:
      state: Arrays, or shapes, with shardings over one mesh.
      batch: A global batch. Its "index" holds the run's numbers of its samples:
        step * batch size + row. Without it only the state is compared.
      name_process: Function from a process's index to its name in messages.
    """

    def __init__(
        self,
        state: PyTree,
        batch: Batch,
        name_process: Callable[[int], str] = "process {}".format,
    ) -> None:
        leaves = flatten_names(state)
        self._names = list(leaves)
        self._name_process = name_process
        mesh: Mesh = next(iter(leaves.values())).sharding.mesh
        self._devices = list(mesh.devices.flat)
        self._replicas = np.stack(
            [_first_replicas(leaf, self._devices) for leaf in leaves.values()], 1
        )
        index: Any = batch.get("index")
        self._size = 0 if index is None else index.shape[0]
        self._sums = _make_sums(
            [leaf.sharding.spec for leaf in leaves.values()],
            index.sharding.spec if self._size else None,
            mesh,
        )

    def start(self, step: int, state: PyTree, batch: Batch) -> Array:
        """Starts to sum up on the devices, without waiting.

        Args:
          step: Steps done, the batch's included.
          state: The state after it.
          batch: Its batch.

        Returns:
          uint32 [devices, arrays + 1]: sums, and the number of misaligned samples:
          those of another step.
        """
        first = np.uint32((step - 1) * self._size % 2**32)
        return self._sums(list(flatten_names(state).values()), batch.get("index"), first)

    def verify(self, step: int, sums: np.ndarray) -> None:
        """Checks that the checksums of a step agree.

        Raises:
          ProcessError: With the array and the processes whose replica differs from most others, or
            the processes whose samples are those of another step.
        """
        if misaligned := np.flatnonzero(sums[:, -1]).tolist():
            raise ProcessError(
                f"step {step}: {self._who(misaligned)} trained on samples of another step",
                "check that it reads the same data as the others; the same command continues from "
                "the last checkpoint",
            )
        sums = sums[:, :-1]
        wrong = np.flatnonzero((sums != np.take_along_axis(sums, self._replicas, 0)).any(0))
        if wrong.size == 0:
            return
        column = int(wrong[0])
        odd = _minority(sums[:, column], self._replicas[:, column])
        more = f" and {wrong.size - 1} arrays more" if wrong.size > 1 else ""
        if odd:
            problem = f"{self._who(odd)} differs from the others in {self._names[column]}{more}"
        else:
            replicas = self._replicas[:, column]
            split = replicas[sums[:, column] != sums[replicas, column]]
            pairs = np.flatnonzero(np.isin(replicas, split)).tolist()
            problem = f"{self._who(pairs)} differ from each other in {self._names[column]}{more}"
        raise ProcessError(
            f"step {step}: {problem}; the state was not saved",
            "the same command continues from the last checkpoint; if it comes again on the "
            "same machine, do without that one",
        )

    def _who(self, indices: Sequence[int]) -> str:
        """Names processes and, where they have several, their devices."""
        owners: dict[int, list[int]] = {}
        for index in indices:
            device = self._devices[index]
            owners.setdefault(device.process_index, []).append(device.id)
        texts = []
        for process, ids in list(owners.items())[:8]:
            of = f", devices {ids}" if len(self._devices) > jax.process_count() else ""
            texts.append(f"{self._name_process(process)}{of}")
        return " and ".join(texts)


def _first_replicas(leaf: Any, devices: Sequence[Any]) -> np.ndarray:
    """Returns for each device the first that holds the same piece [devices]."""
    pieces = leaf.sharding.devices_indices_map(leaf.shape)
    seen: dict[str, int] = {}
    return np.asarray(
        [seen.setdefault(str(pieces[device]), at) for at, device in enumerate(devices)]
    )


def _minority(sums: np.ndarray, replicas: np.ndarray) -> list[int]:
    """Returns the devices whose piece differs from that of most of its holders; [] if none has."""
    odd: list[int] = []
    for first in np.unique(replicas):
        held = np.flatnonzero(replicas == first)
        values, counts = np.unique(sums[held], return_counts=True)
        if counts.max() * 2 > held.size:
            odd += held[sums[held] != values[counts.argmax()]].tolist()
    return odd


def _make_sums(
    specs: list[PartitionSpec], index_spec: PartitionSpec | None, mesh: Mesh
) -> Callable[..., Array]:
    """Returns the program `(arrays, index or None, first index) -> [devices, arrays + 1]`."""

    def local(leaves: list[Array], index: Array | None, first: Array) -> Array:
        misaligned = jnp.zeros((), jnp.uint32)
        if index is not None:
            # Unsigned numbers wrap around, so that a sample before the first is far behind it.
            size = jnp.uint32(index.shape[0] * _shards(index_spec, mesh))
            misaligned = jnp.sum(index.astype(jnp.uint32) - first >= size, dtype=jnp.uint32)
        return jnp.stack([*map(sum_bits, leaves), misaligned])[None]

    everywhere = PartitionSpec(mesh.axis_names)
    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(specs, index_spec, PartitionSpec()),
        out_specs=everywhere,
        check_vma=False,
    )
    return jax.jit(mapped, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _shards(spec: PartitionSpec | None, mesh: Mesh) -> int:
    """Returns the number of pieces of the leading dimension."""
    entry = spec[0] if spec else None
    axes = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
    return int(np.prod([mesh.shape[axis] for axis in axes], dtype=int))
