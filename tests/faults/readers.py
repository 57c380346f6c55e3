"""Readers of files, each with a valid file to damage."""

import functools
import importlib.util
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from dsr_jax import config as configs
from dsr_jax.convert.files import load_converted, save_converted
from dsr_jax.convert.hub import _read_sizes as read_hub_sizes
from dsr_jax.convert.readers import read_state
from dsr_jax.convert.statistics import load_statistics, save_statistics
from dsr_jax.core import lock as locks
from dsr_jax.core.arrays import read_array, read_arrays
from dsr_jax.core.files import write_json
from dsr_jax.core.images import decode
from dsr_jax.data.base import SourceOptions
from dsr_jax.data.caption_files import JsonlCaptions
from dsr_jax.data.class_map import read_class_map
from dsr_jax.data.classes import read_class_names
from dsr_jax.data.latents import (
    MANIFEST,
    CachedLatents,
    remove_damaged,
    shard_path,
    write_manifest,
    write_shard,
)
from dsr_jax.data.records import ArrayRecords, write_array_records
from dsr_jax.data.tar_captions import TarCaptions
from dsr_jax.evaluation.comparison import differences, read_scores
from dsr_jax.evaluation.prompt_images import read_geneval_prompts
from dsr_jax.evaluation.prompt_scores import score_dpg_details, score_geneval_results
from dsr_jax.evaluation.reference import open_reference
from dsr_jax.evaluation.samples import open_samples
from dsr_jax.registers.neurons import load_neurons
from dsr_jax.runs.folder import write_run_files
from dsr_jax.sampling.labels import load_labels
from dsr_jax.telemetry.writers import MetricWriter
from dsr_jax.training.save_record import SaveRecord
from tests.faults import outputs
from tools.prepare_imagenet import verify

IMAGES = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)
DIGITS = str(Path(__file__).parents[2] / "configs" / "digits.py")


@dataclass(frozen=True)
class Reader:
    """Reader of one format.

    Attributes:
      file: Name of the file that is damaged.
      make: Writes a valid file, and whatever else the reader needs, into a folder.
      read: Reads it from there.
      kind: "json" for files whose values are changed, too; else "bytes".
    """

    file: str
    make: Callable[[Path], Any]
    read: Callable[[Path], Any]
    kind: str = "bytes"


def _write_latents(folder: Path) -> None:
    data = {"names": ["a"], "counts": [4], "fingerprint": "sha256:0"}
    manifest = {
        "shape": outputs.SHAPE,
        "dtype": "float32",
        "records": 4,
        "shards": 2,
        "num_classes": 1,
    }
    write_manifest(folder, {**manifest, "data": data})
    for shard in range(2):
        rows = [(np.full(outputs.SHAPE, shard, np.float32), 0)] * 2
        write_shard(folder, shard, 2, rows, "float32")


def _read_latents(folder: Path) -> None:
    latents = CachedLatents(folder)
    for index in range(len(latents)):
        latents[index]


def _png(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 8, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _write_records(folder: Path) -> None:
    write_array_records(folder / "train-00000-of-00001.array_record", [(_png(), 0), (_png(1), 1)])
    shard = {"records": 2, "class_counts": [1, 1], "digest": "sha256:0", "skipped": []}
    write_json(
        folder / "train.json",
        {
            "recipe": {"shards": 1},
            "images": 2,
            "class_names": ["a", "b"],
            "shards": {"train-00000-of-00001.array_record": shard},
        },
    )


def _read_records(folder: Path) -> None:
    options = SourceOptions(image_size=8, channels=3, root=str(folder), split="train")
    records = ArrayRecords(options)
    for index in range(len(records)):
        records[index]


def _write_metrics(folder: Path) -> None:
    lines = [json.dumps({"step": step, "loss": 1.5, "mfu": None}) for step in range(1, 4)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def _read_metrics(folder: Path) -> None:
    with MetricWriter(folder, first_step=3) as writer:
        writer.write(3, {"loss": 1.0})


def _write_run(folder: Path) -> None:
    write_run_files(configs.load(DIGITS), folder)


def _write_scores(folder: Path) -> None:
    samples = {"digest": "sha256:0", "record": {"recipe": {"seed": 0, "sampler": {"x": 1}}}}
    content = {"scores": {"fid": 1.5}, "recipe": {"batch": 1, "fid": {"x": 2}}, "samples": samples}
    write_json(folder / "scores.json", {**content, "provenance": {"packages": {"jax": "1"}}})


def _write_statistics(folder: Path) -> None:
    arrays = {"mean": np.zeros((2, 2, 3), np.float32), "var": np.ones((2, 2, 3), np.float32)}
    save_statistics(folder / "statistics.safetensors", arrays)


def _write_reference(folder: Path) -> None:
    arrays = {"mu": np.zeros(4), "sigma": np.eye(4), "num_images": np.int64(9)}
    np.savez(folder / "r.npz", **arrays, recipe=np.str_(json.dumps({"a": 1})))


def _write_snapshot(folder: Path) -> None:
    save_file({"w": np.zeros((2, 3), np.float32)}, folder / "model-1-of-1.safetensors")
    index = {"metadata": {"total_size": 24}, "weight_map": {"w": "model-1-of-1.safetensors"}}
    write_json(folder / "model.safetensors.index.json", index)


def _write_hub(folder: Path) -> None:
    vision = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"image_size": 16, "patch_size": 4, "intermediate_size": 12, "hidden_act": "gelu"}
    write_json(folder / "config.json", {"model_type": "vit_mae", **vision, **sizes})
    write_json(
        folder / "preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    )


def _write_converted(folder: Path) -> None:
    params = {"a": {"kernel": np.ones((2, 2), np.float32)}}
    save_converted(folder, params, {"family": "siglip", "model": {"depth": 1}, "source": "x"})


def _read_names(folder: Path) -> None:
    from dsr_jax.runs.sampled_classes import classes_of_converted

    load_converted(folder)
    classes_of_converted(folder)


def _class_names(folder: Path) -> None:
    names = {"names": ["a", "b"], "counts": [1, 2], "fingerprint": "sha256:0"}
    write_json(folder / "class_names.json", {"source": "x", "images": 3, **names})


def _two_scores(folder: Path) -> None:
    scores = read_scores(folder / "scores.json")
    differences([scores, scores])


def _write_tar(folder: Path) -> None:
    with tarfile.open(folder / "a.tar", "w") as archive:
        for number in range(3):
            for name, content in (("json", b'{"caption": "a"}'), ("png", _png(number))):
                member = tarfile.TarInfo(f"{number}.{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def _write_lines(folder: Path) -> None:
    (folder / "0.png").write_bytes(_png())
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "<image>"}]
    lines = [{"image": "0.png", "caption": "a"}, {"image": ["0.png"], "conversations": turns}]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))


