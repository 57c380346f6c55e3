"""A SiT with registers in the latents of a VAE: trained and sampled by the commands."""

from collections.abc import Iterator
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image

from dsr_jax import build, train
from dsr_jax import config as configs
from dsr_jax.core.errors import ConfigError, ConversionError
from dsr_jax.core.trees import flatten_names
from dsr_jax.models.sit import SiT
from dsr_jax.spaces import VAE
from dsr_jax.telemetry.writers import read_metrics
from tests.finished_run import final_state
from tests.programs import quick_programs
from tests.test_train import DIGITS, TINY
from tests.tiny_rae import save_rae
from tests.tiny_vae import save_tiny_vae

STEPS = 2


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Starts share their programs."""
    with quick_programs(tmp_path_factory.mktemp("programs")):
        yield


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Arguments of a run with SiT's settings."""
    return (
        *TINY,
        *save_tiny_vae(tmp_path_factory.mktemp("vae") / "vae"),
        "--config.model.name=sit",
        "--config.model.use_rope=False",
        "--config.model.use_rmsnorm=False",
        "--config.model.use_swiglu=False",
        "--config.model.learn_sigma=True",
        "--config.registers.start=1",
        "--config.objective.prediction=velocity",
        "--config.objective.time_distribution=uniform",
        "--config.objective.time_range=(0.0,1.0)",
        "--config.optim.freeze=('*pos_embed',)",
        "--config.sample.method=sde-euler",
        "--config.sample.guidance_channels=3",
        "--config.sample.uint8=sit",
        "--config.sample.every_steps=2",
        "--config.log.every_steps=1",
        f"--config.train.steps={STEPS}",
    )


def start(workdir: Path, *overrides: str) -> int:
    return train.main([DIGITS, f"--workdir={workdir}", *overrides])


@pytest.fixture(scope="module")
def whole(overrides, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert start(folder, *overrides) == 0
    return folder


@pytest.mark.slow
def test_a_run_leaves_numbers_and_decoded_pictures(whole: Path) -> None:
    metrics = read_metrics(whole)
    assert len(metrics) == STEPS and all(np.isfinite(record["loss"]) for record in metrics)
    picture = np.asarray(Image.open(whole / "samples" / f"step_{STEPS:08d}.png"))
    assert picture.shape[2] == 3 and np.ptp(picture) > 50
    config = configs.load_run(whole)
    space, variables = build.make_space(config)
    assert isinstance(space, VAE) and space.latent_shape == (4, 4, 4)
    assert set(variables) == {"vae"}
    recipe = build.sampling_recipe(config, STEPS, "0.5")
    assert recipe["architecture"]["config.space.vae"].startswith("sha256:")
    assert "config.space.encoder" not in recipe["architecture"]
    assert recipe["sampler"]["guidance_channels"] == 3
    assert recipe["sampler"]["time_range"] == (0.0, 1.0)


@pytest.mark.slow
def test_tables_stay_as_they_start_and_the_rest_is_trained(whole: Path) -> None:
    config = configs.load_run(whole)
    space, _ = build.make_space(config)
    model = build.make_model(config, space)
    assert isinstance(model, SiT)
    init = jax.jit(lambda: nn.unbox(build.init_params(model, space, config.seed)))
    first = flatten_names(init())
    last = final_state(whole)
    moved = {name for name, value in first.items() if (last[f"params/{name}"] != value).any()}
    assert not {"pos_embed", "register_pos_embed"} & moved
    assert {"final_layer/linear/kernel", "final_layer/linear/bias"} <= moved


@pytest.mark.slow
def test_the_way_of_sit_starts_at_noise_and_ends_at_data(whole: Path) -> None:
    """Velocities stop short of either end in the registers' paper, SiT's do not."""
    config = configs.load_run(whole)
    sampler = build.make_time_sampler(config)
    assert (sampler.t_min, sampler.t_max) == (0.0, 1.0)
    config.objective.time_range = ()
    assert build.make_time_sampler(config).t_max == 0.999


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("space.vae=", ConfigError, "config.space.vae is not set"),
        ("space.vae=nowhere", ConversionError, "nowhere holds no converted model"),
        ("space.shift=0.5", ConfigError, "shift=0.5, but the autoencoder in .* 0.0"),
        ("space.scale=0.5", ConfigError, "scale=0.5, but the autoencoder in .* 0.18215"),
        ("data.image_size=7", ConfigError, "image_size=7"),
        ("data.channels=1", ConfigError, "config.data.channels=1"),
        ("eval.classifier=digits", ConfigError, "config.eval.classifier='digits'.*'vae'"),
        ("objective.time_range=(0.5,)", ConfigError, r"time_range=\(0.5,\)"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    overrides, tmp_path: Path, override: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        start(tmp_path / "new", *overrides, f"--config.{override}")
    assert not (tmp_path / "new").exists()


def test_an_encoder_is_no_vae(overrides, tmp_path: Path) -> None:
    save_rae(tmp_path)
    with pytest.raises(ConversionError, match="holds a siglip2, not an autoencoder"):
        start(tmp_path / "new", *overrides, f"--config.space.vae={tmp_path / 'encoder'}")
