"""Reads the weights of a training run's denoiser into host memory, with their record."""

import os
from pathlib import Path
from typing import Any

import jax

from dsr_jax.build.abstract import abstract_space
from dsr_jax.build.denoiser import make_model
from dsr_jax.build.experiment import make_rules
from dsr_jax.build.state import abstract_params
from dsr_jax.config import ConfigDict, load_run
from dsr_jax.core.typing import Params
from dsr_jax.data.classes import read_class_names
from dsr_jax.models.denoiser import Denoiser
from dsr_jax.models.registry import denoiser_name, model_sizes
from dsr_jax.parallel.axes import Constrain
from dsr_jax.parallel.mesh import MeshShape, make_mesh
from dsr_jax.parallel.shardings import fetch
from dsr_jax.training.checkpoints import restore_params


def load_denoiser(
    workdir: str | os.PathLike[str], step: int | None = None, ema: str | None = None
) -> tuple[Denoiser, Params, dict[str, Any], ConfigDict]:
    """Reads a run's weights; the files of its input space may be missing.

    Args:
      workdir: The run's folder.
      step: Step of the checkpoint; None for the newest.
      ema: Decay of the EMA weights, "none" for the raw weights; None for config.sample.ema.

    Returns:
      The network, its parameters as NumPy arrays, the record for
      `convert.files.save_converted`, and the run's config.

    Raises:
      ConfigError: If the folder holds no run of a denoiser.
      CheckpointError: If the checkpoint is missing, damaged, or has no such EMA weights.
    """
    config = load_run(workdir)
    mesh, rules = make_mesh(MeshShape(data=1), jax.local_devices()[:1]), make_rules(config)
    space, _ = abstract_space(config)
    model = make_model(config, space, Constrain(rules, mesh))
    abstract = abstract_params(model, space, mesh, rules)
    ema = ema or config.sample.ema
    params, meta = restore_params(
        Path(workdir) / "checkpoints", abstract, step, None if ema == "none" else ema
    )
    record = {
        "family": denoiser_name(type(model)),
        "model": model_sizes(model),
        "entry": "params" if ema == "none" else f"ema {ema}",
        "source": f"{Path(workdir).absolute().name}, step {meta['step']}",
        "source_digest": None,
        "class_names": (read_class_names(workdir) or {"names": []})["names"],
    }
    # Outside the run's mesh, activations have no layout.
    return model.clone(constrain=Constrain()), fetch(params), record, config
