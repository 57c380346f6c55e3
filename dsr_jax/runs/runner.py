"""One start of a training run of any kind: command line, folder, loop, instruments.

The training commands build a `TrainingJob` from a config; all else is here.
"""

import argparse
import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dsr_jax import build
from dsr_jax import config as configs
from dsr_jax.config.resume import check_allowed
from dsr_jax.core.cli import make_parser
from dsr_jax.core.errors import DataError, DeviceMemoryError
from dsr_jax.core.files import write_atomic
from dsr_jax.core.provenance import git_revision, package_versions
from dsr_jax.core.trees import flatten_names
from dsr_jax.core.typing import Batch
from dsr_jax.data.classes import DataDescription, warnings_of, write_class_names
from dsr_jax.parallel.device_memory import is_out_of_memory
from dsr_jax.parallel.peers import check_identical
from dsr_jax.parallel.processes import (
    HEARTBEAT_SECONDS,
    coordination_client,
    is_process_zero,
    lock_folder,
    log,
    start_processes,
    wait_for_all,
)
from dsr_jax.parallel.watch import FOLDER as FAILURES
from dsr_jax.parallel.watch import Limits, Watch, join_watch
from dsr_jax.runs.folder import check_data, check_workdir, write_run_files
from dsr_jax.telemetry import flops
from dsr_jax.telemetry.clock import StepClock
from dsr_jax.telemetry.parameters import parameter_table
from dsr_jax.telemetry.profiler import ProfileWindow
from dsr_jax.telemetry.progress import Progress
from dsr_jax.telemetry.writers import MetricWriter, check_packages
from dsr_jax.training.checkpoints import Checkpoints
from dsr_jax.training.loop import (
    Hook,
    Instruments,
    LoopSettings,
    ResumeState,
    Summary,
    start_or_resume,
    train_loop,
)


@dataclass(frozen=True)
class TrainingJob:
    """Training job: all objects that a config describes.

    Attributes:
      summary_text: Run summary, a few lines of text.
      mesh: Mesh of devices.
      abstract: Shapes and shardings of the state (a `TrainState` or a class derived from it).
      init: Makes the state before the first step.
      step: The compiled step, `(state, batch) -> (state, metrics)`.
      batches: `batches(first step)` yields global batches for ever.
      records: Returns the numbers of the records in the batch of a step, from 1.
      hooks: Periodic actions on the state, such as sampling.
      finish: Action at the end of a complete run.
      data: Description of the training data.
      forward_flops: Of the trained network on one image, from which the share of the devices' peak
        follows; None if unknown.
    """

    summary_text: str
    mesh: Mesh
    abstract: Any
    init: Callable[[], Any]
    step: Callable[[Any, Batch], tuple[Any, Any]]
    batches: Callable[[int], Iterator[Batch]]
    records: Callable[[int], Sequence[int]]
    hooks: Sequence[Hook]
    finish: Callable[[Summary], None]
    data: DataDescription
    forward_flops: int | None = None


MakeTrainingJob = Callable[[configs.ConfigDict, Path], TrainingJob]
"""Builds all that a config names, for a run's folder, and writes nothing.

All is built before anything is written, so that a config which cannot work leaves no trace.
"""


def run_command(
    argv: Sequence[str] | None, make_job: MakeTrainingJob, program: str, description: str | None
) -> int:
    """Runs the command line of a training command.

    Args:
      argv: Command line arguments; None for the process's.
      make_job: Function that builds the command's job.
      program: Name of the command.
      description: Help text of the command.

    Returns:
      The exit status.
    """
    args, overrides = _parser(program, description).parse_known_args(argv)
    check_allowed(args.allow_change)
    # Grain's worker processes read absl's flags, which this program does not use.
    flags.FLAGS(sys.argv[:1], known_only=True)
    config, workdir = configs.load(args.config, overrides), args.workdir
    lost_seconds = config.failures.lost_seconds
    # JAX's own limit names no process: it is for where this program can no longer report.
    start_processes(HEARTBEAT_SECONDS + round(lost_seconds))
    with join_watch(workdir, _limits(config), config.failures.end_hung, lost_seconds) as watch:
        check_processes(configs.to_json(config))
        with lock_folder(workdir), explain_out_of_memory():
            return _run(config, workdir, args.allow_change, make_job, watch)


