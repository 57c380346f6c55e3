"""Scores during training: logs, files, and rejected configs."""

import shlex
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax import train
from dsr_jax.config import base_config
from dsr_jax.core.errors import ConfigError, ConversionError, EvaluationError
from dsr_jax.core.files import read_json
from dsr_jax.data.classes import DataDescription
from dsr_jax.data.sources import make_source, read_all
from dsr_jax.evaluation.reference import open_reference
from dsr_jax.evaluation.samples import open_samples
from dsr_jax.evaluation.scoring import Scorer
from dsr_jax.runs import training_evaluation
from dsr_jax.runs.training_evaluation import Results
from dsr_jax.sampling.job import Samples
from dsr_jax.telemetry.writers import read_metrics
from dsr_jax.training.state import TrainState
from tests.programs import quick_programs
from tests.test_train import DIGITS, STEPS, TINY
from tests.tiny_inception import StandIn

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images, _ = read_all(make_source("digits", image_size=8, channels=1))
    path = tmp_path_factory.mktemp("reference") / "digits.npz"
    np.savez(path, images[:64])
    return path


def start(workdir: Path, reference: Path | str, *overrides: str) -> int:
    """Runs the train command on a tiny config that scores every four steps."""
    scores = (f"--config.eval.reference={reference}", "--config.eval.every_steps=4")
    return train.main([DIGITS, f"--workdir={workdir}", *TINY, *scores, *overrides])


