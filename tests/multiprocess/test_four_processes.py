"""Four processes train, are killed, go on as two and as one; four sample and score."""

import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from dsr_jax.core.files import read_json
from dsr_jax.telemetry.writers import read_metrics
from dsr_jax.training.checkpoints import list_steps
from tests.finished_run import final_state
from tests.processes import REPOSITORY, end, finish, start

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

STEPS, EVERY, DEVICES = 28, 4, 4
SETTINGS = (
    f"--config={REPOSITORY / 'configs' / 'digits.py'}:runlocal",
    f"--config.train.steps={STEPS}",
    f"--config.checkpoint.every_steps={EVERY}",
    f"--config.log.every_steps={EVERY}",
    "--config.sample.every_steps=0",
    "--config.model.depth=2",
    # Large enough that a run lasts until it is stopped.
    "--config.data.global_batch=128",
    # Adam with a small eps turns the rounding of tiny gradients into whole steps.
    "--config.optim.eps=1e-3",
    "--config.optim.warmup_steps=2",
    "--config.precision.matmul=highest",
    "--config.mesh.data=2",
    "--config.mesh.fsdp=2",
)


def train(workdir: Path, count: int, rules: str = "fsdp") -> list[subprocess.Popen]:
    """Starts or continues a run of four devices."""
    words = (*SETTINGS, f"--workdir={workdir}", f"--config.sharding.rules={rules}")
    return start("dsr_jax.train", words, count, DEVICES)


def wait_for_save(workdir: Path, processes: list[subprocess.Popen], after: int) -> int:
    """Returns the step of the first checkpoint later than `after`."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        steps = list_steps(workdir / "checkpoints")
        if steps and steps[-1] > after:
            return steps[-1]
        if any(process.poll() is not None for process in processes):
            break
        time.sleep(0.02)
    end(processes)
    raise AssertionError([process.communicate()[1] for process in processes])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process without interruption."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    finish(train(folder, 1))
    return folder


def test_a_run_survives_losing_one_of_four_and_goes_on_with_fewer(
    whole: Path, tmp_path: Path
) -> None:
    """SIGKILL to one of four, SIGTERM to one of two, the rest by one; rules change meanwhile."""
    four = train(tmp_path, 4)
    wait_for_save(tmp_path, four, after=0)
    four[2].send_signal(signal.SIGKILL)
    time.sleep(2)
    assert four[2].poll() == -signal.SIGKILL
    end(four)
    saved = list_steps(tmp_path / "checkpoints")[-1]
    assert EVERY <= saved < STEPS and saved % EVERY == 0, "a run that was killed has whole saves"

    two = train(tmp_path, 2, rules="zero1")
    wait_for_save(tmp_path, two, after=saved)
    two[1].send_signal(signal.SIGTERM)
    errors = finish(two, 143, 143)
    assert f"continuing from step {saved}" in errors[0]
    stopped = list_steps(tmp_path / "checkpoints")[-1]
    assert saved < stopped < STEPS

    (error,) = finish(train(tmp_path, 1))
    assert f"continuing from step {stopped}" in error
    got, want = final_state(tmp_path), final_state(whole)
    assert got.keys() == want.keys() and int(want["step"]) == STEPS
    for name, value in want.items():
        scale = np.abs(value).max() + 1e-12
        np.testing.assert_allclose(
            got[name] / scale, value / scale, rtol=0, atol=1e-4, err_msg=name
        )
    losses = [
        {record["step"]: record["loss"] for record in read_metrics(folder)}
        for folder in (tmp_path, whole)
    ]
    assert losses[0].keys() == losses[1].keys() == set(range(EVERY, STEPS + 1, EVERY))
    for step, loss in losses[1].items():
        assert losses[0][step] == pytest.approx(loss, rel=1e-4), step


def test_four_processes_sample_and_score_as_one_does(whole: Path, tmp_path: Path) -> None:
    images, scores = [], []
    for count in (1, 4):
        out = tmp_path / str(count)
        words = (
            f"--workdir={whole}",
            f"--out={out}",
            "--name=drawn",
            "--num-samples=50",
            "--batch=20",
            # EMA weights of so few steps give gray images.
            "--ema=none",
        )
        finish(start("dsr_jax.sample", words, count, DEVICES))
        finish(
            start(
                "dsr_jax.evaluate", (str(out / "drawn.npz"), "--classifier=digits"), count, DEVICES
            )
        )
        with np.load(out / "drawn.npz") as arrays:
            images.append((arrays["arr_0"].astype(int), arrays["labels"]))
        scores.append(read_json(out / "drawn.classifier-digits.json")["scores"])
    (one, labels), (four, others) = images
    np.testing.assert_array_equal(labels, others)
    assert one.shape == (50, 8, 8, 1) and len(np.unique(one)) > 20
    np.testing.assert_array_equal(one, four)
    assert scores[0].keys() == scores[1].keys()
    for name, value in scores[0].items():
        near = pytest.approx(value, rel=1e-3) if isinstance(value, float) else value
        assert scores[1][name] == near, name
