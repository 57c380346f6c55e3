"""LPIPS from its two files: both ways, and strictness."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dsr_jax.convert import __main__ as command
from dsr_jax.convert.decoder import save_decoder
from dsr_jax.convert.lpips import load_lpips, lpips_rules, read_lpips
from dsr_jax.core.errors import ConversionError
from dsr_jax.core.trees import flatten_names
from dsr_jax.models.lpips import LPIPS
from dsr_jax.models.variants import VGG16_CHANNELS
from tests.tiny_rae import DECODER, decoder_params

CHANNELS = (2, 3, 4, 5, 6)


def state() -> dict[str, np.ndarray]:
    """Both files together, of random numbers."""
    rules, random = lpips_rules(CHANNELS), np.random.default_rng(0)
    return {
        rule.source: random.standard_normal(rule.source_shape(rules.shapes[rule.target])).astype(
            np.float32
        )
        for rule in rules.rules
    }


def files(folder: Path, **extra: np.ndarray) -> tuple[Path, Path]:
    """taming's file and torchvision's."""
    tensors = state() | {"classifier.0.weight": np.zeros((2, 2), np.float32)} | extra
    linear = {name: x for name, x in tensors.items() if name.startswith("lin")}
    vgg = {name: x for name, x in tensors.items() if name not in linear}
    save_file(linear, folder / "vgg.safetensors")
    save_file(vgg, folder / "vgg16.safetensors")
    return folder / "vgg.safetensors", folder / "vgg16.safetensors"


def test_the_command_and_its_way_back_are_exact(tmp_path: Path) -> None:
    source, vgg = files(tmp_path)
    out, back = tmp_path / "lpips", tmp_path / "back.safetensors"
    command.main(["lpips", f"--source={source}", f"--vgg={vgg}", f"--out={out}"])
    network, params = load_lpips(out)
    assert network == LPIPS(CHANNELS)
    images = jnp.zeros((1, 16, 16, 3))
    abstract = nn.unbox(jax.eval_shape(network.init, jax.random.key(0), images, images))["params"]
    shapes = {name: x.shape for name, x in flatten_names(abstract).items()}
    assert {name: x.shape for name, x in flatten_names(params).items()} == shapes
    command.main(["export", f"--source={out}", f"--out={back}"])
    got, want = load_file(back), state()
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_names_are_torchvisions() -> None:
    names = {name for name in state() if name.endswith("weight") and "features" in name}
    layers = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    assert names == {f"features.{layer}.weight" for layer in layers}
    assert lpips_rules(VGG16_CHANNELS).shapes["conv5_3/kernel"] == (3, 3, 512, 512)


def test_a_file_of_the_whole_network_is_read(tmp_path: Path) -> None:
    starts = {1: 0, 2: 4, 3: 9, 4: 16, 5: 23}
    whole = {}
    for name, x in state().items():
        if name.startswith("features."):
            _, layer, kind = name.split(".")
            number = max(k for k, first in starts.items() if first <= int(layer))
            name = f"net.slice{number}.{int(layer) - starts[number]}.{kind}"
        whole[name] = x
    whole["scaling_layer.shift"] = np.zeros((1, 3, 1, 1), np.float32)
    save_file(whole, tmp_path / "x.safetensors")
    source, vgg = files(tmp_path)
    want, got = read_lpips(source, vgg)[1], read_lpips(tmp_path / "x.safetensors")[1]
    for name, value in flatten_names(want).items():
        np.testing.assert_array_equal(flatten_names(got)[name], value, err_msg=name)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    source, vgg = files(tmp_path)
    with pytest.raises(ConversionError, match="linear layers alone.*\n.*--vgg"):
        read_lpips(source)
    with pytest.raises(ConversionError, match="lin0.model.1.weight is absent.*\n.*vgg.pth"):
        read_lpips(vgg)
    with pytest.raises(ConversionError, match="both hold"):
        read_lpips(source, source)
    with pytest.raises(ConversionError, match="nowhere.pth does not exist"):
        read_lpips(tmp_path / "nowhere.pth", vgg)
    (tmp_path / "more").mkdir()
    with pytest.raises(ConversionError, match="not known to the model.*\n.*surprise"):
        read_lpips(*files(tmp_path / "more", surprise=np.zeros(1, np.float32)))
    wrong = {"features.28.bias": np.zeros(7, np.float32)}
    with pytest.raises(ConversionError, match=r"features.28.bias is \[7\]"):
        read_lpips(*files(tmp_path / "more", **wrong))


def test_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    save_decoder(tmp_path / "decoder", DECODER, decoder_params(), {})
    with pytest.raises(ConversionError, match="holds a decoder, not LPIPS"):
        load_lpips(tmp_path / "decoder")
