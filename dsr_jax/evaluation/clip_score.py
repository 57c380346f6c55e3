"""CLIPScore of given embeddings.

Source: Hessel et al. 2021 and their code; spec evaluation 12.3. Which encoder made the embeddings
decides the values, so it belongs beside them.
"""

import numpy as np

WEIGHT = 2.5


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the cosine similarity of corresponding rows [..., D], in float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return (a * b).sum(axis=-1) / norms


def clip_score(images: np.ndarray, captions: np.ndarray) -> np.ndarray:
    """Returns CLIPScore of images [N, D] and captions [N, D]: 2.5 times the cosine, at least 0."""
    return WEIGHT * np.maximum(cosines(images, captions), 0)


def ref_clip_score(images: np.ndarray, captions: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Returns RefCLIPScore [N]: harmonic mean with the cosine to the caption's nearest reference.

    Args:
      images: Embeddings of the images [N, D].
      captions: [N, D] embeddings of their captions.
      references: [N, R, D] embeddings of each image's reference captions.
    """
    score = clip_score(images, captions)
    nearest = np.maximum(cosines(captions[:, None], references).max(axis=1), 0)
    total = score + nearest
    return np.divide(2 * score * nearest, total, out=np.zeros_like(total), where=total > 0)
