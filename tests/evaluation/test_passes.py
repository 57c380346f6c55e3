"""The pass over images: sums, restarts, bad images; the network is a stand-in."""

import numpy as np
import pytest
from PIL import Image

from dsr_jax.core.errors import EvaluationError
from dsr_jax.evaluation.frechet import gaussian_moments
from dsr_jax.evaluation.image_sets import open_images
from dsr_jax.evaluation.inception_score import InceptionScore
from dsr_jax.evaluation.metrics import find_metrics
from dsr_jax.evaluation.passes import forget, update_metrics
from tests.tiny_inception import StandIn

IMAGES = np.random.RandomState(0).randint(0, 256, (45, 6, 6, 3)).astype(np.uint8)
ALL = ["fid", "sfid", "is", "pr"]


@pytest.fixture
def samples(tmp_path):
    np.savez(tmp_path / "samples.npz", IMAGES)
    return open_images(tmp_path / "samples.npz")


def features():
    found = StandIn()(IMAGES, frozenset(StandIn.widths))
    return {name: np.asarray(found[name]) for name in StandIn.widths}


def update(images, network=None, names=ALL, **settings):
    """Returns new metrics by name after a pass."""
    metrics = {kind.name: kind() for kind in find_metrics(names)}
    update_metrics(images, network or StandIn(), list(metrics.values()), **settings)
    return metrics


def test_sums_and_rows_of_all_images(samples):
    metrics, want = update(samples), features()
    np.testing.assert_array_equal(metrics["pr"].features(), want["pool"])
    for name, feature in (("fid", "pool"), ("sfid", "spatial")):
        moments = metrics[name].gaussian()
        assert moments.count == 45
        np.testing.assert_array_equal(moments.cov, gaussian_moments(want[feature]).cov)
    score = InceptionScore(5)
    score.update(want["logits"])
    assert metrics["is"].compute(None) == {"inception_score": score.score()}


def test_only_what_the_metrics_need_is_extracted(samples):
    asked = []

    class Asked(StandIn):
        def __call__(self, images, outputs, first=0):
            asked.append(outputs)
            return super().__call__(images, outputs, first)

    update(samples, Asked(), ["fid"])
    assert set(asked) == {frozenset(["pool"])}
    asked.clear()
    update(samples, Asked(), ["is", "sfid"])
    assert set(asked) == {frozenset(["logits", "spatial"])}


def test_metrics_share_the_rows_that_they_keep(samples):
    metrics = update(samples, names=["pr", "kid"])
    for ours, theirs in zip(metrics["pr"]._batches, metrics["kid"]._batches, strict=True):
        assert ours is theirs


def test_files_folders_and_batches_give_equal_moments(samples, tmp_path):
    folder = tmp_path / "png"
    folder.mkdir()
    for number, image in enumerate(IMAGES):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    want = update(samples)
    for images, batch in ((samples, 16), (samples, 45), (open_images(folder), 8)):
        found = update(images, StandIn(batch))
        ours, theirs = (each["fid"].gaussian().cov for each in (found, want))
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)
        rows = (each["pr"].features() for each in (found, want))
        np.testing.assert_allclose(*rows, rtol=1e-6, atol=1e-7)
        assert found["is"].compute(None) == pytest.approx(want["is"].compute(None), rel=1e-6)


class Killed(Exception):
    """Ends a pass as a signal would."""


def stop_after(count):
    def stop(done, total):
        if done == count:
            raise Killed

    return stop


def assert_equal(ours, theirs):
    """The same bits in every metric."""
    for name in ("fid", "sfid"):
        np.testing.assert_array_equal(ours[name].gaussian().cov, theirs[name].gaussian().cov)
    np.testing.assert_array_equal(ours["pr"].features(), theirs["pr"].features())
    assert ours["is"].compute(None) == theirs["is"].compute(None)


@pytest.mark.parametrize("after", [8, 24, 40])
def test_a_stopped_pass_continues(samples, tmp_path, after):
    whole = update(samples)
    settings = {"folder": tmp_path / "parts", "identity": {"digest": "a"}, "save_every": 16}
    with pytest.raises(Killed):
        update(samples, report=stop_after(after), **settings)
    network = StandIn()
    metrics = update(samples, network, **settings)
    # What was saved is not made again: 16 or 32 images, all but the last in whole batches.
    assert network.images == 48 - after // 16 * 16
    assert_equal(metrics, whole)
    finished = StandIn()
    assert_equal(update(samples, finished, **settings), whole)
    assert finished.images == 0


def test_rows_behind_the_saved_sums_are_made_again(samples, tmp_path):
    folder = tmp_path / "parts"
    settings = {"folder": folder, "save_every": 16}
    whole = update(samples, **settings)
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    forget(folder)
    with pytest.raises(Killed):
        update(samples, report=stop_after(40), **settings)
    # As if killed between writing rows and sums.
    (folder / "pool-00000045.npy").write_bytes(kept["pool-00000045.npy"])
    assert_equal(update(samples, **settings), whole)


@pytest.mark.parametrize("damage", ["flip", "cut", "absent", "progress"])
def test_damaged_parts_are_made_again(samples, tmp_path, damage, capsys):
    folder = tmp_path / "parts"
    settings = {"folder": folder, "save_every": 16}
    whole = update(samples)
    with pytest.raises(Killed):
        update(samples, report=stop_after(40), **settings)
    path = folder / ("progress.npz" if damage == "progress" else "pool-00000016.npy")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "absent":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else data)
    network = StandIn()
    assert_equal(update(samples, network, **settings), whole)
    assert network.images == 48
    assert "is damaged" in capsys.readouterr().err


def test_a_pass_of_something_else_is_not_continued(samples, tmp_path):
    settings = {"folder": tmp_path / "parts", "save_every": 8, "names": ["fid"]}
    update(samples, identity={"weights": "a"}, **settings)
    with pytest.raises(EvaluationError, match="unfinished pass of other weights"):
        update(samples, identity={"weights": "b"}, **settings)
    with pytest.raises(EvaluationError, match="other metrics"):
        update(samples, identity={"weights": "a"}, **{**settings, "names": ["is"]})


def test_implausible_images_are_rejected(tmp_path):
    images = IMAGES.copy()
    images[19] = 7
    np.savez(tmp_path / "constant.npz", images)
    constant = open_images(tmp_path / "constant.npz")
    with pytest.raises(EvaluationError, match="image 19 is constant: every value is 7"):
        update(constant, names=["fid"])
    assert update(constant, names=["fid"], allow_constant=True)["fid"].gaussian().count == 45
    np.savez(tmp_path / "dark.npz", IMAGES // 128)
    with pytest.raises(EvaluationError, match="no value above 1"):
        update(open_images(tmp_path / "dark.npz"), names=["fid"])


def test_broken_weights_are_noticed(samples):
    class Broken(StandIn):
        def __call__(self, images, outputs, first=0):
            found = super().__call__(images, outputs, first)
            return {name: x * np.nan if name == "pool" else x for name, x in found.items()}

    with pytest.raises(EvaluationError, match="features of row 0 are not finite"):
        update(samples, Broken(), ["fid"])
