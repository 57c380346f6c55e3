"""Jobs that faults are injected into: command, progress, files to damage, result."""

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dsr_jax.core.files import file_digest, read_json
from dsr_jax.telemetry.writers import read_metrics
from dsr_jax.training.checkpoints import list_steps
from tests.tiny_inception import convert_tiny
from tests.tiny_rae import save_rae

ROOT = Path(__file__).parents[2]
TIMINGS = ("step_seconds", "images_per_second", "mfu")
DENOISER = (
    f"--config={ROOT / 'configs' / 'digits.py'}:runlocal",
    "--config.data.source=synthetic",
    "--config.model.hidden_size=16",
    "--config.model.depth=2",
    "--config.model.num_heads=2",
    "--config.registers.num=1",
    "--config.sample.every_steps=0",
    "--config.eval.classifier=",
    "--config.eval.num_samples=0",
    "--config.log.every_steps=5",
    "--config.checkpoint.every_steps=10",
    "--config.failures.lost_seconds=8",
)
DECODER = (
    f"--config={ROOT / 'configs' / 'rae_decoder.py'}:runlocal",
    "--config.data.image_size=16",
    "--config.data.crop_from=24",
    "--config.decoder.patch_size=4",
    "--config.decoder.hidden_size=16",
    "--config.data.global_batch=8",
    "--config.train.steps=60",
    "--config.sample.every_steps=0",
    "--config.eval.num_samples=0",
    "--config.gan.weight=0.0",
    "--config.lpips.weight=0.0",
    "--config.log.every_steps=5",
    "--config.checkpoint.every_steps=5",
    "--config.failures.lost_seconds=8",
)
SAMPLES, IMAGES = 160, 200


@dataclass(frozen=True)
class Job:
    """Command that is disturbed until it is done.

    Attributes:
      module: What `python -m` runs.
      words: Its arguments, from the folders of inputs and of the result.
      outputs: Lists finished partial outputs; the last is the newest. Their number is the progress.
      damageable: Lists the files of the newest outputs that the command makes again if damaged.
      result: What must equal that of an undisturbed run.
      setup: Makes the inputs in a folder.
      processes: Numbers of processes that the command may run on.
    """

    module: str
    words: Callable[[Path, Path], Sequence[str]]
    outputs: Callable[[Path], Sequence[Path]]
    damageable: Callable[[Path], Sequence[Path]]
    result: Callable[[Path], Mapping[str, Any]]
    setup: Callable[[Path], None] = lambda inputs: None
    processes: tuple[int, ...] = (1, 2)


def _newest(pattern: str) -> Callable[[Path], list[Path]]:
    """Returns a function that lists the files of a pattern, the newest last."""

    def find(folder: Path) -> list[Path]:
        found = []
        for path in folder.glob(pattern):
            try:
                found.append((path.stat().st_mtime_ns, path))
            except FileNotFoundError:
                continue
        return [path for _, path in sorted(found)]

    return find


def _checkpoints(folder: Path) -> list[Path]:
    steps = folder / "checkpoints"
    return [steps / str(step) for step in list_steps(steps)]


def _newest_checkpoint(folder: Path) -> list[Path]:
    """Lists the files of the newest checkpoint, if there is an earlier one to go back to."""
    steps = _checkpoints(folder)
    if len(steps) < 2:
        return []
    return sorted(path for path in steps[-1].rglob("*") if path.is_file())


def _trained(folder: Path) -> dict[str, Any]:
    """Returns the final arrays' checksums, and the metrics of every step."""
    metadata = read_json(_checkpoints(folder)[-1] / "meta" / "metadata")
    records = [
        {key: value for key, value in record.items() if key not in TIMINGS}
        for record in read_metrics(folder)
    ]
    return {"step": metadata["step"], "arrays": metadata["arrays"], "metrics": records}


def _sampled(folder: Path) -> dict[str, Any]:
    with zipfile.ZipFile(folder / "images.npz") as archive:
        content = {info.filename: info.CRC for info in archive.infolist()}
        damaged = archive.testzip()
    return {
        "members": content,
        "damaged": damaged,
        "recorded": read_json(folder / "images.json")["samples_digest"]
        == file_digest(folder / "images.npz"),
    }


