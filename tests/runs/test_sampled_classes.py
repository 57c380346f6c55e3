"""Classes that are sampled by default."""

from pathlib import Path

import pytest

from dsr_jax.config import base_config
from dsr_jax.core.errors import ConversionError
from dsr_jax.core.files import write_json
from dsr_jax.data.classes import DataDescription
from dsr_jax.runs.sampled_classes import (
    class_notes,
    classes_of_converted,
    classes_to_sample,
    parse_classes,
)

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


def test_an_exported_run_brings_its_class_names(tmp_path: Path) -> None:
    record = {"class_names": ["cat", "dog", "eel"], "params_digest": "sha256:0"}
    write_json(tmp_path / "conversion.json", record)
    data = classes_of_converted(tmp_path)
    assert classes_to_sample(base_config(), data) == [0, 1, 2]
    assert parse_classes("eel,1", data) == [2, 1]
    write_json(tmp_path / "conversion.json", {"family": "sit", "params_digest": "sha256:0"})
    assert classes_of_converted(tmp_path) is None
    write_json(tmp_path / "conversion.json", {"class_names": [1], "params_digest": "sha256:0"})
    with pytest.raises(ConversionError, match="class_names"):
        classes_of_converted(tmp_path)


def test_records_name_the_classes_that_were_sampled() -> None:
    assert class_notes(DATA, [2, 0, 2, 7]) == {"class_names": {"0": "a", "2": "c"}}
    assert class_notes(None, [2]) == {} and class_notes({**DATA, "names": []}, [2]) == {}
