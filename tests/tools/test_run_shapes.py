"""The shapes experiment: its table, its picture, and one tiny run from end to end."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsr_jax import evaluate_prompts
from dsr_jax.core.files import read_json
from dsr_jax.data.shapes import NUM_SCENES, TASKS
from tools import run_shapes

TRUE = "--generator=tests.shapes_generator:generate"


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as of a run whose images are all correct."""
    folder = tmp_path_factory.mktemp("shapes") / "registers_0"
    for split in NUM_SCENES:
        images = folder / f"prompts_{split}"
        common = ["write", "shapes", f"--split={split}", "--per-task=3", "--images=2"]
        evaluate_prompts.main([*common, TRUE, f"--out={images}"])
        result = folder / f"{split}.scores.json"
        evaluate_prompts.main(["score", "shapes", str(images), f"--out={result}"])
    return folder


def test_the_table_has_every_run_and_the_means(rendered: Path, tmp_path: Path) -> None:
    found = {split: read_json(rendered / f"{split}.scores.json")["scores"] for split in NUM_SCENES}
    worse = {**found, "train": {**found["train"], "overall": 0.5}}
    scores = {
        arm: [
            {**record, "arm": arm, "seed": seed, "train_seconds": 100 + seed}
            for seed, record in enumerate((found, worse))
        ]
        for arm in run_shapes.ARMS
    }
    text = run_shapes.write_table(tmp_path, scores)
    rows = {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in text.splitlines()[2:8]}
    assert list(rows)[:3] == ["4 registers, seed 0", "4 registers, seed 1", "no registers, seed 0"]
    by_chance = f"{found['train']['shuffled']['overall']:.2f}"
    assert rows["4 registers, seed 0"][:8] == [*["1.00"] * 7, by_chance]
    assert rows["no registers, mean of 2"][6] == "0.75"
    assert rows["no registers, mean of 2"][8:10] == ["1.00", "1.00"]
    assert "36 images of each run, and 12 of held-out pairs." in text
    assert (tmp_path / "shapes.md").read_text() == text
    assert read_json(tmp_path / "shapes.json")["runs"] == scores


def test_the_picture_has_a_row_for_every_task(rendered: Path, tmp_path: Path) -> None:
    run_shapes.plot_prompts(tmp_path / "shapes.png", rendered)
    pixels = np.asarray(Image.open(tmp_path / "shapes.png"))
    rows = len(TASKS) + 2
    assert pixels.shape[0] > rows * 144 and pixels.shape[1] > run_shapes.COLUMNS * 144
    height = pixels.shape[0] / rows
    for row in range(rows):
        part = pixels[int(row * height) : int((row + 1) * height), -144:]
        assert (part.max(axis=-1).astype(int) - part.min(axis=-1) > 100).any(), "a colored object"


@pytest.mark.slow
def test_a_tiny_run_is_scored_and_not_repeated(tmp_path: Path) -> None:
    folder = tmp_path / "baseline_0"
    changes = [f"--config.sample.{x}" for x in ("every_steps=0", "ema=none", "guidance=1.0")]
    record = run_shapes.run_arm(folder, "baseline", 0, 8_000, True, changes)
    assert record["overrides"] == changes
    assert set(record["train"]["task_scores"]) == set(TASKS)
    assert set(record["heldout"]["task_scores"]) == {"colors", "color_attr"}
    assert read_json(folder / "config.json")["registers"]["num"] == 0
    (folder / "config.json").unlink()
    assert run_shapes.run_arm(folder, "baseline", 0, 8_000, quick=True) == record
