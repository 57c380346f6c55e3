"""Resampling against PyTorch's interpolation and jax.image.resize."""

import jax
import numpy as np
import pytest

from dsr_jax.core.errors import ConfigError
from dsr_jax.models.resample import resample, resample_matrix
from tests.requirements import require

SIZES = [(37, 16), (16, 37), (14, 16), (256, 224), (5, 5)]


@pytest.mark.parametrize(("size", "wanted"), SIZES)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("bicubic", {"mode": "bicubic", "antialias": False}),
        ("bicubic-antialias", {"mode": "bicubic", "antialias": True}),
        ("bilinear", {"mode": "bilinear", "antialias": False}),
    ],
)
def test_equals_torch(size: int, wanted: int, method: str, options: dict[str, object]) -> None:
    torch = require("torch", "torch")
    x = np.random.default_rng(0).standard_normal((2, size, size + 3, 3), np.float32)
    # In double precision: PyTorch's float32 coordinates are off by 1e-4 of a pixel at 256.
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(x.transpose(0, 3, 1, 2).astype(np.float64)), (wanted, wanted), **options
    )
    ours = resample(x, wanted, wanted, method)
    np.testing.assert_allclose(ours, theirs.numpy().transpose(0, 2, 3, 1), atol=1e-5)


def test_an_offset_equals_torch_with_a_factor() -> None:
    torch = require("torch", "torch")
    x = np.random.default_rng(0).standard_normal((1, 37, 37, 3), np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(x.transpose(0, 3, 1, 2).astype(np.float64)),
        scale_factor=(16.1 / 37, 16.1 / 37),
        mode="bicubic",
    )
    ours = resample(x, 16, 16, "bicubic-offset")
    np.testing.assert_allclose(ours, theirs.numpy().transpose(0, 2, 3, 1), atol=1e-5)
    assert np.abs(ours - resample(x, 16, 16, "bicubic")).max() > 1e-3


def test_antialiased_equals_jax() -> None:
    x = np.random.default_rng(0).standard_normal((37, 37, 4), np.float32)
    want = jax.image.resize(x, (16, 16, 4), "cubic", antialias=True)
    np.testing.assert_allclose(resample(x, 16, 16, "bicubic-antialias"), want, atol=1e-5)


@pytest.mark.parametrize("method", ["bicubic", "bicubic-antialias", "bilinear"])
def test_constants_stay_and_the_same_size_is_the_identity(method: str) -> None:
    np.testing.assert_allclose(resample_matrix(37, 16, method).sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(resample_matrix(7, 7, method), np.eye(7), atol=1e-7)


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(ConfigError, match="'nearest'"):
        resample_matrix(2, 3, "nearest")