def _captions(kind: Any, folder: Path, name: str = "a.tar") -> None:
    options = SourceOptions(image_size=8, root=str(folder / name), on_corrupt="skip")
    source = kind(options)
    for index in range(len(source)):
        source.caption(index)
        source.image(index)


def _write_geneval(folder: Path) -> None:
    line = {"tag": "colors", "prompt": "a", "include": [{"class": "x", "count": 1, "color": "red"}]}
    (folder / "p.jsonl").write_text(json.dumps(line))
    rows = [
        {"metadata": line, "detections": {"x": [[0, 0, 1, 1, 0.9]]}, "colors": {"x": ["red"]}},
        {"metadata": json.dumps(line), "tag": "colors", "correct": True},
    ]
    (folder / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))


def _write_dpg(folder: Path) -> None:
    columns = "item_id,proposition_id,dependency,tuple,question_natural_language"
    rows = ["one,1,0,entity (x),Dropped?", "two,1,0,entity (x),Is it?", "two,2,1,other (x),Red?"]
    (folder / "dpg.csv").write_text("\n".join([columns, *rows]))
    lines = ["a/two.png, (0, 0, 8, 8), Is it?, yes", "a/two.png, (0, 0, 8, 8), Red?, no"]
    (folder / "a_detail.txt").write_text("\n".join(lines))


