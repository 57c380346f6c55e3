"""Embeddings of images and captions by a converted CLIP, prepared as its authors do.

Source: Hessel et al. 2021 (clipscore.py); spec evaluation 12.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from dsr_jax.core.typing import Params
from dsr_jax.models.clip import Clip

if TYPE_CHECKING:
    import tokenizers
    from PIL import Image

PREFIX = "A photo depicts "
"""What CLIPScore puts before a caption."""
MEAN = np.array((0.48145466, 0.4578275, 0.40821073), np.float32)
STD = np.array((0.26862954, 0.26130258, 0.27577711), np.float32)


def prepare_image(image: Image.Image, size: int) -> np.ndarray:
    """Resizes the shorter side, crops the center and normalizes; float32 [size, size, 3]."""
    from PIL import Image

    shorter = min(image.size)
    width, height = (int(size * side / shorter) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255
    return (pixels - MEAN) / STD


def prepare_texts(
    texts: Sequence[str], tokenizer: tokenizers.Tokenizer, network: Clip
) -> np.ndarray:
    """Returns the tokens of texts, int32 [N, text_length]; long ones are cut, the end is kept."""
    tokens = np.full((len(texts), network.text_length), network.end_id, np.int32)
    for row, text in zip(tokens, texts, strict=True):
        ids = tokenizer.encode(text).ids[: network.text_length]
        row[: len(ids)] = ids
        row[-1] = network.end_id
    return tokens


def embed(
    network: Clip,
    params: Params,
    tokenizer: tokenizers.Tokenizer,
    images: Sequence[Image.Image],
    captions: Sequence[str],
    batch: int = 32,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns embeddings of images and of their captions, with the prefix, float32 [N, width] each.

    Args:
      network: The network.
      params: Its parameters.
      tokenizer: Its tokenizer, which adds start and end.
      images: RGB images.
      captions: One caption for each image.
      batch: Pairs at a time.
    """
    apply = jax.jit(lambda params, x, tokens: network.apply({"params": params}, x, tokens))
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for first in range(0, len(images), batch):
        part = slice(first, first + batch)
        pixels = np.stack([prepare_image(image, network.image_size) for image in images[part]])
        tokens = prepare_texts([PREFIX + text for text in captions[part]], tokenizer, network)
        missing = batch - len(pixels)
        padded = (np.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1))) for x in (pixels, tokens))
        outputs = apply(params, *padded)
        found.append(tuple(np.asarray(x)[: len(pixels)] for x in outputs))  # type: ignore[arg-type]
    image_rows, text_rows = zip(*found, strict=True)
    return np.concatenate(image_rows), np.concatenate(text_rows)
