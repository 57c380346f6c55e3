"""One process of a sampling job on several: `job_worker.py [PORT COUNT RANK] FOLDER SEED`."""

import os
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsr_jax.core import cli
from dsr_jax.parallel.processes import start_processes
from dsr_jax.sampling.job import SampleJob, Samples

SHAPE = (2, 3, 1)
LABELS = (np.arange(23) * 7 % 10).astype(np.int32)


def picture(indices: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Images that hold their index and label."""
    images = np.zeros((len(indices), *SHAPE), np.uint8)
    images[:, 0, 0, 0] = indices
    images[:, 1, 2, 0] = labels
    return images


def main() -> None:
    """Samples LABELS over all devices of all processes."""
    *address, folder, seed = sys.argv[1:]
    if address:
        os.environ["DSR_COORDINATOR"] = f"localhost:{address[0]}"
        os.environ["DSR_NUM_PROCESSES"], os.environ["DSR_PROCESS_ID"] = address[1:]
    jax.config.update("jax_num_cpu_devices", 2)
    start_processes()
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))

    def place(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda place: array[place])

    def sample(indices: np.ndarray, labels: np.ndarray) -> Samples:
        finite = np.ones(len(indices), bool)
        return Samples(*map(place, (picture(indices, labels), finite, indices)))

    SampleJob(Path(folder), "samples", LABELS, SHAPE, {"seed": int(seed)}).run(sample, 8)


if __name__ == "__main__":
    cli.run_main(main)
