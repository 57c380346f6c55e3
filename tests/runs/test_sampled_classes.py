"""Classes that are sampled by default."""

from dsr_jax.config import base_config
from dsr_jax.data.classes import DataDescription
from dsr_jax.runs.sampled_classes import class_notes, classes_to_sample

DATA: DataDescription = {
    "source": "folder",
    "images": 5,
    "names": ["a", "b", "c"],
    "counts": [3, 0, 2],
    "fingerprint": "sha256:0",
}


def test_classes_without_images_are_left_out_unless_asked() -> None:
    config = base_config()
    assert classes_to_sample(config, DATA) == [0, 2]
    assert classes_to_sample(config, None) == list(range(10))
    config.sample.all_classes = True
    assert classes_to_sample(config, DATA) == list(range(10))


def test_records_name_the_classes_that_were_sampled() -> None:
    assert class_notes(DATA, [2, 0, 2, 7]) == {"class_names": {"0": "a", "2": "c"}}
    assert class_notes(None, [2]) == {} and class_notes({**DATA, "names": []}, [2]) == {}
