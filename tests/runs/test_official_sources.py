"""Samples straight from official files: converted on the way, cached, without an encoder."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax import sample
from dsr_jax.config import recipes
from dsr_jax.convert.decoder import decoder_rules
from dsr_jax.convert.files import save_state
from dsr_jax.convert.rules import flax_to_torch
from dsr_jax.convert.statistics import save_statistics
from dsr_jax.core.errors import ConfigError, ConversionError
from dsr_jax.core.files import file_digest, read_json
from dsr_jax.models.decoder import DecoderConfig, ViTDecoder
from dsr_jax.models.dit import LightningDiT
from dsr_jax.models.jit import JiT
from dsr_jax.runs.official_sources import config_of_converted, convert_cached, family_of_source
from tests.convert.official_states import make_state
from tests.tiny_rae import random_params

CHANNELS = 768  # Those of dinov2-base, whose 16 x 16 patches of 14 pixels the latents are.
DENOISER = LightningDiT(
    input_size=16,
    in_channels=CHANNELS,
    hidden_size=16,
    depth=2,
    num_heads=2,
    num_classes=5,
    num_registers=4,
    register_start=1,
)
DECODER = DecoderConfig(
    latent_channels=CHANNELS, grid=16, patch_size=2, hidden_size=12, depth=1, num_heads=2, mlp_dim=8
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Official files of a tiny denoiser, decoder and statistics, and the options of a command."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("official")
    save_state(folder / "ep.pt", make_state(DENOISER), ("ema",))
    tokens = jnp.zeros((1, DECODER.grid**2, CHANNELS))
    params = random_params(ViTDecoder(DECODER), tokens)
    save_state(folder / "decoder.pt", flax_to_torch(params, decoder_rules(DECODER)), ())
    random = np.random.RandomState(0)
    statistics = {
        "mean": random.standard_normal((16, 16, CHANNELS)),
        "var": random.uniform(0.5, 2, (16, 16, CHANNELS)),
    }
    save_statistics(folder / "stat.pt", statistics)
    return folder


def command(files, tmp_path, **changes):
    arguments = {
        "converted": files / "ep.pt",
        "encoder": "dinov2-base",
        "decoder": files / "decoder.pt",
        "statistics": files / "stat.pt",
        "options": "--register-start=1",
        "decoder-options": "--num-heads=2",
        "cache": tmp_path / "cache",
        "out": tmp_path / "out",
        "name": "images",
        "num-samples": 4,
        "num-points": 3,
        "batch": 8,
    } | changes
    return [f"--{key}={value}" for key, value in arguments.items() if value]


def test_one_command_from_official_files_to_images(files, tmp_path, capsys):
    sample.main([*command(files, tmp_path), "--grid"])
    with np.load(tmp_path / "out" / "images.npz") as arrays:
        images = arrays["arr_0"]
    assert images.shape == (4, 32, 32, 3) and len(np.unique(images)) > 30
    assert (tmp_path / "out" / "images.png").is_file()
    recipe = read_json(tmp_path / "out" / "images.json")["recipe"]
    assert recipe["converted"]["source_digest"] == file_digest(files / "ep.pt")
    assert recipe["objective"]["prediction"] == "data"
    assert "converting" in capsys.readouterr().err
    folders = sorted(path.name.partition("-")[0] for path in (tmp_path / "cache").iterdir())
    assert folders == ["decoder", "lightningdit"]

    # Again from the cache, and a folder of it that is damaged is converted again.
    sample.main(command(files, tmp_path, name="again"))
    assert "converting" not in capsys.readouterr().err
    digest = file_digest(tmp_path / "out" / "images.npz")
    assert file_digest(tmp_path / "out" / "again.npz") == digest
    params = next((tmp_path / "cache").glob("lightningdit-*/params.safetensors"))
    params.write_bytes(params.read_bytes()[:-1])
    folder = convert_cached(
        str(files / "ep.pt"), "lightningdit", "--register-start=1", tmp_path / "cache"
    )
    assert folder == params.parent and "converting" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"encoder": ""}, ConfigError, "LightningDiT needs --encoder as well"),
        ({"decoder": "", "statistics": ""}, ConfigError, "needs --decoder, --statistics as well"),
        ({"vae": "sdvae"}, ConfigError, "--vae has no effect with LightningDiT"),
        ({"encoder": "dinov9"}, ConfigError, "encoder='dinov9' does not exist"),
        ({"encoder": "siglip2-so400m"}, ConfigError, "latents of 768 channels"),
        ({"options": ""}, ConversionError, "register"),
        ({"converted": "none.pt"}, ConversionError, "none.pt does not exist"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_named(files, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        sample.main(command(files, tmp_path, **changes))
    assert not (tmp_path / "out").exists()


def test_sources_are_checked_before_anything_is_converted(files, tmp_path):
    with pytest.raises(ConfigError, match="needs --decoder as well"):
        sample.main(command(files, tmp_path, decoder=""))
    assert not (tmp_path / "cache").exists()


def test_statistics_none_means_none_with_a_config_too(files, tmp_path):
    digits = Path(__file__).parents[2] / "configs" / "digits_rae.py"
    args, _ = sample._parser().parse_known_args(
        ["--converted=x", f"--config={digits}", "--statistics=none", "--decoder=made"]
    )
    config = sample.load_config(args, [])
    assert config.space.statistics == "" and config.space.decoder == "made"


def test_a_run_is_no_checkpoint(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConversionError, match=r"is the folder of a run.*\n.*--workdir="):
        family_of_source(tmp_path)


def test_a_decoder_is_no_denoiser(files, tmp_path):
    with pytest.raises(ConversionError, match="holds RAE's decoder, not a denoiser"):
        sample.main(command(files, tmp_path, converted=files / "decoder.pt"))


def test_a_family_brings_its_own_recipe(tmp_path):
    """JiT needs neither decoder nor statistics; its noise and guidance are those of its config."""
    pytest.importorskip("torch")
    sizes = dict(input_size=8, in_channels=3, hidden_size=16, depth=2, num_heads=2, num_classes=5)
    model = JiT(**sizes, patch_size=2, bottleneck_dim=8, num_class_tokens=4, class_token_start=1)
    save_state(tmp_path / "jit.pt", make_state(model), ("model_ema1",))
    assert family_of_source(tmp_path / "jit.pt") == "jit"
    options = "--num-heads=2 --class-token-start=1"
    folder = convert_cached(str(tmp_path / "jit.pt"), "jit", options, tmp_path / "cache")
    config = config_of_converted(folder, encoder="", decoder="", statistics="", vae="")
    assert config.model.name == "jit" and config.model.hidden_size == 16
    assert config.registers.num == 0 and config.data.num_classes == 5
    assert config.space.name == "pixels" and config.data.image_size == 8
    assert config.sample.method == "heun-euler" and config.sample.guidance == 2.2


def test_names_of_encoders_that_configs_use_are_known():
    from dsr_jax.build.abstract import encoder_preset

    for name in recipes.RAE_ENCODERS:
        assert encoder_preset(name) == recipes.RAE_ENCODERS[name]
