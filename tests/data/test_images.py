"""Images are brought to a size as by ADM, torchvision and transformers."""

import numpy as np
import pytest
from PIL import Image

from dsr_jax.core.errors import DataError, UnreadableRecord
from dsr_jax.data.images import FITS, center_crop, decode_image, fit_name
from tests.core.test_images import colors, encode


@pytest.mark.parametrize(
    "width,height,size", [(50, 37, 8), (37, 90, 16), (40, 32, 16), (20, 13, 16), (16, 16, 16)]
)
def test_crop_is_adms(width: int, height: int, size: int) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels)
    # Transcribed from ADM's image_datasets.py: an oracle, kept in its own words.
    expected = image
    while min(*expected.size) >= 2 * size:
        expected = expected.resize(tuple(x // 2 for x in expected.size), resample=Image.BOX)
    scale = size / min(*expected.size)
    expected = expected.resize(
        tuple(round(x * scale) for x in expected.size), resample=Image.BICUBIC
    )
    array = np.array(expected)
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    np.testing.assert_array_equal(center_crop(image, size), array[y : y + size, x : x + size])


def test_shorter_side_is_torchvisions() -> None:
    image = Image.fromarray(colors(40)).crop((0, 0, 40, 27))
    transforms = pytest.importorskip("torchvision.transforms.functional")
    expected = transforms.resize(image, 16, transforms.InterpolationMode.BICUBIC)
    np.testing.assert_array_equal(FITS["resize_shorter_side"](image, 16), expected)


def test_a_strip_that_would_grow_beyond_memory_is_refused() -> None:
    content = encode(Image.new("L", (2**16, 1)))
    for fit in ("center_crop", "resize_shorter_side"):
        with pytest.raises(UnreadableRecord, match="strip.png .*16777216 x 256 pixels"):
            decode_image(content, "strip.png", 256, 3, fit=fit)
    assert decode_image(content, "strip.png", 16, 3, fit="squash").shape == (16, 16, 3)


def test_older_names_of_fits_are_read() -> None:
    assert fit_name("crop") == "center_crop" and fit_name("short_side") == "resize_shorter_side"
    with pytest.raises(DataError, match="'stretch'.*\n.*center_crop, squash"):
        fit_name("stretch")
