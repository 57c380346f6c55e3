"""Trains and scores text-to-image on rendered shapes, with and without diffusion registers.

    python tools/run_shapes.py --out=runs/shapes_t2i [--seeds=2] [--steps=8000] [--quick]
    python tools/run_shapes.py --out=runs/shapes_times --config.objective.times=4

Trains configs/shapes_t2i.py, samples GenEval's six tasks, and scores the images by the exact
checker: on pairs of color and kind that training shows, on pairs that it does not, and against
shuffled prompts, the score by chance. Writes OUT/shapes.md, a table, OUT/shapes.json, and
OUT/shapes.png, the first image of some prompts of each task. The same command continues an
interrupted experiment.

This is an experiment, not a test: it reports its outcome and fails on none.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dsr_jax import evaluate_prompts, train
from dsr_jax.core.cli import make_parser, positive_int, run_main
from dsr_jax.core.files import read_json, write_atomic, write_json
from dsr_jax.core.images import decode, read_file, to_array
from dsr_jax.core.provenance import provenance
from dsr_jax.data.shapes import NUM_SCENES, TASKS
from dsr_jax.evaluation.prompt_images import read_geneval_folder
from dsr_jax.parallel.processes import log, start_processes
from dsr_jax.sampling.images import save_png_grid

CONFIG = Path(__file__).parents[1] / "configs" / "shapes_t2i.py"
ARMS = {"registers": "4 registers", "baseline": "no registers"}
COLUMNS = 4

Scores = Mapping[str, Sequence[Mapping[str, Any]]]
"""Records of the runs, one per seed, by name in ARMS."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv` (default: the process's)."""
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for all results")
    parser.add_argument("--seeds", type=positive_int, default=2, help="number of runs of each kind")
    parser.add_argument("--steps", type=positive_int, default=8_000, help="steps of each run")
    parser.add_argument("--quick", action="store_true", help="tiny networks, a few steps only")
    args, overrides = parser.parse_known_args(argv)
    start_processes()
    scores: dict[str, list[dict[str, Any]]] = {}
    # Seeds in the outer loop, so that an unfinished experiment compares both kinds.
    for seed in range(args.seeds):
        for arm in ARMS:
            folder = args.out / f"{arm}_{seed}"
            record = run_arm(folder, arm, seed, args.steps, args.quick, overrides)
            scores.setdefault(arm, []).append(record)
            text = write_table(args.out, scores)
        print(text)
    plot_prompts(args.out / "shapes.png", args.out / "registers_0")


def run_arm(
    folder: Path,
    arm: str,
    seed: int,
    steps: int,
    quick: bool = False,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Trains, samples and scores one run, skipping finished work, and returns its record.

    Args:
      folder: Folder of the run.
      arm: Name in ARMS.
      seed: Seed of data order, parameters and noise.
      steps: Training steps.
      quick: Trains tiny networks for a few steps, and scores few images.
      overrides: Changes of the config, such as "--config.objective.times=4".
    """
    path = folder / "scores.json"
    if path.exists():
        return read_json(path)
    log(f"{ARMS[arm]}, seed {seed}")
    settings = [f"steps={steps}", *(["noregisters"] if arm == "baseline" else [])]
    config = f"{CONFIG}:{','.join([*settings, *(['runlocal'] if quick else [])])}"
    changes = [f"--config.seed={seed}", *overrides]
    if status := train.main([f"--config={config}", f"--workdir={folder}", *changes]):
        raise SystemExit(status)
    record: dict[str, Any] = {"arm": arm, "seed": seed, "overrides": list(overrides)}
    for split in NUM_SCENES:
        images = folder / f"prompts_{split}"
        few = ["--per-task=2", "--images=1", "--batch=8"] if quick else ["--images=8", "--batch=64"]
        written = ["write", "shapes", f"--split={split}", f"--workdir={folder}", f"--out={images}"]
        evaluate_prompts.main([*written, *few])
        result = folder / f"{split}.scores.json"
        evaluate_prompts.main(["score", "shapes", str(images), f"--out={result}"])
        record[split] = read_json(result)["scores"]
    record["train_seconds"] = read_json(folder / "summary.json")["train_seconds"]
    write_json(path, record)
    return record


def write_table(out: Path, scores: Scores) -> str:
    """Writes shapes.md and shapes.json to `out` and returns the text of the former.

    A row for each run, then one with the means of each kind if it has several seeds.
    """
    header = [*(task.replace("_", " ") for task in TASKS), "overall", "shuffled"]
    header += ["held-out colors", "held-out color attr", "held-out shuffled", "training, s"]
    lines = [f"| run | {' | '.join(header)} |", "|---" * (len(header) + 1) + "|"]
    means = []
    for arm, records in scores.items():
        rows = np.array([_row(record) for record in records])
        for record, row in zip(records, rows, strict=True):
            lines.append(_line(f"{ARMS[arm]}, seed {record['seed']}", row))
        if len(rows) > 1:
            means.append(_line(f"{ARMS[arm]}, mean of {len(rows)}", rows.mean(axis=0)))
    first = next(iter(scores.values()))[0]
    counts = [first[split]["n_images"] for split in NUM_SCENES]
    lines += [*means, "", f"{counts[0]} images of each run, and {counts[1]} of held-out pairs."]
    text = "\n".join(lines) + "\n"
    write_atomic(out / "shapes.md", text)
    write_json(out / "shapes.json", {"runs": scores, "provenance": provenance()})
    return text


def _row(record: Mapping[str, Any]) -> list[float]:
    """Returns the figures of a run in the order of the table's columns."""
    shown, held_out = record["train"], record["heldout"]
    return [
        *(shown["task_scores"][task] for task in TASKS),
        shown["overall"],
        shown["shuffled"]["overall"],
        *(held_out["task_scores"][task] for task in ("colors", "color_attr")),
        held_out["shuffled"]["overall"],
        record["train_seconds"],
    ]


def _line(name: str, row: Sequence[float]) -> str:
    *fractions, seconds = row
    return f"| {name} | {' | '.join(f'{x:.2f}' for x in fractions)} | {seconds:.0f} |"


def plot_prompts(path: Path, folder: Path) -> None:
    """Writes a picture of a run's images under their prompts, whether they are correct or not.

    Args:
      path: The picture.
      folder: Folder of the run; a row for each task, and one for each of held-out pairs, shows the
        first image of some of its prompts.
    """
    images, captions, names = [], [], []
    for split in NUM_SCENES:
        first: dict[str, dict[str, Path]] = {}
        for line, file in zip(*read_geneval_folder(folder / f"prompts_{split}"), strict=True):
            first.setdefault(line["tag"], {}).setdefault(line["prompt"], file)
        for task, files in first.items():
            prompts = list(files)
            for number in np.linspace(0, len(prompts) - 1, COLUMNS).round().astype(int):
                file = files[prompts[number]]
                images.append(to_array(decode(read_file(file), str(file))))
                captions.append(prompts[number].removeprefix("a photo of "))
            suffix = ", held out" if split == "heldout" else ""
            names.append(task.replace("_", " ") + suffix)
    save_png_grid(path, np.stack(images), captions, columns=COLUMNS, row_names=names)


if __name__ == "__main__":
    run_main(main)
