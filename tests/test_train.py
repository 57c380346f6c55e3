"""The train command, end to end: files of a run, restarts, and rejected input."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from dsr_jax import config as configs
from dsr_jax import train
from dsr_jax.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DsrError,
    MeshError,
    NumericsError,
)
from dsr_jax.core.files import read_json
from dsr_jax.telemetry.writers import read_metrics
from dsr_jax.training.checkpoints import list_steps
from tests.finished_run import final_state
from tests.programs import quick_programs

REPOSITORY = Path(__file__).parents[1]
DIGITS = f"--config={REPOSITORY / 'configs' / 'digits.py'}:runlocal"
STEPS = 8
TINY = (
    "--config.model.hidden_size=16",
    "--config.model.depth=2",
    "--config.model.num_heads=2",
    "--config.registers.start=0",
    "--config.precision.matmul=highest",
    # Fast enough to leave the zeros of the start behind.
    "--config.optim.warmup_steps=2",
    "--config.ema.decays=(0.5,)",
    "--config.sample.ema=0.5",
    # The pictures on the way and the scored samples then share one program.
    "--config.sample.batch=16",
    "--config.sample.every_steps=4",
)
UNSCORED = ("--config.eval.classifier=", "--config.sample.every_steps=0")
SCORES = (
    "classifier_accuracy",
    "classifier_accuracy_real",
    "frechet_distance",
    "frechet_distance_real",
)


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Starts share their programs, as those in processes of their own cannot."""
    with quick_programs(tmp_path_factory.mktemp("programs")):
        yield


def start(workdir: Path, *overrides: str) -> int:
    """Runs the command on the tiny config."""
    return train.main([DIGITS, f"--workdir={workdir}", *TINY, *overrides])


def records(workdir: Path) -> list[dict[str, Any]]:
    """Log records without the timings."""
    timings = ("step_seconds", "images_per_second", "mfu")
    return [{k: v for k, v in r.items() if k not in timings} for r in read_metrics(workdir)]


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time stamp and bytes of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run without interruption."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert start(folder) == 0
    return folder


def test_a_run_leaves_its_config_its_numbers_and_its_pictures(whole: Path) -> None:
    config = configs.load_run(whole)
    assert config.model.hidden_size == 16 and config.train.steps == STEPS
    (stamp,) = read_json(whole / "provenance.json")
    assert stamp["packages"]["jax"] == jax.__version__
    table = (whole / "parameters.txt").read_text()
    assert "| pos_embed" in table and "Total: " in table
    assert list_steps(whole / "checkpoints") == [4, STEPS]
    metrics = read_metrics(whole)
    assert [record["step"] for record in metrics] == [2, 4, 6, 8]
    assert all(np.isfinite(record[key]) for record in metrics for key in ("loss", "grad_norm"))

    pictures = [whole / "samples" / f"step_{step:08d}.png" for step in (4, STEPS)]
    early, late = (np.asarray(Image.open(path)) for path in pictures)
    assert early.shape == late.shape and early.shape[1] >= 10 * 8 and np.ptp(late) > 50
    assert (early != late).any()
    with np.load(whole / "samples" / f"final_{STEPS:08d}.npz") as samples:
        assert samples["arr_0"].shape == (20, 8, 8, 1)
        assert (np.bincount(samples["labels"]) == 2).all()


def test_the_summary_holds_scores_beside_those_of_real_images(whole: Path) -> None:
    summary = read_json(whole / "summary.json")
    assert set(SCORES) < set(summary)
    assert summary["steps"] == STEPS and summary["train_seconds"] > 0
    assert summary["num_samples"] == 20
    assert summary["loss"] == read_metrics(whole)[-1]["loss"]
    assert summary["classifier_accuracy_real"] > 0.9 > summary["classifier_accuracy"]
    assert summary["frechet_distance"] > 3 * summary["frechet_distance_real"] > 0


def test_a_resumed_run_equals_an_uninterrupted_run_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    """Also where a piece ends between two checkpoints and inside a log window."""
    assert start(tmp_path, "--config.train.stop_after_steps=3") == 0
    assert list_steps(tmp_path / "checkpoints") == [3]
    assert not (tmp_path / "summary.json").exists() and len(records(tmp_path)) == 1
    assert start(tmp_path) == 0

    want, got = final_state(whole), final_state(tmp_path)
    assert got.keys() == want.keys() and {"step", "params/pos_embed"} < want.keys()
    assert int(want["step"]) == STEPS
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    assert records(tmp_path) == records(whole)
    for picture in (whole / "samples").glob("*.png"):
        assert (tmp_path / "samples" / picture.name).read_bytes() == picture.read_bytes()
    summaries = [read_json(folder / "summary.json") for folder in (tmp_path, whole)]
    for key in (*SCORES, "loss", "steps"):
        assert summaries[0][key] == summaries[1][key], key
    assert len(read_json(tmp_path / "provenance.json")) == 2


