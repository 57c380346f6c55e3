"""A run in the latents of an autoencoder: trained, stopped, continued, and sampled."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsr_jax import build, sample, train
from dsr_jax import config as configs
from dsr_jax.core.errors import ConfigError, ConversionError, DataError
from dsr_jax.core.files import read_json
from dsr_jax.registers.neurons import save_neurons
from dsr_jax.telemetry.writers import read_metrics
from tests.finished_run import final_state
from tests.programs import quick_programs
from tests.test_train import DIGITS, TINY
from tests.tiny_rae import DECODER, GRID, save_rae

STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Starts share their programs."""
    with quick_programs(tmp_path_factory.mktemp("programs")):
        yield


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Arguments of a run with everything that a space can have."""
    folder = tmp_path_factory.mktemp("rae")
    arguments = save_rae(folder)
    save_neurons(folder / "neurons.json", {0: [3, 5], 1: [7]})
    return (
        *TINY,
        *arguments,
        f"--config.space.neurons={folder / 'neurons.json'}",
        "--config.space.noise_tau=0.1",
        "--config.model.patch_size=1",
        f"--config.train.steps={STEPS}",
    )


def start(workdir: Path, *overrides: str) -> int:
    return train.main([DIGITS, f"--workdir={workdir}", *overrides])


@pytest.fixture(scope="module")
def whole(overrides, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert start(folder, *overrides) == 0
    return folder


def test_a_run_leaves_numbers_and_decoded_pictures(whole: Path) -> None:
    assert all(np.isfinite(record["loss"]) for record in read_metrics(whole))
    picture = np.asarray(Image.open(whole / "samples" / f"step_{STEPS:08d}.png"))
    assert picture.shape[1] >= 10 * DECODER.image_size and np.ptp(picture) > 50
    config = configs.load_run(whole)
    space, variables = build.make_space(config)
    assert space.latent_shape == (GRID, GRID, 16)
    assert {"encoder", "decoder", "statistics", "registers"} == set(variables)


def test_a_resumed_run_equals_an_uninterrupted_run_bit_for_bit(
    whole: Path, overrides, tmp_path
) -> None:
    assert start(tmp_path, *overrides, "--config.train.stop_after_steps=3") == 0
    assert start(tmp_path, *overrides) == 0
    want, got = final_state(whole), final_state(tmp_path)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_samples_are_images_of_the_decoder_and_name_its_content(whole: Path, tmp_path) -> None:
    sample.main([f"--workdir={whole}", f"--out={tmp_path}", "--name=x", "--num-samples=16"])
    with np.load(tmp_path / "x.npz") as arrays:
        side = DECODER.image_size
        assert arrays["arr_0"].shape == (16, side, side, 3)
        assert len({image.tobytes() for image in arrays["arr_0"]}) == 16
    recipe = read_json(tmp_path / "x.json")["recipe"]["architecture"]
    for key in ("encoder", "decoder", "statistics", "neurons"):
        assert recipe[f"config.space.{key}"].startswith("sha256:")


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("space.encoder=", ConfigError, "config.space.encoder is not set"),
        ("space.encoder=nowhere", ConversionError, "nowhere holds no converted model"),
        ("space.neurons=nowhere", DataError, "nowhere does not exist"),
        ("space.statistics=nowhere.pt", ConversionError, "nowhere.pt does not exist"),
        ("space.image_size=18", ConfigError, "image_size=18 is not a multiple"),
        ("space.image_size=20", ConfigError, "statistics: mean has shape"),
        ("space.decoder=", ConfigError, "has no decoder"),
        ("space.noise_tau=-1.0", ConfigError, "noise_tau=-1"),
        ("data.channels=1", ConfigError, "config.data.channels=1"),
        ("eval.classifier=digits", ConfigError, "config.eval.classifier='digits'"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    overrides, tmp_path: Path, override: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        start(tmp_path / "new", *overrides, f"--config.{override}")
    assert not (tmp_path / "new").exists()
