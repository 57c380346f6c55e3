"""Two processes whose devices alternate along the mesh do what one process does, in every command.

On such a mesh the rows of a process are not one stretch of the global batch.
"""

from pathlib import Path

import numpy as np
import pytest

from dsr_jax.core.files import read_json
from dsr_jax.telemetry.writers import read_metrics
from tests.convert.test_lpips import files
from tests.finished_run import final_state
from tests.processes import REPOSITORY, finish, start
from tests.requirements import require
from tests.test_train_decoder import CONFIG as DECODER_CONFIG
from tests.test_train_decoder import PLAIN, TINY
from tests.tiny_inception import convert_tiny
from tests.tiny_rae import DECODER, GRID, save_rae
from tools import plant_registers

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

DEVICES = 4
DIGITS = f"--config={REPOSITORY / 'configs' / 'digits.py'}:runlocal"
STEPS = 4
MESH = ("--config.mesh.data=2", "--config.mesh.fsdp=2")
TRAIN = (
    DIGITS,
    *MESH,
    f"--config.train.steps={STEPS}",
    "--config.model.depth=2",
    # Adam with a small eps turns the rounding of tiny gradients into whole steps.
    "--config.optim.eps=1e-3",
    "--config.optim.warmup_steps=2",
    "--config.sample.every_steps=0",
    # No samples at the end, which take longer to compile than the training.
    "--config.eval.classifier=",
    "--config.precision.matmul=highest",
)


def run(count: int, module: str, *words: str) -> list[str]:
    """Runs a command on one process, or on two that share the mesh device by device."""
    if count == 1:
        return finish(start(module, words, 1, DEVICES), timeout=600)
    return finish(start("tests.interleaved", (module, *words), count, DEVICES), timeout=600)


def close(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], atol: float = 1e-5) -> None:
    """Arrays agree up to the rounding of sums over devices."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        scale = np.abs(value).max() + 1e-12
        np.testing.assert_allclose(
            found[name] / scale, value / scale, rtol=0, atol=atol, err_msg=name
        )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same training, on one process and on two."""
    folder = tmp_path_factory.mktemp("runs")
    for count in (1, 2):
        run(count, "dsr_jax.train", *TRAIN, f"--workdir={folder / str(count)}")
    return [folder / "1", folder / "2"]


