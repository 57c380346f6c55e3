"""Evaluation during training: pictures and scores, and summary.json at the end."""

import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from dsr_jax import build
from dsr_jax.config import ConfigDict
from dsr_jax.core.files import write_json
from dsr_jax.core.typing import PyTree
from dsr_jax.data.classes import DataDescription
from dsr_jax.data.sources import read_all
from dsr_jax.evaluation.classifier import classifier_scores
from dsr_jax.evaluation.comparison import shown
from dsr_jax.evaluation.samples import open_samples
from dsr_jax.evaluation.scoring import Result, Scorer
from dsr_jax.parallel.processes import is_process_zero, log, wait_for_all
from dsr_jax.parallel.shardings import fetch
from dsr_jax.runs.sampled_classes import class_notes, classes_to_sample
from dsr_jax.runs.scoring import make_scorer, score_to_file
from dsr_jax.sampling.batch import fixed_batch, whole_batch
from dsr_jax.sampling.images import save_png_grid
from dsr_jax.sampling.job import SampleJob
from dsr_jax.sampling.labels import balanced_labels, cycled_labels
from dsr_jax.sampling.sampler import SampleFn
from dsr_jax.telemetry.writers import read_metrics
from dsr_jax.training.loop import Summary
from dsr_jax.training.state import TrainState

CLASSIFIER_SPLITS = ("train", "heldout")


