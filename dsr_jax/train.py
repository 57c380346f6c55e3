"""Trains a denoiser: `python -m dsr_jax.train --config=configs/digits.py --workdir=runs/digits`.

Any key of the config can be set behind it, as in `--config.optim.lr=1e-3`. The same command
continues a run that was stopped. The run's folder holds config.json, provenance.json,
metrics.jsonl, checkpoints/, samples/, with config.log.outliers outliers/ and, at the end,
summary.json.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dsr_jax import build
from dsr_jax import config as configs
from dsr_jax.config import ConfigDict
from dsr_jax.core.cli import run_main
from dsr_jax.core.trees import count_params
from dsr_jax.core.typing import Params, PyTree
from dsr_jax.data.classes import DataDescription, describe, trained_labels
from dsr_jax.models.denoiser import Denoiser
from dsr_jax.parallel import shardings
from dsr_jax.parallel.axes import Constrain
from dsr_jax.parallel.device_memory import FreeBytes, free_bytes
from dsr_jax.runs.folder import add_to_provenance
from dsr_jax.runs.outliers import OutlierMonitor
from dsr_jax.runs.runner import TrainingJob, run_command
from dsr_jax.runs.training_evaluation import Results, open_scorer
from dsr_jax.spaces import InputSpace
from dsr_jax.telemetry.progress import announce_first_call
from dsr_jax.training.checkpoints import list_steps
from dsr_jax.training.loop import Hook
from dsr_jax.training.optimizers import Optimizer
from dsr_jax.training.state import TrainState
from dsr_jax.training.step import TrainStep


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's); returns the exit status."""
    return run_command(argv, make_job, "python -m dsr_jax.train", __doc__)


def make_job(config: ConfigDict, workdir: Path, free_memory: FreeBytes = free_bytes) -> TrainingJob:
    """Builds a denoiser's training.

    Args:
      config: Experiment config.
      workdir: The run's folder.
      free_memory: Memory that the step may allocate on each device.

    Raises:
      DsrError: If what the config names does not exist or does not fit.
    """
    mesh, rules = build.make_mesh(config), build.make_rules(config)
    space, variables = build.make_space(config, mesh)
    model = build.make_model(config, space, Constrain(rules, mesh))
    optimizer = build.make_optimizer(config)
    source = build.make_source(config, random_crops=True, slots=_slots(model))
    data = describe(source)
    sharding = shardings.batch_sharding(mesh, rules)
    abstract, init = build.make_state(config, model, space, optimizer, mesh, rules)
    if not list_steps(workdir / "checkpoints"):
        init = _first_state(config, model, optimizer, abstract, init, data)

    def make_step(policy: str) -> TrainStep:
        network = build.with_remat(config, model, policy)
        return build.make_step(config, network, space, optimizer, abstract)

    step = build.make_fitting_step(
        config,
        make_step,
        abstract,
        sharding,
        lambda choice: add_to_provenance(workdir, {"remat": choice.to_json()}),
        free_memory,
    )
    results = _make_results(config, workdir, model, space, variables, mesh, data)
    batches = build.global_batches(config, source, sharding)
    hooks = [
        Hook(config.sample.every_steps, results.save_grid),
        Hook(config.eval.every_steps, results.score),
    ]
    if config.log.outliers:
        monitor = OutlierMonitor(config, workdir, model, space, variables, batches, mesh)
        hooks.append(Hook(config.log.outliers, monitor))
    return TrainingJob(
        summary_text=_run_summary(config, model, abstract.params, data, mesh),
        mesh=mesh,
        abstract=abstract,
        init=init,
        step=lambda state, batch: step(state, batch, variables),
        batches=batches,
        records=build.batch_records(config, source),
        hooks=hooks,
        finish=results.finish,
        data=data,
        forward_flops=model.forward_flops(),
    )


def _slots(model: Denoiser) -> int:
    """Returns the image slots of a token sequence; 0 without text."""
    return getattr(model, "num_slots", 0)


def _first_state(
    config: ConfigDict,
    model: Denoiser,
    optimizer: Optimizer,
    abstract: TrainState,
    init: Callable[[], TrainState],
    data: DataDescription,
) -> Callable[[], TrainState]:
    """Returns the function that makes a new run's state: `init`, or one that reads weights."""
    if config.train.init_from:
        return build.start_from(config, model, optimizer, abstract, data["names"])
    if config.language.init_from:
        return build.start_from_language(config, init, optimizer, abstract)
    return init


def _make_results(
    config: ConfigDict,
    workdir: Path,
    model: Denoiser,
    space: InputSpace,
    variables: PyTree,
    mesh: Mesh,
    data: DataDescription,
) -> Results:
    """Builds what samples and scores during the run."""
    image_shape: tuple[int, ...] = ()
    if config.sample.every_steps or config.eval.classifier or config.eval.reference:
        # A space that cannot make images fails here, not at the first picture.
        latents = jax.ShapeDtypeStruct((1, *space.latent_shape), jnp.float32)
        image_shape = jax.eval_shape(space.decode, variables, latents).shape[1:]
    sampler = build.make_sampler(config, model, space, mesh, build.make_rules(config))
    sample = announce_first_call(sampler, "the sampler")
    scorer = open_scorer(config, mesh, image_shape)
    prompts = config.sample.prompts if configs.has_text(config) else ()
    tokens = build.encode_prompts(config, prompts, _slots(model)) if prompts else None
    return Results(config, workdir, sample, variables, mesh.size, image_shape, data, scorer, tokens)


def _run_summary(
    config: ConfigDict, model: Denoiser, params: Params, data: DataDescription, mesh: Mesh
) -> str:
    """Returns the run summary, in two lines."""
    rows, trained = model.num_classes, len(trained_labels(data, model.num_classes))
    classes = (
        f"{rows} classes" if trained == rows else f"{trained} classes of a label table of {rows}"
    )
    if configs.has_text(config):
        classes = "with captions"
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    network = [
        f"{config.model.name}: {count_params(params):,} parameters",
        *filter(None, [model.summary()]),
        f"{model.forward_flops() / 1e9:.3g} GFLOPs per image",
    ]
    return (
        f"{', '.join(network)}\n"
        f"data: {data['source']}, {data['images']:,} images, {classes}; mesh: {sizes}"
    )


if __name__ == "__main__":
    run_main(main)
