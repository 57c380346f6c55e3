"""The command that plants register neurons and the one that finds them, on photographs on disk."""

import dataclasses
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

from dsr_jax.convert.files import save_converted
from dsr_jax.core.errors import ConfigError, DataError
from dsr_jax.core.files import read_json
from dsr_jax.models.vit import ViT
from dsr_jax.registers.neurons import load_neurons
from tests.requirements import require
from tools import find_registers, plant_registers


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of scikit-learn's and scikit-image's sample images, and a damaged one."""
    require("matplotlib", "plots")
    skimage, sklearn = require("skimage", "test"), require("sklearn", "test")
    folder = tmp_path_factory.mktemp("images")
    sources = {
        "sklearn": Path(sklearn.__file__).parent / "datasets" / "images",
        "skimage": Path(skimage.__file__).parent / "data",
    }
    for name, source in sources.items():
        (folder / name).symlink_to(source)
    (folder / "cut.jpg").write_bytes((sources["sklearn"] / "china.jpg").read_bytes()[:2000])
    return folder


@pytest.fixture(scope="module")
def encoder(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder") / "planted"
    plant_registers.main(["--root", str(images), "--out", str(folder)])
    return folder


def find(encoder: Path, images: Path, out: Path, *more: str) -> None:
    arguments = ["--root", str(images), "--image-size", "64", "--out", str(out), *more]
    find_registers.main([str(encoder), *arguments])


def test_finds_what_was_planted(
    encoder: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found"
    find(encoder, images, out, "--top-k", "6", "--on-corrupt", "skip")
    planted, found = load_neurons(encoder / "planted.json"), load_neurons(out / "neurons.json")
    assert {b: sorted(u) for b, u in found.items()} == {b: sorted(u) for b, u in planted.items()}
    printed = capsys.readouterr().out
    assert f"skipped: {images / 'cut.jpg'} cannot be decoded" in printed
    assert "outliers before  outliers after" in printed
    record = read_json(out / "report.json")
    assert record["settings"]["top_k"] == [6] and record["images"]["count"] >= 20
    (only,) = record["rounds"]
    assert only["outlier_patches_before"] >= 20 and only["outlier_patches_after"] == 0
    assert {path.name for path in out.iterdir()} == {
        *("neurons.json", "report.json", "report.html"),
        *("norms.png", "maps.png", "scores.png"),
    }


def test_errors_write_nothing(encoder: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cut\.jpg cannot be decoded"):
        find(encoder, images, tmp_path / "found")
    with pytest.raises(DataError, match="no token of .* images has a norm above 1e"):
        find(encoder, images, tmp_path / "found", "--on-corrupt", "skip", "--threshold", "1e9")
    assert not (tmp_path / "found").exists()


def test_trained_registers_cause_a_warning(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(
        plant_registers.CONFIG, family="dinov2", use_cls=True, num_registers=4, use_layer_scale=True
    )
    params = nn.unbox(ViT(config).init(jax.random.key(0), np.zeros((1, 64, 64, 3))))["params"]
    record = {"family": "dinov2", "model": dataclasses.asdict(config), "source": "random"}
    save_converted(tmp_path / "encoder", params, record)
    with pytest.raises(DataError):
        find(tmp_path / "encoder", images, tmp_path / "found", "--on-corrupt", "skip")
    assert "trained with 4 registers" in capsys.readouterr().out


def test_neurons_are_kept_if_the_report_fails(
    encoder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(find_registers, "write_report", fail)
    with pytest.raises(OSError, match="no space"):
        find(encoder, images, tmp_path / "found", "--top-k", "6", "--on-corrupt", "skip")
    assert load_neurons(tmp_path / "found" / "neurons.json")


def test_a_missing_package_is_found_before_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="matplotlib, which is not installed.*\n.*plots"):
        find_registers.main(["no_encoder", "--out", str(tmp_path)])
