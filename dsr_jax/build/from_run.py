"""From a training run's folder to its denoiser's weights, in host memory, and how they convert."""

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
    """Reads a run's weights; the files of its input space need not be there.

    Args:
      workdir: The run's folder.
      step: Which checkpoint; None for the newest.
      ema: Decay of the average, "none" for the weights themselves; None for what the run samples
        with.

    Returns:
      The network, its parameters as NumPy arrays, the record that `convert.files.save_converted`
      wants, and the run's config.

    Raises:
      ConfigError: If the folder holds no run of a denoiser.
      CheckpointError: If the checkpoint is missing, damaged, or has no such average.
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
    # Outside the run's mesh the network has no layout to keep.
    return model.clone(constrain=Constrain()), fetch(params), record, config
