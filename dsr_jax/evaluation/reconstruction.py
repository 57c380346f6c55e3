"""How near reconstructions are to their images: PSNR and SSIM.

Source: DSR reconstruction evaluation (torchmetrics 1.9); spec encoder 12.
"""

import numpy as np

from dsr_jax.core.errors import EvaluationError

_LEAST_ERROR = 1e-10
"""Floor of the mean squared error: identical images have 100 dB."""
_TAPS, _SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03


def psnr(reference: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each image in dB [N], float64.

    Args:
      reference: uint8 [N, H, W, C].
      images: Their reconstructions, likewise.

    Raises:
      EvaluationError: If they are not uint8, or of different shapes.
    """
    reference, images = _unit_range(reference, images)
    error = np.square(reference - images).mean(axis=(1, 2, 3))
    return -10 * np.log10(np.maximum(error, _LEAST_ERROR))


def ssim(reference: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Structural similarity of each image [N], float64.

    Gaussian windows of 11 taps; images are reflected beyond their edges, and the map is averaged
    over all pixels and channels. Variants that leave a border of 5 pixels out give other values on
    small images.

    Args:
      reference: uint8 [N, H, W, C].
      images: Their reconstructions, likewise.

    Raises:
      EvaluationError: If they are not uint8, of different shapes, or smaller than the window.
    """
    reference, images = _unit_range(reference, images)
    if min(reference.shape[1:3]) <= _TAPS // 2:
        raise EvaluationError(
            f"images of {reference.shape[1]} x {reference.shape[2]} pixels",
            f"SSIM needs more than {_TAPS // 2} a side",
        )
    return np.array([_ssim(a, b) for a, b in zip(reference, images, strict=True)])


def _ssim(a: np.ndarray, b: np.ndarray) -> float:
    mean_a, mean_b = _blur(a), _blur(b)
    # Rounding may leave a variance of a flat region below zero, the covariance may be negative.
    var_a = np.maximum(_blur(a * a) - mean_a**2, 0)
    var_b = np.maximum(_blur(b * b) - mean_b**2, 0)
    covariance = _blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + _K1**2) / (mean_a**2 + mean_b**2 + _K1**2)
    structure = (2 * covariance + _K2**2) / (var_a + var_b + _K2**2)
    return float(np.mean(luminance * structure))


def _blur(image: np.ndarray) -> np.ndarray:
    """Gaussian mean of [H, W, C] around each pixel."""
    half = _TAPS // 2
    window = np.exp(-np.square(np.arange(-half, half + 1) / _SIGMA) / 2)
    window /= window.sum()
    for axis in (0, 1):
        padding = [(half, half) if i == axis else (0, 0) for i in range(3)]
        padded = np.pad(image, padding, mode="reflect")
        size = image.shape[axis]
        image = sum(
            weight * np.take(padded, np.arange(i, i + size), axis=axis)
            for i, weight in enumerate(window)
        )
    return image


def _unit_range(reference: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    for name, x in (("reference images", reference), ("reconstructions", images)):
        if x.dtype != np.uint8 or x.ndim != 4:
            raise EvaluationError(f"{name} are {x.dtype}{x.shape}", "give uint8 [N, H, W, C]")
    if reference.shape != images.shape:
        raise EvaluationError(
            f"reference images are {reference.shape}, reconstructions {images.shape}",
            "reconstruct the very images, in their order and size",
        )
    return reference / 255.0, images / 255.0
