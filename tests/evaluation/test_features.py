"""The pass over images: sums, restarts, bad images; the network is a stand-in."""

import numpy as np
import pytest
from PIL import Image

from dsr_jax.core.errors import EvaluationError
from dsr_jax.evaluation.features import extract_statistics, needs_of
from dsr_jax.evaluation.frechet import gaussian_moments
from dsr_jax.evaluation.image_sets import open_images
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


def test_sums_and_rows_of_all_images(samples):
    statistics, want = extract_statistics(samples, StandIn(), ALL), features()
    assert statistics.count == 45
    np.testing.assert_array_equal(statistics.rows, want["pool"])
    for sums, name in ((statistics.moments, "pool"), (statistics.spatial, "spatial")):
        np.testing.assert_array_equal(sums.gaussian().cov, gaussian_moments(want[name]).cov)
    assert statistics.score.count == 45


def test_only_what_the_metrics_need_is_kept(samples):
    assert needs_of(["fid"]) == {"moments"} and needs_of(["pr", "kid"]) == {"rows"}
    statistics = extract_statistics(samples, StandIn(), ["fid"])
    assert (
        statistics.rows.shape == (0, 12) and statistics.spatial is None and statistics.score is None
    )
    statistics = extract_statistics(samples, StandIn(), ["is"])
    assert statistics.outputs == {"logits"} and statistics.moments is None
    with pytest.raises(EvaluationError, match="unknown metrics.*fld"):
        needs_of(["fld"])


def test_files_folders_and_batches_give_equal_moments(samples, tmp_path):
    folder = tmp_path / "png"
    folder.mkdir()
    for number, image in enumerate(IMAGES):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    want = extract_statistics(samples, StandIn(), ALL)
    for images, batch in ((samples, 16), (samples, 45), (open_images(folder), 8)):
        found = extract_statistics(images, StandIn(batch), ALL)
        np.testing.assert_allclose(
            found.moments.gaussian().cov, want.moments.gaussian().cov, rtol=1e-6, atol=1e-7
        )
        np.testing.assert_allclose(found.rows, want.rows, rtol=1e-6, atol=1e-7)
        assert found.score.score() == pytest.approx(want.score.score(), rel=1e-6)


class Killed(Exception):
    """Ends a pass as a signal would."""


@pytest.mark.parametrize("after", [8, 24, 40])
def test_a_stopped_pass_goes_on(samples, tmp_path, after):
    whole = extract_statistics(samples, StandIn(), ALL)

    def stop(done, total):
        if done == after:
            raise Killed

    settings = {"folder": tmp_path / "parts", "identity": {"digest": "a"}, "save_every": 16}
    with pytest.raises(Killed):
        extract_statistics(samples, StandIn(), ALL, report=stop, **settings)
    network = StandIn()
    statistics = extract_statistics(samples, network, ALL, **settings)
    # What was saved is not made again: 16 or 32 images, all but the last in whole batches.
    assert network.images == 48 - after // 16 * 16
    np.testing.assert_array_equal(statistics.rows, whole.rows)
    assert statistics.score.score() == whole.score.score()
    for name in ("moments", "spatial"):
        ours, theirs = (getattr(t, name).gaussian() for t in (statistics, whole))
        np.testing.assert_array_equal(ours.cov, theirs.cov)
    finished = StandIn()
    extract_statistics(samples, finished, ALL, **settings)
    assert finished.images == 0


def test_rows_behind_the_saved_sums_are_made_again(samples, tmp_path):
    folder = tmp_path / "parts"
    settings = {"folder": folder, "save_every": 16}
    extract_statistics(samples, StandIn(), ALL, **settings)
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}

    def stop(done, total):
        if done == 40:
            raise Killed

    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(Killed):
        extract_statistics(samples, StandIn(), ALL, report=stop, **settings)
    # As if killed between writing rows and sums.
    extra = next(name for name in kept if name.startswith("rows-00000032"))
    (folder / extra).write_bytes(kept[extra])
    np.testing.assert_array_equal(
        extract_statistics(samples, StandIn(16), ALL, **settings).rows.shape, (45, 12)
    )


def test_a_pass_of_something_else_is_not_continued(samples, tmp_path):
    settings = {"folder": tmp_path / "parts", "save_every": 8}
    extract_statistics(samples, StandIn(), ["fid"], identity={"weights": "a"}, **settings)
    with pytest.raises(EvaluationError, match="unfinished pass of other weights"):
        extract_statistics(samples, StandIn(), ["fid"], identity={"weights": "b"}, **settings)
    with pytest.raises(EvaluationError, match="other needs"):
        extract_statistics(samples, StandIn(), ["is"], identity={"weights": "a"}, **settings)


def test_images_that_cannot_be_meant(tmp_path):
    images = IMAGES.copy()
    images[19] = 7
    np.savez(tmp_path / "constant.npz", images)
    constant = open_images(tmp_path / "constant.npz")
    with pytest.raises(EvaluationError, match="image 19 is constant: every value is 7"):
        extract_statistics(constant, StandIn(), ["fid"])
    assert extract_statistics(constant, StandIn(), ["fid"], allow_constant=True).count == 45
    np.savez(tmp_path / "dark.npz", IMAGES // 128)
    with pytest.raises(EvaluationError, match="no value above 1"):
        extract_statistics(open_images(tmp_path / "dark.npz"), StandIn(), ["fid"])


def test_broken_weights_are_noticed(samples):
    class Broken(StandIn):
        def __call__(self, images, outputs, first=0):
            found = super().__call__(images, outputs, first)
            return {name: x * np.nan if name == "pool" else x for name, x in found.items()}

    with pytest.raises(EvaluationError, match="features of row 0 are not finite"):
        extract_statistics(samples, Broken(), ["fid"])
