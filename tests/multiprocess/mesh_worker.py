"""Trains a tiny denoiser on several meshes in turn: `mesh_worker.py OUT RULES MESH [MESH ...]`.

A mesh is `data,fsdp,tensor`. Writes the state and the losses after some steps to OUT/MESH.npz.
"""

import sys
from pathlib import Path

import jax
import numpy as np

from dsr_jax import build, train
from dsr_jax.core.cli import run_main
from dsr_jax.core.trees import flatten_names
from dsr_jax.parallel.processes import is_process_zero, start_processes
from dsr_jax.parallel.shardings import fetch
from dsr_jax.training.replicas import ReplicaCheck
from tests.test_meshes import tiny_config

STEPS = 2


def main() -> None:
    """Runs as a script; see the module's docstring."""
    out, rules, *meshes = sys.argv[1:]
    start_processes()
    for mesh in meshes:
        data, fsdp, tensor = map(int, mesh.split(","))
        config = tiny_config(((data, fsdp, tensor), rules))
        config.sample.every_steps = 0
        config.eval.classifier = ""
        # Rounding of one step must not grow in the next.
        config.optim.lr = 1e-2
        build.set_precision(config)
        job = train.make_job(config, Path(out))
        state, batches, losses = job.init(), job.batches(3), []
        for step in range(STEPS):
            batch = next(batches)
            state, metrics = job.step(state, batch)
            check = ReplicaCheck(state, batch)
            check.verify(3 + step + 1, np.asarray(check.start(3 + step + 1, state, batch)))
            losses.append(float(metrics["loss"]))
        arrays = flatten_names(fetch(vars(state)))
        if is_process_zero():
            np.savez(Path(out) / f"{mesh}.npz", losses=losses, **arrays)
    print(jax.process_count(), "processes")


if __name__ == "__main__":
    run_main(main)
