"""The command that trains a decoder: files of a run, restarts, switches, rejected input."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dsr_jax import build, sample, train, train_decoder
from dsr_jax import config as configs
from dsr_jax.convert.decoder import load_decoder
from dsr_jax.core.errors import (
    CheckpointError,
    ConfigError,
    ConversionError,
    DataError,
    DeviceMemoryError,
    DsrError,
)
from dsr_jax.core.files import read_json
from dsr_jax.core.trees import flatten_names
from dsr_jax.evaluation.reconstruction import psnr
from dsr_jax.parallel.shardings import fetch
from dsr_jax.registers.neurons import save_neurons
from dsr_jax.runs.decoder_evaluation import save_pairs
from dsr_jax.runs.runner import run_command
from dsr_jax.sampling.images import to_uint8
from dsr_jax.telemetry.writers import read_metrics
from dsr_jax.training.checkpoints import Checkpoints, list_steps
from tests.programs import quick_programs
from tests.tiny_rae import save_rae

CONFIG = f"--config={Path(__file__).parents[1] / 'configs' / 'rae_decoder.py'}:runlocal"
STEPS, SIZE, HELDOUT = 6, 16, 16
TINY = (
    f"--config.data.image_size={SIZE}",
    "--config.data.crop_from=24",
    "--config.space.image_size=16",
    "--config.decoder.patch_size=4",
    "--config.decoder.hidden_size=16",
    "--config.data.global_batch=8",
    f"--config.train.steps={STEPS}",
    "--config.ema.decays=(0.5,)",
    "--config.sample.ema=0.5",
    "--config.sample.every_steps=3",
    "--config.sample.batch=8",
    f"--config.eval.num_samples={HELDOUT}",
    "--config.checkpoint.every_steps=3",
    "--config.precision.matmul=highest",
)
PLAIN = ("--config.gan.weight=0.0", "--config.lpips.weight=0.0")


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Starts share their programs."""
    with quick_programs(tmp_path_factory.mktemp("programs")):
        yield


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A tiny encoder with statistics and test-time registers, and arguments that name it."""
    folder = tmp_path_factory.mktemp("rae")
    save_rae(folder)
    save_neurons(folder / "neurons.json", {0: [3, 5], 1: [7]})
    return (
        *TINY,
        f"--config.space.encoder={folder / 'encoder'}",
        f"--config.space.statistics={folder / 'statistics.safetensors'}",
        f"--config.space.neurons={folder / 'neurons.json'}",
    )


def start(workdir: Path, *overrides: str) -> int:
    return train_decoder.main([CONFIG, f"--workdir={workdir}", *overrides])


@pytest.fixture(scope="module")
def whole(overrides: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run without interruption."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert start(folder, *overrides) == 0
    return folder


@pytest.mark.slow
def test_a_step_that_does_not_fit_ends_before_it_runs(
    overrides: tuple[str, ...], tmp_path: Path
) -> None:
    make_job = functools.partial(train_decoder.make_job, free_memory=lambda devices: 0)
    words = [CONFIG, f"--workdir={tmp_path / 'run'}", *overrides, *PLAIN]
    with pytest.raises(DeviceMemoryError, match="none needs.*dots needs.*full needs") as caught:
        run_command(words, make_job, "test", None)
    assert "accumulate" not in caught.value.remedy


def final_state(workdir: Path) -> dict[str, np.ndarray]:
    """All arrays of the newest checkpoint."""
    config = configs.load_run(workdir)
    mesh, rules = build.make_mesh(config), build.make_rules(config)
    parts = build.make_decoder_parts(config, None, rules)
    abstract, _ = build.make_decoder_state(config, parts, build.make_optimizer(config), mesh, rules)
    with Checkpoints(workdir / "checkpoints", every_steps=1) as checkpoints:
        return flatten_names(fetch(checkpoints.restore(abstract)[0]))


def records(workdir: Path) -> list[dict[str, Any]]:
    """Log records without the timings."""
    timings = ("step_seconds", "images_per_second", "mfu")
    return [{k: v for k, v in r.items() if k not in timings} for r in read_metrics(workdir)]


@pytest.mark.slow
def test_a_run_leaves_its_losses_scores_and_pictures(whole: Path) -> None:
    losses = [r for r in records(whole) if "loss" in r]
    assert [r["step"] for r in losses] == [2, 4, 6]
    assert all(np.isfinite(value) for r in losses for value in r.values())
    # The runlocal config's starts: discriminator at step 2, against it from step 4 on.
    assert [r["discriminator_loss"] > 0 for r in losses] == [False, True, True]
    assert [r["adaptive_weight"] > 0 for r in losses] == [False, False, True]
    scores = [r for r in records(whole) if "heldout_psnr" in r]
    assert [r["step"] for r in scores] == [3, 6]
    assert all(0 < r["heldout_psnr"] < 60 and -1 < r["heldout_ssim"] < 1 for r in scores)
    picture = np.asarray(Image.open(whole / "samples" / f"step_{STEPS:08d}.png"))
    # Two rows of digits, each above its reconstructions; enlarged twice, two pixels apart.
    assert picture.shape == (4 * 34 - 2, 8 * 34 - 2, 3)
    digits, decoded = picture[:32], picture[34:66]
    assert (digits[..., 0] == digits[..., 1]).all() and (decoded[..., 0] != decoded[..., 1]).any()


@pytest.mark.slow
def test_the_summary_names_a_decoder_that_a_space_reads(
    whole: Path, overrides: tuple[str, ...]
) -> None:
    summary = read_json(whole / "summary.json")
    assert summary["steps"] == STEPS and summary["heldout_images"] == HELDOUT
    folder = whole / summary["decoder"]
    record = read_json(folder / "conversion.json")
    assert record["ema"] == "0.5" and record["step"] == STEPS
    assert record["trained_with"]["config.space.encoder"].startswith("sha256:")
    _, params = load_decoder(folder)
    state = final_state(whole)
    for name, value in flatten_names(params).items():
        np.testing.assert_array_equal(value, state[f"ema/0.5/{name}"], err_msg=name)

    config = configs.load(f"{CONFIG.removeprefix('--config=')}", overrides)
    config.space.decoder, config.space.noise_tau = str(folder), 0.0
    space, variables = build.make_space(config)
    source = build.make_source(config, "heldout")
    images = np.stack([source[index]["image"] for index in range(HELDOUT)])
    latents = space.encode(variables, jnp.asarray(images) / 255)
    decoded = np.asarray(to_uint8(space.decode(variables, latents)))
    assert psnr(images, decoded).mean() == pytest.approx(summary["heldout_psnr"], abs=0.01)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_run_bit_for_bit(
    whole: Path, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    """The piece ends with the discriminator begun, inside a log window."""
    assert start(tmp_path, *overrides, "--config.train.stop_after_steps=5") == 0
    assert list_steps(tmp_path / "checkpoints") == [3, 5]
    assert not (tmp_path / "summary.json").exists()
    assert start(tmp_path, *overrides) == 0
    want, got = final_state(whole), final_state(tmp_path)
    assert got.keys() == want.keys()
    assert {
        "discriminator/step",
        "discriminator/spectral/heads/out/u",
        "params/pred/kernel",
    } < want.keys()
    assert int(want["step"]) == STEPS and int(want["discriminator/step"]) == STEPS - 2
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    assert records(tmp_path) == records(whole)
    name = read_json(whole / "summary.json")["decoder"]
    parameters = [(folder / name / "params.safetensors") for folder in (tmp_path, whole)]
    assert parameters[0].read_bytes() == parameters[1].read_bytes()


@pytest.mark.slow
def test_a_complete_run_is_left_as_it_is(whole: Path, overrides: tuple[str, ...]) -> None:
    before = records(whole), read_json(whole / "summary.json")
    exported = (whole / before[1]["decoder"] / "params.safetensors").stat().st_mtime_ns
    assert start(whole, *overrides) == 0
    assert (records(whole), read_json(whole / "summary.json")) == before
    assert (whole / before[1]["decoder"] / "params.safetensors").stat().st_mtime_ns == exported


@pytest.mark.slow
def test_losses_that_are_switched_off_are_not_computed_nor_stored(
    overrides: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    off = (*PLAIN, "--config.lpips.folder=", "--config.gan.backbone=", "--config.train.steps=2")
    assert start(tmp_path, *overrides, *off) == 0
    assert "losses: L1\n" in capsys.readouterr().err
    losses = [r for r in records(tmp_path) if "loss" in r]
    assert all(r["loss"] == r["l1"] > 0 and "discriminator_loss" not in r for r in losses)
    assert not any(name.startswith("discriminator") for name in final_state(tmp_path))
    on = (*overrides, "--config.train.steps=8")
    with pytest.raises(ConfigError, match="--allow-change gan.weight"):
        start(tmp_path, *on)
    with pytest.raises(CheckpointError, match="discriminator cannot change.*set config.gan back"):
        start(tmp_path, *on, "--allow-change=gan", "--allow-change=lpips")
    # The remedy.
    assert start(tmp_path, *overrides, *off, "--config.train.steps=3") == 0


@pytest.mark.slow
def test_the_decoder_learns_to_reconstruct(overrides: tuple[str, ...], tmp_path: Path) -> None:
    """From L1 alone: random features are no guide."""
    arguments = (
        *overrides,
        *PLAIN,
        "--config.train.steps=600",
        "--config.sample.every_steps=600",
        "--config.log.every_steps=100",
        "--config.checkpoint.every_steps=600",
        "--config.optim.lr=5e-3",
        "--config.optim.decay_end_steps=600",
        "--config.decoder.hidden_size=64",
        "--config.space.noise_tau=0.2",
        "--config.ema.decays=(0.98,)",
        "--config.sample.ema=0.98",
    )
    assert start(tmp_path, *arguments) == 0
    summary = read_json(tmp_path / "summary.json")
    assert summary["heldout_psnr"] > 16 and summary["heldout_ssim"] > 0.6


REFUSED: tuple[tuple[str, type[DsrError], str], ...] = (
    ("lpips.folder=", ConfigError, "config.lpips.folder is not set.*\n.*config.lpips.weight=0.0"),
    ("gan.backbone=", ConfigError, "config.gan.backbone is not set.*\n.*config.gan.weight=0.0"),
    ("lpips.folder=nowhere", ConversionError, "nowhere holds no converted model"),
    ("gan.backbone=nowhere", ConversionError, "nowhere holds no converted model"),
    ("lpips.folder=random:vgg99", ConfigError, "random:vgg99.*\n.*random:vgg16"),
    ("space.encoder=random:big", ConfigError, "random:big.*\n.*random:tiny"),
    ("gan.loss=square", ConfigError, "config.gan.loss='square'"),
    ("gan.kernel_size=4", ConfigError, "config.gan.kernel_size=4"),
    ("gan.weight=-1.0", ConfigError, "config.gan.weight=-1"),
    ("gan.generator_start=1", ConfigError, "generator_start=1 is before"),
    ("decoder.patch_size=8", ConfigError, "images of 32 pixels, config.data.image_size is 16"),
    ("decoder.num_heads=3", ConfigError, "3"),
    ("decoder.hidden_size=0", ConfigError, "defines no decoder.*\n.*dsr_jax.train for"),
    ("space.name=pixels", ConfigError, "'pixels' has no decoder"),
    ("space.decoder=somewhere", ConfigError, "but the decoder is trained"),
    ("optim.accumulate=2", ConfigError, "config.optim.accumulate=2.*\n.*remat"),
    ("eval.split=later", DataError, "no split 'later'"),
)


@pytest.mark.parametrize(("override", "error", "message"), REFUSED, ids=[row[0] for row in REFUSED])
def test_bad_settings_are_refused_before_anything_is_written(
    overrides: tuple[str, ...],
    tmp_path: Path,
    override: str,
    error: type[DsrError],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        # A batch that two micro-batches on eight devices would divide.
        batch = "--config.data.global_batch=16"
        start(tmp_path / "new", *overrides, batch, f"--config.{override}")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_denoiser_commands_report_a_decoders_run(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no denoiser is trained.*\n.*train_decoder"):
        train.main([CONFIG, f"--workdir={tmp_path / 'new'}"])
    with pytest.raises(ConfigError, match="no denoiser is trained"):
        sample.main([f"--workdir={whole}", "--num-samples=8"])


def test_pictures_have_images_above_their_reconstructions(tmp_path: Path) -> None:
    images = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 32, 32, 3), np.uint8)
    save_pairs(tmp_path / "x.png", images, images + 100)
    picture = np.asarray(Image.open(tmp_path / "x.png"))[::34, ::34, 0]
    np.testing.assert_array_equal(picture, [np.arange(8), np.arange(8) + 100])
