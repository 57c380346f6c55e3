"""Scores against every kind of reference, their recipe, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from dsr_jax.core.errors import EvaluationError
from dsr_jax.evaluation.frechet import frechet_distance, gaussian_moments
from dsr_jax.evaluation.image_sets import open_images
from dsr_jax.evaluation.inception_score import IS, SPLIT_SIZE
from dsr_jax.evaluation.reference import open_reference
from dsr_jax.evaluation.scoring import Scorer, label_balance, rounding_of
from tests.tiny_inception import StandIn

RANDOM = np.random.RandomState(0)
IMAGES = RANDOM.randint(0, 256, (64, 6, 6, 3)).astype(np.uint8)
REAL = RANDOM.randint(30, 256, (48, 6, 6, 3)).astype(np.uint8)


def moments_of(images, tail=""):
    name = "pool" if not tail else "spatial"
    found = gaussian_moments(np.asarray(StandIn()(images, frozenset([name]))[name]))
    return {f"mu{tail}": found.mean, f"sigma{tail}": found.cov}


def score(tmp_path, metrics=None, samples=IMAGES, **arrays):
    np.savez(tmp_path / "samples.npz", samples, labels=np.arange(len(samples)) % 4)
    np.savez(tmp_path / "ref.npz", **arrays)
    scorer = Scorer(StandIn(), open_reference(tmp_path / "ref.npz"))
    images = open_images(tmp_path / "samples.npz")
    return scorer.score(images, metrics, folder=tmp_path / "parts")


def test_images_and_their_moments_give_the_same_scores(tmp_path):
    from_images = score(tmp_path, arr_0=REAL)
    given = moments_of(REAL) | moments_of(REAL, "_s")
    from_moments = score(tmp_path, arr_0=REAL, **given)
    assert set(from_images.scores) == {"fid", "sfid", "inception_score", "precision", "recall"}
    for name, value in from_images.scores.items():
        assert from_moments.scores[name] == pytest.approx(value, rel=1e-9)
    x, y = (
        gaussian_moments(np.asarray(StandIn()(i, frozenset(["pool"]))["pool"]))
        for i in (IMAGES, REAL)
    )
    want = frechet_distance(x.mean, x.cov, y.mean, y.cov)
    assert from_images.scores["fid"] == pytest.approx(want, rel=1e-6)
    assert not (tmp_path / "parts").exists()


def test_moments_of_the_file_come_before_those_of_its_images(tmp_path):
    virtual = moments_of(IMAGES) | moments_of(IMAGES, "_s")
    found = score(tmp_path, arr_0=REAL, **virtual)
    assert abs(found.scores["fid"]) < 1e-6 and found.scores["precision"] < 1
    assert found.recipe["precision_recall"]["reference_images"] == 48


def test_what_a_reference_lacks_is_left_out_or_refused(tmp_path):
    found = score(tmp_path, **moments_of(REAL))
    assert set(found.scores) == {"fid", "inception_score"}
    assert "mu_s and sigma_s" in found.skipped["sfid"] and "no images" in found.skipped["pr"]
    with pytest.raises(EvaluationError, match="pr needs more.*no images"):
        score(tmp_path, ["fid", "pr"], **moments_of(REAL))


def test_ready_features_stand_in_for_images(tmp_path):
    features = np.asarray(StandIn()(REAL, frozenset(["pool"]))["pool"])
    found = score(tmp_path, ["pr", "kid"], features=features, **moments_of(REAL))
    want = score(tmp_path, ["pr", "kid"], arr_0=REAL)
    assert found.scores == pytest.approx(want.scores)
    assert found.recipe["kid"]["subset_size"] == 48


def test_the_recipe_holds_what_decides_the_scores(tmp_path):
    recipe = score(tmp_path, ["fid"], arr_0=REAL).recipe
    assert recipe["weights"] == "sha256:w" and recipe["resize"] == "adm"
    assert recipe["reference"].startswith("sha256:")
    assert recipe["num_samples"] == 64 and recipe["image_shape"] == [6, 6, 3]
    assert recipe["labels"] == {"classes": 4, "least": 16, "most": 16}
    assert recipe["rounding"] == "unknown"
    assert rounding_of({"recipe": {"sampler": {"uint8": "truncate"}}}) == "truncate"
    assert label_balance(None) is None


def test_warnings(tmp_path):
    few = score(tmp_path, ["fid"], samples=IMAGES[:12], arr_0=REAL)
    assert "12 samples for 12 features" in few.warnings[0]
    more = score(tmp_path, ["fid"], arr_0=REAL)
    assert "papers use 50,000" in more.warnings[0]

    class Sorted:
        shape = (SPLIT_SIZE * 2, 1, 1, 3)
        labels = np.repeat([0, 1], SPLIT_SIZE)

    assert "sorted by class" in IS().warnings(Sorted)[0]
    Sorted.labels = Sorted.labels[::-1].copy()
    assert not IS().warnings(Sorted)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"images": REAL}, r"no statistics and no images, its keys are \['images'\]"),
        ({"mu": np.zeros(12)}, "no sigma"),
        ({"mu": np.zeros(12), "sigma": np.eye(11)}, r"shapes \(12,\) and \(11, 11\)"),
        ({"mu": np.zeros(12), "sigma": np.eye(12) * np.nan}, "sigma of .* is not finite"),
        ({"mu": np.zeros(12, int), "sigma": np.eye(12)}, "mu of .* is int64"),
        ({"mu": np.array([print], object), "sigma": np.eye(12)}, "Python objects"),
        ({"mu": np.zeros(9), "sigma": np.eye(9)}, "width 12, reference features 9"),
        ({"arr_0": REAL[:, :5]}, r"samples have \(6, 6\) pixels, images .* \(5, 6\)"),
        ({"arr_0": REAL / 255.0}, "float64, expected uint8 .* begin at 0.118 and end at 1"),
    ],
)
def test_references_that_do_not_fit(tmp_path, arrays, reason):
    with pytest.raises(EvaluationError, match=reason):
        score(tmp_path, ["fid"], **arrays)


def test_references_of_other_weights_are_refused(tmp_path):
    made = moments_of(REAL) | {"recipe": np.asarray('{"weights": "sha256:other"}')}
    with pytest.raises(EvaluationError, match="made with weights sha256:other, not sha256:w"):
        score(tmp_path, ["fid"], **made)


def test_samples_that_are_the_reference_are_pointed_out(tmp_path):
    assert not any("same images" in warning for warning in score(tmp_path, arr_0=REAL).warnings)
    np.savez(tmp_path / "copy.npz", REAL)
    scorer = Scorer(StandIn(), open_reference(tmp_path / "copy.npz"))
    images = open_images(tmp_path / "copy.npz")
    found = scorer.score(images, ["fid"], folder=tmp_path / "parts")
    assert abs(found.scores["fid"]) < 1e-6
    assert any("samples and reference are the same images" in w for w in found.warnings)


def test_pickles_are_never_loaded(tmp_path):
    (tmp_path / "ref.pkl").write_bytes(b"cos\nsystem\n")
    with pytest.raises(EvaluationError, match="pickle"):
        open_reference(tmp_path / "ref.pkl")
    with pytest.raises(EvaluationError, match="not found"):
        open_reference(tmp_path / "none.npz")


def test_dinov2_beside_inception(tmp_path):
    found = score(tmp_path, ["fid", "fd_dinov2"], arr_0=REAL)
    x, y = (
        gaussian_moments(np.asarray(StandIn()(i, frozenset(["class_token"]))["class_token"]))
        for i in (IMAGES, REAL)
    )
    want = frechet_distance(x.mean, x.cov, y.mean, y.cov)
    assert found.scores["fd_dinov2"] == pytest.approx(want, rel=1e-6)
    assert found.recipe["dinov2"] == {"weights": "sha256:d"} and "weights" in found.recipe
    alone = score(tmp_path, ["fd_dinov2"], arr_0=REAL)
    assert alone.scores == {"fd_dinov2": found.scores["fd_dinov2"]}
    assert "weights" not in alone.recipe
    given = score(tmp_path, ["fd_dinov2"], mu_dinov2=y.mean, sigma_dinov2=y.cov)
    assert given.scores["fd_dinov2"] == pytest.approx(want, rel=1e-6)


def test_networks_that_are_not_there_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(StandIn, "widths", {"class_token": 7})
    with pytest.raises(EvaluationError, match="(?s)no network for fid.*--inception"):
        score(tmp_path, ["fid", "fd_dinov2"], arr_0=REAL)
    monkeypatch.setattr(StandIn, "widths", {"pool": 12, "spatial": 9, "logits": 5})
    with pytest.raises(EvaluationError, match="(?s)no network for fid, fd_dinov2.*--dinov2"):
        score(tmp_path, ["fid", "fd_dinov2"], arr_0=REAL)


def test_weights_that_are_not_the_published_ones_are_pointed_out(tmp_path, monkeypatch):
    record = {"family": "inception", "source": "mine.pth", "params_digest": "sha256:0123456789"}
    monkeypatch.setattr(StandIn, "records", [record])
    (found,) = (w for w in score(tmp_path, ["fid"], arr_0=REAL).warnings if "weights" in w)
    assert "mine.pth" in found and "not verified as the published ones" in found
    monkeypatch.setattr(StandIn, "records", [{**record, "published": True}])
    assert not any("weights" in w for w in score(tmp_path, ["fid"], arr_0=REAL).warnings)


def test_lossy_files_are_warned_of(tmp_path):
    (tmp_path / "jpeg").mkdir()
    for number, image in enumerate(IMAGES[:20]):
        Image.fromarray(image).save(tmp_path / "jpeg" / f"{number:02d}.jpg")
    np.savez(tmp_path / "ref.npz", REAL)
    scorer = Scorer(StandIn(), open_reference(tmp_path / "ref.npz"))
    images = open_images(tmp_path / "jpeg")
    found = scorer.score(images, ["fid"], folder=tmp_path / "parts")
    assert any("lossy compression" in warning for warning in found.warnings)
