"""References made from a data source and completed from a file."""

import numpy as np
import pytest

from dsr_jax.core.errors import EvaluationError
from dsr_jax.core.files import file_digest
from dsr_jax.evaluation.frechet import FID, SFID, FDDINOv2, gaussian_moments
from dsr_jax.evaluation.reference import open_reference
from tests.tiny_inception import StandIn
from tools import make_reference

IMAGES = np.random.RandomState(0).randint(0, 256, (40, 6, 6, 3)).astype(np.uint8)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs the tool with a stand-in for the network."""
    monkeypatch.setattr(make_reference, "make_extractor", lambda *_: StandIn())

    def run(source, name, *more):
        out = tmp_path / name
        make_reference.main([str(source), "--inception", "x", "--out", str(out), *more])
        return out

    return run


def test_a_data_source_becomes_a_reference(command):
    size = ("--image-size", "8", "--channels", "1")
    out = command("digits", "digits.npz", *size, "--keep", "20")
    found = open_reference(out)
    assert found.statistics["mu", "sigma"].count == found.recipe["images"] > 1000
    assert found.images.shape == (20, 8, 8, 1) and found.features.shape == (20, 12)
    assert found.recipe["weights"] == "sha256:w" and "8" in found.recipe["preprocessing"]
    assert set(found.statistics) == {kind.keys for kind in (FID, SFID, FDDINOv2)} and found.recipe[
        "size"
    ] == [8, 8]
    again = command("digits", "again.npz", *size, "--keep", "20")
    assert file_digest(again) == file_digest(out)
    bare = open_reference(command("digits", "bare.npz", *size, "--keep", "0"))
    assert bare.images is None and bare.features is None and bare.statistics
    assert not list(out.parent.glob("*.parts"))


def test_given_moments_are_kept_and_features_added(command, tmp_path):
    np.savez(tmp_path / "virtual.npz", arr_0=IMAGES, mu=np.ones(12), sigma=np.eye(12))
    found = open_reference(command(tmp_path / "virtual.npz", "ready.npz"))
    np.testing.assert_array_equal(found.statistics["mu", "sigma"].mean, np.ones(12))
    # Those of spatial features would be of other images than the given ones.
    assert set(found.statistics) == {FID.keys}
    want = np.asarray(StandIn()(IMAGES, frozenset(["pool"]))["pool"])
    np.testing.assert_array_equal(found.features, want)
    assert found.recipe["digest"] == file_digest(tmp_path / "virtual.npz")


def test_images_alone_gain_moments(command, tmp_path):
    np.savez(tmp_path / "images.npz", IMAGES)
    found = open_reference(command(tmp_path / "images.npz", "ready.npz"))
    want = gaussian_moments(found.features)
    np.testing.assert_array_equal(found.statistics["mu", "sigma"].cov, want.cov)
    assert set(found.statistics) == {kind.keys for kind in (FID, SFID, FDDINOv2)}


def test_what_cannot_be_made(command, tmp_path):
    np.savez(tmp_path / "moments.npz", mu=np.ones(12), sigma=np.eye(12))
    with pytest.raises(EvaluationError, match="no images"):
        command(tmp_path / "moments.npz", "ready.npz")
    with pytest.raises(EvaluationError, match="moments.npz exists"):
        command("digits", "moments.npz")
    other = np.asarray('{"weights": "sha256:other"}')
    np.savez(tmp_path / "other.npz", arr_0=IMAGES, mu=np.ones(12), sigma=np.eye(12), recipe=other)
    with pytest.raises(EvaluationError, match="other weights"):
        command(tmp_path / "other.npz", "ready.npz")
