"""Classifier accuracy: the fraction of samples that are classified as their label.

It replaces Inception for 8x8 digits: the classifier is trained on real ones. The
Frechet distance between its features of samples and of real images comes with it.
"""

from typing import Any

import numpy as np

from dsr_jax.core.errors import EvaluationError
from dsr_jax.evaluation.frechet import frechet_distance, gaussian_moments

LabeledImages = tuple[np.ndarray, np.ndarray]
"""Images [N, H, W, C], uint8, and their classes [N]."""


class PixelClassifier:
    """A support vector machine with a Gaussian kernel on pixel values.

    Features are the one-against-one decision values, K (K - 1) / 2 margins that vary smoothly with
    the image; scikit-learn's one-against-rest values are vote counts, which jump. Training is
    deterministic.

    Args:
      images: Real training images [N, H, W, C], uint8.
      labels: [N] classes of the images.

    Raises:
      EvaluationError: If there are fewer than two classes, or counts differ.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        from sklearn.svm import SVC

        _check_counts(images, labels)
        if len(np.unique(labels)) < 2:
            raise EvaluationError("a classifier needs training images of at least two classes")
        self.image_shape = images.shape[1:]
        # scikit-learn's example takes 0.001 for 64 pixels from 0 to 16. Ours go from 0 to 1, and
        # squared distances grow with the number of pixels.
        gamma = 0.001 * 16**2 * 64 / int(np.prod(self.image_shape))
        self.settings = {"model": "svc_rbf", "C": 10.0, "gamma": gamma}
        self._svm = SVC(C=10.0, gamma=gamma, decision_function_shape="ovo")
        self._svm.fit(self._pixels(images), labels)

    def _pixels(self, images: np.ndarray) -> np.ndarray:
        """Flattens images to float64 rows in [0, 1]."""
        if images.dtype != np.uint8 or images.shape[1:] != self.image_shape:
            raise EvaluationError(
                f"images are {images.dtype}{images.shape}, the classifier was trained on "
                f"uint8[N, {', '.join(map(str, self.image_shape))}]",
                "score samples of the data set that the classifier was trained on",
            )
        return images.reshape(len(images), -1) / 255.0

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Returns the class predicted for each image [N]."""
        return self._svm.predict(self._pixels(images))

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Returns the fraction of images classified as their label, 0 to 1."""
        _check_counts(images, labels)
        return float(np.mean(self.predict(images) == labels))

    def features(self, images: np.ndarray) -> np.ndarray:
        """Returns margins [N, K (K - 1) / 2], float64."""
        margins = self._svm.decision_function(self._pixels(images))
        return margins.reshape(len(images), -1)


def _check_counts(images: np.ndarray, labels: np.ndarray) -> None:
    if len(images) != len(labels):
        raise EvaluationError(f"{len(images)} images, but {len(labels)} labels")


def classifier_scores(
    images: np.ndarray, labels: np.ndarray, train: LabeledImages, heldout: LabeledImages
) -> dict[str, Any]:
    """Scores samples with a classifier trained on `train`.

    Args:
      images: Samples [N, H, W, C], uint8.
      labels: The classes that were sampled [N].
      train: Real images to train the classifier, also the reference of the Frechet distances.
      heldout: Other real images. Their scores are what perfect samples would get.

    Returns:
      classifier_accuracy, classifier_accuracy_real (0 to 1), frechet_distance,
      frechet_distance_real (both against `train`), num_samples, num_real and the classifier's
      settings. A Frechet distance of few images is biased upwards: compare only values of about
      equal counts.

    Raises:
      EvaluationError: If shapes, types, counts or classes do not fit.
    """
    unknown = np.setdiff1d(labels, train[1])
    if len(unknown):
        raise EvaluationError(
            f"samples are labeled {unknown.tolist()}, as no image of the data set is",
            "score samples of the data set that the classifier was trained on",
        )
    classifier = PixelClassifier(*train)
    reference = gaussian_moments(classifier.features(train[0]))

    def distance(some: np.ndarray) -> float:
        moments = gaussian_moments(classifier.features(some))
        return frechet_distance(moments.mean, moments.cov, reference.mean, reference.cov)

    return {
        "classifier_accuracy": classifier.accuracy(images, labels),
        "classifier_accuracy_real": classifier.accuracy(*heldout),
        "frechet_distance": distance(images),
        "frechet_distance_real": distance(heldout[0]),
        "num_samples": len(images),
        "num_real": len(heldout[0]),
        "classifier": classifier.settings,
    }
