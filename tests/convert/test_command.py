"""The conversion command, its way back, and images from converted weights."""

import os

import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file

from dsr_jax import build, sample
from dsr_jax.convert.__main__ import main
from dsr_jax.convert.files import load_converted, save_converted
from dsr_jax.core.errors import ConversionError
from dsr_jax.core.files import file_digest, read_json
from tests.convert.official_states import make_state
from tests.requirements import require
from tests.test_sample import tiny_config

CONFIG = """
from tests.test_sample import tiny_config

def get_config(arg):
    return tiny_config()
"""


@pytest.fixture(scope="module")
def model():
    config = tiny_config()
    return build.make_model(config, build.make_space(config)[0])


@pytest.fixture(scope="module")
def source(model, tmp_path_factory):
    """An official checkpoint of the tiny config's model."""
    path = tmp_path_factory.mktemp("source") / "ep-1.safetensors"
    save_file(make_state(model), path)
    return path


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    """The folder that the command makes of it."""
    folder = tmp_path_factory.mktemp("converted") / "model"
    assert main(arguments(source, folder)) == 0
    return folder


def arguments(source, out, *more):
    return ["lightningdit", f"--source={source}", f"--out={out}", "--register-start=1", *more]


def test_record_describes_the_conversion(model, source, converted):
    _, record = load_converted(converted)
    assert record["family"] == "lightningdit" and record["entry"] is None
    assert record["source"] == "ep-1.safetensors"
    assert record["source_digest"] == file_digest(source)
    assert record["params_digest"] == file_digest(converted / "params.safetensors")
    sizes = record["model"]
    assert sizes["num_registers"] == 4 and sizes["register_start"] == 1
    assert all(value == getattr(model, name) for name, value in sizes.items())


def test_export_gives_the_same_bytes(source, converted, tmp_path):
    out = tmp_path / "deeper" / "back.safetensors"
    assert main(["export", f"--source={converted}", f"--out={out}"]) == 0
    assert out.read_bytes() == save(load_file(source))
    again = tmp_path / "again"
    main(arguments(out, again))
    assert file_digest(again / "params.safetensors") == file_digest(
        converted / "params.safetensors"
    )


def test_torch_files_in_and_out(model, source, converted, tmp_path):
    torch = require("torch", "torch")
    ema = {name: torch.from_numpy(x) for name, x in load_file(source).items()}
    raw = {name: torch.from_numpy(x) for name, x in make_state(model, seed=1).items()}
    torch.save({"model": raw, "ema": ema, "step": 3}, tmp_path / "ep.pt")
    digests = {}
    for entry in ("default", "ema", "model"):
        choice = [] if entry == "default" else [f"--entry={entry}"]
        main(arguments(tmp_path / "ep.pt", tmp_path / entry, *choice))
        digests[entry] = file_digest(tmp_path / entry / "params.safetensors")
    assert digests["default"] == digests["ema"] == file_digest(converted / "params.safetensors")
    assert digests["model"] != digests["ema"]
    main(["export", f"--source={tmp_path / 'ema'}", f"--out={tmp_path / 'back.pt'}"])
    back = torch.load(tmp_path / "back.pt", weights_only=True)["ema"]
    assert back.keys() == ema.keys() and all(torch.equal(back[name], ema[name]) for name in ema)


def test_nothing_is_overwritten(source, converted, tmp_path):
    before = file_digest(converted / "params.safetensors")
    with pytest.raises(ConversionError, match=f"{converted} is not an empty folder"):
        main(arguments(source, converted))
    assert file_digest(converted / "params.safetensors") == before
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ConversionError, match="is not an empty folder"):
        main(arguments(source, tmp_path / "file"))
    with pytest.raises(ConversionError, match="file exists"):
        main(["export", f"--source={converted}", f"--out={tmp_path / 'file'}"])
    assert (tmp_path / "file").read_text() == "kept"


def test_refused_source_leaves_nothing_behind(source, tmp_path):
    state = load_file(source)
    del state["blocks.1.norm2.weight"]
    save_file(state, tmp_path / "lacking.safetensors")
    with pytest.raises(ConversionError, match=r"blocks\.1\.norm2\.weight"):
        main(arguments(tmp_path / "lacking.safetensors", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["lightningdit --register-start=1", "decoder"])
def test_numbers_of_heads_are_positive(family, source, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*family.split(), f"--source={source}", f"--out={tmp_path / 'o'}", "--num-heads=-2"])
    assert "--num-heads: -2 is not positive" in capsys.readouterr().err


def test_damaged_conversions_are_refused(converted, tmp_path):
    with pytest.raises(ConversionError, match="conversion.json and params.safetensors missing"):
        load_converted(tmp_path)
    params, record = load_converted(converted)
    save_converted(tmp_path / "copy", params, record)
    path = tmp_path / "copy" / "params.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConversionError, match="params.safetensors is not what was written"):
        load_converted(tmp_path / "copy")
    path.unlink()
    with pytest.raises(ConversionError, match="no converted model: params.safetensors missing"):
        load_converted(tmp_path / "copy")


def test_a_killed_conversion_does_not_block_its_folder(converted, tmp_path):
    params, record = load_converted(converted)
    out = tmp_path / "out"
    save_converted(out, params, record)
    (out / "params.safetensors").rename(out / ".params.safetensors.ab12cd_9.tmp")
    (out / ".lock.json").write_text("")
    os.utime(out / ".lock.json", (0, 0))
    save_converted(out, params, record)
    assert sorted(p.name for p in out.iterdir()) == ["conversion.json", "params.safetensors"]
    with pytest.raises(ConversionError, match="is not an empty folder"):
        save_converted(out, params, record)


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG)
    return path


def test_images_of_converted_weights(converted, config_file, tmp_path):
    command = [f"--converted={converted}", f"--config={config_file}", "--num-samples=8"]
    sample.main([*command, f"--out={tmp_path / 'out'}", "--name=images"])
    with np.load(tmp_path / "out" / "images.npz") as arrays:
        images = arrays["arr_0"]
    assert images.shape == (8, 8, 8, 1) and len(np.unique(images)) > 30
    recipe = read_json(tmp_path / "out" / "images.json")["recipe"]
    assert recipe["converted"]["source"] == "ep-1.safetensors"


@pytest.mark.parametrize(
    ("override", "pattern"),
    [
        ("model.hidden_size=32", r"model\.hidden_size: 16 -> 32"),
        ("registers.num=9", r"registers\.num: 4 -> 9"),
        ("registers.start=0", r"registers\.start: 1 -> 0"),
        ("model.use_qknorm=True", r"model\.use_qknorm: False -> True"),
        ("model.mlp_ratio=4.0", r"blocks_pre/mlp/w12/kernel: \(1, 16, 2, \d+\) -> \(1, 16, 2,"),
    ],
)
def test_config_of_other_sizes(converted, config_file, tmp_path, override, pattern):
    command = [f"--converted={converted}", f"--config={config_file}", f"--config.{override}"]
    with pytest.raises(ConversionError, match=pattern) as caught:
        sample.main([*command, f"--out={tmp_path / 'out'}"])
    assert "--config.KEY=VALUE" in caught.value.remedy
    assert not (tmp_path / "out").exists()


def test_converted_encoder_is_no_denoiser(converted, config_file, tmp_path):
    params, record = load_converted(converted)
    save_converted(tmp_path / "encoder", params, {**record, "family": "siglip"})
    problem = "holds a siglip, but config.model.name='lightningdit'"
    with pytest.raises(ConversionError, match=problem):
        sample.main([f"--converted={tmp_path / 'encoder'}", f"--config={config_file}"])