class Results:
    """Samples with a run's weights and writes pictures and scores.

    Args:
      config: The run's config.
      workdir: Folder of the run.
      sample: Result of `build.make_sampler`.
      variables: Frozen arrays of the input space.
      num_devices: Batches are multiples of this.
      image_shape: Height, width and channels of its images; () if that is never asked for.
      data: The run's classes. Those without images are sampled only if config.sample.all_classes.
      scorer: Result of `open_scorer`.
      tokens: Token sequences [P, L] of the prompts that pictures show, in place of classes.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        sample: SampleFn,
        variables: PyTree,
        num_devices: int,
        image_shape: tuple[int, ...],
        data: DataDescription,
        scorer: Scorer | None = None,
        tokens: np.ndarray | None = None,
    ) -> None:
        self.config, self.workdir = config, workdir
        self._sample, self._variables, self._num_devices = sample, variables, num_devices
        self._data, self._classes = data, classes_to_sample(config, data)
        self._image_shape, self._scorer, self._tokens = image_shape, scorer, tokens
        self._last: tuple[int, dict[str, Any]] = (-1, {})
        self._shown: list[str] = []

    def save_grid(self, step: int, state: TrainState) -> None:
        """Writes a picture of samples, a class or prompt per column."""
        section, classes = self.config.sample, self._classes
        if self._tokens is not None:
            classes = list(range(len(self._tokens)))
        batch = self._batch_for(section.num)
        indices = np.arange(batch, dtype=np.uint32)
        labels = cycled_labels(classes, batch)
        if self._tokens is not None:
            labels = self._tokens[labels]
        samples = self._sample(
            state.weights(self.config.sample.ema), self._variables, indices, labels
        )
        images = fetch(samples.images)[: section.num]
        if is_process_zero():
            path = self.workdir / "samples" / f"step_{step:08d}.png"
            save_png_grid(path, images, columns=len(classes))

    def score(self, step: int, state: TrainState, *, trained_here: bool = True) -> dict[str, float]:
        """Samples and scores as config.eval asks; returns the numbers for the log.

        The samples of the last step stay, those on the way are removed. The scores with their
        recipe go to `scores/`, where tools/compare_scores.py finds them.

        Args:
          step: Steps done.
          state: The state.
          trained_here: Whether this start has trained the state, so that samples of this step which
            are there already are of other weights: of a run that went back, or of a stop that no
            checkpoint kept.
        """
        scores: dict[str, Any] = {}
        section, last = self.config.eval, step == self.config.train.steps
        if section.num_samples and (section.classifier or self._scorer is not None):
            name = f"{'final' if last else 'scored'}_{step:08d}"
            if not last or trained_here:
                self._remove(name)
            path = self._save_samples(step, state, name)
            if self._scorer is not None:
                out = self.workdir / "scores" / f"step_{step:08d}.scores.json"
                metrics = list(section.metrics)
                found = score_to_file(self._scorer, open_samples(path), metrics, out).scores
                self._shown, scores = shown(found), {**scores, **found}
            if section.classifier and is_process_zero():
                scores |= self._classify(path)
            if not last:
                self._remove(name)
        self._last = (step, scores)
        return {key: float(x) for key, x in scores.items() if isinstance(x, (int, float))}

    def finish(self, summary: Summary) -> None:
        """Samples and scores where the config asks for it; writes summary.json."""
        if self._last[0] != summary.step:
            self.score(summary.step, summary.state, trained_here=summary.steps_here > 0)
        scores, path = self._last[1], self.workdir / "summary.json"
        if not is_process_zero():
            return
        # From the file, since a start that finds the run complete writes no record of its own.
        losses = [record["loss"] for record in read_metrics(self.workdir) if "loss" in record]
        record = {
            "steps": summary.step,
            "train_seconds": round(summary.seconds, 1),
            "loss": losses[-1] if losses else None,
        }
        write_json(path, {**scores, **record})
        if "classifier_accuracy" in scores:
            log(
                f"classifier accuracy {scores['classifier_accuracy']:.1%} on "
                f"{scores['num_samples']} samples (real held-out images "
                f"{scores['classifier_accuracy_real']:.1%}); Frechet distance "
                f"{scores['frechet_distance']:.3g} (real {scores['frechet_distance_real']:.3g})"
            )
        if self._scorer is not None:
            found = (f"{key} {scores[key]:.5g}" for key in self._shown)
            log(f"{self.config.eval.num_samples} samples: {', '.join(found)}")
        log(
            f"pictures: {self.workdir / 'samples'}; summary: {path}\n"
            f"next, sample more: {self._command()}"
        )

    def _command(self) -> str:
        """Returns a command that samples from the run."""
        words = ["python", "-m", "dsr_jax.sample", f"--workdir={self.workdir}"]
        if self._tokens is None:
            words.append("--num-samples=100")
        else:
            words += ["--prompt", self.config.sample.prompts[0]]
        if self.config.objective.label_dropout:
            words.append("--guidance=2.0")
        return shlex.join([*words, "--grid"])

    def _batch_for(self, count: int) -> int:
        """Returns the smallest batch of at least `count` that divides over the devices."""
        return whole_batch(count, self._num_devices)

    def _save_samples(self, step: int, state: TrainState, name: str) -> Path:
        config, weights = self.config, state.weights(self.config.sample.ema)
        job = SampleJob(
            self.workdir / "samples",
            name,
            balanced_labels(config.eval.num_samples, self._classes, config.sample.seed),
            self._image_shape,
            build.sampling_recipe(config, step, config.sample.ema),
            class_notes(self._data, self._classes),
        )
        return job.run(
            lambda indices, labels: self._sample(weights, self._variables, indices, labels),
            self._batch_for(fixed_batch(config.sample.batch)),
            report=log,
        )

    def _remove(self, name: str) -> None:
        """Removes a job of samples and their scores' unfinished pass, if they are there."""
        wait_for_all(f"{name} can go")
        if is_process_zero():
            samples, step = self.workdir / "samples", name.rpartition("_")[2]
            for ending in ("npz", "json"):
                (samples / f"{name}.{ending}").unlink(missing_ok=True)
            shutil.rmtree(samples / f"{name}.parts", ignore_errors=True)
            parts = self.workdir / "scores" / f"step_{step}.scores.json.parts"
            shutil.rmtree(parts, ignore_errors=True)
        wait_for_all(f"{name} is gone")

    def _classify(self, path: Path) -> dict[str, Any]:
        samples = open_samples(path)
        splits = (read_all(build.make_source(self.config, name)) for name in CLASSIFIER_SPLITS)
        train, heldout = splits
        return classifier_scores(
            samples.images(), samples.require_labels("the classifier"), train, heldout
        )


def open_scorer(config: ConfigDict, mesh: Mesh, image_shape: tuple[int, ...]) -> Scorer | None:
    """Opens reference and networks of config.eval; None where it names no reference.

    Raises:
      EvaluationError: If the reference cannot be read, or is not of images of this shape.
      ConversionError: If weights are not there.
    """
    section = config.eval
    if not section.reference:
        return None
    scorer = make_scorer(
        section.reference, section.inception, section.dinov2, section.batch, mesh=mesh
    )
    scorer.check((section.num_samples, *image_shape), list(section.metrics), Result())
    return scorer
