"""Takes the policy that fits the smallest device of two processes: `remat_worker.py OUT`.

Each process finds other free memory, and writes the policy that it takes to OUT/PROCESS.txt.
"""

import sys
from pathlib import Path

import jax
from jax.sharding import NamedSharding, PartitionSpec

from dsr_jax.build.fitting import FittingStep, compile_fit
from dsr_jax.core.cli import run_main
from dsr_jax.models.blocks import REMAT_POLICIES
from dsr_jax.parallel.mesh import MeshShape, make_mesh
from dsr_jax.parallel.processes import start_processes
from tests.build.test_fitting import toy_arrays, toy_step


def main() -> None:
    """Runs as a script; see the module's docstring."""
    start_processes()
    process, count = jax.process_index(), jax.process_count()
    mesh = make_mesh(MeshShape(count, 1, 1))
    arrays = jax.device_put(toy_arrays(), NamedSharding(mesh, PartitionSpec()))
    steps = {policy: toy_step(policy) for policy in REMAT_POLICIES}
    needed = compile_fit("none", steps["none"], arrays)[0].allocated
    # The last process alone has too little for the fastest policy.
    free = needed - 1 if process == count - 1 else 2**40
    chosen = []
    FittingStep(steps, mesh, lambda *_: [], chosen.append, lambda _: free)(*arrays)
    assert chosen[0].free == needed - 1
    (Path(sys.argv[1]) / f"{process}.txt").write_text(chosen[0].policy)


if __name__ == "__main__":
    run_main(main)
