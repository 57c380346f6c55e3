"""Scores an autoencoder's reconstructions: rFID, PSNR, SSIM, LPIPS.

    python -m dsr_jax.evaluate_reconstruction --config=configs/x.py --out=DIR \\
        --inception=converted/inception --lpips=converted/lpips

The config names the autoencoder (config.space) and the images (config.data, of the split
config.eval.split unless --split says otherwise); any key can be overridden after it. DIR then holds
reconstructions.npz, in the order of the data, scores.json with the recipe, and pairs.png, images
above their reconstructions. Without --inception there is no rFID, without --lpips no LPIPS. The
same command continues a stopped one; on several hosts all of them must see DIR.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsr_jax import build
from dsr_jax import config as configs
from dsr_jax.convert.files import load_converted
from dsr_jax.convert.lpips import load_lpips
from dsr_jax.core.cli import make_parser, positive_int, run_main
from dsr_jax.core.errors import ConfigError
from dsr_jax.core.files import write_json
from dsr_jax.core.provenance import provenance
from dsr_jax.evaluation.pairs import PairScorer
from dsr_jax.evaluation.passes import forget
from dsr_jax.evaluation.samples import open_samples
from dsr_jax.parallel.processes import is_process_zero, lock_folder
from dsr_jax.parallel.watch import join_job
from dsr_jax.runs.decoder_evaluation import COLUMNS, save_pairs
from dsr_jax.runs.reconstruction import Reconstruction, rfid
from dsr_jax.runs.scoring import PassReport, check_writable, make_extractor

_SHOWN = 4 * COLUMNS


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv` (default: the process's)."""
    args, overrides = _parser().parse_known_args(argv)
    score(args, load_config(args, overrides))


@join_job()
def score(args: argparse.Namespace, config: configs.ConfigDict) -> None:
    """Reconstructs and scores what the command line names, on all processes."""
    build.set_precision(config)
    out = args.out
    check_writable(out)
    with lock_folder(out):
        _score(args, config, out)


def _score(args: argparse.Namespace, config: configs.ConfigDict, out: Path) -> None:
    """Scores into a folder that no other command writes."""
    # Missing weights end the command before anything is reconstructed.
    extractor = make_extractor(args.inception, None, args.batch) if args.inception else None
    perceptual = _open_lpips(args.lpips) if args.lpips else None
    work = Reconstruction(config, args.images or 0, args.batch)
    path = work.run(out)
    outputs = open_samples(path)
    scores, skipped = {}, {}
    if extractor is None:
        skipped["rfid"] = "no --inception"
    else:
        scores["rfid"] = rfid(work.images, outputs, extractor, work.recipe, out)
    if perceptual is None:
        skipped["lpips"] = "no --lpips"
    network, params, lpips_record = perceptual or (None, None, None)
    pairs = PairScorer(work.mesh, args.batch, network, params)
    means = pairs.score(work.images, outputs, out / "pairs.parts", work.recipe, PassReport("pairs"))
    if not is_process_zero():
        return
    scores |= means
    recipe = {**work.recipe, "lpips": (lpips_record or {}).get("params_digest")}
    if extractor is not None:
        recipe["inception"] = extractor.recipe(frozenset(["pool"]))
    content = {"scores": scores, "recipe": recipe, "skipped": skipped}
    write_json(out / "scores.json", {**content, "provenance": provenance()})
    shown = [next(each.batches(_SHOWN)) for each in (work.images, outputs)]
    save_pairs(out / "pairs.png", shown[0], shown[1])
    forget(out / "pairs.parts")
    forget(out / "rfid.parts")
    print(f"{work.images.shape[0]} images of {work.recipe['data']['source']}")
    for name, value in scores.items():
        print(f"  {name:24} {value:.5g}")
    for name, problem in skipped.items():
        print(f"  {name:24} left out: {problem}")
    print(f"written to {out}")


def load_config(args: argparse.Namespace, overrides: Sequence[str]) -> configs.ConfigDict:
    """Returns the config of what is to be scored.

    Raises:
      ConfigError: If keys or values cannot be, or the space is no autoencoder.
    """
    config = configs.load_file(args.config)
    configs.apply_overrides(config, overrides)
    # Images are read, not latents; the classifier is for samples alone.
    config.data.latents = config.eval.classifier = ""
    config.data.split = args.split or config.eval.split
    config.data.global_batch = args.batch
    config.optim.accumulate = 1
    configs.check(config)
    if config.space.name == "pixels":
        raise ConfigError(
            "config.space.name='pixels' reconstructs nothing",
            "set --config.space.name=rae or vae, and the folders of its networks",
        )
    return config


def _open_lpips(folder: str) -> tuple[Any, Any, dict[str, Any]]:
    return (*load_lpips(folder), load_converted(folder)[1])


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, "python -m dsr_jax.evaluate_reconstruction")
    add = parser.add_argument
    add("--config", required=True, help="config file that names data and space")
    add(
        "--out",
        type=Path,
        required=True,
        help="folder of the result, new or of the same command",
    )
    add("--split", help="split of the data; default: config.eval.split")
    add("--images", type=positive_int, help="number of images, at even intervals; default: all")
    add("--batch", type=positive_int, default=32, help="images per step, over all devices")
    add("--inception", help="folder of converted weights, for rFID")
    add("--lpips", help="folder of converted weights, for LPIPS")
    return parser


if __name__ == "__main__":
    run_main(main)
