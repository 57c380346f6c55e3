"""The command that scores autoencoders, on tiny random networks."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsr_jax import evaluate_reconstruction
from dsr_jax.convert.__main__ import main as convert
from dsr_jax.core.errors import ConfigError, ConversionError, LockError
from dsr_jax.core.files import read_json
from dsr_jax.core.lock import FolderLock
from dsr_jax.data.sources import make_source, read_all
from dsr_jax.evaluation.reconstruction import psnr, ssim
from dsr_jax.evaluation.samples import open_samples
from dsr_jax.sampling.job import SampleJob
from tests.convert.test_lpips import files
from tests.programs import quick_programs
from tests.test_train import DIGITS
from tests.tiny_inception import convert_tiny
from tests.tiny_rae import DECODER, GRID, save_rae
from tests.tiny_vae import save_tiny_vae

SIZE = GRID * DECODER.patch_size
COUNT = 21


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Starts share their programs."""
    with quick_programs(tmp_path_factory.mktemp("programs")):
        yield


@pytest.fixture(scope="module")
def rae(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return (*save_rae(tmp_path_factory.mktemp("rae")), f"--config.data.image_size={SIZE}")


def start(out: Path, *arguments: str) -> None:
    """Runs the command on held-out shapes."""
    data = ("--config.data.source=synthetic", f"--images={COUNT}", "--batch=8")
    command = [DIGITS, f"--out={out}", *data, *arguments]
    evaluate_reconstruction.main(command)


def source_images() -> np.ndarray:
    """What the command takes of the data."""
    source = make_source("synthetic", split="heldout", image_size=SIZE, channels=3)
    images, _ = read_all(source)
    return images[np.arange(COUNT) * len(images) // COUNT]


def test_without_weights_two_scores_and_a_picture(
    rae: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(tmp_path / "out", *rae)
    written = read_json(tmp_path / "out" / "scores.json")
    outputs, images = open_samples(tmp_path / "out" / "reconstructions.npz"), source_images()
    assert outputs.shape == (COUNT, SIZE, SIZE, 3)
    assert written["scores"]["psnr"] == pytest.approx(psnr(images, outputs.images()).mean())
    assert written["scores"]["ssim"] == pytest.approx(ssim(images, outputs.images()).mean())
    assert set(written["skipped"]) == {"rfid", "lpips"}
    assert "left out: no --inception" in capsys.readouterr().out
    recipe = written["recipe"]
    assert recipe["space"]["config.space.decoder"].startswith("sha256:")
    assert recipe["data"]["images"] == COUNT and recipe["data"]["split"] == "heldout"
    picture = np.asarray(Image.open(tmp_path / "out" / "pairs.png"))
    # Small images are shown twice as large, with a gap of two pixels.
    for row, shown in enumerate((images[0], outputs.images()[0])):
        top = row * (2 * SIZE + 2)
        np.testing.assert_array_equal(picture[top : top + 2 * SIZE : 2, : 2 * SIZE : 2], shown)


@pytest.mark.slow
def test_all_scores_of_a_vae_also_after_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = (*save_tiny_vae(tmp_path / "vae"), f"--config.data.image_size={SIZE}")
    source, vgg = files(tmp_path)
    lpips, inception = tmp_path / "lpips", convert_tiny(tmp_path)
    convert(["lpips", f"--source={source}", f"--vgg={vgg}", f"--out={lpips}"])
    weights = (f"--inception={inception}", f"--lpips={lpips}")
    start(tmp_path / "whole", *vae, *weights)
    written = read_json(tmp_path / "whole" / "scores.json")
    assert set(written["scores"]) == {"rfid", "psnr", "ssim", "lpips"} and not written["skipped"]
    assert written["scores"]["rfid"] > 0 and written["scores"]["lpips"] > 0
    digest = read_json(inception / "conversion.json")["params_digest"]
    assert written["recipe"]["inception"]["weights"] == digest
    assert written["recipe"]["lpips"].startswith("sha256:")
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {
        *("reconstructions.npz", "reconstructions.json", "scores.json", "pairs.png")
    }

    write, calls = SampleJob._write, []

    def stop(self: SampleJob, *args: object) -> None:
        calls.append(len(calls))
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(SampleJob, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "again", *vae, *weights)
    start(tmp_path / "again", *vae, *weights)
    assert len(calls) == 4, "a batch was reconstructed twice"
    again = read_json(tmp_path / "again" / "scores.json")
    assert again["scores"] == pytest.approx(written["scores"], rel=1e-6)


def test_one_command_at_a_time_writes_a_folder(rae: tuple[str, ...], tmp_path: Path) -> None:
    with FolderLock(tmp_path), pytest.raises(LockError, match="in use by process"):
        start(tmp_path, *rae)


def test_what_cannot_be_scored(rae: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for arguments, kind, reason in (
        (("--config.space.name=pixels",), ConfigError, "reconstructs nothing"),
        ((*rae, "--config.space.decoder="), ConfigError, "no decoder"),
        ((*rae, "--config.data.image_size=16"), ConfigError, r"makes images \(20, 20, 3\)"),
        ((*rae, "--inception=none"), ConversionError, "no weights of Inception"),
        ((*rae, "--lpips=none"), ConversionError, "holds no converted model"),
    ):
        with pytest.raises(kind, match=reason):
            start(out, *arguments)
    assert not out.exists()
