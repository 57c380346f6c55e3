"""The classifier on easy made-up classes and on scikit-learn's real digits."""

import numpy as np
import pytest

from dsr_jax.core.errors import EvaluationError
from dsr_jax.evaluation.classifier import PixelClassifier, classifier_scores

pytest.importorskip("sklearn")


def stripes(num, seed):
    """Noisy 4x4 images; class k has row k bright."""
    rng = np.random.RandomState(seed)
    labels = np.arange(num) % 3
    images = rng.randint(0, 80, (num, 4, 4, 1))
    images[np.arange(num), labels] += 150
    return images.astype(np.uint8), labels


def test_it_separates_easy_classes_and_chance_stays_chance():
    train, heldout = stripes(120, 0), stripes(60, 1)
    scores = classifier_scores(*stripes(90, 2), train, heldout)
    assert scores["classifier_accuracy"] == scores["classifier_accuracy_real"] == 1.0
    assert scores["num_samples"] == 90 and scores["num_real"] == 60
    images, labels = stripes(90, 2)
    wrong = classifier_scores(images, np.roll(labels, 1), train, heldout)
    assert wrong["classifier_accuracy"] == 0.0
    assert wrong["frechet_distance"] == pytest.approx(scores["frechet_distance"])


def test_distance_is_small_for_real_images_and_grows_with_noise_and_lost_classes():
    train, heldout = stripes(300, 0), stripes(150, 1)
    images, labels = stripes(150, 2)
    noise = np.random.RandomState(3).randint(0, 120, images.shape)
    noisy = np.clip(images.astype(int) + noise, 0, 255).astype(np.uint8)
    scores = [
        classifier_scores(some, labels, train, heldout)["frechet_distance"]
        for some in (images, noisy, np.repeat(images[:1], 150, axis=0))
    ]
    real = classifier_scores(images, labels, train, heldout)["frechet_distance_real"]
    assert max(scores[0], real) < 0.1 * scores[1] and scores[1] < scores[2]


def test_features_are_the_pairwise_margins():
    classifier = PixelClassifier(*stripes(60, 0))
    assert classifier.features(stripes(7, 1)[0]).shape == (7, 3)
    two = stripes(60, 0)
    keep = two[1] < 2
    assert PixelClassifier(two[0][keep], two[1][keep]).features(two[0][:5]).shape == (5, 1)


def test_it_refuses_images_of_another_kind():
    images, labels = stripes(30, 0)
    classifier = PixelClassifier(images, labels)
    with pytest.raises(EvaluationError, match="float32"):
        classifier.predict(images.astype(np.float32))
    with pytest.raises(EvaluationError, match=r"\(30, 4, 2, 1\).*uint8\[N, 4, 4, 1\]"):
        classifier.features(images[:, :, :2])
    with pytest.raises(EvaluationError, match="30 images, but 29 labels"):
        classifier.accuracy(images, labels[:-1])
    with pytest.raises(EvaluationError, match=r"labeled \[3\]"):
        classifier_scores(images, labels + 1, (images, labels), (images, labels))
    with pytest.raises(EvaluationError, match="at least two classes"):
        PixelClassifier(images, np.zeros(30, int))


def test_it_reads_real_digits():
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    order = np.random.RandomState(0).permutation(len(images))
    train, heldout = order[:1437], order[1437:]
    scores = classifier_scores(
        images[heldout],
        digits.target[heldout],
        (images[train], digits.target[train]),
        (images[heldout], digits.target[heldout]),
    )
    assert scores["classifier_accuracy"] > 0.985
    assert scores["frechet_distance"] == scores["frechet_distance_real"]
