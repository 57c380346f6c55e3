"""Trains a denoiser: `python -m dsr_jax.train --config=configs/digits.py --workdir=runs/digits`.

Any key of the config can be set behind it, as in `--config.optim.lr=1e-3`. The same command
continues a run that was stopped. The run's folder holds config.json, provenance.json,
metrics.jsonl, checkpoints/, samples/ and, at the end, summary.json.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from dsr_jax import build
from dsr_jax import config as configs
from dsr_jax.core.cli import run_main
from dsr_jax.core.files import write_json
from dsr_jax.core.trees import count_params
from dsr_jax.core.typing import Params
from dsr_jax.data.sources import read_all
from dsr_jax.evaluation.judge import judge_samples
from dsr_jax.evaluation.samples import open_samples
from dsr_jax.parallel import shardings
from dsr_jax.parallel.axes import Constrain
from dsr_jax.parallel.processes import is_primary, say, start_processes
from dsr_jax.sampling.images import save_png_grid
from dsr_jax.sampling.job import SampleJob
from dsr_jax.sampling.labels import balanced_labels, cycled_labels
from dsr_jax.telemetry import flops
from dsr_jax.telemetry.clock import StepClock
from dsr_jax.telemetry.profiler import ProfileWindow
from dsr_jax.telemetry.progress import Progress
from dsr_jax.telemetry.writers import MetricWriter
from dsr_jax.training.checkpoints import Checkpoints
from dsr_jax.training.loop import (
    Hook,
    Instruments,
    LoopSettings,
    Summary,
    start_or_resume,
    train_loop,
)
from dsr_jax.training.metrics import MetricWindow
from dsr_jax.training.state import TrainState

JUDGE_SPLITS = ("train", "heldout")


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

    Args:
      config: Checked config.
      workdir: The run's folder.
    """

    def __init__(self, config: configs.ConfigDict, workdir: Path) -> None:
        self.config, self.workdir = config, workdir
        self.mesh, self.rules = build.make_mesh(config), build.make_rules(config)
        self.space, self.variables = build.make_space(config)
        self.model = build.make_model(config, self.space, Constrain(self.rules, self.mesh))
        self.optimizer = build.make_optimizer(config)
        self.source = build.make_source(config)
        self.draw = build.make_sampler(config, self.model, self.space, self.mesh, self.rules)

    def train(self) -> int:
        """Trains to the end or until stopped; returns the exit status."""
        config, section = self.config, self.config.checkpoint
        abstract, init = build.make_state(
            config, self.model, self.space, self.optimizer, self.mesh, self.rules
        )
        say(self._card(count_params(abstract.params)))
        with Checkpoints(
            self.workdir / "checkpoints",
            every_steps=section.every_steps,
            keep_latest=section.keep_latest,
            keep_every=section.keep_every,
            architecture=configs.architecture(config),
        ) as checkpoints:
            state, window = start_or_resume(checkpoints, init, abstract, section.restore_step)
            began = time.monotonic()
            summary = self._loop(state, window, checkpoints, abstract)
        if not summary.stopped:
            self._finish(summary, time.monotonic() - began)
        return summary.exit_status

    def _loop(
        self,
        state: TrainState,
        window: MetricWindow,
        checkpoints: Checkpoints,
        abstract: TrainState,
    ) -> Summary:
        config, start = self.config, int(state.step)
        if 0 < start < config.train.steps:
            say(f"continuing from step {start}")
        batch = shardings.batch_sharding(self.mesh, self.rules)
        step = build.make_step(config, self.model, self.space, self.optimizer)
        compiled = build.jit_step(step, abstract, batch, self.mesh)
        with self._instruments(start) as instruments:
            return train_loop(
                state,
                lambda state, batch: compiled(state, batch, self.variables),
                build.global_batches(config, self.source, batch),
                checkpoints,
                LoopSettings(
                    config.train.steps, config.log.every_steps, config.train.stop_after_steps
                ),
                instruments,
                hooks=[Hook(config.sample.every_steps, self._draw_grid)],
                window=window,
            )

    def _card(self, num_params: int) -> str:
        """What is about to run, in three lines."""
        config, model = self.config, self.model
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

    def _weights(self, state: TrainState) -> Params:
        """The parameters, or the average of them, that config.sample.ema names."""
        name = self.config.sample.ema
        return state.params if name == "none" else state.ema[name]

    def _draw_grid(self, step: int, state: TrainState) -> None:
        """Writes a picture of samples, row by row of the same class."""
        section = self.config.sample
        batch = self._batch_for(section.num)
        indices = np.arange(batch, dtype=np.uint32)
        labels = cycled_labels(range(self.config.data.num_classes), batch)
        samples = self.draw(self._weights(state), self.variables, indices, labels)
        images = shardings.fetch(samples.images)[: section.num]
        if is_primary():
            path = self.workdir / "samples" / f"step_{step:08d}.png"
            save_png_grid(path, images, columns=self.config.data.num_classes)

    def _batch_for(self, count: int) -> int:
        """The smallest batch of at least `count` that divides over the mesh."""
        shards = self.mesh.devices.size
        return -(-count // shards) * shards

    def _finish(self, summary: Summary, seconds: float) -> None:
        """Draws and judges samples where the config asks for it; writes summary.json."""
        config, record = self.config, {}
        if config.eval.num_samples and config.eval.judge:
            record = self._judge(summary)
        if not is_primary():
            return
        write_json(
            self.workdir / "summary.json",
            {
                **record,
                "steps": summary.step,
                "train_seconds": round(seconds, 1),
                "loss": summary.last_record.get("loss"),
            },
        )
        if record:
            say(
                f"judge accuracy {record['judge_accuracy']:.1%} on {record['num_samples']} samples "
                f"(real held-out images {record['judge_accuracy_real']:.1%}); Frechet distance "
                f"{record['frechet_distance']:.3g} (real {record['frechet_distance_real']:.3g})"
            )
        say(
            f"pictures: {self.workdir / 'samples'}; summary: {self.workdir / 'summary.json'}\n"
            "next, draw your own: python -m dsr_jax.sample "
            f"--workdir={self.workdir} --num-samples=100 --guidance=2.0"
        )

    def _judge(self, summary: Summary) -> dict[str, Any]:
        config, weights = self.config, self._weights(summary.state)
        job = SampleJob(
            self.workdir / "samples",
            f"final_{summary.step:08d}",
            balanced_labels(config.eval.num_samples, config.data.num_classes, config.sample.seed),
            (config.data.image_size, config.data.image_size, config.data.channels),
            build.sampling_recipe(config, summary.step, config.sample.ema),
        )
        path = job.run(
            lambda indices, labels: self.draw(weights, self.variables, indices, labels),
            self._batch_for(config.sample.batch),
        )
        if not is_primary():
            return {}
        samples = open_samples(path)
        train, heldout = (read_all(build.make_source(config, name)) for name in JUDGE_SPLITS)
        return judge_samples(samples.images(), samples.require_labels("judge"), train, heldout)


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
