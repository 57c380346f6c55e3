"""Files that commands and TFDS write, for the readers that are fuzzed."""

import io
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dsr_jax.core.files import write_json
from dsr_jax.data.base import SourceOptions
from dsr_jax.data.records import Tfds, write_records
from dsr_jax.evaluation.prompt_images import GenevalLayout, Prompt, write_images
from dsr_jax.reports.outlier_records import to_record
from dsr_jax.reports.run_page import make_run_page
from dsr_jax.runs import encoder_pass
from dsr_jax.sampling.job import SampleJob, Samples
from dsr_jax.spaces.statistics import LatentStatistics

SHAPE = (2, 3, 1)


def sample_job(folder: Path) -> SampleJob:
    return SampleJob(folder, "samples", np.zeros(6, np.int32), SHAPE, {"seed": 0})


def sampled(indices: np.ndarray, labels: np.ndarray) -> Samples:
    return Samples(*map(_device, (np.ones((len(indices), *SHAPE), np.uint8), labels == 0, indices)))


def _device(array: np.ndarray) -> Any:
    import jax

    return jax.numpy.asarray(array)


def run_job(folder: Path) -> None:
    sample_job(folder).run(sampled, 3, lambda line: None)


def start_job(folder: Path) -> None:
    job = sample_job(folder)
    job._start(3, lambda line: None)


def make_parts(folder: Path) -> None:
    job = sample_job(folder)
    start_job(folder)
    job._write(sampled(np.arange(6, dtype=np.uint32), job.labels), np.arange(6), 6)


def read_parts(folder: Path) -> None:
    job = sample_job(folder)
    for part in job._part_files():
        job._load_part(part)


PART = f"samples.parts/00000000-00000006-{zlib.crc32(np.ones((6, *SHAPE), np.uint8)):08x}.npy"


def write_shown_run(folder: Path, outliers: bool) -> None:
    """Writes a run for its page."""
    found = [{"outlier_share": np.zeros(2)}] if outliers else []
    record = {"step": 4, "loss": 1.5, "fid": 2.5, **to_record((0.5,) * len(found), found)}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    write_json(
        folder / "config.json", {"train": {"steps": 4}, "model": {"name": "dit", "depth": 2}}
    )
    write_json(folder / "provenance.json", [{"time": "2026", "packages": {"jax": "1"}}])
    write_json(folder / "summary.json", {"steps": 4, "seconds": 1.5})
    (folder / "scores").mkdir()
    write_json(folder / "scores" / "a.scores.json", {"scores": {"fid": 1.5}})


def show_run(folder: Path) -> None:
    make_run_page([folder]).encode()


def save_sums(folder: Path) -> None:
    statistics = LatentStatistics(SHAPE)
    statistics.update(np.ones((2, *SHAPE), np.float32))
    encoder_pass._save(folder, {"space": {"x": 1}}, statistics, 2)


def read_sums(folder: Path) -> None:
    saved = encoder_pass._read_progress(folder, {"space": {"x": 1}})
    if saved:
        LatentStatistics.from_state(saved, SHAPE)


def write_prompt_images(folder: Path) -> None:
    def gray(prompts: Sequence[str], seeds: np.ndarray) -> np.ndarray:
        return np.full((len(prompts), 8, 8, 3), seeds[0] % 251, np.uint8)

    prompts, layout = [Prompt(0, "a", "00000", {"tag": "x"})], GenevalLayout(1)
    write_images(folder / "out", prompts, layout, gray, batch=1, recipe={"model": 1})


TFDS = "mini/1.0.0"
"""Folder of a prepared data set called "mini"."""


def write_tfds(folder: Path) -> None:
    """Writes a data set as TFDS prepares it, without TensorFlow."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.proto import tf_example_pb2

    root = folder / TFDS
    root.mkdir(parents=True)
    image = tfds.features.Image(shape=(8, 8, 1), dtype=np.uint8)
    label = tfds.features.ClassLabel(names=["a", "b"])
    tfds.features.FeaturesDict({"image": image, "label": label}).save_metadata(str(root))
    tfds.features.FeaturesDict({"image": image, "label": label}).save_config(str(root))
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    split = {"name": "train", "shardLengths": ["2"], "numBytes": "9", "filepathTemplate": template}
    names = {"name": "mini", "version": "1.0.0", "fileFormat": "array_record", "moduleName": "x"}
    write_json(root / "dataset_info.json", {**names, "splits": [split]})
    examples = []
    for number in range(2):
        file = io.BytesIO()
        Image.fromarray(np.full((8, 8), 99 * number, np.uint8)).save(file, "PNG")
        example = tf_example_pb2.Example()
        example.features.feature["image"].bytes_list.value.append(file.getvalue())
        example.features.feature["label"].int64_list.value.append(number)
        examples.append(example.SerializeToString())
    write_records(root / "mini-train.array_record-00000-of-00001", examples)


def read_tfds(folder: Path) -> None:
    options = SourceOptions(
        image_size=8, channels=1, root=str(folder), split="train", dataset="mini"
    )
    source = Tfds(options)
    for index in range(len(source)):
        source[index]