@pytest.fixture(scope="module")
def rae(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return save_rae(tmp_path_factory.mktemp("rae"))


def test_train(runs: list[Path]) -> None:
    one, two = map(final_state, runs)
    assert int(one["step"]) == STEPS
    close(two, one)
    losses = [[r["loss"] for r in read_metrics(folder) if "loss" in r] for folder in runs]
    assert len(losses[0]) == STEPS // 2
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_sample(runs: list[Path], tmp_path: Path) -> None:
    found = []
    for count in (1, 2):
        words = ("--num-samples=21", "--batch=8", "--ema=none", "--name=drawn")
        run(
            count,
            "dsr_jax.sample",
            f"--workdir={runs[0]}",
            f"--out={tmp_path / str(count)}",
            *words,
        )
        with np.load(tmp_path / str(count) / "drawn.npz") as arrays:
            found.append((arrays["arr_0"].astype(int), arrays["labels"]))
    (one, labels), (two, others) = found
    np.testing.assert_array_equal(labels, others)
    assert len(one) == 21 and len(np.unique(one, axis=0)) == 21
    assert np.abs(one - two).max() <= 1


def test_evaluate(tmp_path: Path) -> None:
    random = np.random.RandomState(0)
    for name, count, top in (("samples", 37, 256), ("real", 29, 200)):
        images = random.randint(0, top, (count, 16, 16, 3)).astype(np.uint8)
        np.savez(tmp_path / f"{name}.npz", images)
    convert_tiny(tmp_path)
    scores = []
    for count in (1, 2):
        out = tmp_path / f"{count}.json"
        words = ["--reference", str(tmp_path / "real.npz"), "--metrics", "fid,sfid,is,pr"]
        words += ["--inception", str(tmp_path / "inception"), "--batch", "8", "--out", str(out)]
        run(count, "dsr_jax.evaluate", str(tmp_path / "samples.npz"), *words)
        scores.append(read_json(out)["scores"])
    assert scores[1] == pytest.approx(scores[0], rel=1e-6)


def test_evaluate_reconstruction(rae: tuple[str, ...], tmp_path: Path) -> None:
    convert_tiny(tmp_path)
    files(tmp_path)
    size = GRID * DECODER.patch_size
    written, images = [], []
    for count in (1, 2):
        out = tmp_path / str(count)
        words = (*rae, f"--config.data.image_size={size}", "--config.data.source=synthetic")
        words += ("--images=21", "--batch=8", f"--inception={tmp_path / 'inception'}")
        run(count, "dsr_jax.evaluate_reconstruction", DIGITS, f"--out={out}", *words)
        written.append(read_json(out / "scores.json")["scores"])
        with np.load(out / "reconstructions.npz") as arrays:
            np.testing.assert_array_equal(arrays["labels"], np.arange(21))
            images.append(arrays["arr_0"].astype(int))
    assert np.abs(images[0] - images[1]).max() <= 1
    assert {"psnr", "ssim", "rfid"} <= set(written[0])
    assert written[1] == pytest.approx(written[0], rel=1e-4)


def test_encode(rae: tuple[str, ...], tmp_path: Path) -> None:
    from dsr_jax.convert.statistics import load_statistics
    from dsr_jax.data.latents import CachedLatents

    for count in (1, 2):
        words = (DIGITS, *rae, "--images=21", "--batch=8")
        out = tmp_path / str(count)
        run(count, "dsr_jax.encode", "statistics", *words, f"--out={out / 'statistics'}")
        cache = ("--copies=1", "--dtype=float32", "--shard-batches=1", f"--out={out / 'cache'}")
        run(count, "dsr_jax.encode", "cache", *words, *cache)
    one, two = (load_statistics(tmp_path / str(count) / "statistics") for count in (1, 2))
    close(two, one)
    ours, theirs = (CachedLatents(tmp_path / str(count) / "cache") for count in (1, 2))
    assert len(ours) == len(theirs) == 21
    for index in range(21):
        close(theirs[index], ours[index])


def test_train_decoder(rae: tuple[str, ...], tmp_path: Path) -> None:
    from PIL import Image

    encoder = next(word for word in rae if ".encoder=" in word)
    for count in (1, 2):
        words = (
            *TINY,
            *PLAIN,
            *MESH,
            encoder,
            "--config.optim.eps=1e-3",
            f"--workdir={tmp_path / str(count)}",
        )
        run(count, "dsr_jax.train_decoder", DECODER_CONFIG, *words)
    records = [read_metrics(tmp_path / str(count)) for count in (1, 2)]
    names = {"loss", "heldout_psnr", "heldout_ssim"}
    ours, theirs = ([{k: v for k, v in r.items() if k in names} for r in each] for each in records)
    assert len(ours) == len(theirs) and any("heldout_psnr" in r for r in ours)
    for a, b in zip(ours, theirs, strict=True):
        assert b == pytest.approx(a, rel=1e-3)
    pictures = [
        np.asarray(Image.open(sorted((tmp_path / str(count) / "samples").glob("*.png"))[-1]))
        for count in (1, 2)
    ]
    assert np.abs(pictures[0].astype(int) - pictures[1].astype(int)).max() <= 1


def test_find_registers(tmp_path: Path) -> None:
    require("matplotlib", "plots")
    skimage = require("skimage", "test")
    images = Path(skimage.__file__).parent / "data"
    plant_registers.main(["--root", str(images), "--out", str(tmp_path / "planted")])
    rounds = []
    for count in (1, 2):
        out = tmp_path / str(count)
        words = [str(tmp_path / "planted"), "--root", str(images), "--image-size", "64"]
        words += ["--top-k", "6", "--batch", "8", "--on-corrupt", "skip", "--out", str(out)]
        run(count, "tools.find_registers", *words)
        assert (out / "report.html").exists()
        rounds.append(read_json(out / "report.json")["rounds"])
        rounds[-1].append(read_json(out / "neurons.json"))
    assert rounds[1] == rounds[0]
