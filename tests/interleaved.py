"""Runs a command on a mesh whose devices alternate between the processes, as on TPU slices.

    python -m tests.interleaved dsr_jax.train --config=... --workdir=...

JAX lays out CPU devices process by process, which hides mistakes in the order of rows.
"""

import runpy
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils


def alternating_mesh(sizes: Sequence[int], devices: Sequence[Any], **_: Any) -> np.ndarray:
    """Stands in for `mesh_utils.create_device_mesh`: first devices of all, second ones, ..."""
    seen: dict[int, int] = {}
    places = []
    for device in devices:
        seen[device.process_index] = seen.get(device.process_index, 0) + 1
        places.append((seen[device.process_index], device.process_index))
    order = sorted(range(len(devices)), key=places.__getitem__)
    array = np.empty(len(devices), dtype=object)
    array[:] = [devices[place] for place in order]
    return array.reshape(tuple(sizes))


if __name__ == "__main__":
    mesh_utils.create_device_mesh = alternating_mesh
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
