"""Outlier statistics during training: metrics, pictures, and what they leave alone."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dsr_jax import train
from dsr_jax.core.errors import ConfigError
from dsr_jax.registers.statistics import STATISTICS
from dsr_jax.reports.outlier_records import read_history
from dsr_jax.telemetry.writers import read_metrics
from tests.finished_run import final_state
from tests.programs import quick_programs
from tests.requirements import require

REPOSITORY = Path(__file__).parents[2]
TINY = (
    f"--config={REPOSITORY / 'configs' / 'digits.py'}:runlocal",
    "--config.model.hidden_size=16",
    "--config.model.depth=2",
    "--config.model.num_heads=2",
    "--config.registers.start=1",
    "--config.precision.matmul=highest",
    "--config.eval.classifier=",
    "--config.sample.every_steps=0",
)
MEASURED = (
    "--config.log.outliers=4",
    "--config.log.outlier_times=(0.2,0.8)",
    "--config.log.tensorboard=True",
)


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with quick_programs(tmp_path_factory.mktemp("programs")):
        yield


def start(workdir: Path, *overrides: str) -> int:
    return train.main([*TINY, f"--workdir={workdir}", *overrides])


@pytest.mark.slow
def test_a_run_writes_them_and_trains_as_without(tmp_path: Path) -> None:
    events = require("tensorboardX", "tensorboard")
    plain, run = tmp_path / "plain", tmp_path / "run"
    start(plain)
    assert start(run, *MEASURED, "--config.train.stop_after_steps=6") == 0
    steps = (run / "outliers" / "steps.png").read_bytes()
    assert start(run, *MEASURED) == 0
    history = read_history(read_metrics(run))
    assert history is not None
    assert history.steps == (4, 8) and history.times == (0.2, 0.8)
    assert set(STATISTICS) <= set(history.values)
    assert history.values["norm_p50"].shape == (2, 2, 2)
    assert np.isfinite(history.values["norm_p50"]).all()
    registers = history.values["register_attention"]
    assert (registers[:, :, 0] == 0).all() and (registers[:, :, 1] > 0).all()
    names = {path.name for path in (run / "outliers").iterdir()}
    assert names == {"noise_00000004.png", "noise_00000008.png", "steps.png"}
    assert (run / "outliers" / "steps.png").read_bytes() != steps, "both steps are in it"
    measured = final_state(run)
    for name, array in final_state(plain).items():
        np.testing.assert_array_equal(array, measured[name], err_msg=name)
    losses = [[r["loss"] for r in read_metrics(w) if "loss" in r] for w in (plain, run)]
    assert losses[0] == losses[1]
    del events
    written = b"".join(path.read_bytes() for path in (run / "tensorboard").iterdir())
    assert b"outliers/norm_p98/t0.20/block01" in written and b"outliers/steps" in written


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (("--config.log.outliers=-1",), "config.log.outliers=-1"),
        (("--config.log.outlier_images=0",), "config.log.outlier_images=0"),
        (("--config.log.outlier_times=(0.5,2.0)",), "config.log.outlier_times"),
        (("--config.log.outlier_times=()",), "config.log.outlier_times"),
        (("--config.log.outlier_times=(0.122,0.124)",), "config.log.outlier_times.*are equal"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, overrides: tuple[str, ...], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        start(tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()
