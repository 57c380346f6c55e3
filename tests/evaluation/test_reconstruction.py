"""PSNR and SSIM against their definitions."""

import numpy as np
import pytest

from dsr_jax.core.errors import EvaluationError
from dsr_jax.evaluation.reconstruction import psnr, ssim

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 14, 17, 3), np.uint8)


def direct_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """SSIM of two gray images by a sum over each window."""
    a, b = (np.pad(x / 255.0, 5, mode="reflect") for x in (a, b))
    taps = np.exp(-np.square(np.arange(-5, 6)) / (2 * 1.5**2))
    window = np.outer(taps, taps) / taps.sum() ** 2
    values = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            u, v = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mu, mv = (window * u).sum(), (window * v).sum()
            var_u, var_v = (window * (u - mu) ** 2).sum(), (window * (v - mv) ** 2).sum()
            both = (window * (u - mu) * (v - mv)).sum()
            values.append(
                (2 * mu * mv + 1e-4)
                * (2 * both + 9e-4)
                / ((mu**2 + mv**2 + 1e-4) * (var_u + var_v + 9e-4))
            )
    return float(np.mean(values))


def test_identical_images() -> None:
    np.testing.assert_array_equal(psnr(IMAGES, IMAGES), 100)
    np.testing.assert_allclose(ssim(IMAGES, IMAGES), 1, atol=1e-12)


def test_psnr_of_a_known_error() -> None:
    other = IMAGES // 2
    want = -10 * np.log10(np.square((IMAGES - other.astype(float)) / 255).mean(axis=(1, 2, 3)))
    np.testing.assert_allclose(psnr(IMAGES, other), want)
    black, gray = np.zeros((1, 8, 8, 1), np.uint8), np.full((1, 8, 8, 1), 51, np.uint8)
    np.testing.assert_allclose(psnr(black, gray), 20 * np.log10(5))


def test_ssim_is_the_mean_over_windows_of_the_reflected_image() -> None:
    other = np.clip(IMAGES.astype(int) + 40 * (IMAGES[::-1] > 128), 0, 255).astype(np.uint8)
    found = ssim(IMAGES[:1], other[:1])
    want = np.mean([direct_ssim(IMAGES[0, ..., c], other[0, ..., c]) for c in range(3)])
    np.testing.assert_allclose(found, want, rtol=1e-9)
    assert found[0] < 0.98


def test_what_cannot_be_compared_is_named() -> None:
    with pytest.raises(EvaluationError, match="reconstructions are float64"):
        psnr(IMAGES, IMAGES / 255)
    with pytest.raises(EvaluationError, match=r"reconstructions \(2, 14, 17, 3\)"):
        ssim(IMAGES, IMAGES[:2])
    with pytest.raises(EvaluationError, match="5 x 17 pixels"):
        ssim(IMAGES[:, :5], IMAGES[:, :5])
