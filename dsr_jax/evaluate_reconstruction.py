"""Scores an autoencoder by what it makes of images: rFID, PSNR, SSIM, LPIPS.

    python -m dsr_jax.evaluate_reconstruction --config=configs/x.py --out=DIR \
        --inception=converted/inception --lpips=converted/lpips

The config names the autoencoder (config.space) and the images (config.data, of the split
config.eval.split unless --split says otherwise); any key can be set behind it. DIR then holds
reconstructions.npz, in the order of the data, scores.json with the recipe, and pairs.png, images
above their reconstructions. Without --inception there is no rFID, without --lpips no LPIPS. The
same command goes on where a stopped one was; on several hosts DIR must be one that all of them see.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax import build
from dsr_jax import config as configs
from dsr_jax.build_rae import file_digests
from dsr_jax.convert.files import load_converted
from dsr_jax.convert.lpips import load_lpips
from dsr_jax.core.cli import run_main
from dsr_jax.core.errors import ConfigError
from dsr_jax.core.files import write_json
from dsr_jax.core.provenance import provenance
from dsr_jax.evaluation.features import Extractor, forget, tally_images
from dsr_jax.evaluation.frechet import frechet_distance
from dsr_jax.evaluation.image_sets import ImageSet, SourceImages
from dsr_jax.evaluation.pairs import PairScorer
from dsr_jax.evaluation.samples import open_samples
from dsr_jax.parallel import shardings
from dsr_jax.parallel.processes import is_primary, say, start_processes
from dsr_jax.reconstructions import COLUMNS, save_pairs
from dsr_jax.sampling.images import to_uint8
from dsr_jax.sampling.job import SampleJob, Samples
from dsr_jax.scorers import make_extractor

_SHOWN = 4 * COLUMNS


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv` (default: the process's)."""
    args, overrides = _parser().parse_known_args(argv)
    config = load_config(args, overrides)
    start_processes()
    build.set_precision(config)
    out = Path(args.out)
    # Missing weights end the command before anything is reconstructed.
    extractor = make_extractor(args.inception, None, args.batch) if args.inception else None
    perceptual = _open_lpips(args.lpips) if args.lpips else None
    work = Reconstruction(config, args.images, args.batch)
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
    means = pairs.score(work.images, outputs, out / "pairs.parts", work.recipe)
    if not is_primary():
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
    # Images are read, no latents; the judge looks at samples alone.
    config.data.latents = config.eval.judge = ""
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


class Reconstruction:
    """Images of a data source through an autoencoder.

    Args:
      config: Space and data.
      images: How many, spread evenly over the source; 0 for all.
      batch: Images at a time over all devices.

    Attributes:
      mesh: The devices.
      images: What is reconstructed.
      recipe: What decides the reconstructions.

    Raises:
      ConfigError: If the autoencoder has no decoder, or gives images of another size.
    """

    def __init__(self, config: configs.ConfigDict, images: int, batch: int) -> None:
        self.mesh, rules = build.make_mesh(config), build.make_rules(config)
        space, self._variables = build.make_space(config, self.mesh)
        source = build.make_source(config)
        self.images = SourceImages(source, images)
        self._sharding = shardings.batch_sharding(self.mesh, rules)
        self._batch = batch
        rounding = config.sample.uint8

        def reconstruct(variables: Any, images: jax.Array) -> Samples:
            latents = space.encode(variables, images.astype(jnp.float32) / 255)
            decoded = space.decode(variables, latents)
            finite = jnp.isfinite(decoded).all(axis=(1, 2, 3))
            return Samples(to_uint8(decoded, rounding), finite)

        self._reconstruct = jax.jit(reconstruct, out_shardings=self._sharding)
        given = jax.ShapeDtypeStruct((batch, *self.images.shape[1:]), np.uint8)
        shape = jax.eval_shape(reconstruct, self._variables, given).images.shape[1:]
        if shape != self.images.shape[1:]:
            raise ConfigError(
                f"the autoencoder makes images {shape} of images {self.images.shape[1:]}",
                "set config.data.image_size to what its decoder makes",
            )
        settings = {key: config.space[key] for key in ("name", "image_size", "preln", "scale")}
        self.recipe: dict[str, Any] = {
            "data": {
                **self.images.describe(),
                "split": config.data.split,
                "image_size": config.data.image_size,
            },
            "space": {**settings, **file_digests(config)},
            "precision": config.precision.to_dict(),
            "rounding": rounding,
        }

    def run(self, out: Path) -> Path:
        """Reconstructs what is missing; returns the path of the `.npz`.

        In place of labels it holds the numbers of the images.
        """
        numbers = np.arange(self.images.shape[0], dtype=np.int32)
        shape = self.images.shape[1:]
        job = SampleJob(out, "reconstructions", numbers, shape, self.recipe)
        part = (jax.process_index(), jax.process_count())

        def draw(indices: np.ndarray, _: np.ndarray) -> Samples:
            rows = self.images.take(np.array_split(indices, part[1])[part[0]])
            batch = shardings.host_to_global({"images": rows}, self._sharding)["images"]
            return self._reconstruct(self._variables, batch)

        return job.run(draw, self._batch, report=say)


def rfid(
    images: ImageSet, outputs: ImageSet, extractor: Extractor, recipe: dict[str, Any], out: Path
) -> float:
    """Frechet distance of Inception's features of reconstructions and images.

    Returns:
      The distance; NaN on processes other than the primary.

    Raises:
      EvaluationError: If features are not finite, or there are fewer than two images.
    """
    found = []
    for name, each in (("reconstructions", outputs), ("images", images)):
        tally = tally_images(
            each,
            extractor,
            ["fid"],
            folder=out / "rfid.parts" / name,
            identity={"images": each.describe(), "recipe": recipe},
            # An image of a single colour is reconstructed like any other.
            allow_constant=True,
        )
        say(f"features of {name}: {each.shape[0]}/{each.shape[0]}")
        found.append(tally)
    if not is_primary():
        return float("nan")
    ours, theirs = (tally.gaussian("fid") for tally in found)
    return frechet_distance(ours.mean, ours.cov, theirs.mean, theirs.cov)


def _open_lpips(folder: str) -> tuple[Any, Any, dict[str, Any]]:
    return (*load_lpips(folder), load_converted(folder)[1])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dsr_jax.evaluate_reconstruction",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", required=True, help="config file that names data and space")
    add("--out", required=True, help="folder of the result, new or of the same command")
    add("--split", help="of the data; default: config.eval.split")
    add("--images", type=int, default=0, help="how many; default: all")
    add("--batch", type=int, default=32, help="images at a time over all devices")
    add("--inception", help="folder of converted weights, for rFID")
    add("--lpips", help="folder of converted weights, for LPIPS")
    return parser


if __name__ == "__main__":
    run_main(main)
