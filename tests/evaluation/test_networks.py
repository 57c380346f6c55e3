"""DINOv2's class tokens against PyTorch's, and rejected encoders."""

import dataclasses

import jax
import numpy as np
import pytest

from dsr_jax.convert.__main__ import main as convert
from dsr_jax.convert.hub import load_class_encoder
from dsr_jax.core.errors import ConversionError, EvaluationError
from dsr_jax.evaluation.networks import dinov2_features
from tests.convert.hub_models import save_snapshot
from tests.requirements import require

torch = require("torch", "torch")
transformers = require("transformers", "torch")
IMAGES = np.random.RandomState(0).randint(0, 256, (2, 48, 40, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random DINOv2 as a snapshot and as a converted folder."""
    folder = tmp_path_factory.mktemp("dinov2")
    save_snapshot("dinov2", folder / "hub", patch_size=14)
    source, out = str(folder / "hub"), str(folder / "converted")
    convert(["dinov2", "--source", source, "--class-output", "--out", out])
    return folder


def test_class_tokens_are_those_of_pytorch(folders):
    config, params, record = load_class_encoder(folders / "converted")
    network = dinov2_features(config, params, record)
    assert network.recipe["dinov2"]["weights"] == record["params_digest"]
    ours = network.apply(params, IMAGES)["class_token"]

    model = transformers.Dinov2Model.from_pretrained(folders / "hub").eval()
    native, width = config.image_size // config.patch_size, config.hidden_size
    table = model.embeddings.position_embeddings.detach()
    factor = (16 + 0.1) / native
    patches = torch.nn.functional.interpolate(
        table[:, 1:].reshape(1, native, native, width).permute(0, 3, 1, 2).double(),
        scale_factor=(factor, factor),
        mode="bicubic",
    )
    patches = patches.permute(0, 2, 3, 1).reshape(1, 256, width).float()
    positions = torch.cat([table[:, :1], patches], dim=1)
    model.embeddings.interpolate_pos_encoding = lambda *_: positions
    pixels = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy()).double()
    pixels = torch.nn.functional.interpolate(pixels, (224, 224), mode="bicubic", antialias=True)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        out = model((pixels.float() / 255 - mean) / std)
    theirs = out.last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


def test_grayscale_images_are_treated_as_color(folders):
    config, params, record = load_class_encoder(folders / "converted")
    network = dinov2_features(config, params, record)
    gray = IMAGES[..., :1]
    found, want = (network.apply(params, x) for x in (gray, np.repeat(gray, 3, axis=-1)))
    np.testing.assert_allclose(found["class_token"], want["class_token"], atol=1e-5)


def test_the_patch_tokens_do_not_change(folders):
    """A folder with the class output serves as an encoder of latents, too."""
    from dsr_jax.convert.hub import read_encoder
    from dsr_jax.models.vit import ViT

    pixels = jax.numpy.ones((1, 28, 28, 3))
    config, params, _ = load_class_encoder(folders / "converted")
    plain, fewer = read_encoder(folders / "hub")
    assert not plain.class_output and set(params) - set(fewer) == {"norm"}
    found, want = (
        ViT(c).apply({"params": p}, pixels) for c, p in ((config, params), (plain, fewer))
    )
    np.testing.assert_array_equal(found.tokens, want.tokens)
    assert want.class_token is None and found.class_token.shape == (1, config.hidden_size)


def test_other_encoders_are_refused(folders, tmp_path):
    convert(["dinov2", "--source", str(folders / "hub"), "--out", str(tmp_path / "plain")])
    with pytest.raises(ConversionError, match="without its class output"):
        load_class_encoder(tmp_path / "plain")
    config, params, _ = load_class_encoder(folders / "converted")
    for changes, reason in (
        ({"class_output": False}, "without its class output"),
        ({"num_registers": 4}, "not DINOv2 without registers"),
        ({"patch_size": 15}, "no images of 224"),
    ):
        with pytest.raises(EvaluationError, match=reason):
            dinov2_features(dataclasses.replace(config, **changes), params)
