"""Registers for a run that was trained without: the tool, and training on from what it writes."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dsr_jax import train
from dsr_jax.build.from_run import load_denoiser
from dsr_jax.convert.files import load_converted, save_converted
from dsr_jax.core.errors import ConfigError, ConversionError
from dsr_jax.core.trees import flatten_names
from dsr_jax.models.dit import LightningDiT
from dsr_jax.telemetry.writers import read_metrics
from tests.programs import quick_programs
from tests.test_export import save_run
from tests.tiny_denoisers import random_params
from tools.add_registers import main

MODEL = LightningDiT(
    input_size=8,
    in_channels=1,
    patch_size=4,
    hidden_size=16,
    depth=3,
    num_heads=2,
    num_classes=10,
)
SHORT = (
    "--config.train.steps=2",
    "--config.log.every_steps=1",
    "--config.data.global_batch=16",
    "--config.sample.every_steps=0",
    "--config.eval.num_samples=0",
    "--config.checkpoint.every_steps=1",
)


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Starts share their programs."""
    with quick_programs(tmp_path_factory.mktemp("programs")):
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose network does something, and folders with registers made of it."""
    folder = tmp_path_factory.mktemp("runs")
    save_run(folder / "base", MODEL, random_params(MODEL))
    join = ["--registers=4", "--start=1", f"--workdir={folder / 'base'}"]
    main([*join, "--gated", f"--out={folder / 'gated'}"])
    main([*join, f"--out={folder / 'plain'}", "--scale=0.5"])
    main([f"--converted={folder / 'plain'}", "--ablate", f"--out={folder / 'again'}"])
    return folder


def start(runs: Path, name: str, workdir: Path, *overrides: str) -> list[float]:
    """Trains on from a folder; returns the losses."""
    command = [f"--config={runs / 'base' / 'config.json'}", f"--workdir={workdir}", *SHORT]
    assert train.main([*command, *from_folder(runs, name), *overrides]) == 0
    return [record["loss"] for record in read_metrics(workdir)]


def from_folder(runs: Path, name: str) -> list[str]:
    """Overrides that start from a folder."""
    num = 0 if name == "again" else 4
    return [
        f"--config.train.init_from={runs / name}",
        f"--config.registers.num={num}",
        f"--config.registers.start={min(num, 1)}",
        f"--config.registers.gate={name == 'gated'}",
    ]


@pytest.mark.slow
def test_the_first_loss_behind_gates_is_the_old_networks(runs: Path, tmp_path: Path) -> None:
    losses = {name: start(runs, name, tmp_path / name) for name in ("again", "gated", "plain")}
    assert losses["gated"][0] == pytest.approx(losses["again"][0], rel=1e-6)
    assert abs(losses["plain"][0] / losses["again"][0] - 1) > 1e-4
    assert all(len(numbers) == 2 and np.isfinite(numbers).all() for numbers in losses.values())
    # Training goes on in the run's own checkpoints; the folder is not read again.
    gone = ["--config.train.steps=3", "--config.train.init_from=gone"]
    assert len(start(runs, "gated", tmp_path / "gated", *gone)) == 3


def test_a_folder_of_another_network_starts_nothing(runs: Path, tmp_path: Path) -> None:
    for overrides, message in (
        (["--config.registers.gate=False"], r"registers\.gate: True -> False"),
        (["--config.registers.num=9"], r"registers\.num: 4 -> 9"),
        (["--config.model.hidden_size=32"], r"hidden_size: 16 -> 32"),
    ):
        with pytest.raises(ConversionError, match=message):
            start(runs, "gated", tmp_path / "run", *overrides)
        assert not (tmp_path / "run").exists()


def test_a_decoder_starts_from_nothing() -> None:
    with pytest.raises(ConfigError, match="a decoder is trained"):
        train.main(["--config=configs/rae_decoder.py", "--workdir=x", "--config.train.init_from=y"])


def test_ablating_gives_the_runs_own_weights(runs: Path) -> None:
    params, record = load_converted(runs / "again")
    _, ema, _, _ = load_denoiser(runs / "base")
    want, got = flatten_names(ema), flatten_names(params)
    assert set(want) == set(got) and all(np.array_equal(want[key], got[key]) for key in want)
    assert record["retrofit"]["registers"] == [4, 0] and record["source"] == "base, step 1"
    _, gated = load_converted(runs / "gated")
    assert gated["retrofit"]["registers"] == [0, 4] and gated["model"]["register_gate"]


def test_losses_are_compared(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = [f"--workdir={runs / 'base'}", "--registers=4", "--start=1", "--compare=1"]
    main([*source, "--gated", f"--out={tmp_path / 'a'}"])
    *_, before, _, after, _ = capsys.readouterr().out.replace(",", "").split()
    assert float(before) == pytest.approx(float(after), rel=1e-5) and float(before) > 0


def test_impossible_changes_are_rejected(runs: Path, tmp_path: Path) -> None:
    out, source = f"--out={tmp_path / 'out'}", f"--workdir={runs / 'base'}"
    with pytest.raises(ConfigError, match=r"depth 3, .*\n.*give --start"):
        main([source, out])
    with pytest.raises(ConversionError, match="no registers"):
        main([source, out, "--ablate"])
    with pytest.raises(ConfigError, match="--compare needs"):
        main([f"--converted={runs / 'plain'}", out, "--ablate", "--compare=1"])
    save_converted(tmp_path / "vae", {"x": np.zeros(1)}, {"family": "sdvae", "model": {}})
    with pytest.raises(ConfigError, match="holds a sdvae"):
        main([f"--converted={tmp_path / 'vae'}", out])
    assert not (tmp_path / "out").exists()
