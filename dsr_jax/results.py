"""What a training run shows of itself: pictures on the way, scores and summary.json at the end."""

from pathlib import Path
from typing import Any

import numpy as np

from dsr_jax import build
from dsr_jax.config import ConfigDict
from dsr_jax.core.files import write_json
from dsr_jax.core.typing import Params, PyTree
from dsr_jax.data.sources import read_all
from dsr_jax.evaluation.judge import judge_samples
from dsr_jax.evaluation.samples import open_samples
from dsr_jax.parallel.processes import is_primary, say
from dsr_jax.parallel.shardings import fetch
from dsr_jax.sampling.images import save_png_grid
from dsr_jax.sampling.job import SampleJob
from dsr_jax.sampling.labels import balanced_labels, cycled_labels
from dsr_jax.sampling.sampler import SampleFn
from dsr_jax.telemetry.writers import read_metrics
from dsr_jax.training.loop import Summary
from dsr_jax.training.state import TrainState

JUDGE_SPLITS = ("train", "heldout")


class Results:
    """Draws with a run's weights and writes down what came out.

    Args:
      config: The run's config.
      workdir: Its folder.
      draw: From `build.make_sampler`.
      variables: Frozen arrays of the input space.
      num_devices: Batches are multiples of this.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        draw: SampleFn,
        variables: PyTree,
        num_devices: int,
    ) -> None:
        self.config, self.workdir = config, workdir
        self._draw, self._variables, self._num_devices = draw, variables, num_devices

    def draw_grid(self, step: int, state: TrainState) -> None:
        """Writes a picture of samples, a class per column."""
        section, classes = self.config.sample, self.config.data.num_classes
        batch = self._batch_for(section.num)
        indices = np.arange(batch, dtype=np.uint32)
        labels = cycled_labels(range(classes), batch)
        samples = self._draw(self._weights(state), self._variables, indices, labels)
        images = fetch(samples.images)[: section.num]
        if is_primary():
            path = self.workdir / "samples" / f"step_{step:08d}.png"
            save_png_grid(path, images, columns=classes)

    def finish(self, summary: Summary) -> None:
        """Draws and judges samples where the config asks for it; writes summary.json."""
        section, path = self.config.eval, self.workdir / "summary.json"
        scores = self._judge(summary) if section.num_samples and section.judge else {}
        if not is_primary():
            return
        # From the file, since a start that finds the run complete writes no record of its own.
        log = read_metrics(self.workdir)
        loss = log[-1]["loss"] if log else None
        record = {"steps": summary.step, "train_seconds": round(summary.seconds, 1), "loss": loss}
        write_json(path, {**scores, **record})
        if scores:
            say(
                f"judge accuracy {scores['judge_accuracy']:.1%} on {scores['num_samples']} samples "
                f"(real held-out images {scores['judge_accuracy_real']:.1%}); Frechet distance "
                f"{scores['frechet_distance']:.3g} (real {scores['frechet_distance_real']:.3g})"
            )
        say(
            f"pictures: {self.workdir / 'samples'}; summary: {path}\n"
            "next, draw your own: python -m dsr_jax.sample "
            f"--workdir={self.workdir} --num-samples=100 --guidance=2.0 --grid"
        )

    def _weights(self, state: TrainState) -> Params:
        """The parameters, or the average of them, that config.sample.ema names."""
        name = self.config.sample.ema
        return state.params if name == "none" else state.ema[name]

    def _batch_for(self, count: int) -> int:
        """The smallest batch of at least `count` that divides over the devices."""
        return -(-count // self._num_devices) * self._num_devices

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
            lambda indices, labels: self._draw(weights, self._variables, indices, labels),
            self._batch_for(config.sample.batch),
        )
        if not is_primary():
            return {}
        samples = open_samples(path)
        train, heldout = (read_all(build.make_source(config, name)) for name in JUDGE_SPLITS)
        return judge_samples(samples.images(), samples.require_labels("judge"), train, heldout)