@contextlib.contextmanager
def explain_out_of_memory() -> Iterator[None]:
    """Turns the error of a device without enough memory into one that names what to change.

    Raises:
      DeviceMemoryError: In its place. All that it names may change within a run.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceMemoryError(
            f"a device is out of memory: {str(error).splitlines()[0][:300]}",
            "set config.model.remat=full or a higher config.optim.accumulate (for a decoder, "
            "config.decoder.remat=full), split the state over more devices with config.mesh.fsdp "
            "and config.sharding.rules=fsdp, compute in config.precision.compute=bfloat16, or, if "
            "images were being sampled or scored, lower config.sample.batch or config.eval.batch; "
            "each may change within a run, and python -m dsr_jax.compile reports a denoiser's "
            "memory beforehand",
        ) from error


def check_processes(config: Mapping[str, Any]) -> None:
    """Checks that all processes of a run have the same config, code and packages.

    Raises:
      ConfigError: Naming the processes that differ, and what differs.
      ProcessError: If one does not start.
    """
    if jax.process_count() == 1:
        return
    values = {f"config.{name}": value for name, value in flatten_names(config, ".").items()}
    values |= {f"package {name}": value for name, value in package_versions().items()}
    values |= {"code": git_revision(), "Python": sys.version.split()[0]}
    check_identical(coordination_client(), jax.process_index(), jax.process_count(), values)


def check_same_data(data: DataDescription) -> None:
    """Checks that all processes list the same data, as disks of their own may not.

    Raises:
      DataError: Naming the processes that differ from process 0.
    """
    listing = {key: data[key] for key in ("images", "names", "counts", "fingerprint")}
    digest = hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).digest()
    digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8), tiled=False)
    rows = np.reshape(digests, (-1, len(digest)))
    others = np.flatnonzero((rows != rows[0]).any(axis=1))
    if others.size:
        raise DataError(
            f"processes {', '.join(map(str, others[:8]))} find other data than process 0 does; "
            f"process {jax.process_index()} finds {data['images']} images of "
            f"{len(data['names'])} classes in {data['source']}",
            "give all hosts the same files: a shared folder, or whole copies of it",
        )


def _limits(config: configs.ConfigDict) -> Limits:
    section = config.failures
    return Limits(section.step_seconds, section.pause_seconds, config.checkpoint.save_seconds)


def _run(
    config: configs.ConfigDict,
    workdir: Path,
    allowed: Sequence[str],
    make_job: MakeTrainingJob,
    watch: Watch,
) -> int:
    """Builds what the config names and trains; returns the exit status."""
    build.set_precision(config)
    changes = check_workdir(config, workdir, allowed)
    check_packages(config.log.tensorboard, config.log.wandb)
    job = make_job(config, workdir)
    changes += check_data(workdir, job.data, allowed)
    # The folder that others still look at must not change.
    wait_for_all("workdir checked")
    check_same_data(job.data)
    for change in changes:
        log(f"changed since the last start: {change}")
    for hint in configs.hints(config):
        log(f"hint: {hint}")
    if not configs.trains_decoder(config):
        for warning in warnings_of(job.data, config.data.num_classes):
            log(f"warning: {warning}")
    continues = (workdir / "config.json").is_file()
    if not continues:
        # First of all, since a folder without config.json is taken for somebody else's.
        _record_start(job, config, workdir)
    return _train(job, config, workdir, watch, continues)


def _record_start(job: TrainingJob, config: configs.ConfigDict, workdir: Path) -> None:
    """Writes the files that describe the run and this start of it, on process 0."""
    if is_process_zero():
        write_run_files(config, workdir)
        write_class_names(workdir, job.data)
        write_atomic(workdir / "parameters.txt", parameter_table(job.abstract.params) + "\n")


def _train(
    job: TrainingJob, config: configs.ConfigDict, workdir: Path, watch: Watch, continues: bool
) -> int:
    """Trains to the end or until stopped; returns the exit status."""
    section = config.checkpoint
    steps, images = config.train.steps, config.data.global_batch
    log(f"{job.summary_text}\n{steps:,} steps of {images} images, in {workdir}")
    with Checkpoints(
        workdir / "checkpoints",
        every_steps=section.every_steps,
        keep_latest=section.keep_latest,
        keep_every=section.keep_every,
        architecture=configs.architecture(config),
        save_seconds=section.save_seconds,
    ) as checkpoints:
        state, resume_state = start_or_resume(
            checkpoints, job.init, job.abstract, section.restore_step
        )
        if continues:
            # Settings with which no checkpoint can be restored are not the run's.
            _record_start(job, config, workdir)
        summary = _loop(job, config, workdir, state, resume_state, checkpoints, watch)
    if not summary.stopped:
        watch.enter("finishing", summary.step)
        job.finish(summary)
    return summary.exit_status


def _loop(
    job: TrainingJob,
    config: configs.ConfigDict,
    workdir: Path,
    state: Any,
    resume_state: ResumeState,
    checkpoints: Checkpoints,
    watch: Watch,
) -> Summary:
    start = int(state.step)
    if 0 < start < config.train.steps:
        log(f"continuing from step {start}")
    settings = LoopSettings(
        config.train.steps,
        config.log.every_steps,
        config.train.stop_after_steps,
        config.failures.check_replicas,
    )
    with _instruments(job, config, workdir, start, watch) as instruments:
        return train_loop(
            state,
            job.step,
            job.batches,
            checkpoints,
            settings,
            instruments,
            hooks=job.hooks,
            resume_state=resume_state,
        )


@contextlib.contextmanager
def _instruments(
    job: TrainingJob, config: configs.ConfigDict, workdir: Path, start: int, watch: Watch
) -> Iterator[Instruments]:
    """Opens what the loop reports to."""
    devices = job.mesh.devices.flatten()

    def mfu(step_seconds: float) -> float | None:
        if job.forward_flops is None:
            return None
        step_flops = flops.train_step_flops(job.forward_flops, config.data.global_batch)
        return flops.mfu(step_flops, step_seconds, len(devices), devices[0].device_kind)

    writer = MetricWriter(
        workdir,
        first_step=start + 1,
        tensorboard=config.log.tensorboard,
        wandb=config.log.wandb,
        config=configs.to_json(config),
    )
    progress = Progress(config.train.steps, start_step=start)
    profile = ProfileWindow(workdir, config.log.profile_start, config.log.profile_steps)
    with writer, progress, profile:
        clock = StepClock(config.data.global_batch, config.train.steps)
        yield Instruments(
            *(writer, progress, clock, profile, mfu, watch), job.records, workdir / FAILURES
        )


_CONFIG_HELP = (
    "config file with its arguments, joined by commas: configs/x.py:key=value,key; "
    "--config.KEY=VALUE behind it sets any key, and python -m dsr_jax.config lists them all"
)


def _parser(program: str, description: str | None) -> argparse.ArgumentParser:
    parser = make_parser(description, program)
    add = parser.add_argument
    add("--config", required=True, help=_CONFIG_HELP)
    add("--workdir", required=True, type=Path, help="the run's folder, new or its own")
    add(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="lets a run that continues change this key, which decides what is learned; repeatable",
    )
    return parser
