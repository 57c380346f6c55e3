"""Text-to-image benchmarks: writes the images that official tools score, and scores their results.

    python -m dsr_jax.evaluate_prompts write geneval --prompts=evaluation_metadata.jsonl \\
        --workdir=runs/text --config.sample.guidance=2.0 --out=images/geneval
    python -m dsr_jax.evaluate_prompts write dpg --prompts=dpg_bench/prompts \\
        --generator=my_model:generate --out=images/dpg
    python -m dsr_jax.evaluate_prompts write shapes --split=heldout --workdir=runs/shapes \\
        --out=images/heldout
    python -m dsr_jax.evaluate_prompts score geneval results.jsonl
    python -m dsr_jax.evaluate_prompts score dpg images_detail.txt --questions=dpg_bench.csv
    python -m dsr_jax.evaluate_prompts score shapes images/heldout
    python -m dsr_jax.evaluate_prompts score clip images/geneval --clip=converted/clip

The same `write` continues a stopped one. GenEval's detector and DPG-Bench's question answering are
not included: run the official tools on the folders. `shapes` are prompts of GenEval's six tasks
about the rendered shapes, whose images an exact checker reads.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsr_jax import build
from dsr_jax import config as configs
from dsr_jax.convert.clip import load_clip
from dsr_jax.core import cli
from dsr_jax.core.files import write_json
from dsr_jax.core.images import decode, read_file, to_array
from dsr_jax.core.plugins import load_object
from dsr_jax.core.provenance import provenance
from dsr_jax.core.tokenizers import read_tokenizer
from dsr_jax.data import shapes
from dsr_jax.evaluation import clip_score, prompt_images, prompt_scores
from dsr_jax.evaluation.clip_embedding import PREFIX, embed
from dsr_jax.evaluation.scene_checker import SceneChecker
from dsr_jax.parallel.processes import is_process_zero, lock_folder, log
from dsr_jax.parallel.watch import join_job
from dsr_jax.runs.prompt_generator import PromptGenerator

BENCHMARKS = ("geneval", "dpg", "shapes")
SCORES = (*BENCHMARKS, "clip")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv` (default: the process's)."""
    args, overrides = _parser().parse_known_args(argv)
    if args.action == "write" and args.workdir:
        write(args, overrides)
        return
    if overrides:
        _parser().error(f"unrecognized arguments: {' '.join(overrides)}")
    if args.action == "write":
        write(args, ())
    else:
        score(args)