@pytest.mark.slow
def test_scores_are_logged_on_the_way(
    tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_scorer(path: str, *_: Any, mesh: Any) -> Scorer:
        assert mesh.size == 8
        return Scorer(StandIn(), open_reference(path))  # type: ignore[arg-type]

    monkeypatch.setattr(training_evaluation, "make_scorer", make_scorer)
    run = tmp_path / "run"
    # As if an evaluation of other weights had been stopped.
    left = run / "samples" / "scored_00000004.parts"
    with quick_programs(tmp_path / "programs"):
        start(run, reference, "--config.eval.inception=x", "--config.train.stop_after_steps=2")
        left.mkdir(parents=True)
        (left / "job.json").write_text('{"recipe": {"step": 3}, "starts": []}')
        assert start(run, reference, "--config.eval.inception=x") == 0
    logged = {r["step"]: r for r in read_metrics(run) if "fid" in r}
    assert set(logged) == {4, STEPS} and logged[4]["fid"] != logged[STEPS]["fid"]
    assert 0 <= logged[4]["classifier_accuracy"] <= 1
    summary = read_json(run / "summary.json")
    assert summary["fid"] == logged[STEPS]["fid"] and summary["loss"] > 0
    files = sorted(path.name for path in (run / "scores").iterdir())
    assert files == [f"step_{step:08d}.scores.json" for step in (4, STEPS)]
    written = read_json(run / "scores" / files[1])
    assert written["recipe"]["num_samples"] == 20
    assert written["samples"]["record"]["recipe"]["step"] == STEPS
    assert [path.name for path in (run / "samples").glob("*.npz")] == ["final_00000008.npz"]
    assert not list((run / "samples").glob("scored*"))
    samples = open_samples(run / "samples" / "final_00000008.npz")
    scorer = make_scorer(str(reference), mesh=np.zeros(8))
    again = scorer.score(samples, ["fid"], folder=tmp_path / "parts")
    assert again.scores["fid"] == summary["fid"]


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (("--config.eval.inception=",), "config.eval.reference=.* with inception=''"),
        (("--config.eval.num_samples=0", "--config.eval.inception=x"), "with num_samples=0"),
        (("--config.eval.every_steps=-1",), "config.eval.every_steps=-1"),
        (("--config.eval.batch=0",), "config.eval.batch=0"),
    ],
)
def test_settings_that_cannot_be(
    tmp_path: Path, reference: Path, overrides: tuple[str, ...], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        start(tmp_path / "run", reference, *overrides)
    assert not (tmp_path / "run").exists()


def test_nothing_to_score(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is nothing to score"):
        start(tmp_path / "run", "", "--config.eval.classifier=")


def test_files_that_are_not_there_end_the_command_before_it_trains(
    tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, inception = tmp_path / "run", "--config.eval.inception=none"
    with pytest.raises(ConversionError, match="no weights of Inception in 'none'"):
        start(run, reference, inception)
    with pytest.raises(EvaluationError, match="reference file 'none.npz' not found"):
        start(run, "none.npz", inception)
    monkeypatch.setattr(
        training_evaluation,
        "make_scorer",
        lambda path, *_, mesh: Scorer(StandIn(), open_reference(path)),
    )
    np.savez(tmp_path / "large.npz", np.zeros((4, 16, 16, 3), np.uint8))
    with pytest.raises(EvaluationError, match=r"samples have \(8, 8\) pixels"):
        start(run, tmp_path / "large.npz", inception)
    with pytest.raises(EvaluationError, match="unknown metrics"):
        start(run, reference, inception, "--config.eval.metrics=('fld',)")
    assert not run.exists()


DATA: DataDescription = {
    "source": "folder",
    "images": 5,
    "names": ["a", "b", "c"],
    "counts": [3, 0, 2],
    "fingerprint": "sha256:0",
}


def make_results(workdir: Path, sample: Any = None, **settings: float) -> Results:
    config = base_config()
    config.sample.update(ema="none", num=6)
    config.objective.update(settings)
    return Results(config, workdir, sample, {}, 1, (8, 8, 1), DATA)


@pytest.mark.parametrize(("dropout", "guided"), [(0.1, True), (0.0, False)])
def test_the_suggested_command_is_one_that_works(
    tmp_path: Path, dropout: float, guided: bool
) -> None:
    """Paths are quoted, and guidance is suggested only where the null class was trained."""
    workdir = tmp_path / "my runs"
    words = shlex.split(make_results(workdir, label_dropout=dropout)._command())
    assert words[:4] == ["python", "-m", "dsr_jax.sample", f"--workdir={workdir}"]
    assert ("--guidance=2.0" in words) is guided


def test_pictures_show_trained_classes_alone(tmp_path: Path) -> None:
    seen: list[np.ndarray] = []

    def sample(params: Any, variables: Any, indices: np.ndarray, labels: np.ndarray) -> Samples:
        seen.append(labels)
        return Samples(jnp.zeros((6, 8, 8, 1), jnp.uint8), jnp.ones(6, bool), jnp.asarray(indices))

    state = TrainState(step=np.int32(4), params={}, ema={}, opt_state=())
    make_results(tmp_path, sample).save_grid(4, state)
    assert seen[0].tolist() == [0, 2, 0, 2, 0, 2]
    assert (tmp_path / "samples" / "step_00000004.png").is_file()


def test_final_samples_of_a_run_that_went_back_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A complete run that is started again keeps them, and so does one that was stopped there."""

    def sample(params: Any, variables: Any, indices: np.ndarray, labels: np.ndarray) -> Samples:
        images = jnp.full((len(indices), 8, 8, 1), params["level"], jnp.uint8)
        return Samples(images, jnp.ones(len(indices), bool), jnp.asarray(indices))

    def mean(self: Results, path: Path) -> dict[str, float]:
        return {"mean": float(np.load(path)["arr_0"].mean())}

    monkeypatch.setattr(Results, "_classify", mean)
    results = make_results(tmp_path, sample)
    results.config.train.steps = 4
    results.config.eval.update(classifier="digits", num_samples=6)

    def score(level: int, **how: bool) -> float:
        params = {"level": np.uint8(level)}
        state = TrainState(step=np.int32(4), params=params, ema={}, opt_state=())
        return results.score(4, state, **how)["mean"]

    assert [score(1), score(2), score(3, trained_here=False)] == [1, 2, 2]