READERS = {
    "config": Reader("config.json", _write_run, configs.load_run, "json"),
    "provenance": Reader("provenance.json", _write_run, _write_run, "json"),
    "metrics": Reader("metrics.jsonl", _write_metrics, _read_metrics),
    "saves": Reader(
        "checkpoints.json",
        lambda folder: SaveRecord(folder / "checkpoints").note_saved(4),
        lambda folder: SaveRecord(folder / "checkpoints"),
        "json",
    ),
    "job": Reader("samples.parts/job.json", outputs.start_job, outputs.run_job, "json"),
    "job record": Reader("samples.json", outputs.run_job, outputs.run_job, "json"),
    "part of samples": Reader(outputs.PART, outputs.make_parts, outputs.read_parts),
    **{
        f"page of {name}": Reader(
            name,
            functools.partial(outputs.write_shown_run, outliers=name == "metrics.jsonl"),
            outputs.show_run,
            "json",
        )
        for name in (
            *("config.json", "metrics.jsonl", "provenance.json", "summary.json"),
            "scores/a.scores.json",
        )
    },
    "sums of latents": Reader("progress.npz", outputs.save_sums, outputs.read_sums),
    "recipe of prompts' images": Reader(
        "out.json", outputs.write_prompt_images, outputs.write_prompt_images, "json"
    ),
    "image of a prompt": Reader(
        "out/00000/samples/0000.png", outputs.write_prompt_images, outputs.write_prompt_images
    ),
    "scores": Reader("scores.json", _write_scores, _two_scores, "json"),
    "conversion": Reader("conversion.json", _write_converted, _read_names, "json"),
    "weights": Reader("params.safetensors", _write_converted, load_converted),
    "statistics": Reader("statistics.safetensors", _write_statistics, load_statistics),
    "snapshot index": Reader("model.safetensors.index.json", _write_snapshot, read_state, "json"),
    "snapshot": Reader("model-1-of-1.safetensors", _write_snapshot, read_state),
    "hub config": Reader(
        "config.json", _write_hub, lambda folder: read_hub_sizes(folder, None, False), "json"
    ),
    "hub processor": Reader(
        "preprocessor_config.json",
        _write_hub,
        lambda folder: read_hub_sizes(folder, None, False),
        "json",
    ),
    "latents manifest": Reader(MANIFEST, _write_latents, _read_latents, "json"),
    "latents digests": Reader(
        "digests.json", _write_latents, lambda folder: remove_damaged(folder, [2, 2]), "json"
    ),
    "latents shard": Reader(shard_path("", 1, 2).name, _write_latents, _read_latents),
    "packed images": Reader("train-00000-of-00001.array_record", _write_records, _read_records),
    "packed classes": Reader("train.json", _write_records, _read_records, "json"),
    "packed manifest": Reader("train.json", _write_records, verify, "json"),
    **{
        f"TFDS {name}": Reader(
            f"{outputs.TFDS}/{name}", outputs.write_tfds, outputs.read_tfds, kind
        )
        for name, kind in (
            ("features.json", "json"),
            ("dataset_info.json", "json"),
            ("label.labels.txt", "bytes"),
            ("mini-train.array_record-00000-of-00001", "bytes"),
        )
        if importlib.util.find_spec("tensorflow_datasets")
    },
    "class names": Reader("class_names.json", _class_names, read_class_names, "json"),
    "class map": Reader(
        "map.json",
        lambda folder: write_json(folder / "map.json", {"a": 0, "b": 1}),
        lambda folder: read_class_map(folder / "map.json"),
        "json",
    ),
    "class list": Reader(
        "map.txt",
        lambda folder: (folder / "map.txt").write_text("cat\ndog\n"),
        lambda folder: read_class_map(folder / "map.txt"),
    ),
    "neurons": Reader(
        "n.json",
        lambda folder: write_json(folder / "n.json", {"2": [33, 9], "3": [11]}),
        lambda folder: load_neurons(folder / "n.json"),
        "json",
    ),
    **{
        f"labels {end}": Reader(
            f"l{end}",
            lambda folder, end=end: _write_labels(folder / f"l{end}"),
            lambda folder, end=end: load_labels(folder / f"l{end}", 3),
        )
        for end in (".npy", ".npz", ".txt")
    },
    "array": Reader(
        "a.npy",
        lambda folder: np.save(folder / "a.npy", np.arange(6.0).reshape(2, 3)),
        lambda folder: read_array(folder / "a.npy"),
    ),
    "arrays": Reader(
        "a.npz",
        lambda folder: np.savez_compressed(folder / "a.npz", a=np.arange(6), b=np.str_("x")),
        lambda folder: read_arrays(folder / "a.npz"),
    ),
    "samples": Reader(
        "s.npz",
        lambda folder: np.savez(folder / "s.npz", arr_0=IMAGES, labels=np.arange(4)),
        lambda folder: open_samples(folder / "s.npz").images(),
    ),
    "reference": Reader("r.npz", _write_reference, lambda folder: open_reference(folder / "r.npz")),
    "image": Reader(
        "i.png",
        lambda folder: (folder / "i.png").write_bytes(_png()),
        lambda folder: decode((folder / "i.png").read_bytes(), "i.png"),
    ),
    "tar captions": Reader("a.tar", _write_tar, lambda folder: _captions(TarCaptions, folder)),
    "caption lines": Reader(
        "a.jsonl", _write_lines, lambda folder: _captions(JsonlCaptions, folder, "a.jsonl")
    ),
    "GenEval prompts": Reader(
        "p.jsonl", _write_geneval, lambda folder: read_geneval_prompts(folder / "p.jsonl")
    ),
    "GenEval results": Reader(
        "r.jsonl", _write_geneval, lambda folder: score_geneval_results(folder / "r.jsonl")
    ),
    **{
        f"DPG-Bench {name}": Reader(
            name,
            _write_dpg,
            lambda folder: score_dpg_details(folder / "a_detail.txt", folder / "dpg.csv"),
        )
        for name in ("a_detail.txt", "dpg.csv")
    },
    "lock": Reader(
        "lock.json",
        lambda folder: write_json(folder / "lock.json", locks.this_process()),
        lambda folder: locks.describe(locks._read(folder / "lock.json")[0]),
        "json",
    ),
}


def _write_labels(path: Path) -> None:
    labels = np.array([3, 1, 2], np.int32)
    if path.suffix == ".npy":
        np.save(path, labels)
    elif path.suffix == ".npz":
        np.savez_compressed(path, labels=labels)
    else:
        path.write_text("3 1 2\n")
