"""metrics.jsonl survives resumes and crashes; the optional writers are asked for by name."""

import importlib.machinery
import json
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.core.errors import ConfigError
from dsr_jax.telemetry.writers import MetricWriter, read_metrics


def write(workdir: Path, steps: range, **options: object) -> None:
    with MetricWriter(workdir, **options) as writer:
        for step in steps:
            writer.write(step, {"loss": step / 10})


def test_one_line_per_call(tmp_path: Path) -> None:
    with MetricWriter(tmp_path / "run") as writer:
        writer.write(1, {"loss": jnp.float32(0.5), "mfu": None})
        writer.write(1, {"eval/fid": np.float64(3)})
        assert len(read_metrics(tmp_path / "run")) == 2  # flushed at once
        writer.write(2, {"loss": float("nan"), "norm": float("inf")})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert lines[:2] == ['{"step": 1, "loss": 0.5}', '{"step": 1, "eval/fid": 3.0}']
    assert json.loads(lines[2]) == {"step": 2, "loss": None, "norm": None}


def test_resume_drops_what_will_be_written_again(tmp_path: Path) -> None:
    write(tmp_path, range(1, 10))
    write(tmp_path, range(6, 12), first_step=6)
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == list(range(1, 12))
    assert all(record["loss"] == record["step"] / 10 for record in records)
    write(tmp_path, range(3))
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1, 2]


def test_resume_after_a_torn_line(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    write(tmp_path, range(4, 5), first_step=4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 4]


def test_a_failed_truncation_keeps_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, range(1, 4))
    before = (tmp_path / "metrics.jsonl").read_text()

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        MetricWriter(tmp_path, first_step=2)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_steps_never_run_backwards(tmp_path: Path) -> None:
    with MetricWriter(tmp_path, first_step=5) as writer:
        with pytest.raises(ValueError, match="step 3 after step 4"):
            writer.write(3, {"loss": 1.0})
        writer.write(7, {"loss": 1.0})
        with pytest.raises(ValueError, match="step 6 after step 7"):
            writer.write(6, {"loss": 1.0})


def test_records_of_the_step_before_are_added_once(tmp_path: Path) -> None:
    """The scores of the last saved step, which its start may have written."""
    write(tmp_path, range(1, 5))
    for score in (1.0, 2.0):
        with MetricWriter(tmp_path, first_step=5) as writer:
            writer.write(4, {"fid": score})
            writer.write(4, {"kid": 0.5, "fid": score})
    loss, *scores = [record for record in read_metrics(tmp_path) if record["step"] == 4]
    assert loss == {"step": 4, "loss": 0.4}
    assert scores == [{"step": 4, "fid": 1.0}, {"step": 4, "kid": 0.5, "fid": 1.0}]


def test_only_the_primary_process_writes(tmp_path: Path) -> None:
    with MetricWriter(tmp_path, tensorboard=True, process_zero=False) as writer:
        writer.write(1, {"loss": 1.0})
        writer.write_image(1, "samples", np.zeros((4, 4, 3), np.uint8))
    assert not list(tmp_path.iterdir())


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    with MetricWriter(tmp_path, tensorboard=True) as writer:
        writer.write(3, {"loss": 0.25})
        writer.write_image(3, "samples", np.zeros((4, 4, 3), np.uint8))
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"loss" in content and b"samples" in content and b"PNG" in content


@pytest.mark.parametrize(
    "options,package", [({"tensorboard": True}, "tensorboardX"), ({"wandb": "dsr"}, "wandb")]
)
def test_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], package: str
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n: None if n == package else found(n))
    for process_zero in (True, False):
        with pytest.raises(ConfigError, match=f"needs {package}.*\n.*pip install {package}"):
            MetricWriter(tmp_path, process_zero=process_zero, **options)


class FakeWandb(types.ModuleType):
    """The part of wandb's interface that the writer uses."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin="wandb.py")
        self.starts: list[dict[str, object]] = []
        self.logged: list[dict[str, object]] = []
        self.finished = 0

    def init(self, **options: object) -> "FakeWandb":
        self.starts.append(options)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, values: dict[str, object]) -> None:
        self.logged.append(values)

    def Image(self, image: np.ndarray) -> tuple[int, ...]:  # noqa: N802
        return image.shape

    def finish(self) -> None:
        self.finished += 1


def test_wandb_continues_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for first_step in (1, 2):
        with MetricWriter(
            tmp_path, first_step=first_step, wandb="dsr", config={"seed": 1}
        ) as writer:
            writer.write(2, {"loss": 0.5})
            writer.write_image(2, "samples", np.zeros((4, 4, 3), np.uint8))
    first, second = fake.starts
    assert first["id"] == second["id"] and first["resume"] == "allow"
    assert first["project"] == "dsr" and first["config"] == {"seed": 1}
    assert fake.logged[:2] == [{"step": 2, "loss": 0.5}, {"step": 2, "samples": (4, 4, 3)}]
    assert fake.finished == 2
