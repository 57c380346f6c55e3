"""Sample files: read in pieces, and refused with a reason where they cannot be scored."""

import zipfile

import numpy as np
import pytest

from dsr_jax.core.errors import DamagedFileError, EvaluationError
from dsr_jax.core.files import write_json
from dsr_jax.evaluation.samples import check_levels, open_samples

IMAGES = np.random.RandomState(0).randint(0, 256, (11, 4, 5, 3)).astype(np.uint8)
LABELS = np.arange(11)


def test_images_labels_and_recipe_come_back(tmp_path):
    path = tmp_path / "samples.npz"
    np.savez(path, IMAGES, labels=LABELS)
    samples = open_samples(path)
    assert samples.shape == IMAGES.shape and samples.recipe() is None
    assert samples.digest().startswith("sha256:")
    np.testing.assert_array_equal(samples.images(), IMAGES)
    np.testing.assert_array_equal(samples.require_labels("a test"), LABELS)
    sizes = [len(batch) for batch in samples.batches(4)]
    assert sizes == [4, 4, 3]
    np.testing.assert_array_equal(np.concatenate(list(samples.batches(4))), IMAGES)
    write_json(path.with_suffix(".json"), {"recipe": {"seed": 3}})
    assert samples.recipe() == {"recipe": {"seed": 3}}


@pytest.mark.parametrize("content", [[1], "x", {"recipe": "a cake"}])
def test_json_of_other_programs_is_no_record(tmp_path, content):
    np.savez(tmp_path / "samples.npz", IMAGES)
    write_json(tmp_path / "samples.json", content)
    assert open_samples(tmp_path / "samples.npz").describe()["record"] is None
    (tmp_path / "samples.json").write_text("{")
    with pytest.raises(DamagedFileError, match=r"(?s)samples.json is damaged.*move it elsewhere"):
        open_samples(tmp_path / "samples.npz").describe()


def test_members_that_are_no_arrays_do_not_count(tmp_path):
    with zipfile.ZipFile(tmp_path / "samples.npz", "w") as archive:
        archive.writestr("arr_0", b"not an array")
    with pytest.raises(EvaluationError, match=r"no key 'arr_0', its keys are \[\]"):
        open_samples(tmp_path / "samples.npz")


def test_compressed_files_are_read_too(tmp_path):
    np.savez_compressed(tmp_path / "samples.npz", IMAGES)
    np.testing.assert_array_equal(open_samples(tmp_path / "samples.npz").images(), IMAGES)


class Bomb:
    """Pickles to something that would run code when unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("unpickled an object from a sample file",))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": IMAGES}, r"no key 'arr_0', its keys are \['images'\]"),
        ({"arr_0": IMAGES / np.float32(255)}, "arr_0 .* is float32, expected uint8"),
        ({"arr_0": IMAGES.astype(np.int64)}, "arr_0 .* is int64, expected uint8"),
        ({"arr_0": IMAGES[..., :2]}, r"shape \(11, 4, 5, 2\)"),
        ({"arr_0": IMAGES[0]}, r"shape \(4, 5, 3\)"),
        ({"arr_0": IMAGES[:0]}, "with N > 0"),
        ({"arr_0": np.asfortranarray(IMAGES)}, "Fortran order"),
        ({"arr_0": np.array([Bomb()], object)}, "arr_0 .* holds Python objects"),
        ({"arr_0": IMAGES, "labels": np.array([Bomb()] * 11)}, "labels .* holds Python objects"),
        ({"arr_0": IMAGES, "labels": LABELS[:9]}, r"labels .* int64\(9,\), expected integer"),
        ({"arr_0": IMAGES, "arr_1": LABELS[:9]}, r"arr_1 .* int64\(9,\), expected integer"),
        ({"arr_0": IMAGES, "labels": LABELS - 1}, r"labels .* holds the label -1 \(image 0\)"),
        ({"arr_0": IMAGES, "labels": LABELS / 2}, "labels .* float64"),
        ({"arr_0": IMAGES, "labels": LABELS + 2**40}, "label 1099511627786, .* beyond 32 bits"),
    ],
)
def test_files_that_cannot_be_scored_are_refused(tmp_path, arrays, message):
    path = tmp_path / "samples.npz"
    np.savez(path, **arrays)
    with pytest.raises(EvaluationError, match=message) as caught:
        open_samples(path)
    assert str(path) in str(caught.value) and caught.value.remedy


@pytest.mark.parametrize("keep", [0, 40, 0.5, -3])
def test_truncated_files_are_named(tmp_path, keep):
    path = tmp_path / "samples.npz"
    np.savez(path, IMAGES, labels=LABELS)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(keep * len(raw)) if isinstance(keep, float) else keep])
    with pytest.raises(EvaluationError, match="samples.npz is damaged"):
        open_samples(path)


def test_flipped_bytes_are_noticed(tmp_path):
    path = tmp_path / "samples.npz"
    np.savez(path, IMAGES)
    raw = bytearray(path.read_bytes())
    raw[300] ^= 255
    path.write_bytes(raw)
    with pytest.raises(EvaluationError, match="samples.npz is damaged"):
        open_samples(path).images()


def test_missing_file_and_missing_labels(tmp_path):
    with pytest.raises(EvaluationError, match="not found"):
        open_samples(tmp_path / "none.npz")
    np.savez(tmp_path / "samples.npz", IMAGES)
    with pytest.raises(
        EvaluationError, match="holds no labels, and the classifier needs"
    ) as caught:
        open_samples(tmp_path / "samples.npz").require_labels("the classifier")
    assert "integer array 'labels'" in caught.value.remedy


def test_images_cast_without_scaling_are_named(tmp_path):
    check_levels(IMAGES, tmp_path)
    with pytest.raises(EvaluationError, match="no value above 1"):
        check_levels(IMAGES // 128, tmp_path)


def test_labels_of_the_adm_sampler(tmp_path):
    np.savez(tmp_path / "samples.npz", IMAGES, LABELS)
    found = open_samples(tmp_path / "samples.npz")
    np.testing.assert_array_equal(found.require_labels("a test"), LABELS)


def test_a_single_array_is_named(tmp_path):
    path = tmp_path / "samples.npy"
    np.save(path, IMAGES)
    with pytest.raises(EvaluationError, match=r"(?s)single array \(.npy\).*numpy.savez") as caught:
        open_samples(path)
    # The remedy works.
    exec(f"import numpy; {caught.value.remedy.partition(': ')[2]}")
    np.testing.assert_array_equal(open_samples(tmp_path / "samples.npz").images(), IMAGES)
