"""Fixture of a finished run, for the tests of the train command."""

from pathlib import Path

import numpy as np

from dsr_jax import build
from dsr_jax import config as configs
from dsr_jax.core.trees import flatten_names
from dsr_jax.parallel.axes import Constrain
from dsr_jax.parallel.shardings import fetch
from dsr_jax.training.checkpoints import Checkpoints


def final_state(workdir: Path) -> dict[str, np.ndarray]:
    """All arrays of the newest checkpoint, by name."""
    config = configs.load_run(workdir)
    # Of the tests' devices, not those of the processes that trained.
    config.mesh.update(data=-1, fsdp=1, tensor=1)
    mesh, rules = build.make_mesh(config), build.make_rules(config)
    space, _ = build.make_space(config)
    model = build.make_model(config, space, Constrain(rules, mesh))
    abstract, _ = build.make_state(config, model, space, build.make_optimizer(config), mesh, rules)
    with Checkpoints(workdir / "checkpoints", every_steps=1) as checkpoints:
        return flatten_names(fetch(checkpoints.restore(abstract)[0]))