@join_job()
def write(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Writes the images of a benchmark that are missing, on all processes."""
    out = args.out
    prompts = read_prompts(args)
    if args.workdir:
        generate: Any = open_run(args, overrides)
    else:
        generate = load_object("--generator", args.generator)
    layout = prompt_images.DpgLayout if args.benchmark == "dpg" else prompt_images.GenevalLayout
    recipe = {"generator": args.generator or "run", **getattr(generate, "recipe", {})}
    with lock_folder(out.parent, out.name):
        made = prompt_images.write_images(
            out,
            prompts,
            layout(args.images),
            generate,
            seed=args.seed,
            batch=args.batch,
            recipe=recipe,
        )
    log(f"{out}: {len(prompts)} prompts, {made} new images")


def open_run(args: argparse.Namespace, overrides: Sequence[str]) -> PromptGenerator:
    """Returns the generator of the command line's run.

    Raises:
      ConfigError: If there is no run of text, or arguments, keys or values cannot be.
    """
    config = configs.load_run(args.workdir.expanduser())
    # The mesh is this machine's, not the one that trained.
    config.mesh.update(data=-1, fsdp=1, tensor=1, dcn_data=-1, dcn_fsdp=1)
    configs.apply_overrides(config, overrides)
    configs.check(config)
    build.set_precision(config)
    return PromptGenerator(config, args.workdir.expanduser(), args.checkpoint_step)


def read_prompts(args: argparse.Namespace) -> list[prompt_images.Prompt]:
    """Returns the prompts of the command line's benchmark."""
    if args.benchmark == "geneval":
        return prompt_images.read_geneval_prompts(args.prompts)
    if args.benchmark == "dpg":
        return prompt_images.read_dpg_prompts(args.prompts)
    lines = shapes.evaluation_prompts(args.split, args.per_task)
    return prompt_images.geneval_prompts(lines)


@join_job()
def score(args: argparse.Namespace) -> None:
    """Scores result files, and writes the scores, on process 0 alone."""
    if not is_process_zero():
        return
    if args.benchmark == "geneval":
        scores = prompt_scores.score_geneval_results(args.results)
    elif args.benchmark == "dpg":
        scores = prompt_scores.score_dpg_details(args.results, args.questions)
    elif args.benchmark == "shapes":
        scores = score_shapes(args.results)
    else:
        scores = score_clip(args.results, args.clip, args.batch)
    out = args.out or args.results.with_name(f"{args.results.stem}.scores.json")
    write_json(out, {"benchmark": args.benchmark, "scores": scores, "provenance": provenance()})
    print("\n".join(describe(scores)))
    print(f"written to {out}")


def score_shapes(root: Path) -> dict[str, Any]:
    """Returns the exact checker's scores of a folder in GenEval's layout."""
    metadata, paths = prompt_images.read_geneval_folder(root)
    images: list[np.ndarray] = [to_array(decode(read_file(path), str(path))) for path in paths]
    checker = SceneChecker(shapes.PALETTE, shapes.BACKGROUND, shapes.masks(), shapes.SCENE_SIZE)
    return checker.score(metadata, images)


def score_clip(root: Path, folder: Path, batch: int) -> dict[str, Any]:
    """Returns CLIPScore of the images of a folder in GenEval's layout against their prompts.

    Args:
      root: Folder of the images.
      folder: Converted CLIP.
      batch: Images at a time.
    """
    network, params, record = load_clip(folder)
    metadata, paths = prompt_images.read_geneval_folder(root)
    images = [decode(read_file(path), str(path)) for path in paths]
    texts = [line["prompt"] for line in metadata]
    found = embed(network, params, read_tokenizer(folder), images, texts, batch)
    cosines = clip_score.cosines(*found)
    return {
        "clip_score": float(clip_score.clip_score(*found).mean()),
        "cosine": float(cosines.mean()),
        "prefix": PREFIX,
        "n_images": len(images),
        "clip": record["source"],
        "clip_digest": record["source_digest"],
    }


def describe(scores: dict[str, Any]) -> list[str]:
    """Lists lines of scores; a task's score by chance is in brackets."""
    if "clip_score" in scores:
        return [f"  {name:24} {scores[name]:.4f}" for name in ("clip_score", "cosine")]
    lines = []
    chance = scores.get("shuffled")
    for name, value in scores.get("task_scores", {}).items():
        by_chance = f"  ({chance['task_scores'].get(name, 0):.3f})" if chance else ""
        lines.append(f"  {name:24} {value:.3f}{by_chance}")
    if "overall" in scores:
        by_chance = f"  ({chance['overall']:.3f} with shuffled prompts)" if chance else ""
        lines.append(f"  {'overall':24} {scores['overall']:.3f}{by_chance}")
        lines.append(f"  {scores['n_images']} images of {scores['n_prompts']} prompts")
        return lines
    lines = [f"  {name:24} {value:.2f}" for name, value in scores["l1"].items()]
    lines.append(f"  {'score':24} {scores['score']:.2f}")
    if failed := scores["failed"]:
        lines.append(f"  {len(failed)} images left out: {', '.join(failed[:5])}")
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, "python -m dsr_jax.evaluate_prompts")
    actions = parser.add_subparsers(required=True, metavar="write|score", dest="action")
    writing = actions.add_parser("write", help="make the images of a benchmark")
    scoring = actions.add_parser("score", help="score the results of a benchmark")
    for action in (writing, scoring):
        kinds = action.add_subparsers(required=True, metavar="BENCHMARK", dest="benchmark")
        for name in BENCHMARKS if action is writing else SCORES:
            add_arguments = _add_writing if action is writing else _add_scoring
            add_arguments(kinds.add_parser(name), name)
    return parser


def _add_writing(parser: argparse.ArgumentParser, benchmark: str) -> None:
    add = parser.add_argument
    if benchmark == "shapes":
        add("--split", choices=list(shapes.NUM_SCENES), default="train", help="attribute pairs")
        add("--per-task", type=cli.positive_int, default=24, help="prompts of a task, at most")
    else:
        what = "evaluation_metadata.jsonl" if benchmark == "geneval" else "folder of NAME.txt"
        add("--prompts", type=Path, required=True, help=what)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--workdir",
        type=Path,
        help="run of text; --config.sample.KEY=VALUE changes solver, guidance and weights",
    )
    which.add_argument(
        "--generator",
        help="package.module:function of (prompts, seeds) that returns uint8 [B, H, W, 3]",
    )
    add("--checkpoint-step", type=cli.count, help="step of the run; default: the newest")
    add("--out", type=Path, required=True, help="folder of the images, new or of the same command")
    add("--images", type=cli.positive_int, default=4, help="images per prompt")
    add("--seed", type=cli.count, default=prompt_images.SEED, help="seed of the benchmark")
    add("--batch", type=cli.positive_int, default=16, help="images at a time")


def _add_scoring(parser: argparse.ArgumentParser, benchmark: str) -> None:
    add = parser.add_argument
    what = {
        "geneval": "results.jsonl of evaluate_images.py",
        "dpg": "..._detail.txt of compute_dpg_bench.py",
        "shapes": "folder that `write shapes` made",
        "clip": "folder that `write geneval` or `write shapes` made",
    }
    add("results", type=Path, help=what[benchmark])
    if benchmark == "dpg":
        add("--questions", type=Path, required=True, help="dpg_bench.csv")
    if benchmark == "clip":
        add("--clip", type=Path, required=True, help="folder of a converted CLIP")
        add("--batch", type=cli.positive_int, default=32, help="images at a time")
    add("--out", type=Path, help="score file; default: beside the results")


if __name__ == "__main__":
    cli.run_main(main)