def test_a_complete_run_is_left_as_it_is(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def results() -> dict[str, Any]:
        stamped = {k: v for k, v in content(whole).items() if k.startswith("checkpoints/")}
        return {"summary": read_json(whole / "summary.json"), "log": records(whole), **stamped}

    before = results()
    assert before["summary"]["loss"] is not None
    assert start(whole) == 0
    assert results() == before
    assert "the run is complete" in capsys.readouterr().err


def test_a_changed_setting_is_logged_and_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for steps in (2, 4):
        assert start(tmp_path, *UNSCORED, f"--config.train.steps={steps}") == 0
    said = capsys.readouterr().err
    assert "changed since the last start: config.train.steps: 2 -> 4" in said
    assert "continuing from step 2" in said
    assert configs.load_run(tmp_path).train.steps == 4
    assert [record["step"] for record in records(tmp_path)] == [2, 4]


def test_a_diverging_run_keeps_its_last_good_checkpoint(tmp_path: Path) -> None:
    """A learning rate of 1e30 makes the parameters' squares leave float32 in one step."""
    short = (*UNSCORED, "--config.train.steps=3")
    loose = (*short, "--config.optim.clip_norm=0.0")
    assert start(tmp_path, *loose, "--config.train.stop_after_steps=1") == 0
    with pytest.raises(
        NumericsError, match="(?s)step 2 is not.* step 1, finite.*set config.optim.clip_norm"
    ):
        start(tmp_path, *loose, "--config.optim.lr=1e30")
    assert list_steps(tmp_path / "checkpoints") == [1]
    assert records(tmp_path)[-1]["step"] == 2 and records(tmp_path)[-1]["param_norm"] is None
    assert all(np.isfinite(value).all() for value in final_state(tmp_path).values())
    assert not (tmp_path / "summary.json").exists()
    # As the remedy says: with clipping, which the run did without.
    assert start(tmp_path, *short) == 0
    assert int(final_state(tmp_path)["step"]) == 3


REFUSED: tuple[tuple[str, type[DsrError], str], ...] = (
    ("optim.lrr=1", ConfigError, "'config.optim.lrr'.*\n.*did you mean config.optim.lr?"),
    ("train.steps=many", ConfigError, "config.train.steps=many is a str"),
    ("registers.num=5", ConfigError, "5"),
    ("registers.start=9", ConfigError, "9"),
    ("model.num_heads=3", ConfigError, "3"),
    ("model.name=unet", ConfigError, "'unet'"),
    ("space.name=video", ConfigError, "'video'"),
    ("data.global_batch=12", MeshError, "batch 12 .*\n.*multiple of 8"),
    ("mesh.fsdp=3", MeshError, "'fsdp': 3"),
    ("sharding.rules=none", MeshError, "'none'.*\n.*fsdp, zero1, replicated"),
    ("sample.method=leapfrog", ConfigError, "'leapfrog'"),
    ("objective.path=spiral", ConfigError, "spiral"),
    ("objective.prediction=image", ConfigError, "image"),
    ("objective.time_distribution=cauchy", ConfigError, "cauchy"),
    ("objective.loss_weight=heavy", ConfigError, "heavy"),
    ("optim.schedule=stairs", ConfigError, "stairs"),
    ("data.source=nothing", DsrError, "nothing"),
    ("precision.compute=int8", ConfigError, "int8"),
    ("model.attention=linear", ConfigError, "linear"),
    ("model.remat=some", ConfigError, "some"),
    ("log.tensorboard=True", ConfigError, "tensorboardX, which is not installed"),
    ("eval.classifier=person", ConfigError, "person"),
)


@pytest.mark.parametrize(("override", "error", "message"), REFUSED, ids=[row[0] for row in REFUSED])
def test_bad_settings_are_refused_before_anything_is_written(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    override: str,
    error: type[DsrError],
    message: str,
) -> None:
    """In a new folder, and in that of a run, whose record would otherwise be spoilt."""
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    before = content(whole)
    with pytest.raises(error, match=message):
        start(tmp_path / "new", f"--config.{override}")
    with pytest.raises((error, ConfigError)):
        start(whole, f"--config.{override}")
    assert not (tmp_path / "new").exists()
    assert content(whole) == before


def test_the_folder_of_another_architecture_is_refused(whole: Path) -> None:
    before = content(whole)
    with pytest.raises(ConfigError, match="another architecture:\n.*hidden_size: 16 -> 32"):
        start(whole, "--config.model.hidden_size=32")
    assert content(whole) == before


def test_a_step_that_is_not_there_changes_nothing(whole: Path) -> None:
    before = content(whole)
    with pytest.raises(CheckpointError, match="no checkpoint of step 5"):
        start(whole, "--config.checkpoint.restore_step=5")
    assert content(whole) == before


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    before = content(tmp_path)
    with pytest.raises(ConfigError, match="thesis.tex"):
        start(tmp_path)
    assert content(tmp_path) == before


def test_the_command_ends_with_a_message_and_status_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dsr_jax.train", DIGITS, "--config.registers.num=5"]
    done = subprocess.run(
        [*command, f"--workdir={tmp_path / 'run'}"],
        cwd=REPOSITORY,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert "ConfigError: " in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 4
    assert not (tmp_path / "run").exists()


def test_classes_are_recorded_and_may_not_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three classes under a label table of ten, then a fourth."""
    root, run = tmp_path / "images", tmp_path / "run"

    def add(name: str) -> None:
        (root / name).mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(0, 256, (4, 10, 12, 3), np.uint8)
        for number, image in enumerate(pixels):
            Image.fromarray(image).save(root / name / f"{number}.png")

    for name in ("dog", "cat", "owl"):
        add(name)
    folder = ("--config.data.source=folder", f"--config.data.root={root}", *UNSCORED)
    folder += ("--config.data.channels=3", "--config.train.steps=2")
    assert start(run, *folder) == 0
    printed = capsys.readouterr().err
    assert "12 images, 3 classes of a label table of 10" in printed
    assert "7 rows stay untrained (3-9)" in printed
    found = read_json(run / "class_names.json")
    assert (found["names"], found["counts"]) == (["cat", "dog", "owl"], [4, 4, 4])
    before = content(run)
    add("bee")
    with pytest.raises(DataError, match=r"class 'bee' \(label 0\) appeared"):
        start(run, *folder, "--config.train.steps=3")
    assert content(run) == before