def _shards(folder: Path) -> dict[str, Any]:
    return {path.name: file_digest(path) for path in sorted(folder.glob("*.array_record"))}


def _save_samples(inputs: Path) -> None:
    convert_tiny(inputs)
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, 16, 16, 3), np.uint8)
    np.savez(inputs / "samples.npz", arr_0=images)
    np.savez(inputs / "reference.npz", arr_0=images[::-1] // 2)


def _save_images(inputs: Path) -> None:
    random = np.random.default_rng(0)
    for label in range(4):
        folder = inputs / "images" / f"n{label:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(60):
            pixels = random.integers(0, 256, (40, 50, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")


def _rae(inputs: Path) -> tuple[str, ...]:
    return tuple(json.loads((inputs / "rae.json").read_text()))


def _save_rae(inputs: Path) -> None:
    overrides = save_rae(inputs)
    (inputs / "rae.json").write_text(json.dumps(overrides))


def _train_for_samples(inputs: Path) -> None:
    from dsr_jax import train

    train.main(
        [*DENOISER, "--config.train.steps=4", f"--workdir={inputs / 'run'}", "--config.mesh.data=1"]
    )


JOBS = {
    "train": Job(
        "dsr_jax.train",
        lambda inputs, folder: [*DENOISER, f"--workdir={folder}", "--config.train.steps=200"],
        _checkpoints,
        _newest_checkpoint,
        _trained,
    ),
    "train_decoder": Job(
        "dsr_jax.train_decoder",
        lambda inputs, folder: [
            *DECODER,
            f"--workdir={folder}",
            "--config.space.image_size=16",
            f"--config.space.encoder={inputs / 'encoder'}",
            f"--config.space.statistics={inputs / 'statistics.safetensors'}",
        ],
        _checkpoints,
        _newest_checkpoint,
        _trained,
        _save_rae,
    ),
    "sample": Job(
        "dsr_jax.sample",
        lambda inputs, folder: [
            f"--workdir={inputs / 'run'}",
            f"--out={folder}",
            "--name=images",
            f"--num-samples={SAMPLES}",
            "--batch=4",
            "--num-points=30",
        ],
        _newest("images.parts/*.npy"),
        lambda folder: _newest("images.parts/*.npy")(folder)[-1:] or _newest("images.npz")(folder),
        _sampled,
        _train_for_samples,
    ),
    "encode": Job(
        "dsr_jax.encode",
        lambda inputs, folder: [
            "cache",
            f"--config={ROOT / 'configs' / 'digits.py'}",
            f"--out={folder}",
            "--images=200",
            "--batch=8",
            "--shard-batches=1",
            "--copies=2",
            *_rae(inputs),
        ],
        _newest("*.array_record"),
        lambda folder: _newest("*.array_record")(folder)[-1:],
        _shards,
        _save_rae,
    ),
    "evaluate": Job(
        "dsr_jax.evaluate",
        lambda inputs, folder: [
            str(inputs / "samples.npz"),
            f"--reference={inputs / 'reference.npz'}",
            f"--inception={inputs / 'inception'}",
            f"--out={folder / 'scores.json'}",
            "--metrics=fid,is,kid",
            "--batch=4",
            "--save-every=4",
        ],
        _newest("scores.json.parts/**/*.np?"),
        lambda folder: _newest("scores.json.parts/**/*.np?")(folder)[-2:],
        lambda folder: {"scores": read_json(folder / "scores.json")["scores"]},
        _save_samples,
    ),
    "prepare": Job(
        "tools.prepare_imagenet",
        lambda inputs, folder: [
            str(inputs / "images"),
            str(folder),
            "--shards=30",
            "--size=32",
            "--workers=2",
        ],
        _newest("*.array_record"),
        lambda folder: _newest("*.array_record")(folder)[-1:],
        lambda folder: {
            **_shards(folder),
            "recorded": {
                name: shard["digest"]
                for name, shard in sorted(read_json(folder / "train.json")["shards"].items())
            },
        },
        _save_images,
        (1,),
    ),
}
