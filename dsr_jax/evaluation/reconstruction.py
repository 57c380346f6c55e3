"""PSNR and SSIM of images and their reconstructions.

Source: DSR reconstruction evaluation (torchmetrics 1.9); spec encoder 12.
"""

import numpy as np

from dsr_jax.core.errors import EvaluationError

_MIN_ERROR = 1e-10
"""Floor of the mean squared error: identical images have 100 dB."""
_SIGMA, _RADIUS = 1.5, 5
"""The Gaussian window of SSIM, in pixels."""


def psnr(reference: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Returns the peak signal-to-noise ratio of each image in dB [N], float64.

    Args:
      reference: uint8 [N, H, W, C].
      images: Reconstructions, in the same format.

    Raises:
      EvaluationError: If they are not uint8, or of different shapes.
    """
    reference, images = _unit_range(reference, images)
    error = np.square(reference - images).mean(axis=(1, 2, 3))
    return -10 * np.log10(np.maximum(error, _MIN_ERROR))


def ssim(reference: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Returns the structural similarity of each image [N], float64.

    Gaussian windows of 11 taps; images are reflected beyond their edges, and the map is averaged
    over all pixels and channels. Variants that leave a border of 5 pixels out give other values on
    small images.

    Args:
      reference: uint8 [N, H, W, C].
      images: Reconstructions, in the same format.

    Raises:
      EvaluationError: If they are not uint8, of different shapes, or smaller than the window.
    """
    reference, images = _unit_range(reference, images)
    if min(reference.shape[1:3]) <= _RADIUS:
        raise EvaluationError(
            f"images of {reference.shape[1]} x {reference.shape[2]} pixels",
            f"SSIM needs more than {_RADIUS} a side",
        )
    from skimage.metrics import structural_similarity

    # scikit-image repeats the outermost pixel beyond an edge and leaves the border out of the mean.
    # With as wide a border reflected before, its mean is over all pixels of the image.
    sides = ((0, 0), (_RADIUS, _RADIUS), (_RADIUS, _RADIUS), (0, 0))
    pairs = zip(*(np.pad(x, sides, mode="reflect") for x in (reference, images)), strict=True)
    scores = [
        structural_similarity(
            a,
            b,
            data_range=1.0,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=_SIGMA,
            use_sample_covariance=False,
        )
        for a, b in pairs
    ]
    return np.array(scores, np.float64)


def _unit_range(reference: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    for name, x in (("reference images", reference), ("reconstructions", images)):
        if x.dtype != np.uint8 or x.ndim != 4:
            raise EvaluationError(f"{name} are {x.dtype}{x.shape}", "give uint8 [N, H, W, C]")
    if reference.shape != images.shape:
        raise EvaluationError(
            f"reference images are {reference.shape}, reconstructions {images.shape}",
            "reconstruct the same images, in their order and size",
        )
    return reference / 255.0, images / 255.0
