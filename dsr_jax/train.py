"""Trains a denoiser: `python -m dsr_jax.train --config=configs/digits.py --workdir=runs/digits`.

Any key of the config can be set behind it, as in `--config.optim.lr=1e-3`. The same command
continues a run that was stopped. The run's folder holds config.json, provenance.json,
metrics.jsonl, checkpoints/, samples/ and, at the end, summary.json.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags

from dsr_jax import build
from dsr_jax import config as configs
from dsr_jax.core.cli import run_main
from dsr_jax.core.trees import count_params
from dsr_jax.parallel import shardings
from dsr_jax.parallel.axes import Constrain
from dsr_jax.parallel.processes import is_primary, say, start_processes
from dsr_jax.results import Results
from dsr_jax.telemetry import flops
from dsr_jax.telemetry.clock import StepClock
from dsr_jax.telemetry.profiler import ProfileWindow
from dsr_jax.telemetry.progress import Progress
from dsr_jax.telemetry.writers import MetricWriter, check_packages
from dsr_jax.training.checkpoints import Checkpoints
from dsr_jax.training.loop import (
    Carried,
    Hook,
    Instruments,
    LoopSettings,
    Summary,
    start_or_resume,
    train_loop,
)
from dsr_jax.training.state import TrainState


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's); returns the exit status."""
    args, overrides = _parser().parse_known_args(argv)
    # Grain's worker processes read absl's flags, which this program does not use.
    flags.FLAGS(sys.argv[:1], known_only=True)
    config = configs.load(args.config, overrides)
    start_processes()
    build.set_precision(config)
    changes = configs.check_workdir(config, args.workdir)
    run = Run(config, Path(args.workdir))
    for change in changes:
        say(f"changed since the last start: {change}")
    if is_primary():
        configs.write_run_files(config, args.workdir)
    return run.train()


class Run:
    """One start of a run: what the config names, built; then the loop; then the summary.

    All is built before anything is written, so that a config which cannot work leaves no trace.

    Args:
      config: Checked config.
      workdir: The run's folder.

    Raises:
      DsrError: If what the config names does not exist or does not fit.
    """

    def __init__(self, config: configs.ConfigDict, workdir: Path) -> None:
        self.config, self.workdir = config, workdir
        self.mesh, self.rules = build.make_mesh(config), build.make_rules(config)
        self.space, self.variables = build.make_space(config, self.mesh)
        self.model = build.make_model(config, self.space, Constrain(self.rules, self.mesh))
        self.optimizer = build.make_optimizer(config)
        self.source = build.make_source(config)
        self.batch_sharding = shardings.batch_sharding(self.mesh, self.rules)
        self.abstract, self.init = build.make_state(
            config, self.model, self.space, self.optimizer, self.mesh, self.rules
        )
        step = build.make_step(config, self.model, self.space, self.optimizer)
        self.step = build.jit_step(step, self.abstract, self.batch_sharding, self.mesh)
        if config.sample.every_steps:
            # A space that gives no images says so now, not at the first picture.
            latents = jax.ShapeDtypeStruct((1, *self.space.latent_shape), jnp.float32)
            jax.eval_shape(self.space.decode, self.variables, latents)
        draw = build.make_sampler(config, self.model, self.space, self.mesh, self.rules)
        self.results = Results(config, workdir, draw, self.variables, self.mesh.size)
        check_packages(config.log.tensorboard, config.log.wandb)

    def train(self) -> int:
        """Trains to the end or until stopped; returns the exit status."""
        section = self.config.checkpoint
        say(self._card())
        with Checkpoints(
            self.workdir / "checkpoints",
            every_steps=section.every_steps,
            keep_latest=section.keep_latest,
            keep_every=section.keep_every,
            architecture=configs.architecture(self.config),
        ) as checkpoints:
            state, carried = start_or_resume(
                checkpoints, self.init, self.abstract, section.restore_step
            )
            summary = self._loop(state, carried, checkpoints)
        if not summary.stopped:
            self.results.finish(summary)
        return summary.exit_status

    def _loop(self, state: TrainState, carried: Carried, checkpoints: Checkpoints) -> Summary:
        config, start = self.config, int(state.step)
        if 0 < start < config.train.steps:
            say(f"continuing from step {start}")
        with self._instruments(start) as instruments:
            return train_loop(
                state,
                lambda state, batch: self.step(state, batch, self.variables),
                build.global_batches(config, self.source, self.batch_sharding),
                checkpoints,
                LoopSettings(
                    config.train.steps, config.log.every_steps, config.train.stop_after_steps
                ),
                instruments,
                hooks=[Hook(config.sample.every_steps, self.results.draw_grid)],
                carried=carried,
            )

    def _card(self) -> str:
        """What is about to run, in three lines."""
        config, model = self.config, self.model
        num_params = count_params(self.abstract.params)
        registers = (
            f"{model.num_registers} registers from block {model.register_start}"
            if model.num_registers
            else "no registers"
        )
        sizes = ", ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items())
        return (
            f"{config.model.name}: {num_params:,} parameters, depth {model.depth}, {registers}, "
            f"{build.forward_flops(model) / 1e9:.3g} GFLOPs per image\n"
            f"data: {self.source.name}, {len(self.source):,} images, {model.num_classes} classes; "
            f"mesh: {sizes}\n"
            f"{config.train.steps:,} steps of {config.data.global_batch} images, in {self.workdir}"
        )

    @contextlib.contextmanager
    def _instruments(self, start: int) -> Iterator[Instruments]:
        """Opens what the loop reports to."""
        config = self.config
        step_flops = flops.train_step_flops(
            build.forward_flops(self.model), config.data.global_batch
        )
        devices = self.mesh.devices.flatten()
        writer = MetricWriter(
            self.workdir,
            first_step=start + 1,
            tensorboard=config.log.tensorboard,
            wandb=config.log.wandb,
            config=configs.to_json(config),
        )
        progress = Progress(config.train.steps, start_step=start)
        profile = ProfileWindow(self.workdir, config.log.profile_start, config.log.profile_steps)
        with writer, progress, profile:
            yield Instruments(
                writer=writer,
                progress=progress,
                clock=StepClock(config.data.global_batch, config.train.steps),
                profile=profile,
                mfu=lambda seconds: flops.mfu(
                    step_flops, seconds, len(devices), devices[0].device_kind
                ),
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dsr_jax.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="config file, as in configs/x.py:key=value")
    parser.add_argument("--workdir", required=True, help="the run's folder, new or its own")
    return parser


if __name__ == "__main__":
    run_main(main)
